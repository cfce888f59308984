"""GSAM against its formula in numpy, and against what it is for."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import hero_jax
from tests.problems import (
    DIRECTIONS,
    mlp_batch,
    mlp_loss,
    mlp_params,
    numpy_direction,
    slices,
)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_equals_numpy(direction):
    params, batch = mlp_params(), mlp_batch()
    flat, unravel = ravel_pytree(params)
    grad = jax.jit(jax.grad(lambda w: mlp_loss(unravel(w), *batch)))
    W, g = np.asarray(flat), np.asarray(grad(flat))
    U = W + 0.3 * numpy_direction(direction, W, g, slices(params))
    dL = np.asarray(grad(jnp.asarray(U)))
    across = g - (g @ dL) / (dL @ dL) * dL
    value, gradient = jax.jit(
        hero_jax.family.gsam_value_and_grad(
            mlp_loss, h=0.3, alpha=0.7, perturbation=direction
        )
    )(params, *batch)
    np.testing.assert_allclose(ravel_pytree(gradient)[0], dL - 0.7 * across, rtol=1e-10)
    np.testing.assert_allclose(value, mlp_loss(params, *batch), rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_without_alpha_it_is_sharpness_aware_minimization():
    params, batch = mlp_params(), mlp_batch()
    found = hero_jax.family.gsam_value_and_grad(mlp_loss, h=0.2, alpha=0.0)(
        params, *batch
    )
    expected = hero_jax.hero_value_and_grad(
        mlp_loss, h=0.2, gamma=0.0, perturbation="normalized"
    )(params, *batch)
    chex.assert_trees_all_close(found, expected, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_closes_the_gap_and_descends_as_fast():
    """To first order alpha changes the gap L(U) - L(W), at a fixed z, and not L(U)."""
    params, batch = mlp_params(), mlp_batch()
    g = jax.grad(mlp_loss)(params, *batch)
    z = hero_jax.perturbation.normalized(params, g)

    def at(params):
        U = jax.tree.map(lambda w, d: w + 0.2 * d, params, z)
        return jnp.stack([mlp_loss(U, *batch), mlp_loss(params, *batch)])

    def rates(alpha):
        value_and_grad = hero_jax.family.gsam_value_and_grad(
            mlp_loss, h=0.2, alpha=alpha
        )
        step = jax.tree.map(jnp.negative, value_and_grad(params, *batch)[1])
        perturbed, clean = jax.jvp(at, (params,), (step,))[1]
        return float(perturbed), float(perturbed - clean)

    (descent, gap), (same_descent, smaller_gap) = rates(0.0), rates(0.5)
    np.testing.assert_allclose(same_descent, descent, rtol=1e-10)
    assert smaller_gap < gap - 1e-6


@pytest.mark.usefixtures("x64")
def test_masked_leaves_stay_where_they_are():
    params, batch = mlp_params(), mlp_batch()
    mask = jax.tree.map(lambda x: x.ndim >= 2, params)
    g = jax.tree.map(
        lambda keep, x: x if keep else jnp.zeros_like(x),
        mask,
        jax.grad(mlp_loss)(params, *batch),
    )
    z = hero_jax.perturbation.normalized(params, g)
    U = jax.tree.map(lambda w, d: w + 0.2 * d, params, z)
    _, gradient = hero_jax.family.gsam_value_and_grad(
        mlp_loss, h=0.2, alpha=0.0, perturb_mask=mask
    )(params, *batch)
    chex.assert_trees_all_close(gradient, jax.grad(mlp_loss)(U, *batch), rtol=1e-10)


def test_zero_and_infinite_gradients():
    value_and_grad = hero_jax.family.gsam_value_and_grad(
        lambda w: jnp.sum(w**2), h=0.1, alpha=0.5
    )
    np.testing.assert_array_equal(value_and_grad(jnp.zeros(3))[1], np.zeros(3))
    value_and_grad = hero_jax.family.gsam_value_and_grad(
        lambda w: jnp.sum(jnp.sqrt(w)), h=0.1, alpha=0.0
    )
    assert np.isnan(value_and_grad(jnp.array([0.0, 1.0]))[1]).all()


def test_large_gradients_do_not_overflow():
    """The square of 1e25 is infinite in float32."""
    scale = 1e25
    loss = lambda w: jnp.sum(jnp.array([1.0, 2.0]) * w**2)
    W = jnp.array([1.0, 1.0])
    options = {"h": 0.1, "alpha": 0.5}
    _, plain = hero_jax.family.gsam_value_and_grad(loss, **options)(W)
    _, scaled = hero_jax.family.gsam_value_and_grad(
        lambda w: scale * loss(w), **options
    )(W)
    np.testing.assert_allclose(scaled / scale, plain, rtol=1e-5)


def test_errors():
    loss = lambda w: jnp.sum(w**2)
    with pytest.raises(TypeError, match=r"loss_fn must be a callable"):
        hero_jax.family.gsam_value_and_grad(None, h=0.1, alpha=0.1)
    with pytest.raises(ValueError, match=r"alpha must be finite and >= 0, got -1"):
        hero_jax.family.gsam_value_and_grad(loss, h=0.1, alpha=-1.0)
    with pytest.raises(ValueError, match=r"h must be finite and >= 0"):
        hero_jax.family.gsam_value_and_grad(loss, h=float("nan"), alpha=0.1)
    with pytest.raises(ValueError, match=r"perturbation must be one of"):
        hero_jax.family.gsam_value_and_grad(loss, h=0.1, alpha=0.1, perturbation="sam")
