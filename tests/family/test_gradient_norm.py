"""Penalties on the gradient's norm: finite differences, and what they turn into."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import hero_jax
from tests.problems import mlp_batch, mlp_loss, mlp_params, quadratic

METHODS = {
    "GRAD-L1": (hero_jax.family.grad_l1_value_and_grad, lambda g: np.abs(g).sum()),
    "GNP": (hero_jax.family.gnp_value_and_grad, np.linalg.norm),
}


def float64_close(actual, expected, tolerance=1e-10):
    """Float64 rounds at 1e-16; sums of a few dozen terms leave 1e-10 far away."""
    chex.assert_trees_all_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("method", METHODS)
def test_equals_finite_differences_of_the_penalized_loss(method):
    value_and_grad, norm = METHODS[method]
    params, batch = mlp_params(), mlp_batch()
    flat, unravel = ravel_pytree(params)
    loss = jax.jit(lambda w: mlp_loss(unravel(w), *batch))
    grad = jax.jit(jax.grad(loss))
    strength, step = 0.3, 1e-6

    def penalized(w):
        return float(loss(w)) + strength * norm(np.asarray(grad(w)))

    value, gradient = jax.jit(value_and_grad(mlp_loss, strength=strength))(
        params, *batch
    )
    float64_close(value, loss(flat))
    differences = [
        (penalized(flat + step * e) - penalized(flat - step * e)) / (2 * step)
        for e in np.eye(flat.size)
    ]
    # Central differences: error step^2 + eps / step, below 1e-8 here.
    np.testing.assert_allclose(
        ravel_pytree(gradient)[0], differences, rtol=1e-6, atol=1e-8
    )


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("method", "options"),
    [
        *(("GRAD-L1", {}), ("GRAD-L1", {"radius": 1e-6})),
        *(("GNP", {}), ("GNP", {"radius": 1e-6})),
    ],
)
def test_mask_selects_the_penalized_leaves(method, options):
    value_and_grad, _ = METHODS[method]
    params, batch = mlp_params(), mlp_batch()
    order = {"GRAD-L1": 1, "GNP": 2}[method]

    def norm_of_kernels(params):
        g = jax.tree.leaves(jax.grad(mlp_loss)(params, *batch))
        return jnp.linalg.norm(
            jnp.concatenate([x.ravel() for x in g if x.ndim >= 2]), order
        )

    expected = jax.tree.map(
        lambda a, b: a + 0.3 * b,
        jax.grad(mlp_loss)(params, *batch),
        jax.jit(jax.grad(norm_of_kernels))(params),  # reverse over reverse
    )
    masked = value_and_grad(
        mlp_loss,
        strength=0.3,
        penalty_mask=lambda p: jax.tree.map(lambda x: x.ndim >= 2, p),
        **options,
    )
    _, gradient = jax.jit(masked)(params, *batch)
    # A difference over r errs by r times the third derivative.
    float64_close(gradient, expected, 1e-4 if options else 1e-10)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("method", METHODS)
def test_of_a_quadratic(method):
    """Of W'AW/2 a difference of gradients is exact, whatever the radius."""
    A = quadratic([5.0, 2.0, 0.5, 0.0, -1.0])
    W = np.random.default_rng(1).normal(size=5)
    g = A @ W
    v = np.sign(g) if method == "GRAD-L1" else g / np.linalg.norm(g)
    expected = g + 0.3 * A @ v
    for radius in (None, 0.1, jnp.float64(10.0)):
        _, gradient = METHODS[method][0](
            lambda w: w @ A @ w / 2, strength=0.3, radius=radius
        )(jnp.asarray(W))
        float64_close(gradient, expected)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_gnp_with_the_radius_for_strength_is_sam():
    params, batch = mlp_params(), mlp_batch()
    sam = hero_jax.hero_value_and_grad(
        mlp_loss, h=0.2, gamma=0.0, perturbation="normalized"
    )
    gnp = hero_jax.family.gnp_value_and_grad(mlp_loss, strength=0.2, radius=0.2)
    float64_close(gnp(params, *batch), sam(params, *batch))


@pytest.mark.parametrize("options", [{}, {"radius": 0.1}])
@pytest.mark.parametrize("method", METHODS)
def test_zero_gradient_stays_zero(method, options):
    value_and_grad = METHODS[method][0](
        lambda w: jnp.sum(w**2), strength=1.0, **options
    )
    _, gradient = value_and_grad(jnp.zeros(3))
    np.testing.assert_array_equal(gradient, np.zeros(3))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("options", [{}, {"radius": 0.1}])
@pytest.mark.parametrize("method", METHODS)
def test_a_strength_has_no_unit(method, options):
    """The norm of a gradient is in proportion to the loss, as the loss is."""
    params, batch = mlp_params(), mlp_batch()
    value_and_grad, _ = METHODS[method]
    scale = 2.0**15
    plain, scaled = (
        jax.jit(value_and_grad(loss, strength=0.3, **options))(params, *batch)
        for loss in (mlp_loss, lambda *args: scale * mlp_loss(*args))
    )
    float64_close(jax.tree.map(lambda x: x / scale, scaled), plain)


@pytest.mark.parametrize("radius", [None, 0.1])
def test_what_is_not_finite_is_not_hidden(radius):
    """The loss of a rectified network may be finite where a gradient is not."""
    value_and_grad = hero_jax.family.gnp_value_and_grad(
        lambda w: jnp.sum(jnp.sqrt(w)), strength=1.0, radius=radius
    )
    _, gradient = value_and_grad(jnp.array([0.0, 1.0]))
    assert not np.isfinite(gradient).all()


def test_half_precision_is_perturbed_in_float32():
    """A step of norm 0.05 over 1,000 weights at 1 would be rounded away in bfloat16."""
    W = 1.15625  # a bfloat16, of which the cube is none
    loss = lambda w: jnp.sum(w.astype(jnp.float32) ** 4) / 4
    _, gradient = hero_jax.family.gnp_value_and_grad(loss, strength=5.0, radius=0.05)(
        jnp.full(1000, W, jnp.bfloat16)
    )
    expected = W**3 + 5.0 / 0.05 * ((W + 0.05 / np.sqrt(1000)) ** 3 - W**3)
    # bfloat16 has 8 bits: the result itself is rounded by up to 2^-8.
    np.testing.assert_allclose(np.float32(gradient), expected, rtol=2**-8)


def test_errors():
    loss = lambda w: jnp.sum(w**2)
    for value_and_grad, _ in METHODS.values():
        with pytest.raises(TypeError, match=r"loss_fn must be a callable"):
            value_and_grad(None, strength=0.1)
        with pytest.raises(ValueError, match=r"strength must be finite and >= 0"):
            value_and_grad(loss, strength=-1)
        with pytest.raises(ValueError, match=r"radius must be finite and > 0, got 0"):
            value_and_grad(loss, strength=0.1, radius=0.0)
