"""Bits in bytes against numpy's packbits, and packed arrays."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hero_jax.quant import PackedArray, QuantizedArray, pack, quantize_array, unpack
from hero_jax.quant._packing import pack_bits, packed_size, unpack_bits

WIDTHS = (2, 3, 4, 5, 6, 7, 8, 16)


def numpy_packed(values, bits):
    """The bits of every value, least significant first, end to end."""
    rows = (values.reshape(-1, 1) >> np.arange(bits)) & 1
    return np.packbits(rows.astype(np.uint8).ravel(), bitorder="little")


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from((1, *WIDTHS, 9, 13)),
    st.sampled_from((0, 1, 7, 8, 40)),
    st.randoms(),
)
def test_equals_numpy(bits, size, random):
    values = np.array([random.randrange(2**bits) for _ in range(size)], np.uint32)
    packed = pack_bits(jnp.asarray(values), bits)
    assert packed.shape == (packed_size(size, bits),)
    np.testing.assert_array_equal(packed, numpy_packed(values, bits))
    np.testing.assert_array_equal(unpack_bits(packed, bits, size), values)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["affine", "symmetric"])
@pytest.mark.parametrize(
    ("shape", "bits"),
    [
        *(((5, 7), bits) for bits in WIDTHS),
        *itertools.product([(), (0,), (3, 0), (1,), (2, 3, 4)], (3, 16)),
    ],
)
def test_round_trip_of_arrays(shape, bits, scheme):
    x = jax.random.normal(jax.random.key(bits), shape)
    axis = -1 if shape else None
    quantized = quantize_array(x, bits, scheme=scheme, axis=axis)
    packed = pack(quantized)
    assert packed.packed.nbytes == packed_size(x.size, bits)
    assert packed.scheme == quantized.scheme == scheme
    assert packed.shape == quantized.shape == shape
    restored = unpack(packed)
    assert restored.values.dtype == quantized.values.dtype
    np.testing.assert_array_equal(restored.values, quantized.values)
    np.testing.assert_array_equal(packed.dequantize(), quantized.dequantize())


def test_extreme_signed_values_survive():
    for bits in WIDTHS:
        ends = jnp.array([-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, 0, -1])
        array = QuantizedArray(
            values=ends.astype(jnp.int8 if bits <= 8 else jnp.int16),
            scale=jnp.ones(1),
            zero_point=None,
            bits=bits,
            dtype=np.dtype(np.float32),
            block_shape=(4,),
        )
        np.testing.assert_array_equal(unpack(pack(array)).values, ends)


def test_stacked_arrays_pack_and_unpack_one_by_one():
    x = jax.random.normal(jax.random.key(0), (5, 3, 7))
    quantized = jax.vmap(lambda x: quantize_array(x, 3, axis=-1))(x)
    packed = jax.jit(jax.vmap(pack))(quantized)
    assert packed.packed.shape == (5, packed_size(21, 3))
    np.testing.assert_array_equal(packed.dequantize(), quantized.dequantize())
    np.testing.assert_array_equal(pack(quantized).dequantize(), quantized.dequantize())
    _, one_by_one = jax.lax.scan(lambda _, x: (None, x.dequantize()), None, packed)
    np.testing.assert_array_equal(one_by_one, quantized.dequantize())


@pytest.mark.slow
@pytest.mark.parametrize("bits", [3, 4, 16])
def test_layers_with_grids_of_their_own_are_packed_one_by_one(bits):
    x = jax.random.normal(jax.random.key(0), (5, 8, 6))
    for options in ({"axis": 0}, {"axis": (0, -1)}, {"axis": (0, 1, 2)}):
        quantized = quantize_array(x, bits, **options)
        packed = pack(quantized)
        assert packed.shape == quantized.shape
        assert packed.packed.shape[0] == 5
        assert packed.packed.nbytes == packed_size(x.size, bits)
        expected = quantized.dequantize()
        np.testing.assert_array_equal(packed.dequantize(), expected)
        _, scanned = jax.lax.scan(lambda _, p: (None, p.dequantize()), None, packed)
        np.testing.assert_array_equal(scanned, expected)
        one = jax.tree.map(lambda a: a[3], packed)
        np.testing.assert_array_equal(one.dequantize(), expected[3])


def test_no_byte_is_spent_on_axes():
    quantized = quantize_array(jnp.ones((7, 3)), 3, axis=0)  # rows of 9 bits
    assert pack(quantized).packed.shape == (packed_size(21, 3),)


def test_nibbles_are_a_quarter_of_the_bytes_of_half_precision():
    quantized = quantize_array(jnp.ones((64, 64)), 4)
    assert pack(quantized).packed.nbytes == 64 * 64 // 2
    assert quantized.values.nbytes == 64 * 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packed": jnp.zeros(4, jnp.uint8)}, r"packed must have shape \(3,\)"),
        ({"packed": jnp.zeros(3, jnp.int8)}, "packed must have .* dtype uint8"),
        ({"row_shape": [2, 3]}, "row_shape must be a tuple of integers >= 0"),
        ({"row_shape": (2, -3)}, "row_shape must be a tuple of integers >= 0"),
        ({"scale": jnp.ones((2, 1))}, r"scale must have shape \(1, 1\)"),
        ({"bits": 5}, r"packed must have shape \(4,\)"),
        ({"bits": 9}, "bits must be an integer from 2 to 8, or 16, got 9"),
    ],
)
def test_construction_checks_the_invariants(change, message):
    packed = pack(quantize_array(jnp.ones((2, 3)), 4))
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(packed, **change)
    assert isinstance(dataclasses.replace(packed), PackedArray)
