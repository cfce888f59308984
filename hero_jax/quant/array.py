r"""Linear uniform quantization of one array: the setting of Theorem 2.

An array is mapped to integers q on a uniform grid of at most `2^bits` levels,

.. math::

    q = \mathrm{clip}(\mathrm{round}(x / s) + o, \, 0, \, 2^{bits} - 1), \qquad
    x \approx s \, (q - o)

with scale s (the width of a bin) and integer zero point o. Every entry moves by at
most half a bin, and zero is on the grid whenever the array's range contains it.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np

from hero_jax import _tree

MIN_BITS, MAX_BITS = 2, 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedArray:
    """An array stored as integers on a uniform grid; a pytree node.

    Attributes:
      values: unsigned 8-bit integers below `2^bits`, in the shape of the array.
      scale: width of a bin, positive, float32, or float64 for float64 arrays; one
        number with as many axes as the array, so that stacked ones broadcast too.
      zero_point: the integer that stands for 0.0, in the shape of `scale`; int32, or
        int64 for float64 arrays; outside of `[0, 2^bits)` if the array's range does
        not contain zero.
      bits: number of bits per value, 2 to 8.
      dtype: of the array that was quantized.
    """

    values: chex.Array
    scale: chex.Array
    zero_point: chex.Array
    bits: int = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return tuple(self.values.shape)

    def dequantize(self) -> chex.Array:
        """Return `scale * (values - zero_point)` in the original dtype."""
        steps = self.values.astype(self.zero_point.dtype) - self.zero_point
        return (steps.astype(self.scale.dtype) * self.scale).astype(self.dtype)


def check_bits(bits: object) -> None:
    """Raise unless `bits` is an integer from 2 to 8."""
    if isinstance(bits, bool) or not isinstance(bits, (int, np.integer)):
        raise TypeError(
            f"bits must be an integer from {MIN_BITS} to {MAX_BITS}, "
            f"got {type(bits).__name__}: {bits!r}."
        )
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"bits must be from {MIN_BITS} to {MAX_BITS}, got {bits}.")


def quantize_array(x: chex.Array, bits: int) -> QuantizedArray:
    """Quantize one array over the range from its least to its largest entry.

    Args:
      x: real floating-point array of any shape, finite.
      bits: number of bits per value, 2 to 8.

    Returns:
      The quantized array; halves are rounded to even.

    Raises:
      TypeError: `bits` is no integer.
      ValueError: `bits` is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from hero_jax.quant import quantize_array
      >>> q = quantize_array(jnp.array([-1.0, 0.0, 0.4, 2.0]), bits=2)
      >>> q.values, q.dequantize()
      (Array([0, 1, 1, 3], dtype=uint8), Array([-1.,  0.,  0.,  2.], dtype=float32))
    """
    check_bits(bits)
    wide = jnp.asarray(x, _tree.wide_dtype(jnp.result_type(x)))
    scale, zero_point = _affine_grid(wide, bits)
    steps = jnp.round(wide / scale).astype(zero_point.dtype)
    values = jnp.clip(steps + zero_point, 0, 2**bits - 1).astype(jnp.uint8)
    return QuantizedArray(
        values, scale, zero_point, int(bits), np.dtype(jnp.result_type(x))
    )


def _affine_grid(x: chex.Array, bits: int) -> tuple[chex.Array, chex.Array]:
    """Return scale and zero point of the grid from the least to the largest entry."""
    integer = jnp.int64 if x.dtype == jnp.float64 else jnp.int32
    if x.size == 0:
        one = (1,) * x.ndim
        return jnp.ones(one, x.dtype), jnp.zeros(one, integer)
    low, high = jnp.min(x, keepdims=True), jnp.max(x, keepdims=True)
    # Bins no narrower than the floats are dense: a constant array is kept exactly,
    # and the zero point of one far from zero stays within its integers.
    resolution = float(np.finfo(x.dtype).eps) * jnp.maximum(jnp.abs(low), jnp.abs(high))
    levels = 2**bits - 1
    scale = jnp.maximum(high / levels - low / levels, resolution)
    scale = jnp.where(scale > 0.0, scale, 1.0)
    return scale, -jnp.round(low / scale).astype(integer)
