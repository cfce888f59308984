"""Integers of a few bits stored without gaps: eight of them in as many bytes as bits.

Value k of an array, counted row by row, takes the bits from `k * bits` on, the least
significant first, as `numpy.packbits(..., bitorder="little")` orders them.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np

from hero_jax.quant import _array, _nodes
from hero_jax.quant._array import QuantizedArray
from hero_jax.quant._blocks import trailing
from hero_jax.quant._options import check_bits


def packed_size(size: int, bits: int) -> int:
    """Return how many bytes so many integers take."""
    return math.ceil(size * bits / 8)


@functools.partial(jax.jit, static_argnames="bits")
def pack_bits(values: chex.Array, bits: int) -> chex.Array:
    """Pack unsigned integers.

    Args:
      values: integers from 0 to `2^bits - 1`, any shape.
      bits: number of bits per value, 1 to 16.

    Returns:
      Bytes, `[ceil(size * bits / 8)]`; the bits that are left over are zero.

    Example:
      >>> import jax.numpy as jnp
      >>> from hero_jax.quant._packing import pack_bits
      >>> pack_bits(jnp.array([1, 2, 3]), bits=4)
      Array([33,  3], dtype=uint8)
    """
    flat = values.reshape(-1).astype(jnp.uint32)
    eights = jnp.pad(flat, (0, -flat.size % 8)).reshape(-1, 8)
    columns = []
    for byte in range(bits):
        column = jnp.zeros(len(eights), jnp.uint32)
        for k in range(8 * byte // bits, (8 * byte + 7) // bits + 1):
            column |= _shift_left(eights[:, k], k * bits - 8 * byte)
        columns.append((column & 0xFF).astype(jnp.uint8))
    return jnp.stack(columns, 1).reshape(-1)[: packed_size(flat.size, bits)]


@functools.partial(jax.jit, static_argnames=("bits", "size"))
def unpack_bits(packed: chex.Array, bits: int, size: int) -> chex.Array:
    """Return the unsigned integers of :func:`pack_bits`, flat.

    Args:
      packed: bytes, `[ceil(size * bits / 8)]`.
      bits: number of bits per value, 1 to 16.
      size: number of values.

    Returns:
      Integers `[size]`, uint8 up to 8 bits, else uint16.
    """
    whole = packed_size(8 * math.ceil(size / 8), bits)
    rows = jnp.pad(packed, (0, whole - packed.size)).reshape(-1, bits)
    rows = rows.astype(jnp.uint32)
    columns = []
    for k in range(8):
        column = jnp.zeros(len(rows), jnp.uint32)
        for byte in range(k * bits // 8, (k * bits + bits - 1) // 8 + 1):
            column |= _shift_left(rows[:, byte], 8 * byte - k * bits)
        columns.append(column & (2**bits - 1))
    dtype = jnp.uint8 if bits <= 8 else jnp.uint16
    return jnp.stack(columns, 1).reshape(-1)[:size].astype(dtype)


def _shift_left(x: chex.Array, places: int) -> chex.Array:
    return x << places if places >= 0 else x >> -places


@dataclasses.dataclass(frozen=True, eq=False)
class PackedArray(_nodes.NotAnArray):
    """A :class:`hero_jax.quant.QuantizedArray` whose integers have no gaps.

    A pytree node: 4-bit weights take half a byte each in memory, and are unpacked
    where they are used, inside `jax.jit`. Construction checks the following.

    Attributes:
      packed: bytes, `[..., ceil(n * bits / 8)]`, of rows of n integers: unsigned ones,
        or signed ones plus `2^(bits-1)`. Leading axes of the array that have a grid
        per index stay axes where rows fill whole bytes, for `scan` over layers.
      scale: as of the quantized array, one per block.
      zero_point: likewise; None: symmetric.
      bits: number of bits per value, 2 to 8, or 16.
      dtype: of the array that was quantized.
      row_shape: shape of a row: of the array without the leading axes of `packed`.
      block_shape: shape of the blocks that share a grid.
    """

    packed: chex.Array
    scale: chex.Array
    zero_point: chex.Array | None
    bits: int
    dtype: np.dtype
    row_shape: tuple[int, ...]
    block_shape: tuple[int, ...]

    def __post_init__(self) -> None:
        check_bits(self.bits)
        _array.check_shape("row_shape", self.row_shape, least=0)
        _array.check_grids(self, self.shape)
        size = packed_size(math.prod(self.row_shape), self.bits)
        expected = (*self.packed.shape[:-1], size)
        _array.check_field("packed", self.packed, expected, np.dtype(np.uint8))

    @property
    def scheme(self) -> str:
        """Kind of grid, "affine" or "symmetric"."""
        return "symmetric" if self.zero_point is None else "affine"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return (*self.packed.shape[:-1], *self.row_shape)

    def unpack(self) -> QuantizedArray:
        """Return the array with its integers one per byte."""
        *leading, num_bytes = self.packed.shape
        rows = self.packed.reshape(math.prod(leading), num_bytes)
        size = math.prod(self.row_shape)
        unsigned = jax.vmap(lambda row: unpack_bits(row, self.bits, size))(rows)
        values = unsigned.reshape(self.shape)
        if self.zero_point is None:
            values = (values.astype(jnp.int32) - 2 ** (self.bits - 1)).astype(
                _array.storage_dtype(self.bits, self.scheme)
            )
        unpacked: QuantizedArray = _nodes.unchecked(
            QuantizedArray,
            values=values,
            scale=self.scale,
            zero_point=self.zero_point,
            bits=self.bits,
            dtype=self.dtype,
            block_shape=self.block_shape,
        )
        return unpacked

    def dequantize(self) -> chex.Array:
        """Return the array as floats of the original dtype."""
        return self.unpack().dequantize()


_nodes.register(
    PackedArray, ("packed", "scale", "zero_point"), "hero_jax.quant.PackedArray"
)


def pack_array(x: QuantizedArray) -> PackedArray:
    """Return the quantized array with its integers packed."""
    values = x.values
    if x.zero_point is None:
        values = values.astype(jnp.int32) + 2 ** (x.bits - 1)
    leading = _leading_axes(x)
    row_shape = x.shape[leading:]
    rows = values.reshape(math.prod(x.shape[:leading]), math.prod(row_shape))
    packed_rows = jax.vmap(lambda row: pack_bits(row, x.bits))(rows)
    packed: PackedArray = _nodes.unchecked(
        PackedArray,
        packed=packed_rows.reshape(*x.shape[:leading], packed_rows.shape[-1]),
        scale=x.scale,
        zero_point=x.zero_point,
        bits=x.bits,
        dtype=x.dtype,
        row_shape=row_shape,
        block_shape=x.block_shape,
    )
    return packed


def _leading_axes(x: QuantizedArray) -> int:
    """Return how many leading axes a packed array keeps, at no cost in bytes."""
    stacked = x.ndim - len(x.block_shape)
    block_shape = (1,) * stacked + trailing(x.block_shape, x.ndim)
    one_each = next((i for i, b in enumerate(block_shape) if b > 1), x.ndim)
    for leading in range(one_each, stacked, -1):
        if math.prod(x.shape[leading:]) * x.bits % 8 == 0:
            return leading
    return max(stacked, 0)
