"""Static quantization of the activations of Flax Linen models, for evaluation.

The activation of a layer is its input. Its range is found once, on calibration data;
from then on the input is rounded to the levels of a fixed grid over that range.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import chex
import jax.numpy as jnp
from jax import lax

from hero_jax import _checks, _tree
from hero_jax.quant import _grid, _interception
from hero_jax.quant._bits import Bits, bits_of_leaves
from hero_jax.quant._options import check_traceable_bits
from hero_jax.quant._ranges import ActivationRange, check_ranges

P = ParamSpec("P")
T = TypeVar("T")


def quantize_activations(
    apply_fn: Callable[P, T],
    ranges: Mapping[str, ActivationRange],
    bits: Bits | chex.Numeric,
    *,
    scheme: str = "affine",
) -> Callable[P, T]:
    """Return a function that runs a model with rounded activations.

    The input of each layer in `ranges` is rounded to the nearest level of the grid over
    its range; entries outside are moved to the end of the range. Other layers keep
    their floats. The derivative is straight-through: 1 within the range, 0 outside.

    Args:
      apply_fn: runs a Flax Linen model, as in :func:`activation_ranges`, with
        quantized weights or not. It may be jitted if JAX has `jax.make_user_context`;
        before, jit the returned function instead.
      ranges: path of the layer to its range; delete layers that are to stay floats.
      bits: number of bits, 2 to 8, or 16, or a mapping from paths or patterns to
        numbers, `{"*": 4, "classifier": 8}`: a layer's own path counts first, else the
        first that matches; may be traced, and is not checked then: one program serves
        all precisions.
      scheme: "affine", the levels spread over the range; "affine_with_zero", over the
        range and zero; or "symmetric", over the largest magnitude of either sign.

    Returns:
      Function with the arguments and results of `apply_fn`, for use under `jax.jit`,
      with `jax.vmap` and `jax.grad` at will: outside, JAX compiles every operation anew
      for each of these functions. It raises ValueError if it never calls a layer that
      is in `ranges`.

    Raises:
      ImportError: flax is not installed (seen when the function is called).
      ValueError: `bits` or `scheme` is out of range, a layer has no pattern or a
        pattern no layer, or a range is not finite.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from hero_jax import quant
      >>> model = nn.Dense(1, use_bias=False)
      >>> variables = {"params": {"kernel": jnp.ones((1, 1))}}
      >>> x = jnp.array([[0.0], [0.4], [3.0], [5.0]])
      >>> ranges = quant.activation_ranges(model.apply, variables, x[:3])
      >>> rounded_fn = quant.quantize_activations(model.apply, ranges, bits=2)
      >>> jax.jit(rounded_fn)(variables, x).ravel()
      Array([0., 0., 3., 3.], dtype=float32)
    """
    _checks.check_choice("scheme", scheme, _grid.SCHEMES)
    check_ranges(ranges)
    widths = _bits_by_path(bits, ranges)
    met: set[str] = set()
    token = object()

    def change(_: Any, path: str, x: chex.Array) -> chex.Array:
        if path not in ranges:
            return x
        met.add(path)
        return rounded(x, ranges[path], widths[path], scheme)

    @functools.wraps(apply_fn, updated=())
    def quantized(*args: P.args, **kwargs: P.kwargs) -> T:
        with _interception.inputs_changed(change, token):
            outputs = apply_fn(*args, **kwargs)
        if missing := sorted(set(ranges) - met):
            raise ValueError(
                f"ranges must be of layers that apply_fn calls: it never called "
                f"{missing[0]!r}."
            )
        return outputs

    return quantized


def rounded(
    x: chex.Array, x_range: ActivationRange, bits: chex.Numeric, scheme: str
) -> chex.Array:
    """Return x at the nearest levels of the grid over a range, in its own dtype."""
    wide = _tree.wide_dtype(x.dtype)
    low, high = (lax.stop_gradient(jnp.asarray(end, wide)) for end in x_range[:2])
    largest = jnp.maximum(jnp.abs(low), jnp.abs(high))
    if scheme == "symmetric":
        low, high = -largest, largest
    covering = _grid.covering((low, high), largest, bits, scheme)
    x_wide = x.astype(wide)
    fixed = lax.stop_gradient(x_wide)
    levels = covering.levels(covering.integers(fixed, _grid.limits(bits, scheme, wide)))
    # Zero, with the derivative of x: the levels stay exact.
    straight = jnp.where((low <= fixed) & (fixed <= high), x_wide - fixed, 0.0)
    return _grid.narrow(levels + straight, x.dtype)


def _bits_by_path(bits: Any, ranges: Mapping[str, Any]) -> dict[str, Any]:
    flat = dict.fromkeys(ranges, 0)
    widths = bits_of_leaves(bits, flat, [True] * len(flat))
    by_path = dict(zip(sorted(flat), widths, strict=True))
    for path, width in by_path.items():
        with _checks.at(repr(path)):
            check_traceable_bits(width)
    return by_path
