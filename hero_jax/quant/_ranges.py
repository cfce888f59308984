"""The ranges of the inputs of a Flax Linen model's layers, on calibration data."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from hero_jax import _batches, _checks, _programs, _tree
from hero_jax.quant import _grid, _interception
from hero_jax.quant._options import GridOptions, resolve


class ActivationRange(NamedTuple):
    """What is known of the input of a layer.

    Attributes:
      low: lower end of the range, a scalar of float32 or, of wider inputs, theirs.
      high: upper end.
      size: entries per example, that is, without the leading axis; of a layer that is
        called several times, of all calls together.
    """

    low: chex.Array
    high: chex.Array
    size: int


def activation_ranges(
    apply_fn: Callable[..., Any],
    *args: Any,
    layers: type | tuple[type, ...] | None = None,
    batch_size: int | None = None,
    batch_argnums: int | Sequence[int] = -1,
    calibration: str = "minmax",
    percentile: float | None = None,
) -> dict[str, ActivationRange]:
    """Find the ranges of the activations of a Flax Linen model on calibration data.

    Not for use inside `jax.jit`. Layers inside `jax.vmap`, `nn.scan` or
    `nn.remat` have no inputs that could be seen from outside.

    Args:
      apply_fn: `(*args) -> anything`, runs the model in evaluation, for instance
        `(params, batch_stats, images) -> logits`. Pass the same function object again
        to use the compiled program again, which is kept for as long as that object is.
      *args: its arguments, arrays or trees of them.
      layers: classes of modules whose inputs count; by default those of Flax Linen that
        own a kernel: Conv, ConvTranspose, ConvLocal, Dense, DenseGeneral and Einsum.
      batch_size: number of examples that go through `apply_fn` at once; all by default.
      batch_argnums: positions of the arguments of `apply_fn` whose arrays have a
        leading axis of examples, as `argnums` counts them in JAX; the last by default.
        For `batch_size`.
      calibration: "minmax", the least and largest entry of all examples, or
        "percentile", which leaves out the outermost entries: the mean over the batches,
        weighted by their numbers of examples, of each batch's percentiles.
      percentile: above 50, at most 100; for that calibration, 99.9 by default, and 100
        minus it below.

    Returns:
      Path of the layer, as in "BasicBlock_0/Conv_1", to its range; path + "/kernel" is
      the path of its weights in `params`; a model that is itself a layer has the path
      "". A layer that is called several times has the union of its ranges.

    Raises:
      ImportError: flax is not installed.
      TypeError: an input is not floating-point.
      ValueError: no such layer is called, or an input has
        NaN or infinite entries.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from hero_jax import quant
      >>> model = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(2)])
      >>> x = jnp.linspace(-1.0, 3.0, 40).reshape(10, 4)
      >>> variables = model.init(jax.random.key(0), x)
      >>> ranges = quant.activation_ranges(model.apply, variables, x, batch_size=4)
      >>> list(ranges), ranges["layers_2"].size
      (['layers_0', 'layers_2'], 8)
      >>> float(ranges["layers_0"].low), float(ranges["layers_0"].high)
      (-1.0, 3.0)

    References:
      Jacob et al., `Quantization and Training of Neural Networks
      <https://arxiv.org/abs/1712.05877>`_, 2018, Section 3.1.
    """
    _checks.check_choice("calibration", calibration, ("minmax", "percentile"))
    options = GridOptions(calibration=calibration, percentile=percentile)
    checked = resolve((), options)
    percent = checked.percent if calibration == "percentile" else None
    classes = _classes(layers)
    ranges_of_batch = _programs.compiled(_ranges_of_batch, apply_fn, classes, percent)
    counts, ranges = [], []
    for count, batch in _in_batches(args, batch_size, batch_argnums):
        counts.append(count)
        # Waiting for each keeps the memory at that of one batch.
        ranges.append(jax.device_get(ranges_of_batch(batch)))
    if not ranges[0]:
        names = ", ".join(c.__name__ for c in classes)
        raise ValueError(
            f"apply_fn must call a Flax Linen layer of the classes {names}: it called "
            "none, so that there are no activations."
        )
    found = {}
    for path, first in ranges[0].items():
        lows, highs = ([r[path][end] for r in ranges] for end in (0, 1))
        if percent is None:
            low, high = np.min(lows), np.max(highs)
        else:
            low, high = (np.average(ends, weights=counts) for ends in (lows, highs))
        dtype = first.low.dtype
        low, high = jnp.asarray(low, dtype), jnp.asarray(high, dtype)
        found[path] = ActivationRange(low, high, int(first.size))
    check_ranges(found)
    return found


def check_ranges(ranges: Mapping[str, ActivationRange]) -> None:
    """Raise unless `ranges` are as :func:`activation_ranges` returns them."""
    if not ranges:
        raise ValueError("ranges must have at least one layer, got none.")
    for path, (low, high, _) in ranges.items():
        if isinstance(low, jax.core.Tracer) or isinstance(high, jax.core.Tracer):
            continue
        low, high = np.asarray(low), np.asarray(high)  # also known while tracing
        if not (-np.inf < low <= high < np.inf):
            raise ValueError(
                "ranges must be finite, low to high, as of finite activations, got "
                f"{low} to {high} for {path!r}."
            )


def _ranges_of_batch(
    apply_fn: Callable[..., Any],
    classes: tuple[type, ...],
    percent: float | None,
    args: Sequence[Any],
) -> dict[str, ActivationRange]:
    def of_call(x: chex.Array) -> tuple[chex.Array, chex.Array]:
        x = _tree.widen(x)
        axes = tuple(range(x.ndim))
        ends = (
            _grid.min_max(x, axes, "affine")
            if percent is None
            else _grid.percentile(x, axes, "affine", percent)
        )
        finite = jnp.isfinite(x).all()  # a percentile may pass over infinity
        low, high = (jnp.where(finite, e.reshape(()), jnp.nan) for e in ends)
        return low, high

    def of_layer(calls: list[chex.Array]) -> ActivationRange:
        lows, highs = zip(*map(of_call, calls), strict=True)
        size = sum(math.prod(x.shape[1:]) for x in calls)
        return ActivationRange(
            functools.reduce(jnp.minimum, lows),
            functools.reduce(jnp.maximum, highs),
            size,
        )

    inputs = _interception.recorded_inputs(
        apply_fn, args, lambda module, _: isinstance(module, classes)
    )
    return {path: of_layer(calls) for path, calls in inputs.items()}


def _in_batches(
    args: Sequence[Any],
    batch_size: int | None,
    batch_argnums: int | Sequence[int],
) -> Iterator[tuple[int, Sequence[Any]]]:
    """Yield the number of examples and the arguments of one batch after another."""
    if batch_size is None:
        yield 1, args
        return
    _checks.check_integer("batch_size", batch_size)
    where = _batches.positions(batch_argnums, len(args))
    parts, rest = _batches.cut(args, where, batch_size)
    size = _batches.number_of_examples(args, where)
    for k in range(size // batch_size):
        part = jax.tree.map(lambda x, k=k: x[k], parts)
        yield batch_size, _batches.replaced(args, where, part)
    if rest is not None:
        yield size % batch_size, _batches.replaced(args, where, rest)


def _classes(layers: type | tuple[type, ...] | None) -> tuple[type, ...]:
    if layers is None:
        return _interception.weight_layers()
    return layers if isinstance(layers, tuple) else (layers,)
