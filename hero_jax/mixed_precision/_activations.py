"""The loss as a function of offsets of the activations, and what rounding does to them.

The offsets play the part of the weights: whatever :mod:`hero_jax.curvature` says of a
loss in its weights, it says of this one in its activations.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import chex
import jax
import jax.numpy as jnp

from hero_jax import _checks, _programs, _tree
from hero_jax.mixed_precision._errors import Errors
from hero_jax.quant import ActivationRange, _grid, _interception
from hero_jax.quant._activations import rounded
from hero_jax.quant._options import check_choices
from hero_jax.quant._ranges import check_ranges

Offsets = dict[str, chex.Array]
"""Path of a layer to what is added to its input, `[B, ...]`."""


@dataclasses.dataclass(frozen=True)
class OffsetLoss(_programs.MadeOfFunctions):
    """A loss with offsets of the activations, `(offsets, *args) -> loss`.

    Two of them are equal if their losses are, so that compiled programs are used again.
    For use under `jax.jit` and the like: outside, every call compiles all over again.

    Attributes:
      loss_fn: `(*args) -> loss`, runs a Flax Linen model.
    """

    of_weights: ClassVar[bool] = False
    """Offsets are not stacks of layers, whatever the names and shapes of layers say."""

    loss_fn: Callable[..., Any]

    def __call__(self, offsets: Offsets, *args: Any) -> Any:
        """Return `loss_fn(*args)` with `x + offsets[path]` for each layer's input x."""
        calls: collections.Counter[str] = collections.Counter()

        def change(_: Any, path: str, x: chex.Array) -> chex.Array:
            if path not in offsets:
                return x
            calls[path] += 1
            d = offsets[path]
            if x.shape != d.shape:
                raise ValueError(
                    f"offsets of {path!r} must have the shape of its activations, "
                    f"{x.shape}, got {d.shape}. They are those of one batch."
                )
            return (_tree.widen(x) + d).astype(x.dtype)

        with _interception.inputs_changed(change, object()):
            loss = self.loss_fn(*args)
        _check_called_once({path: calls[path] for path in offsets})
        return loss


class ActivationProblem(NamedTuple):
    """The activations of one batch as the parameters of a loss.

    Attributes:
      loss_fn: `(offsets, *args) -> loss`; equal and of equal hash for equal losses.
      offsets: path of the layer to zeros `[B, ...]`, one per entry of its input, B
        being the number of examples.
      errors: `Q_b(x) - x` per layer and number of bits b, `[len(choices), B, ...]`, at
        the activations x of the float model: no layer before is rounded.
    """

    loss_fn: OffsetLoss
    offsets: Offsets
    errors: Errors


def activation_problem(
    loss_fn: Callable[..., Any],
    ranges: Mapping[str, ActivationRange],
    *args: Any,
    choices: Sequence[int] = (2, 3, 4, 5, 6, 7, 8),
    scheme: str = "affine",
) -> ActivationProblem:
    """Make the activations of a Flax Linen model the parameters of its loss.

    With offsets `d` of the activations the loss is, to second order,

        loss(d) - loss(0) = g'd + d'Hd / 2,

    and `loss_fn` and `offsets` go where :mod:`hero_jax.curvature` wants a loss and its
    weights. With a loss that is a mean over B examples, the layer's part of `tr H` is
    the mean over examples of the trace of H in the activations of that example alone.

    Args:
      loss_fn: `(*args) -> loss` of evaluation, as in
        `(params, batch_stats, images, labels) -> loss`; a mean over examples.
      ranges: path of the layer to its range, of
        :func:`hero_jax.quant.activation_ranges`; these layers get offsets.
      *args: arguments of `loss_fn`, with the examples of one batch.
      choices: numbers of bits, 2 to 8 or 16.
      scheme: as in :func:`hero_jax.quant.quantize_activations`.

    Returns:
      The problem, with as much memory as `len(choices) + 1` times the activations of
      the batch. The offsets belong to these B examples: `batch_size` does not go with
      them, nor does :func:`hero_jax.mixed_precision.eigenvalue_spread`.

    Raises:
      ImportError: flax is not installed.
      ValueError: a layer in `ranges` is never called,
        or several times, which leaves its offsets undefined.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from hero_jax import curvature, mixed_precision, quant
      >>> model = nn.Dense(1, use_bias=False)
      >>> def loss_fn(params, x):
      ...     return jnp.mean(model.apply({"params": params}, x) ** 2)
      >>> params = {"kernel": jnp.array([[2.0]])}
      >>> x = jnp.linspace(-1.0, 1.0, 5)[:, None]
      >>> ranges = quant.activation_ranges(loss_fn, params, x)
      >>> problem = mixed_precision.activation_problem(loss_fn, ranges, params, x)
      >>> problem.offsets[""].shape, problem.errors.layers[""].shape
      ((5, 1), (7, 5, 1))
      >>> trace = curvature.trace(problem.loss_fn, problem.offsets, params, x).whole
      >>> f"{trace.value:.0f} +- {trace.stderr:.0f}"
      '8 +- 0'

    References:
      Dong et al., `HAWQ-V2 <https://arxiv.org/abs/1911.03852>`_, 2020: mixed
      precision of activations by the Hessian in the activations.
    """
    _checks.check_choice("scheme", scheme, _grid.SCHEMES)
    check_ranges(ranges)
    choices = check_choices(choices)
    compiled = _programs.compiled(_offsets_and_errors, loss_fn, choices, scheme)
    offsets, errors = compiled(dict(ranges), args)
    return ActivationProblem(OffsetLoss(loss_fn), offsets, Errors(choices, errors))


def _offsets_and_errors(
    loss_fn: Callable[..., Any],
    choices: tuple[int, ...],
    scheme: str,
    ranges: dict[str, ActivationRange],
    args: Sequence[Any],
) -> tuple[Offsets, dict[str, chex.Array]]:
    inputs = _interception.recorded_inputs(
        loss_fn, args, lambda _, path: path in ranges
    )
    _check_called_once({path: len(inputs.get(path, ())) for path in ranges})

    def errors(path: str, x: chex.Array) -> chex.Array:
        def of_width(bits: chex.Array) -> chex.Array:
            return _tree.widen(rounded(x, ranges[path], bits, scheme)) - _tree.widen(x)

        return jax.vmap(of_width)(jnp.asarray(choices))

    return (
        {path: jnp.zeros_like(_tree.widen(x)) for path, (x,) in inputs.items()},
        {path: errors(path, x) for path, (x,) in inputs.items()},
    )


def _check_called_once(calls: Mapping[str, int]) -> None:
    for path, count in calls.items():
        if count != 1:
            raise ValueError(
                "ranges must be of layers that loss_fn calls once: it calls "
                f"{path!r} {count} times."
            )
