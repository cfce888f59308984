"""A stack of layers is the same layers one by one, in every room.

The network is Flax's: layers under `nn.scan`, each with attention, normalization, a
dense layer without bias, and experts under `nn.vmap`. Unrolled, it has a tree of its
own for every layer and expert, and the same loss. The loss stands in for that of the
network, which takes minutes to compile: what matters is the tree.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import hero_jax
from hero_jax import _tree, landscape, quant

nn = pytest.importorskip("flax.linen")

LAYERS, EXPERTS, WIDTH = 2, 2, 8


class Block(nn.Module):
    """One layer."""

    @nn.compact
    def __call__(self, x, _):
        """Return the next x, and nothing."""
        y = nn.LayerNorm(name="norm")(x)
        attend = nn.MultiHeadDotProductAttention(2, name="attention")
        x = x + attend(y)
        x = x + nn.Dense(WIDTH, use_bias=False, name="mix")(jnp.tanh(x))
        experts = nn.vmap(
            nn.Dense,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            axis_size=EXPERTS,
        )
        experts = experts(WIDTH, use_bias=False, name="experts")
        return x + jnp.tanh(experts(x)).mean(0), None


BLOCKS = nn.scan(
    Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS
)()


def problem():
    """Return a smooth loss that couples all weights of the network, and weights."""
    rng = np.random.default_rng(0)
    x = jnp.zeros((4, 5, WIDTH))
    shapes = jax.eval_shape(BLOCKS.init, jax.random.key(0), x, None)["params"]
    params = {"blocks": shapes, "head": {"kernel": x[0]}}
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), params)
    flat, _ = ravel_pytree(params)
    mixed = jnp.asarray(rng.normal(size=(20, flat.size)) / flat.size**0.5)
    return lambda params: jnp.mean(jnp.cos(mixed @ ravel_pytree(params)[0])), params


def unrolled(params):
    """Return a tree for each layer and expert."""
    cut = lambda tree, n: [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(n)]
    blocks = cut(params["blocks"], LAYERS)
    blocks = [{**block, "experts": cut(block["experts"], EXPERTS)} for block in blocks]
    return {**params, "blocks": blocks}


def rolled(params):
    """Undo it."""
    stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)
    blocks = [
        {**block, "experts": stack(block["experts"])} for block in params["blocks"]
    ]
    return {**params, "blocks": stack(blocks)}


def loss_unrolled(loss_fn):
    return lambda params: loss_fn(rolled(params))


def assert_equal(a, b, rtol):
    """Compare two trees, whose paths are told of."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for name, x, y in zip(
        _tree.leaf_paths(a), jax.tree.leaves(a), jax.tree.leaves(b), strict=True
    ):
        scale = float(np.abs(y).max())
        np.testing.assert_allclose(x, y, rtol, rtol * scale, err_msg=name)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("perturbation", ["layerwise", "adaptive"])
def test_gradient(perturbation, reduction):
    loss_fn, params = problem()
    options = {"h": 0.5, "gamma": 10.0, "reduction": reduction}
    options |= {"perturbation": perturbation, "return_metrics": True}
    gradient = lambda loss_fn: jax.jit(hero_jax.hero_value_and_grad(loss_fn, **options))
    found = gradient(loss_fn)(params)
    expected = gradient(loss_unrolled(loss_fn))(unrolled(params))
    assert_equal(unrolled(found[1]), expected[1], 1e-11)
    np.testing.assert_allclose(found[2].penalty, expected[2].penalty, 1e-11)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"axis": "output"},
        {"axis": -1},
        {"axis": 0, "group_size": 3},
        {"calibration": "percentile", "scheme": "symmetric"},
    ],
    ids=str,
)
def test_grids_and_sizes(options):
    """Kernels alone are rounded, each layer of a stack on grids of its own."""
    _, params = problem()
    found = quant.quantize(params, 4, **options)
    expected = quant.quantize(unrolled(params), 4, **options)
    a, b = quant.dequantize(found), quant.dequantize(expected)
    assert_equal(unrolled(a), b, 1e-14)  # percentiles are interpolated
    assert quant.size_in_bytes(found) == quant.size_in_bytes(expected)
    changed = {
        path
        for path, x, y in zip(
            _tree.leaf_paths(params),
            jax.tree.leaves(params),
            jax.tree.leaves(a),
            strict=True,
        )
        if (x != y).any()
    }
    assert changed == {p for p in _tree.leaf_paths(params) if p.endswith("kernel")}
    scanned = quant.fake_quantize(params, 4, **options)
    assert_equal(unrolled(scanned), b, 1e-14)


def test_output_axes_of_attention():
    """One grid for each head and dim of q, k and v: over the axis `embed` alone."""
    _, params = problem()
    attention = quant.quantize(params, 4, axis="output")["blocks"]["attention"]
    shapes = {name: leaf["kernel"].scale.shape for name, leaf in attention.items()}
    per_head = (LAYERS, 1, 2, WIDTH // 2)
    assert shapes == {
        **dict.fromkeys(("query", "key", "value"), per_head),
        "out": (LAYERS, 1, 1, WIDTH),
    }


@pytest.mark.usefixtures("x64")
def test_filters():
    """Those of every layer and expert keep their norms; biases do not move."""
    _, params = problem()
    rng = np.random.default_rng(1)
    d = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), params)
    found = landscape.filter_normalized(d, params)
    expected = landscape.filter_normalized(unrolled(d), unrolled(params))
    assert_equal(unrolled(found), expected, 1e-14)
    attention = found["blocks"]["attention"]
    norms = lambda x: jnp.linalg.norm(x, axis=1)  # over `embed`
    np.testing.assert_allclose(
        norms(attention["query"]["kernel"]),
        norms(params["blocks"]["attention"]["query"]["kernel"]),
        1e-14,
    )
    assert not attention["query"]["bias"].any()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_what_is_known_of_leaves_reaches_every_room(reduction):
    """One kernel of three axes, which could be a convolution's: nothing tells."""
    rng = np.random.default_rng(0)
    W = {"kernel": jnp.asarray(rng.normal(size=(2, 3, 4)))}
    each = {"kernel": [*W["kernel"]]}
    known = {"leaves": {"kernel": {"layer_axes": 1}}}
    mixed = jnp.asarray(rng.normal(size=(6, 24)) / 5)
    loss = lambda W: jnp.sum(jnp.cos(mixed @ jnp.ravel(jnp.asarray(W["kernel"]))))
    hero = {"h": 0.5, "gamma": 1.0, "reduction": reduction}

    def by_function(W, **options):
        return hero_jax.hero_value_and_grad(loss, **hero, **options)(W)[1]

    def by_link(W, **options):
        tx = hero_jax.hero(**hero, **options)
        grad_fn = jax.grad(loss)
        return tx.update(grad_fn(W), tx.init(W), W, grad_fn=grad_fn)[0]

    def by_quantizer(W, **options):
        return quant.fake_quantize(W, 3, **options)

    def by_filters(W, **options):
        ones = jax.tree.map(jnp.ones_like, W)
        return landscape.filter_normalized(ones, W, **options)

    for room in (by_function, by_link, by_quantizer, by_filters):
        found, expected = room(W, **known)["kernel"], room(each)["kernel"]
        np.testing.assert_allclose(found, expected, 1e-12, err_msg=room.__name__)
        assert not np.allclose(room(W)["kernel"], expected, 1e-3), room.__name__
