"""Which leaf gets how many bits."""

import jax
import jax.numpy as jnp
import pytest

from hero_jax import quant


def params():
    return {
        "conv": [jnp.ones((2, 2)), {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}],
        "head": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)},
    }


def widths(tree):
    return [
        x.bits if quant.is_quantized(x) else None
        for x in jax.tree.leaves(tree, is_leaf=quant.is_quantized)
    ]


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        (4, [4, None, 4, None, 4]),
        ({"conv": 3, "head": 8}, [3, None, 3, None, 8]),
        (
            {"conv": [2, {"kernel": 5, "bias": 7}], "head": 16},
            [2, None, 5, None, 16],
        ),
        ({"*": 4}, [4, None, 4, None, 4]),
        ({"head/*": 8, "*": 4}, [4, None, 4, None, 8]),
        ({"*": 4, "head/*": 8}, [4, None, 4, None, 4]),  # the first match counts
        ({"*/kernel": 6, "conv/0": 2}, [2, None, 6, None, 6]),
        ({"head": 8, "*": 4}, [4, None, 4, None, 8]),  # a subtree
        ({"conv/[01]*": 3, "head/kernel": 5}, [3, None, 3, None, 5]),
    ],
)
def test_one_number_a_tree_or_patterns(bits, expected):
    quantized = quant.quantize(params(), bits)
    assert widths(quantized) == expected
    rounded = quant.fake_quantize(params(), bits)
    assert jax.tree.all(
        jax.tree.map(
            lambda x, y: bool((x == y).all()), quant.dequantize(quantized), rounded
        )
    )


def test_patterns_see_the_leaves_that_the_mask_leaves():
    quantized = quant.quantize(params(), {"*/bias": 3, "*": 4}, mask=True)
    assert widths(quantized) == [4, 3, 4, 3, 4]
    with pytest.raises(ValueError, match=r"'\*/bias' matches none of \['conv/0', 'con"):
        quant.quantize(params(), {"*/bias": 3, "*": 4})


def test_traced_numbers_for_every_leaf():
    tree = {"a": jax.random.normal(jax.random.key(0), (4, 4))}
    tree["b"] = 2.0 * tree["a"]
    traced = jax.jit(quant.fake_quantize)(tree, {"a": 3, "b": 5})
    expected = quant.fake_quantize(tree, {"a": 3, "b": 5})
    assert jax.tree.all(jax.tree.map(jnp.allclose, traced, expected))


@pytest.mark.parametrize(
    ("bits", "error", "message"),
    [
        (
            {"head/*": 8},
            ValueError,
            r"none of \['head/\*'\] matches 'conv/0'. A last pa",
        ),
        (
            {"*": 4, "tail": 3},
            ValueError,
            r"'tail' matches none of \['conv/0', 'conv/1",
        ),
        ({"conv": 3}, ValueError, r"none of \['conv'\] matches 'head/kernel'"),
        (
            {"conv": [3], "head": 4},
            ValueError,
            r"bits must be an integer, a tree of in",
        ),
        ([4, 4], ValueError, r"bits must be an integer, a tree of integers"),
        ({"*": 9}, ValueError, r"bits must be .* or 16, got 9 \(at \['conv'\]\[0\]\)."),
        ({"*": 4.0}, TypeError, r"bits must be .* got 4.0 \(at \['conv'\]\[0\]\)"),
        (None, ValueError, r"bits must be an integer, a tree of integers"),
    ],
)
def test_misuse_is_named(bits, error, message):
    for function in (quant.quantize, quant.fake_quantize):
        with pytest.raises(error, match=message):
            function(params(), bits)


def test_paths_of_flax_leave_boxes_out():
    nnx = pytest.importorskip("flax.nnx")
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    quantized = quant.quantize(state, {"*kernel": 3})
    assert widths(quantized) == [None, 3]
    assert list(quant.quantization_error(state, quantized)) == ["bias", "kernel"]


def test_frozen_trees_take_numbers_for_subtrees():
    flax = pytest.importorskip("flax")
    frozen = flax.core.freeze({"a": {"w": jnp.ones((2, 2))}, "b[0]": jnp.ones((2, 2))})
    quantized = quant.quantize(frozen, {"a": 3, "b[0]": 8})
    assert widths(quantized) == [3, 8]
