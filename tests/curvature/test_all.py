"""What holds for every diagnostic of a loss."""

import functools
import gc
import re
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from hero_jax import curvature, landscape, mixed_precision

PARAMS = {
    "a": jnp.linspace(-0.5, 0.7, 12, dtype=jnp.float32).reshape(4, 3),
    "b": jnp.linspace(0.4, -0.3, 3, dtype=jnp.float32).reshape(3, 1),
}
X = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)


def network(params, x=X):
    """A loss without matrix products, which differ in precision from GPU to CPU."""
    hidden = jnp.tanh(jnp.sum(x[:, :, None] * params["a"], axis=1))
    y = jnp.sum(hidden * params["b"][:, 0], axis=1) - x[:, 0]
    return jnp.mean(y**2 + y**4 / 4)


@functools.cache
def errors():
    return mixed_precision.weight_errors(PARAMS, (2, 3))


def sizes():
    return {"a": 12, "b": 3}


TWICE = jax.tree.map(lambda w: 2.0 * w, PARAMS)
DIAGNOSTICS = {
    "hvp": lambda f: curvature.hvp(f, PARAMS, PARAMS),
    "gradient": lambda f: curvature.loss_and_gradient(f, PARAMS),
    "hessian_norm": lambda f: curvature.hessian_norm(f, PARAMS, direction=PARAMS),
    "top": lambda f: curvature.top_eigenvalues(f, PARAMS, k=2),
    "layers": lambda f: curvature.layer_eigenvalues(f, PARAMS),
    "trace": lambda f: curvature.trace(f, PARAMS, num_samples=4),
    "deflated": lambda f: curvature.trace(f, PARAMS, num_samples=4, deflation=3),
    "layer_traces": lambda f: curvature.layer_traces(f, PARAMS, num_samples=4),
    "density": lambda f: curvature.spectral_density(f, PARAMS, steps=6),
    "loss_change": lambda f: curvature.loss_change(f, PARAMS, TWICE),
    "eigenvalue": lambda f: mixed_precision.eigenvalue(f, PARAMS, errors()),
    "spread": lambda f: mixed_precision.eigenvalue_spread(
        f, PARAMS, errors(), X, subsets=2, steps=3
    ),
    "average_trace": lambda f: mixed_precision.average_trace(
        f, PARAMS, errors(), num_samples=4
    ),
    "quadratic": lambda f: mixed_precision.quadratic(
        f, PARAMS, errors(), pairwise=True
    ),
    "measured": lambda f: mixed_precision.measured(f, PARAMS, errors()),
    "surface": lambda f: landscape.loss_surface(
        f, PARAMS, [PARAMS], [jnp.linspace(0.0, 1.0, 3)]
    ),
}
OTHERS = {
    "harm": lambda f: curvature.smallest_harmful_step(
        f, PARAMS, PARAMS, loss_increase=1.0, max_step=9.0
    ),
    "greedy": lambda f: mixed_precision.greedy_frontier(f, PARAMS, errors(), sizes()),
}
"""These give no numbers in proportion to the loss."""


@pytest.fixture(params=DIAGNOSTICS)
def diagnostic(request):
    return DIAGNOSTICS[request.param]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*DIAGNOSTICS, *OTHERS])
def test_nothing_of_a_loss_stays_when_it_is_gone(name):
    """Neither the function nor its data; and it is compiled once while it lives."""
    diagnostic = {**DIAGNOSTICS, **OTHERS}[name]
    calls = []

    def make(scale):
        def loss(params, x=X):
            calls.append(None)
            return jnp.sum(scale) * network(params, x)

        return loss

    scale = jnp.ones(1000) / 1000
    loss = make(scale)
    diagnostic(loss)
    traced = len(calls)
    diagnostic(loss)
    assert len(calls) == traced
    gone = weakref.ref(loss), weakref.ref(scale)
    del loss, scale
    gc.collect()
    assert [x() for x in gone] == [None, None]


def test_nor_of_a_direction_or_of_a_function_for_statistics():
    """The loss stays, as that of a module does."""

    def make(scale):
        direction = lambda w, g: jax.tree.map(lambda x: jnp.sum(scale) * x, g)
        stats_fn = lambda w, x: x * jnp.sum(scale)
        return direction, stats_fn

    scale = jnp.ones(1000)
    direction, stats_fn = make(scale)
    curvature.hessian_norm(network, PARAMS, direction=direction)
    axis = [jnp.linspace(0.0, 1.0, 3)]
    landscape.loss_surface(network, PARAMS, [PARAMS], axis, X, stats_fn=stats_fn)
    gone = [weakref.ref(x) for x in (scale, direction, stats_fn)]
    del scale, direction, stats_fn
    gc.collect()
    assert [x() for x in gone] == [None] * 3


