"""Quantization errors against numpy in double precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hero_jax import quant


def params():
    rng = np.random.default_rng(0)
    return {
        "layers": [{"kernel": jnp.asarray(rng.normal(size=(20, 30)), jnp.float32)}],
        "head": jnp.asarray(rng.normal(size=(30, 2)), jnp.bfloat16),
        "bias": jnp.ones(3),
    }


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_equals_numpy(bits):
    tree = params()
    quantized = quant.quantize(tree, bits)
    errors = quant.quantization_error(tree, quantized)
    assert list(errors) == ["bias", "head", "layers/0/kernel"]
    restored = quant.dequantize(quantized)
    for name, x, y in [
        (
            "layers/0/kernel",
            tree["layers"][0]["kernel"],
            restored["layers"][0]["kernel"],
        ),
        ("head", tree["head"], restored["head"]),
    ]:
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        error = errors[name]
        np.testing.assert_allclose(error.max, np.abs(x - y).max(), rtol=1e-5)
        np.testing.assert_allclose(error.mean_square, np.mean((x - y) ** 2), rtol=1e-5)
        snr = 10 * np.log10(np.mean(x**2) / np.mean((x - y) ** 2))
        np.testing.assert_allclose(error.snr, snr, rtol=1e-5)
    assert errors["bias"].max == errors["bias"].mean_square == 0.0
    assert errors["bias"].snr == np.inf


def test_every_bit_is_worth_six_decibels():
    """The textbook rule for uniform data: 6.02 dB per bit."""
    tree = {"w": jax.random.uniform(jax.random.key(0), (300, 300), minval=-1.0)}
    for bits in range(2, 9):
        error = quant.quantization_error(tree, quant.quantize(tree, bits))["w"]
        np.testing.assert_allclose(error.snr, 20 * np.log10(2**bits - 1), atol=0.1)


def test_all_kinds_of_quantized_trees_agree_also_inside_jit():
    tree = params()
    quantized = quant.quantize(tree, 4)
    expected = quant.quantization_error(tree, quantized)
    for other in (quant.pack(quantized), quant.fake_quantize(tree, 4)):
        same = jax.jit(quant.quantization_error)(tree, other)
        for name, error in expected.items():
            np.testing.assert_allclose(same[name], error, rtol=1e-5)


def test_zero_and_empty_leaves():
    tree = {"zero": jnp.zeros((2, 2)), "empty": jnp.zeros((0, 2))}
    errors = quant.quantization_error(tree, quant.quantize(tree, 2))
    for error in errors.values():
        np.testing.assert_array_equal(error, (0.0, 0.0, np.inf))


def test_other_trees_are_named():
    tree = params()
    with pytest.raises(ValueError, match="quantized must have the tree structure of"):
        quant.quantization_error(tree, {"bias": tree["bias"]})
    with pytest.raises(ValueError, match=r"quantized must have the shapes of params"):
        quant.quantization_error(tree, {**tree, "bias": jnp.ones(4)})
