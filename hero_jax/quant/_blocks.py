"""Blocks of an array that share one quantization grid: tensors, channels, groups.

A block shape has one number per axis: how many consecutive indices share a grid. It
counts from the last axis, so that an array stacked along new leading axes (as `vmap`
and `scan` over layers do) keeps its block shape. Where an axis is not a multiple of its
block, the last block is smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from numpy.lib.array_utils import normalize_axis_tuple

Reduce = Callable[[chex.Array, tuple[int, ...]], chex.ArrayTree]
"""`(blocks, axes) -> tree` of arrays, each reduced over `axes`, which are removed."""


def block_shape_of(
    shape: Sequence[int],
    axis: int | Sequence[int] | None,
    group_size: int | Sequence[int] | None,
) -> tuple[int, ...]:
    """Return the shape of the blocks of an array.

    Args:
      shape: of the array.
      axis: axes along which the grids differ; None for one grid.
      group_size: number of consecutive indices that share a grid, for each such axis;
        None for 1.

    Returns:
      One number per axis, from 1 to its length.

    Raises:
      TypeError: `axis` or `group_size` is neither an integer nor a sequence of them.
      ValueError: an axis is missing or repeated, or a group size is not positive.
    """
    if axis is None:
        if group_size is not None:
            raise ValueError(
                f"group_size needs the axis to which it applies, got axis=None and "
                f"group_size={group_size!r}."
            )
        return tuple(max(n, 1) for n in shape)
    axes = normalize_axis_tuple(axis, len(shape), "axis")
    sizes = np.ravel(1 if group_size is None else group_size).tolist()
    sizes = sizes * len(axes) if len(sizes) == 1 else sizes
    if len(sizes) != len(axes) or min(sizes, default=1) < 1:
        raise ValueError(
            f"group_size must be at least 1, one number or one per axis, got "
            f"{group_size!r} for axis={axis!r}."
        )
    block_shape = list(shape)
    for a, size in zip(axes, sizes, strict=True):
        block_shape[a] = min(size, shape[a])
    return tuple(max(n, 1) for n in block_shape)


def trailing(block_shape: tuple[int, ...], ndim: int) -> tuple[int, ...]:
    """Return the block shape of the last axes of an array that lost leading ones."""
    return block_shape[max(len(block_shape) - ndim, 0) :]


def num_blocks(shape: Sequence[int], block_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the number of blocks along each axis; leading axes count one by one."""
    block_shape = trailing(block_shape, len(shape))
    leading = (1,) * (len(shape) - len(block_shape))
    blocks = (*leading, *block_shape)
    return tuple(-(-n // b) for n, b in zip(shape, blocks, strict=True))


def reduce_blocks(
    reduce: Reduce, x: chex.Array, block_shape: tuple[int, ...]
) -> chex.ArrayTree:
    """Apply `reduce` to every block.

    Args:
      reduce: of an array in which every axis of `x` has become two, the number of
        blocks and the place within one; it removes the latter, named by `axes`.
      x: array of any shape.
      block_shape: as many numbers as `x` has axes.

    Returns:
      What `reduce` returns, of shape :func:`num_blocks`.
    """
    for axis, (n, b) in enumerate(zip(x.shape, block_shape, strict=True)):
        if n > b and n % b:
            whole, rest = jnp.split(x, [n - n % b], axis)
            smaller = (*block_shape[:axis], n % b, *block_shape[axis + 1 :])
            parts = (
                reduce_blocks(reduce, whole, block_shape),
                reduce_blocks(reduce, rest, smaller),
            )
            return jax.tree.map(lambda *p, a=axis: jnp.concatenate(p, a), *parts)
    pairs = [(n // b, b) for n, b in zip(x.shape, block_shape, strict=True)]
    axes = tuple(range(1, 2 * x.ndim, 2))
    return reduce(x.reshape([size for pair in pairs for size in pair]), axes)


def spread(blocks: Any, shape: Sequence[int], block_shape: tuple[int, ...]) -> Any:
    """Repeat one entry per block over the block, as far as broadcasting does not.

    Args:
      blocks: array of shape :func:`num_blocks`.
      shape: of the array that the blocks cut.
      block_shape: shape of a block.

    Returns:
      Array that broadcasts to `shape`.
    """
    block_shape = trailing(block_shape, len(shape))
    for axis, b in enumerate(block_shape, len(shape) - len(block_shape)):
        if 1 < b < shape[axis]:
            blocks = jnp.repeat(blocks, b, axis)
            blocks = jax.lax.slice_in_dim(blocks, 0, shape[axis], axis=axis)
    return blocks
