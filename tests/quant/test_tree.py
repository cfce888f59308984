"""Quantization of parameter trees."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hero_jax import quant
from hero_jax.quant import QuantizedArray


def params():
    key = jax.random.key(0)
    return {
        "conv": {"kernel": jax.random.normal(key, (3, 3, 4, 8))},
        "norm": {"scale": jnp.linspace(0.5, 2.0, 8), "bias": jnp.ones(8)},
        "head": [jax.random.normal(key, (8, 2), jnp.bfloat16), jnp.float32(0.3)],
        "unused": None,
    }


def test_weights_are_quantized_and_the_rest_is_untouched():
    tree = params()
    quantized = quant.quantize(tree, 4)
    assert isinstance(quantized["conv"]["kernel"], QuantizedArray)
    assert isinstance(quantized["head"][0], QuantizedArray)
    chex.assert_trees_all_equal(quantized["norm"], tree["norm"])
    assert quantized["head"][1] is tree["head"][1]
    assert quantized["unused"] is None

    restored = quant.dequantize(quantized)
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, tree)
    expected = quant.quantize_array(tree["conv"]["kernel"], 4).dequantize()
    np.testing.assert_array_equal(restored["conv"]["kernel"], expected)
    assert np.any(np.asarray(expected != tree["conv"]["kernel"]))


def test_every_leaf_has_a_grid_of_its_own():
    tree = {"small": 1e-3 * jnp.eye(3), "large": 1e3 * jnp.eye(3)}
    restored = quant.dequantize(quant.quantize(tree, 2))
    chex.assert_trees_all_close(restored, tree, rtol=1e-6)


def test_mask_chooses_the_leaves():
    tree = params()
    everything = quant.quantize(tree, 8, mask=True)
    assert isinstance(everything["norm"]["bias"], QuantizedArray)
    assert isinstance(everything["head"][1], QuantizedArray)
    mask = {"conv": False, "norm": {"scale": True, "bias": False}, "head": False}
    some = quant.quantize(tree, 8, mask={**mask, "unused": None})
    kinds = [
        isinstance(x, QuantizedArray)
        for x in jax.tree.leaves(some, is_leaf=lambda x: isinstance(x, QuantizedArray))
    ]
    assert kinds == [False, False, False, False, True]  # norm / scale comes last


def test_works_inside_jit_with_integers_in_memory():
    tree = params()
    quantized = quant.quantize(tree, 4)
    bytes_of = lambda t: sum(x.nbytes for x in jax.tree.leaves(t))
    assert bytes_of(quantized) < 0.35 * bytes_of(tree)
    jitted = jax.jit(lambda t: quant.dequantize(quant.quantize(t, 4)))(tree)
    chex.assert_trees_all_close(jitted, quant.dequantize(quantized), rtol=1e-6)
    chex.assert_trees_all_close(
        jax.jit(quant.dequantize)(quantized), quant.dequantize(quantized), rtol=1e-6
    )


def test_empty_tree():
    assert quant.dequantize(quant.quantize({}, 4)) == {}


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_entries_that_are_not_finite_are_named(bad):
    tree = {"ok": jnp.ones((2, 2)), "bad": jnp.array([[1.0, bad]])}
    with pytest.raises(ValueError, match=r"finite to be quantized: \['bad'\] has NaN"):
        quant.quantize(tree, 4)
    # What is not quantized may be anything.
    quant.quantize(tree, 4, mask={"ok": True, "bad": False})


def test_other_misuse_is_named():
    with pytest.raises(ValueError, match=r"bits must be an integer from 2 to 8, or 16, got 1"):
        quant.quantize({}, 1)
    with pytest.raises(TypeError, match=r"bits must be an integer"):
        quant.quantize(params(), "4")
    with pytest.raises(TypeError, match=r"real floating-point arrays .* int32 at \['"):
        quant.quantize({"w": jnp.ones((2, 2), jnp.int32)}, 4)
    with pytest.raises(ValueError, match=r"mask must have the tree structure of para"):
        quant.quantize(params(), 4, mask={"other": True})
