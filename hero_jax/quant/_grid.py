r"""Linear uniform grids: the setting of Theorem 2.

A grid of at most `2^bits` levels maps a number to an integer and back,

.. math::

    q = \mathrm{clip}(\mathrm{round}(x / s) + o, \, q_\min, \, q_\max), \qquad
    x \approx s \, (q - o)

with scale s (the width of a bin) and zero point o. Three schemes:

- affine: q from 0 to `2^bits - 1`, the levels spread over the range of x, o an integer,
  so that zero is a level wherever the range contains it;
- affine_with_zero: the same over the range of x and 0, so that o is a level, too;
- symmetric: q from `-m` to `m = 2^(bits-1) - 1` and o = 0, the largest magnitude a
  level: `s = max|x| / m`. The grid is odd, and -max|x|, 0 and max|x| are kept.

Every entry inside the range moves by at most half a bin. Everything here computes in
the floats of x, in which the integers involved are exact, and `bits` may be traced.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

Axes = tuple[int, ...]
Range = tuple[chex.Array, chex.Array]
"""Least and largest number that a grid covers, with reduced axes of length one."""

Limits = tuple[chex.Array, chex.Array]
"""Smallest and largest integer of a grid, as floats."""

SCHEMES = ("affine", "affine_with_zero", "symmetric")
NUM_CLIPS = 100
"""How many shares of the range the mean-squared-error calibration tries."""


class Grid(NamedTuple):
    """A uniform grid, or many that broadcast against the data.

    Attributes:
      scale: width of a bin, positive.
      zero_point: integer that stands for 0.0, in the floats of `scale`; None: 0.
    """

    scale: chex.Array
    zero_point: chex.Array | None

    def integers(
        self, x: chex.Array, limits: Limits, noise: chex.Array | None = None
    ) -> chex.Array:
        """Return the integers of the nearest levels, as floats; halves go to even.

        With `noise` uniform in [0, 1), round up or down at random instead, so that
        the expectation is x.
        """
        # XLA divides by a broadcast scale through its reciprocal, which vanishes for
        # the largest floats: those are made smaller, without rounding, beforehand.
        shrink = jnp.where(self.scale > 1.0, 0.0625, 1.0).astype(x.dtype)
        steps = (x * shrink) / (self.scale * shrink)
        steps = jnp.round(steps) if noise is None else jnp.floor(steps + noise)
        return jnp.clip(self._shifted(steps, 1), *limits)

    def levels(self, integers: chex.Array) -> chex.Array:
        """Return the numbers that the integers stand for."""
        return self._shifted(integers, -1) * self.scale

    def _shifted(self, integers: chex.Array, sign: int) -> chex.Array:
        if self.zero_point is None:
            return integers
        return integers + sign * self.zero_point


def narrow(x: chex.Array, dtype: np.dtype) -> chex.Array:
    """Cast to a dtype; a level beyond its largest number becomes that number."""
    largest = float(jnp.finfo(dtype).max)
    return jnp.clip(x, -largest, largest).astype(dtype)


def limits(bits: chex.Numeric, scheme: str, dtype: np.dtype) -> Limits:
    """Return the smallest and the largest integer of a grid."""
    num_levels = jnp.left_shift(jnp.int32(1), jnp.asarray(bits, jnp.int32))
    if scheme == "symmetric":
        most = (num_levels // 2 - 1).astype(dtype)
        return -most, most
    return jnp.zeros((), dtype), (num_levels - 1).astype(dtype)


def covering(
    x_range: Range, largest: chex.Array, bits: chex.Numeric, scheme: str
) -> Grid:
    """Return the grid over a range.

    Args:
      x_range: ends of the range; a symmetric one has opposite ends.
      largest: largest magnitude of the data.
      bits: number of bits, may be traced.
      scheme: one of SCHEMES.

    Returns:
      The grid; its scale is not finite if `largest` is not.
    """
    low, high = x_range
    dtype = low.dtype
    _, most = limits(bits, scheme, dtype)
    tiny = float(jnp.finfo(dtype).tiny)
    if scheme == "symmetric":
        scale = high / most
        smallest = jnp.asarray(tiny, dtype)
    else:
        if scheme == "affine_with_zero":
            low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
        # low and high apart: their difference may overflow.
        scale = high / most - low / most
        # Bins no narrower than the floats are dense: a constant array is kept
        # exactly, and the zero point of one far from zero stays an exact float.
        smallest = jnp.maximum(jnp.finfo(dtype).eps * largest, tiny)
    scale = jnp.where(largest > 0.0, jnp.maximum(scale, smallest), 1.0)
    scale = jnp.where(jnp.isfinite(largest), scale, jnp.nan).astype(dtype)
    return Grid(scale, None if scheme == "symmetric" else -jnp.round(low / scale))


def min_max(x: chex.Array, axes: Axes, scheme: str) -> Range:
    """Cover every entry."""
    if scheme == "symmetric":
        high = jnp.max(jnp.abs(x), axes, keepdims=True)
        return -high, high
    return jnp.min(x, axes, keepdims=True), jnp.max(x, axes, keepdims=True)


def percentile(x: chex.Array, axes: Axes, scheme: str, percent: float) -> Range:
    """Leave out the outermost entries: beyond the percentile on either side."""
    if not axes:
        return min_max(x, axes, scheme)
    if scheme == "symmetric":
        high = jnp.percentile(jnp.abs(x), percent, axes, keepdims=True)
        return -high, high
    low, high = (
        jnp.percentile(x, p, axes, keepdims=True) for p in (100 - percent, percent)
    )
    return low, high


def least_squares(x: chex.Array, axes: Axes, scheme: str, bits: chex.Numeric) -> Range:
    """Clip where the mean squared error is least, never worse than :func:`min_max`.

    The ends are drawn in towards the mean (a symmetric range: towards zero) by shares
    of 1/100 to 100/100: first both by the same share, then each alone. The best is
    kept, and of equals the widest.
    """
    whole = min_max(x, axes, scheme)
    # Rows of one block each: a reduction along columns is slow inside a loop.
    rows = jnp.moveaxis(x, axes, range(x.ndim - len(axes), x.ndim))
    rows = rows.reshape(whole[0].size, math.prod(x.shape[a] for a in axes))
    largest = jnp.max(jnp.abs(rows), 1, keepdims=True)
    # Of order one, so that squares neither overflow nor vanish, nor does 1 / unit.
    unit = jnp.maximum(largest / 8, jnp.finfo(x.dtype).tiny)
    rows = rows / unit
    symmetric = scheme == "symmetric"
    centre = jnp.zeros_like(unit) if symmetric else jnp.mean(rows, 1, keepdims=True)

    def squared_error(ends: Range) -> chex.Array:
        grid = covering(ends, largest / unit, bits, scheme)
        integers = grid.integers(rows, limits(bits, scheme, rows.dtype))
        error = grid.levels(integers) - rows
        return jnp.mean(jnp.square(error), 1, keepdims=True)

    def narrowed(start: Range, moves: tuple[bool, bool]) -> Range:
        def try_share(
            best: tuple[Range, chex.Array], share: chex.Array
        ) -> tuple[tuple[Range, chex.Array], None]:
            ends, least_error = best
            candidate = tuple(
                centre + share * (end - centre) if move else end
                for end, move in zip(start, moves, strict=True)
            )
            error = squared_error(candidate)
            better = error < least_error
            ends = jax.tree.map(lambda a, b: jnp.where(better, a, b), candidate, ends)
            return (ends, jnp.where(better, error, least_error)), None

        shares = jnp.arange(NUM_CLIPS - 1, 0, -1, dtype=x.dtype) / NUM_CLIPS
        (ends, _), _ = jax.lax.scan(try_share, (start, squared_error(start)), shares)
        return ends

    start = min_max(rows, (1,), scheme)
    ends = narrowed(start, (True, True))
    if not symmetric:
        ends = narrowed(ends, (False, True))
        ends = narrowed(ends, (True, False))
    low, high = (
        jnp.where(end == first, original.reshape(-1, 1), end * unit).reshape(
            original.shape
        )
        for end, first, original in zip(ends, start, whole, strict=True)
    )
    return low, high


CALIBRATIONS = ("minmax", "mse", "percentile")
DEFAULT_PERCENT = 99.9


def fit(
    bits: chex.Numeric, scheme: str, calibration: str, percent: float
) -> Callable[[chex.Array, Axes], Grid]:
    """Return the function that finds the grids of blocks of data.

    Args:
      bits: number of bits, may be traced.
      scheme: one of SCHEMES.
      calibration: one of CALIBRATIONS.
      percent: percentile, for that calibration.

    Returns:
      Function `(x, axes) -> grid` that removes the `axes` of x; the scale is NaN where
      x is not finite.
    """

    def grids(x: chex.Array, axes: Axes) -> Grid:
        whole = min_max(x, axes, scheme)
        if calibration == "mse":
            ends = least_squares(x, axes, scheme, bits)
        elif calibration == "percentile":
            ends = percentile(x, axes, scheme, percent)
        else:
            ends = whole
        largest = jnp.maximum(jnp.abs(whole[0]), jnp.abs(whole[1]))
        covered = covering(ends, largest, bits, scheme)
        squeezed: Grid = jax.tree.map(lambda a: jnp.squeeze(a, axes), covered)
        return squeezed

    return grids
