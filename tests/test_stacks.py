"""A stack of layers is the same layers one by one, in every room.

The network is Flax's: layers under `nn.scan`, each with attention, normalization, a
dense layer without bias, and experts under `nn.vmap`. Unrolled, it has a tree of its
own for every layer and expert, and the same loss. The loss stands in for that of the
network, which takes minutes to compile: what matters is the tree.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from hero_jax import _tree, curvature, landscape, mixed_precision, quant
from tests import paper

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


@functools.cache
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
    params = jax.tree.map(np.asarray, params)
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


def in_stack(path):
    """Return what the layer at a path of the unrolled tree is called in the stack."""
    keys = path.split("/")
    numbers = [key for key in keys if key.isdigit()]
    stack = "/".join(key for key in keys if not key.isdigit())
    return f"{stack}[{', '.join(numbers)}]" if numbers else stack


class Dense:
    """The network as a function of one vector, and the kernels of the unrolled one.

    Attributes:
      W, f: vector of all weights, and the loss of such a vector.
      H: Hessian.
      layers: path of the unrolled kernel to the places of its weights in W.
    """

    def __init__(self, loss_fn, params):
        W, unravel = ravel_pytree(params)
        self.f = jax.jit(lambda W: loss_fn(unravel(W)))
        self.W, self.H = np.asarray(W), np.asarray(jax.jit(jax.hessian(self.f))(W))
        places = unrolled(unravel(jnp.arange(W.size, dtype=W.dtype)))
        self.layers = {
            path: np.asarray(x, int).ravel()
            for path, x in zip(
                _tree.leaf_paths(places), jax.tree.leaves(places), strict=True
            )
            if path.endswith("kernel")
        }

    def block(self, path):
        return self.H[np.ix_(self.layers[path], self.layers[path])]

    def change(self, d):
        """Return `d'Hd / 2`, and what d does to the loss."""
        return d @ self.H @ d / 2, self.f(self.W + d) - self.f(self.W)


def assert_equal(a, b, rtol):
    """Compare two trees, whose paths are told of."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for name, x, y in zip(
        _tree.leaf_paths(a), jax.tree.leaves(a), jax.tree.leaves(b), strict=True
    ):
        scale = float(np.abs(y).max())
        np.testing.assert_allclose(x, y, rtol, rtol * scale, err_msg=name)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("perturbation", "reduction"),
    [
        ("layerwise", "sum"),
        pytest.param("adaptive", "mean", marks=pytest.mark.slow),
    ],
)
def test_gradient(perturbation, reduction):
    loss_fn, params = problem()
    options = {"h": 0.5, "gamma": 10.0, "reduction": reduction}
    options |= {"perturbation": perturbation, "return_metrics": True}
    gradient = lambda loss_fn: jax.jit(paper.hero_value_and_grad(loss_fn, **options))
    found = gradient(loss_fn)(params)
    expected = gradient(loss_unrolled(loss_fn))(unrolled(params))
    assert_equal(unrolled(found[1]), expected[1], 1e-11)
    np.testing.assert_allclose(found[2].penalty, expected[2].penalty, 1e-11)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"axis": "output"},
        pytest.param({"axis": -1}, marks=pytest.mark.slow),
        {"axis": 0, "group_size": 3},
        {"calibration": "percentile", "scheme": "symmetric"},
    ],
    ids=str,
)
def test_grids_and_sizes(options):
    """Kernels alone are rounded, each layer of a stack on grids of its own."""
    _, params = problem()
    quantize = jax.jit(lambda params: quant.quantize(params, 4, **options))
    found, expected = quantize(params), quantize(unrolled(params))
    a, b = map(jax.jit(quant.dequantize), (found, expected))
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
    scanned = jax.jit(lambda params: quant.fake_quantize(params, 4, **options))(params)
    assert_equal(unrolled(scanned), b, 1e-14)


@pytest.mark.usefixtures("x64")
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
    normalized = jax.jit(landscape.filter_normalized)
    found = normalized(d, params)
    expected = normalized(unrolled(d), unrolled(params))
    assert_equal(unrolled(found), expected, 1e-14)
    attention = found["blocks"]["attention"]
    norms = lambda x: np.linalg.norm(x, axis=1)  # over `embed`
    np.testing.assert_allclose(
        norms(attention["query"]["kernel"]),
        norms(params["blocks"]["attention"]["query"]["kernel"]),
        1e-14,
    )
    assert not attention["query"]["bias"].any()


@pytest.mark.slow
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
        return paper.hero_value_and_grad(loss, **hero, **options)(W)[1]

    def by_link(W, **options):
        tx = paper.hero(**hero, **options)
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


