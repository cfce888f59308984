"""The schemes that qwix has too give the same integers and scales."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hero_jax.quant import quantize_array

qwix = pytest.importorskip("qwix")

LAYOUTS = [
    ({}, {}),
    ({"axis": -1}, {"channelwise_axes": [2]}),
    ({"axis": (0, 1)}, {"channelwise_axes": [0, 1]}),
    (
        {"axis": (1, -1), "group_size": (4, 1)},
        {"tiled_axes": {1: 4}, "channelwise_axes": [2]},
    ),
    ({"axis": (2, 1), "group_size": (5, 8)}, {"tiled_axes": {2: 5, 1: 8}}),
]
QTYPES = {2: "int2", 3: "int3", 4: jnp.int4, 5: "int5", 6: "int6", 7: "int7"}
QTYPES[8] = jnp.int8


def weights(seed):
    return jax.random.normal(jax.random.key(seed), (6, 8, 40))


def integers(array):
    """Stored in 4 bits or 8: compare as numbers."""
    return np.asarray(array.astype(jnp.int32))


@pytest.mark.parametrize(("ours", "theirs"), LAYOUTS, ids=str)
@pytest.mark.parametrize("bits", QTYPES)
def test_symmetric(bits, ours, theirs):
    """Theirs ends half a bin beyond the last level, ours on it.

    Their bins are narrower for it, ours keep the largest weight, and a second
    quantization changes nothing. On one and the same grid the integers are equal.
    """
    x = weights(bits)
    most = 2 ** (bits - 1) - 1
    actual = quantize_array(x, bits, scheme="symmetric", **ours)
    expected = qwix.quantize(x, QTYPES[bits], calibration_method="absmax", **theirs)
    np.testing.assert_allclose(
        actual.scale * most, expected.scale * (most + 0.5), rtol=1e-6
    )
    wider = f"absmax,{(most + 0.5) / most}"
    same = qwix.quantize(x, QTYPES[bits], calibration_method=wider, **theirs)
    np.testing.assert_allclose(actual.scale, same.scale, rtol=1e-6)
    np.testing.assert_array_equal(actual.values, integers(same.qvalue))


@pytest.mark.parametrize(("ours", "theirs"), LAYOUTS, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_affine(bits, ours, theirs):
    """Theirs counts from -2^(bits-1), ours from 0."""
    x = weights(bits)  # every block has both signs
    actual = quantize_array(x, bits, **ours)
    expected = qwix.quantize(x, QTYPES[bits], calibration_method="minmax", **theirs)
    offset = 2 ** (bits - 1)
    np.testing.assert_allclose(actual.scale, expected.scale, rtol=1e-6)
    np.testing.assert_array_equal(
        actual.zero_point - offset, integers(expected.zero_point)
    )
    np.testing.assert_array_equal(
        integers(actual.values) - offset, integers(expected.qvalue)
    )


def test_affine_ranges_without_zero_are_finer_here():
    """Theirs are stretched to contain zero, ours are not."""
    x = 5.0 + weights(0) / 10
    ours = quantize_array(x, 4)
    theirs = qwix.quantize(x, jnp.int4, calibration_method="minmax")
    error = jnp.abs(ours.dequantize() - x).max()
    assert error < 0.2 * jnp.abs(qwix.dequantize(theirs) - x).max()