@pytest.mark.slow
@pytest.mark.parametrize("factor", [1e-25, pytest.param(1e20, marks=pytest.mark.slow)])
def test_results_are_in_proportion_to_the_loss(diagnostic, factor):
    """In float32, whose squares end at 1e-38 and 1e38."""
    factor = np.float32(factor)
    scaled = jax.tree.leaves(diagnostic(lambda *args: factor * network(*args)))
    largest = 0.0
    for actual, x in zip(scaled, jax.tree.leaves(diagnostic(network)), strict=True):
        if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
            continue
        x, ratio = np.asarray(x, np.float64), np.asarray(actual, np.float64) / factor
        if x.shape in {(2, *w.shape) for w in PARAMS.values()}:
            continue  # eigenvectors have length 1
        if x.shape == (4, 6) and np.all(x >= 0.0) and np.allclose(x.sum(1), 1.0):
            continue  # the weights of a density
        largest = max(largest, np.abs(x).max())
        # Rounding, of numbers of one array and so of one size.
        np.testing.assert_allclose(ratio, x, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.slow
@pytest.mark.parametrize("factor", [1e-25, 1e20])
def test_eigenvalues_and_traces_of_any_scale_are_those_of_the_dense_hessian(factor):
    flat, unravel = ravel_pytree(PARAMS)
    H = jax.jit(jax.hessian(lambda w: network(unravel(w))))(flat)
    H = np.asarray(H, np.float64)
    loss = lambda params: np.float32(factor) * network(params)
    top = curvature.top_eigenvalues(loss, PARAMS, k=2, steps=15)
    expected = factor * np.linalg.eigvalsh(H)[:-3:-1]
    np.testing.assert_allclose(top.values, expected, rtol=1e-4)
    assert np.all(top.residuals < 1e-4 * expected[0])
    tr = curvature.trace(loss, PARAMS, num_samples=200).whole
    assert abs(tr.value - factor * np.trace(H)) < 4.0 * tr.stderr
    off = np.sum(np.square(H)) - np.sum(np.square(np.diag(H)))
    np.testing.assert_allclose(tr.stderr, factor * np.sqrt(2 * off / 200), rtol=0.3)
    density = curvature.spectral_density(loss, PARAMS, num_samples=50, steps=15)
    mean = density.moment(1)
    assert abs(mean.value - factor * np.trace(H) / len(H)) < 4.0 * mean.stderr


@pytest.mark.parametrize("name", [*DIAGNOSTICS, "harm"])
def test_products_of_ours_have_full_precision(name):
    """On GPUs and TPUs float32 products are of rounded factors by default."""
    errors()  # outside of the trace
    diagnostic = {**DIAGNOSTICS, **OTHERS}[name]
    program = str(jax.make_jaxpr(lambda: diagnostic(network))())
    products = re.findall(r"dot_general\[(.*?)\n *\]", program, re.DOTALL)
    assert len(products) == program.count("dot_general[")
    for product in products:
        assert "precision=(Precision.HIGHEST, Precision.HIGHEST)" in product


@pytest.mark.slow
def test_single_precision_stays_that(diagnostic, x64):
    del x64
    for x in jax.tree.leaves(diagnostic(network)):
        assert jnp.result_type(x) != jnp.float64


@pytest.mark.parametrize(
    "diagnostic",
    [
        lambda f, w, **options: curvature.top_eigenvalues(f, w, X, k=2, **options),
        lambda f, w, **options: curvature.trace(f, w, X, deflation=3, **options),
        lambda f, w, **options: curvature.layer_traces(f, w, X, deflation=3, **options),
    ],
)
@pytest.mark.parametrize("options", [{}, {"batch_size": 3}])
def test_the_product_stands_in_the_program_once(diagnostic, options):
    """It is what takes long to compile."""
    program = str(jax.make_jaxpr(lambda w: diagnostic(network, w, **options))(PARAMS))
    product = str(
        jax.make_jaxpr(lambda w: curvature.hvp(network, w, w, X, **options))(PARAMS)
    )
    assert program.count("tanh") == product.count("tanh") > 0
