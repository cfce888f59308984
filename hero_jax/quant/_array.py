"""One array as integers on a uniform grid, or on one grid per block."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Unpack

import chex
import jax
import jax.numpy as jnp
import numpy as np

from hero_jax import _tree
from hero_jax.quant import _blocks, _grid, _nodes
from hero_jax.quant._options import (
    GridOptions,
    Options,
    check_bits,
    check_traceable_bits,
    resolve,
)

FLOATS = tuple(map(np.dtype, ("float16", jnp.bfloat16, "float32", "float64")))


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedArray(_nodes.NotAnArray):
    """An array stored as integers on uniform grids; a pytree node.

    The integers are stored one per byte (or two, above 8 bits), ready for use;
    :func:`hero_jax.quant.pack` stores them without gaps.

    Construction checks the following, as far as the values are known; unflattening
    (and with it every JAX transformation) does not repeat it.

    Attributes:
      values: integers, in the shape of the array. Affine: unsigned, below `2^bits`.
        Symmetric: signed, from `-2^(bits-1)`, of which the quantizer makes no use, to
        `2^(bits-1) - 1`. Of 8 bits up to `bits=8`, else of 16.
      scale: width of the bins, positive and finite; float32, or float64 for float64
        arrays; one per block, with as many axes as `values`.
      zero_point: the integer that stands for 0.0, in the shape of `scale`; int32, or
        int64 for float64 arrays; outside `[0, 2^bits)` if the block's range does
        not contain zero, unless the scheme was "affine_with_zero". None: symmetric.
      bits: number of bits per value, 2 to 8, or 16.
      dtype: of the array that was quantized, real floating-point.
      block_shape: shape of the blocks that share a grid, at least 1 each; counts from
        the last axis, so that leading axes may be added (`vmap`) and, where they have
        a grid per index, taken away (`scan`).
    """

    values: chex.Array
    scale: chex.Array
    zero_point: chex.Array | None
    bits: int
    dtype: np.dtype
    block_shape: tuple[int, ...]

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_grids(self, self.shape)
        storage = storage_dtype(self.bits, self.scheme)
        check_field("values", self.values, self.shape, storage)
        if _is_known(self.values) and self.values.size:
            least = -(2 ** (self.bits - 1)) if self.scheme == "symmetric" else 0
            most = least + 2**self.bits - 1
            low, high = int(self.values.min()), int(self.values.max())
            if low < least or high > most:
                raise ValueError(
                    f"values must be from {least} to {most} with bits={self.bits}, "
                    f"{self.scheme}; got {low} to {high}."
                )

    @property
    def scheme(self) -> str:
        """Kind of grid, "affine" or "symmetric"."""
        return "symmetric" if self.zero_point is None else "affine"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return tuple(self.values.shape)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    def dequantize(self) -> chex.Array:
        """Return `scale * (values - zero_point)` in the original dtype.

        Raises:
          ValueError: the blocks do not fit the values any more: both were cut or joined
            along an axis whose indices share a grid.
        """
        expected = _blocks.num_blocks(self.shape, self.block_shape)
        check_field("scale", self.scale, expected, self.scale.dtype)
        grids = _grid.Grid(self.scale, self.zero_point)
        return _dequantize(self.values, grids, self.dtype, self.block_shape)


def check_grids(node: Any, shape: tuple[int, ...]) -> None:
    """Raise unless scale, zero point, dtype and block shape fit an array's shape.

    What is said of the values is checked where they are known, thus not in tracing.

    Args:
      node: with the attributes `scale`, `zero_point`, `dtype` and `block_shape` of a
        :class:`QuantizedArray`.
      shape: of the array.
    """
    _check_dtype("dtype", node.dtype)
    check_shape("block_shape", node.block_shape, least=1)
    wide = _tree.wide_dtype(node.dtype)
    expected = _blocks.num_blocks(shape, node.block_shape)
    check_field("scale", node.scale, expected, wide)
    if node.zero_point is not None:
        integer = zero_point_dtype(node.dtype)
        check_field("zero_point", node.zero_point, expected, integer)
    if _is_known(node.scale):
        scale = np.asarray(node.scale)
        if not np.all((scale > 0.0) & np.isfinite(scale)):
            raise ValueError("scale must be positive and finite, as of finite arrays.")


def _is_known(array: object) -> bool:
    """Whether the entries can be looked at."""
    known = isinstance(array, (np.ndarray, jax.Array))
    return known and not isinstance(array, jax.core.Tracer)


def check_shape(name: str, shape: object, least: int) -> None:
    """Raise unless `shape` is a tuple of integers that are not too small."""
    if not isinstance(shape, tuple) or not all(
        isinstance(n, int) and n >= least for n in shape
    ):
        raise ValueError(f"{name} must be a tuple of integers >= {least}, got {shape}.")


def check_field(
    name: str, array: chex.Array, shape: tuple[int, ...], dtype: np.dtype
) -> None:
    """Raise unless an array has this shape and dtype."""
    got = np.shape(array), getattr(array, "dtype", None)
    if got != (shape, dtype):
        raise ValueError(
            f"{name} must have shape {shape} and dtype {dtype}, got {got[0]} and "
            f"{got[1]}."
        )


def zero_point_dtype(dtype: np.dtype) -> np.dtype:
    """Return the dtype of the zero points of an array of this dtype."""
    return np.dtype(np.int64 if dtype.itemsize == 8 else np.int32)


def storage_dtype(bits: int, scheme: str) -> np.dtype:
    """Return the dtype in which integers are stored."""
    sign = "" if scheme == "symmetric" else "u"
    return np.dtype(f"{sign}int{8 if bits <= 8 else 16}")


_nodes.register(
    QuantizedArray, ("values", "scale", "zero_point"), "hero_jax.quant.QuantizedArray"
)


def quantize_array(
    x: chex.Array,
    bits: int,
    *,
    key: chex.PRNGKey | None = None,
    **options: Unpack[GridOptions],
) -> QuantizedArray:
    """Quantize one array to integers.

    Args:
      x: real floating-point array of any shape, finite. Outside of tracing that is
        checked by :func:`hero_jax.quant.quantize`; here, entries that are not finite
        make the whole block NaN.
      bits: number of bits per value, 2 to 8, or 16.
      key: random key for stochastic rounding, to one of the two neighbours, unbiased
        between the outermost levels. Default: to the nearest, halves to even.
      **options: scheme, axis, group_size, calibration and percentile, see
        :class:`hero_jax.quant.GridOptions`.

    Returns:
      The quantized array.

    Raises:
      TypeError: `bits` is not an integer, `x` not real floating-point, or an option is
        unknown.

    Example:
      >>> import jax.numpy as jnp
      >>> from hero_jax.quant import quantize_array
      >>> q = quantize_array(jnp.array([-1.0, 0.0, 0.4, 2.0]), bits=2)
      >>> q.values, q.dequantize()
      (Array([0, 1, 1, 3], dtype=uint8), Array([-1.,  0.,  0.,  2.], dtype=float32))
      >>> quantize_array(jnp.array([[1.0, 2.0], [5.0, 0.0]]), 4, axis=-1).scale.shape
      (1, 2)
    """
    check_bits(bits)
    x = as_array("x", x)
    chosen = resolve(x.shape, options)
    storage = storage_dtype(bits, chosen.scheme)
    integers, grids, _ = fit_integers(x, np.int32(bits), key, storage, chosen)
    return assemble(x, bits, chosen, integers, grids)


def fake_quantize_array(
    x: chex.Array,
    bits: chex.Numeric,
    *,
    key: chex.PRNGKey | None = None,
    **options: Unpack[GridOptions],
) -> chex.Array:
    """Round the entries of an array to the levels of its grid, and keep floats.

    Equal to `quantize_array(...).dequantize()`, except that `bits` may be traced: one
    compiled program serves all precisions. The derivative is zero. To train through the
    rounding, use the straight-through estimator
    `x + lax.stop_gradient(fake_quantize_array(x, bits) - x)`.

    Args:
      x: real floating-point array of any shape, finite.
      bits: number of bits, 2 to 8, or 16; may be traced, and is not checked then.
      key: random key for stochastic rounding.
      **options: as in :func:`quantize_array`.

    Returns:
      Array of the shape and dtype of x.

    Raises:
      TypeError: `bits` is not an integer, `x` not real floating-point, or an option is
        unknown.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from hero_jax.quant import fake_quantize_array
      >>> x, widths = jnp.array([0.0, 0.4, 1.0]), jnp.arange(2, 5)
      >>> jax.vmap(lambda bits: fake_quantize_array(x, bits))(widths)[:, 1].tolist()
      [0.3333..., 0.4285..., 0.4000...]
    """
    check_traceable_bits(bits)
    x = as_array("x", x)
    chosen = resolve(x.shape, options)
    return fit_levels(x, bits, key, chosen)[0]


def as_array(name: str, x: chex.Array) -> chex.Array:
    """Return x as a JAX array, or raise unless it has a dtype that is quantized."""
    _tree.check_real(name, x)
    x = jnp.asarray(x)
    _check_dtype(name, x.dtype)
    return x


def _check_dtype(name: str, dtype: Any) -> None:
    """Raise `TypeError` for a dtype that is not quantized."""
    if not isinstance(dtype, np.dtype) or dtype not in FLOATS:
        allowed = ", ".join(map(str, FLOATS))
        raise TypeError(f"{name} must have one of the dtypes {allowed}, got {dtype}.")


def _fit(
    x: chex.Array, bits: chex.Numeric, key: chex.PRNGKey | None, options: Options
) -> tuple[_grid.Grid, _grid.Grid, chex.Array]:
    """Return the grids, one per block; the same over x; the integers, as floats."""
    x = x.astype(_tree.wide_dtype(x.dtype))
    fit = _grid.fit(bits, options.scheme, options.calibration, options.percent)
    grids: _grid.Grid = jax.lax.stop_gradient(
        _blocks.reduce_blocks(fit, x, options.block_shape)
    )
    spread = _spread(grids, x.shape, options.block_shape)
    limits = _grid.limits(bits, options.scheme, x.dtype)
    noise = None if key is None else jax.random.uniform(key, x.shape, x.dtype)
    return grids, spread, spread.integers(x, limits, noise)


def _spread(
    grids: _grid.Grid, shape: tuple[int, ...], block_shape: tuple[int, ...]
) -> _grid.Grid:
    """Let the grids of the blocks broadcast against the array."""
    spread: _grid.Grid = jax.tree.map(
        lambda a: _blocks.spread(a, shape, block_shape), grids
    )
    return spread


@functools.partial(jax.jit, static_argnames=("storage", "options"))
def fit_integers(
    x: chex.Array,
    bits: chex.Numeric,
    key: chex.PRNGKey | None,
    storage: np.dtype,
    options: Options,
) -> tuple[chex.Array, _grid.Grid, chex.Array]:
    """Return integers, grids, and whether all of x is finite.

    One program serves all bits of the same storage.
    """
    (scale, zero_point), _, integers = _fit(x, bits, key, options)
    if zero_point is not None:
        zero_point = zero_point.astype(zero_point_dtype(x.dtype))
    finite = jnp.isfinite(scale).all()
    return integers.astype(storage), _grid.Grid(scale, zero_point), finite


def assemble(
    x: chex.Array,
    bits: int,
    options: Options,
    integers: chex.Array,
    grids: _grid.Grid,
) -> QuantizedArray:
    """Return the quantized x, given its :func:`fit_integers`."""
    array: QuantizedArray = _nodes.unchecked(
        QuantizedArray,
        values=integers,
        scale=grids.scale,
        zero_point=grids.zero_point,
        bits=int(bits),
        dtype=np.dtype(x.dtype),
        block_shape=options.block_shape,
    )
    return array


@functools.partial(jax.jit, static_argnames="options")
def fit_levels(
    x: chex.Array, bits: chex.Numeric, key: chex.PRNGKey | None, options: Options
) -> tuple[chex.Array, chex.Array]:
    """Return x moved to the levels of its grids, and whether all of x is finite."""
    grids, spread, integers = _fit(x, bits, key, options)
    levels = _grid.narrow(spread.levels(integers), x.dtype)
    return levels, jnp.isfinite(grids.scale).all()


@functools.partial(jax.jit, static_argnames=("dtype", "block_shape"))
def _dequantize(
    values: chex.Array,
    grids: _grid.Grid,
    dtype: np.dtype,
    block_shape: tuple[int, ...],
) -> chex.Array:
    wide = grids.scale.dtype
    floats = jax.tree.map(lambda a: a.astype(wide), grids)
    spread = _spread(floats, values.shape, block_shape)
    return _grid.narrow(spread.levels(values.astype(wide)), dtype)