STEPS = 25
"""The Hessian has rank 20: Lanczos exhausts it, and deflation leaves nothing."""


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_curvature_of_each_layer():
    loss_fn, params = problem()
    dense = Dense(loss_fn, params)
    moved = quant.fake_quantize(params, 3)
    d = ravel_pytree(moved)[0] - dense.W
    exact = {"num_samples": 2, "deflation": STEPS}
    top = curvature.layer_eigenvalues(loss_fn, params, steps=STEPS)
    own = curvature.layer_traces(loss_fn, params, **exact)
    trace = curvature.trace(loss_fn, params, **exact)
    change = curvature.loss_change(loss_fn, params, moved).layers
    names = {in_stack(path) for path in dense.layers}
    assert names == {*top} == {*own} == {*change} < {*trace.layers}
    for path, where in dense.layers.items():
        name, block = in_stack(path), dense.block(path)
        alone = np.zeros_like(dense.W)
        alone[where] = d[where]
        second_order, measured = dense.change(alone)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-9, err_msg=name)
        close(top[name], np.linalg.eigvalsh(block)[-1])
        for found in (own[name].value, trace.layers[name].value):
            close(found, np.trace(block), atol=1e-12)
        close(trace.averages[name].value, np.trace(block) / where.size, atol=1e-14)
        close(change[name].second_order, second_order)
        close(change[name].measured, measured, atol=1e-14)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_sensitivity_is_that_of_all_layers_with_the_same_bits():
    loss_fn, params = problem()
    choices = (2, 3)
    dense = Dense(loss_fn, params)
    errors = mixed_precision.weight_errors(params, choices)
    d = mixed_precision.weight_errors(unrolled(params), choices).layers
    bytes_of = mixed_precision.layer_sizes(unrolled(params), choices)
    sizes = mixed_precision.layer_sizes(params, choices)
    problem_of = (loss_fn, params, errors)
    top = mixed_precision.eigenvalue(*problem_of, steps=STEPS)
    mean = mixed_precision.average_trace(*problem_of, num_samples=2, deflation=STEPS)
    noisy = mixed_precision.average_trace(*problem_of, num_samples=4)
    estimates = curvature.layer_traces(loss_fn, params, num_samples=4)
    form = mixed_precision.quadratic(*problem_of)
    loss = mixed_precision.measured(*problem_of)
    stacks = {}
    for path in dense.layers:
        stacks.setdefault(in_stack(path).split("[")[0], []).append(path)
    assert stacks.keys() == sizes.keys() == top.layers.keys() == form.layers.keys()
    for stack, paths in stacks.items():
        assert sizes[stack].weights == sum(bytes_of[p].weights for p in paths)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-9, err_msg=stack)
        for k, bits in enumerate(choices):
            assert sizes[stack].bytes[bits] == sum(
                bytes_of[p].bytes[bits] for p in paths
            )
            together = np.zeros_like(dense.W)
            tops, means, stderrs = [], [], []
            for path in paths:
                error = together[dense.layers[path]] = np.ravel(d[path][k])
                half, block = error @ error / 2, dense.block(path)
                tops.append(np.linalg.eigvalsh(block)[-1] * half)
                means.append(np.trace(block) / len(block) * half)
                stderrs.append(estimates[in_stack(path)].stderr / len(block) * half)
            second_order, measured = dense.change(together)
            close(top.layers[stack][k], sum(tops))
            close(mean.layers[stack][k], sum(means), atol=1e-12)
            close(noisy.stderr[stack][k], np.linalg.norm(stderrs))
            close(form.layers[stack][k], second_order)
            close(loss.layers[stack][k], measured, atol=1e-14)


@pytest.mark.usefixtures("x64")
def test_spread_is_that_of_all_layers_on_the_same_examples():
    """Eigenvalues of both layers rise and fall together, and so does their sum."""
    rng = np.random.default_rng(0)
    W = {"kernel": jnp.asarray(rng.normal(size=(2, 3, 4)))}
    W["bias"] = jnp.zeros((2, 4))
    scale = jnp.asarray(rng.uniform(1, 2, size=(6, 2)))
    loss = lambda W, c: (c @ jnp.square(W["kernel"]).sum((1, 2))).mean() / 2
    errors = mixed_precision.weight_errors(W, (3,))
    found = mixed_precision.eigenvalue_spread(loss, W, errors, scale, subsets=3)
    tops = np.asarray(scale).reshape(3, 2, 2).mean(1)  # of parts and layers
    half = np.square(errors.layers["kernel"][0]).sum((1, 2)) / 2
    expected = (tops.mean(0) + tops.std(0, ddof=1)) @ half
    np.testing.assert_allclose(found.layers["kernel"], [expected], 1e-12)
    stderr = (tops @ half).std(ddof=1) / 3**0.5
    np.testing.assert_allclose(found.stderr["kernel"], [stderr], 1e-12)


@pytest.mark.usefixtures("x64")
def test_what_is_known_of_leaves_reaches_sensitivities():
    rng = np.random.default_rng(0)
    W = {"kernel": jnp.asarray(rng.normal(size=(2, 3, 4)))}
    known = {"leaves": {"kernel": {"layer_axes": 1}}}
    loss = lambda W: jnp.array([1.0, 9.0]) @ jnp.square(W["kernel"]).sum((1, 2))
    errors = mixed_precision.weight_errors(W, (3,), **known)
    found = mixed_precision.eigenvalue(loss, W, errors, **known)
    squares = np.square(errors.layers["kernel"][0]).sum((1, 2))
    np.testing.assert_allclose(found.layers["kernel"], [squares @ [1, 9]], 1e-12)
