"""Products and norms against the dense Hessian, and its Gauss-Newton matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from hero_jax import curvature, perturbation
from tests import problems
from tests.curvature.dense import classifier, classifier_data, criterion, outputs

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize("batch_size", [None, 3, 7])
def test_hvp_is_the_product_with_the_dense_hessian(dense, batch_size):
    v = dense.vector()
    Hv = curvature.hvp(
        problems.mlp_loss,
        dense.params,
        dense.unravel(v),
        *dense.args,
        batch_size=batch_size,
    )
    assert jax.tree.structure(Hv) == jax.tree.structure(dense.params)
    np.testing.assert_allclose(ravel_pytree(Hv)[0], dense.H @ v, rtol=1e-10)


@pytest.mark.parametrize("batch_size", [None, 4])
def test_gauss_newton_is_the_product_with_its_dense_form(batch_size):
    params, x, labels = classifier_data()
    flat, unravel = ravel_pytree(params)
    v = np.random.default_rng(1).normal(size=flat.size)
    J = jax.jit(jax.jacobian(lambda w: outputs(unravel(w), x, labels)))(flat)
    J = np.asarray(J).reshape(-1, flat.size)
    y = outputs(params, x, labels)
    C = jax.jit(jax.hessian(lambda y: criterion(y.reshape(-1, 3), x, labels)))
    G = J.T @ np.asarray(C(y.ravel())) @ J
    Gv = curvature.hvp(
        classifier,
        params,
        unravel(v),
        x,
        labels,
        matrix="gauss_newton",
        batch_size=batch_size,
    )
    np.testing.assert_allclose(ravel_pytree(Gv)[0], G @ v, rtol=1e-10, atol=1e-14)


def test_gauss_newton_of_convolutions_that_have_reverse_mode_only():
    """As a `jax.custom_vjp` has."""
    images = jax.random.normal(jax.random.key(0), (2, 6, 6, 3))
    kernels = jax.random.normal(jax.random.key(1), (2, 3, 3, 3, 3))
    v = jax.random.normal(jax.random.key(2), kernels.shape)

    def conv(x, kernel):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=layout
        )

    reverse_only = jax.custom_vjp(conv)
    reverse_only.defvjp(
        lambda *args: (conv(*args), args), lambda args, dy: jax.vjp(conv, *args)[1](dy)
    )

    def logits(conv, kernels):
        x = images
        for kernel in kernels:
            x = jnp.tanh(conv(x, kernel))
        return x.sum((1, 2))

    loss = curvature.ComposedLoss(
        lambda kernels: logits(reverse_only, kernels),
        lambda y: jnp.sum(jax.nn.logsumexp(y, axis=1)),
    )
    Gv = curvature.hvp(loss, kernels, v, matrix="gauss_newton")
    f = lambda kernels: logits(conv, kernels)

    @jax.jit
    def product(v):
        y, Jv = jax.jvp(f, (kernels,), (v,))
        p = jax.nn.softmax(y)
        CJv = p * Jv - p * jnp.sum(p * Jv, axis=1, keepdims=True)
        return jax.vjp(f, kernels)[1](CJv)

    (expected,) = product(v)
    np.testing.assert_allclose(Gv, expected, rtol=1e-9, atol=1e-12)


def test_hvp_in_half_precision_is_taken_in_single():
    w, v = jnp.ones(3, jnp.bfloat16), jnp.ones(3, jnp.bfloat16)
    Hv = curvature.hvp(lambda w: jnp.sum(w**3) / 6.0, w, v)
    assert Hv.dtype == jnp.float32
    np.testing.assert_allclose(Hv, 1.0, rtol=1e-6)


def test_hvp_drops_the_auxiliary_output_and_works_under_transformations(dense):
    def loss_fn(params, x, y):
        return problems.mlp_loss(params, x, y), "not an array"

    vs = np.stack([dense.vector(0), dense.vector(1)])

    @jax.jit
    @jax.vmap
    def products(v):
        return ravel_pytree(
            curvature.hvp(
                loss_fn, dense.params, dense.unravel(v), *dense.args, has_aux=True
            )
        )[0]

    np.testing.assert_allclose(products(vs), vs @ dense.H, rtol=1e-10)


@pytest.mark.parametrize(
    ("direction", "batch_size"),
    [("layerwise", 3), ("adaptive", None), ("normalized", 1)],
)
def test_hessian_norm_along_a_named_direction(dense, direction, batch_size):
    z = problems.numpy_direction(direction, dense.W, dense.g, dense.slices)
    norm = curvature.hessian_norm(
        problems.mlp_loss,
        dense.params,
        *dense.args,
        direction=direction,
        batch_size=batch_size,
    )
    np.testing.assert_allclose(norm, np.linalg.norm(dense.H @ z), rtol=1e-10)


def test_hessian_norm_along_any_vector_is_not_normalized(dense):
    v = dense.vector()
    for z in (dense.unravel(v), lambda params, grads: dense.unravel(jnp.asarray(v))):
        norm = curvature.hessian_norm(
            problems.mlp_loss, dense.params, *dense.args, direction=z
        )
        np.testing.assert_allclose(norm, np.linalg.norm(dense.H @ v), rtol=1e-10)


@pytest.mark.parametrize("h", [0.5, np.float64(1e-5)])
def test_hessian_norm_by_the_papers_finite_difference(dense, h):
    z = problems.numpy_direction("layerwise", dense.W, dense.g, dense.slices)
    loss = lambda w: problems.mlp_loss(dense.unravel(w), *dense.args)
    gradient = np.asarray(jax.grad(loss)(jnp.asarray(dense.W + h * z)))
    norm = curvature.hessian_norm(problems.mlp_loss, dense.params, *dense.args, h=h)
    expected = np.linalg.norm(gradient - dense.g) / h
    np.testing.assert_allclose(norm, expected, rtol=1e-9)
    if h < 1e-3:  # the derivative itself, but for terms of order h
        np.testing.assert_allclose(norm, np.linalg.norm(dense.H @ z), rtol=1e-4)


def test_hessian_norm_compiles_once_for_all_h(dense):
    calls = []

    def loss_fn(params):
        calls.append(None)
        return problems.mlp_loss(params, *dense.args)

    norms = [curvature.hessian_norm(loss_fn, dense.params, h=h) for h in (0.1, 0.2)]
    assert norms[0] != norms[1]
    traced = len(calls)
    curvature.hessian_norm(loss_fn, dense.params, h=0.3)
    assert len(calls) == traced


def test_progress_counts_batches_of_products(dense):
    seen = []
    curvature.top_eigenvalues(
        problems.mlp_loss,
        dense.params,
        *dense.args,
        steps=5,
        batch_size=3,
        progress=lambda done, total: seen.append((done, total)),
    )
    # 5 steps and a residual, of 3 + 3 + 1 examples each
    assert sorted(seen) == [(done, 18) for done in range(1, 19)]
    seen.clear()
    curvature.loss_and_gradient(
        problems.mlp_loss,
        dense.params,
        *dense.args,
        batch_size=3,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert sorted(seen) == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size must be an integer >= 1, got 0"),
        ({"batch_size": 2.0}, TypeError, "batch_size must be an integer"),
        (
            {"batch_size": 2, "batch_argnums": (3,)},
            TypeError,
            "argument 3, .* got 3 pos",
        ),
        ({"batch_size": 2, "batch_argnums": (0,)}, ValueError, "not name the weights"),
        ({"progress": True}, TypeError, "progress must be a callable"),
        ({"batch_size": 2, "batch_argnums": "x"}, TypeError, "batch_argnums must name"),
        ({"matrix": "fisher"}, ValueError, "matrix must be one of .*'fisher'"),
        ({"matrix": "gauss_newton"}, TypeError, "needs loss_fn to be a ComposedLoss"),
        ({"batchsize": 2}, TypeError, "unknown options .'batchsize'"),
    ],
)
def test_options_out_of_range(kwargs, error, message):
    x, y = problems.mlp_batch(dtype=jnp.float32)
    params = problems.mlp_params(dtype=jnp.float32)
    with pytest.raises(error, match=message):
        curvature.hessian_norm(problems.mlp_loss, params, x, y, **kwargs)


def test_bad_arguments():
    w = jnp.ones(3)
    square = lambda w: jnp.sum(w**2)
    with pytest.raises(TypeError, match="loss_fn must be a callable"):
        curvature.hvp(3, w, w)
    with pytest.raises(ValueError, match="vector must have the shapes of params"):
        curvature.hvp(square, w, jnp.ones(2))
    with pytest.raises(TypeError, match="params must have real floating-point"):
        curvature.hvp(square, jnp.arange(3), w)
    with pytest.raises(TypeError, match=r"loss_fn must return a scalar loss"):
        curvature.hvp(lambda w: w**2, w, w)
    with pytest.raises(TypeError, match=r"got a tuple of 2.*pass has_aux=True"):
        curvature.hvp(lambda w: (square(w), None), w, w)
    with pytest.raises(TypeError, match=r"a pair \(loss, aux\) with has_aux=True"):
        curvature.hvp(square, w, w, has_aux=True)
    with pytest.raises(ValueError, match=r"\(1, 2\), .* its default .*\(2,\), \(3,\)"):
        curvature.hvp(lambda w, x, y: 0.0, w, w, jnp.ones(2), jnp.ones(3), batch_size=2)
    with pytest.raises(ValueError, match=r"got the shapes .\(\)"):
        curvature.hvp(lambda w, x: 0.0, w, w, 2.0, batch_size=2)
    with pytest.raises(ValueError, match="h must be finite and > 0"):
        curvature.hessian_norm(square, w, h=0.0)
    with pytest.raises(ValueError, match="perturbation must be one of"):
        curvature.hessian_norm(square, w, direction="sideways")
    with pytest.raises(ValueError, match="direction must have the tree structure"):
        curvature.hessian_norm(square, w, direction={"w": w})
    with pytest.raises(ValueError, match="direction's result must have the shapes"):
        curvature.hessian_norm(square, w, direction=lambda w, g: jnp.ones(2))
    composed = curvature.ComposedLoss(lambda w: w, square)
    vector = curvature.ComposedLoss(lambda w: w, lambda y: y)
    with pytest.raises(TypeError, match="criterion must return a scalar"):
        curvature.hvp(vector, w, w, matrix="gauss_newton")
    with pytest.raises(ValueError, match="h must be None with matrix='gauss_newton'"):
        curvature.hessian_norm(composed, w, h=1.0, matrix="gauss_newton")


def test_zero_and_nonfinite_gradients():
    w = jnp.ones(3)
    assert curvature.hessian_norm(lambda w: 0.0 * jnp.sum(w), w) == 0.0
    assert jnp.isnan(curvature.hessian_norm(lambda w: jnp.nan * jnp.sum(w**2), w))
    z = perturbation.layerwise(w, jnp.zeros(3))
    assert curvature.hessian_norm(lambda w: jnp.sum(w**2), w, direction=z) == 0.0


@pytest.mark.parametrize("batch_size", [None, 2, 100])
def test_loss_and_gradient_over_all_examples(dense, batch_size):
    loss, g = curvature.loss_and_gradient(
        problems.mlp_loss, dense.params, *dense.args, batch_size=batch_size
    )
    expected = problems.mlp_loss(dense.params, *dense.args)
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    np.testing.assert_allclose(ravel_pytree(g)[0], dense.g, rtol=1e-10)
