"""One quantized array against Theorem 2's promise and a grid written out in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hero_jax.quant import QuantizedArray, quantize_array

every_width = pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8, 16])
every_scheme = pytest.mark.parametrize("scheme", ["affine", "symmetric"])
arrays = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=6),
    elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False),
)


def nearest_level(x, scale, zero_point, bits):
    """The nearest level by exhaustive search in double precision."""
    levels = scale.item() * (np.arange(2**bits) - zero_point.item())
    return levels[np.abs(x.ravel()[:, None] - levels).argmin(1)].reshape(x.shape)


def ulp(x):
    """Spacing of float32 numbers at the largest entry."""
    return np.spacing(np.float32(np.abs(x).max(initial=0.0)))


@settings(deadline=None, max_examples=200)
@given(arrays, st.integers(2, 8))
def test_every_entry_moves_by_at_most_half_a_bin(x, bits):
    quantized = quantize_array(jnp.asarray(x), bits)
    assert quantized.values.dtype == jnp.uint8
    assert quantized.shape == x.shape
    assert int(quantized.values.max(initial=0)) < 2**bits
    restored = np.asarray(quantized.dequantize(), np.float64)
    # Half a bin, the rounding of x / scale and of the product, relative to x.
    scale = float(quantized.scale.max(initial=0.0))
    tolerance = 0.5 * scale * (1 + 1e-5) + 2 * ulp(x)
    assert np.all(np.abs(restored - x) <= tolerance)
    if x.size and x.min() < x.max():
        # The bins are no wider than the range cut into 2^bits - 1 of them, or than
        # the spacing of the floats.
        width = (float(x.max()) - float(x.min())) / (2**bits - 1)
        assert scale <= max(width * (1 + 1e-6), 2 * ulp(x))


@every_width
@pytest.mark.parametrize("offset", [0.0, 0.7, -3.0, 100.0])
def test_equals_the_nearest_level_by_exhaustive_search(bits, offset):
    x = np.random.default_rng(bits).permutation(np.linspace(-1.0, 1.5, 2000)) + offset
    x = x.astype(np.float32).reshape(40, 50)
    quantized = quantize_array(jnp.asarray(x), bits)
    expected = nearest_level(x, quantized.scale, quantized.zero_point, bits)
    error = np.abs(np.asarray(quantized.dequantize()) - x)
    # Equally near at most: a tie may be rounded either way.
    assert np.all(error <= np.abs(expected - x) + 4 * ulp(x))
    assert len(np.unique(quantized.values)) == min(2**bits, 2000)  # no level is lost


@every_width
def test_scale_and_zero_point_are_those_of_the_range(bits):
    x = jnp.array([-1.0, 0.25, 2.0])
    quantized = quantize_array(x, bits)
    np.testing.assert_allclose(quantized.scale, 3.0 / (2**bits - 1), rtol=1e-6)
    assert quantized.zero_point.item() == round((2**bits - 1) / 3)
    assert int(quantized.values[0]) == 0
    assert int(quantized.values[2]) == 2**bits - 1


@every_width
def test_zero_is_on_the_grid(bits):
    x = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    x[::3] = 0.0
    restored = quantize_array(jnp.asarray(x), bits).dequantize()
    np.testing.assert_array_equal(restored[::3], 0.0)


@settings(deadline=None)
@given(arrays, st.integers(2, 8))
def test_a_second_quantization_changes_nothing(x, bits):
    once = quantize_array(jnp.asarray(x), bits).dequantize()
    if not np.isfinite(once).all():
        return  # the end of a grid as wide as all float32 numbers
    twice = quantize_array(once, bits).dequantize()
    np.testing.assert_allclose(twice, once, rtol=1e-5, atol=float(2 * ulp(x)))


@pytest.mark.parametrize("value", [0.0, 3.7, -0.1, 1e-30, -2e30])
@every_width
def test_constant_arrays_are_kept_exactly(value, bits):
    x = jnp.full((2, 3), value, jnp.float32)
    np.testing.assert_array_equal(quantize_array(x, bits).dequantize(), x)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (1, 1, 1)])
def test_odd_shapes(shape):
    x = jnp.full(shape, 1.5)
    quantized = quantize_array(x, 4)
    assert quantized.shape == shape
    np.testing.assert_array_equal(quantized.dequantize(), x)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtype_returns(dtype):
    x = jax.random.normal(jax.random.key(0), (100,), dtype)
    quantized = quantize_array(x, 8)
    restored = quantized.dequantize()
    assert restored.dtype == dtype
    assert quantized.scale.dtype == jnp.float32
    # Half a bin, then the rounding of the restored value to its dtype.
    rounding = float(jnp.finfo(dtype).eps) * np.abs(np.asarray(x, np.float64))
    error = np.abs(np.asarray(restored, np.float64) - np.asarray(x, np.float64))
    assert np.all(error <= 0.5 * quantized.scale.item() * (1 + 1e-5) + rounding)


@pytest.mark.usefixtures("x64")
def test_float64_keeps_its_precision():
    x = 1.0 + 1e-9 * jnp.linspace(0.0, 1.0, 256)  # a constant in float32
    quantized = quantize_array(x, 8)
    assert quantized.dequantize().dtype == jnp.float64
    assert len(np.unique(quantized.values)) == 256
    np.testing.assert_allclose(quantized.dequantize(), x, atol=1e-9 / 255)


def test_is_a_pytree_node_that_passes_through_jit_and_vmap():
    x = jax.random.normal(jax.random.key(0), (5, 4, 3))
    one_by_one = [quantize_array(row, 4).dequantize() for row in x]
    together = jax.jit(jax.vmap(lambda row: quantize_array(row, 4)))(x)
    assert isinstance(together, QuantizedArray)
    assert together.values.shape == x.shape
    np.testing.assert_array_equal(
        jax.vmap(QuantizedArray.dequantize)(together), together.dequantize()
    )
    restored = together.dequantize()
    np.testing.assert_allclose(restored, jnp.stack(one_by_one), rtol=1e-6)


@pytest.mark.parametrize("bits", [1, 9, 0, -4])
def test_bits_out_of_range_are_named(bits):
    with pytest.raises(ValueError, match=rf"bits must be an integer from 2 to 8, or 16, got {bits}"):
        quantize_array(jnp.ones(3), bits)


@pytest.mark.parametrize("bits", [4.0, "4", None, True, (4,)])
def test_bits_of_another_type_are_named(bits):
    with pytest.raises(TypeError, match=r"bits must be an integer from 2 to 8, or 16, got"):
        quantize_array(jnp.ones(3), bits)
