"""Directions against Eq. 11 written out in numpy, and their limits."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

from hero_jax import perturbation
from tests.problems import DIRECTIONS, mlp_params, numpy_direction, slices


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_equals_numpy(direction):
    W, g = mlp_params(0), mlp_params(1)
    z = getattr(perturbation, direction)(W, g)
    flat_W, flat_g = ravel_pytree(W)[0], ravel_pytree(g)[0]
    expected = numpy_direction(
        direction, np.asarray(flat_W), np.asarray(flat_g), slices(W)
    )
    # The largest entry is divided out before squaring: rounding differs, no more.
    np.testing.assert_allclose(ravel_pytree(z)[0], expected, rtol=1e-13)
    chex.assert_trees_all_equal_shapes_and_dtypes(z, W)


@pytest.mark.parametrize("direction", DIRECTIONS)
@settings(deadline=None, max_examples=50)
@given(exponent_W=st.integers(-25, 15), exponent_g=st.integers(-35, 35))
def test_direction_does_not_depend_on_the_gradient_scale(
    direction, exponent_W, exponent_g
):
    """Squares of 1e30 overflow in float32 and those of 1e-30 vanish."""
    W = np.array([0.5, -2.0, 1.0]) * 10.0**exponent_W
    g = np.array([1.0, 3.0, -2.0]) * 10.0**exponent_g
    if direction == "adaptive" and not -36 < exponent_W + exponent_g < 36:
        return  # |W| g itself leaves the range of float32
    z = getattr(perturbation, direction)(jnp.float32(W), jnp.float32(g))
    expected = numpy_direction(direction, W, g, [slice(None)])
    np.testing.assert_allclose(z, expected, rtol=2e-6)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_widened_before_any_norm(direction, dtype):
    """300^2 overflows float16 and 1 + 2^-8 is not a bfloat16."""
    W, g = jnp.full(1000, 300.0, dtype), jnp.full(1000, 300.0, dtype)
    z = getattr(perturbation, direction)(W, g)
    assert z.dtype == jnp.float32
    wide = np.full(1000, 300.0)
    expected = numpy_direction(direction, wide, wide, [slice(None)])
    np.testing.assert_allclose(z, expected, rtol=1e-5)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_leaves_of_several_dtypes_keep_their_own(direction):
    W = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(3), "c": jnp.float32([1, 2])}
    z = getattr(perturbation, direction)(W, W)
    dtypes = {name: leaf.dtype.name for name, leaf in z.items()}
    assert dtypes == {"a": "float32", "b": "float64", "c": "float32"}


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_non_finite_gradient_is_not_taken_for_zero(direction, bad):
    z = getattr(perturbation, direction)(jnp.ones(3), jnp.array([1.0, bad, 1.0]))
    assert not jnp.isfinite(z).all()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_zero_gradient_gives_zero_and_its_derivative_is_finite(direction):
    z = getattr(perturbation, direction)
    W, g = jnp.ones((2, 2)), jnp.zeros((2, 2))
    chex.assert_trees_all_equal(z(W, g), jnp.zeros((2, 2)))
    with jax.debug_nans(True):
        jax.jit(z)(W, g)
        chex.assert_tree_all_finite(jax.jacfwd(z, argnums=(0, 1))(W, g))
        chex.assert_tree_all_finite(jax.jacrev(z, argnums=(0, 1))(W, g))


def test_every_layer_moves_by_its_own_scale():
    """||z^i|| does not depend on the size of the layer's gradient."""
    W = {"a": jnp.ones(4), "b": jnp.ones(4)}
    small = perturbation.layerwise(W, {"a": jnp.ones(4), "b": 1e-6 * jnp.ones(4)})
    chex.assert_trees_all_close(small["a"], small["b"], rtol=1e-6)
    shared = perturbation.adaptive(W, {"a": jnp.ones(4), "b": 1e-6 * jnp.ones(4)})
    np.testing.assert_allclose(shared["b"], 1e-6 * shared["a"], rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_gradient_is_the_gradient_itself(dtype):
    """Eq. 10."""
    W, g = mlp_params(0, dtype), mlp_params(1, dtype)
    z = perturbation.gradient(W, g)
    chex.assert_trees_all_equal(z, jax.tree.map(lambda x: x.astype(jnp.float32), g))


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_random_directions_have_unit_covariance(distribution):
    """Entries of mean 0 and variance 1, no two leaves alike, new for a new key."""
    W = {"a": jnp.ones((100, 100), jnp.bfloat16), "b": jnp.ones(10_000)}

    def draw(seed):
        direction = perturbation.hutchinson(jax.random.key(seed), distribution)
        return jax.jit(direction)(W, W)

    z = draw(0)
    chex.assert_trees_all_equal_shapes(z, W)
    assert {x.dtype for x in jax.tree.leaves(z)} == {jnp.dtype("float32")}
    flat = np.asarray(ravel_pytree(z)[0])
    # 20,000 draws: standard errors 0.007 of the mean and 0.01 of the variance.
    assert abs(flat.mean()) < 0.03
    assert abs(flat.var() - 1) < 0.04
    assert abs(np.corrcoef(flat[:10_000], flat[10_000:])[0, 1]) < 0.04
    assert abs(np.corrcoef(flat, ravel_pytree(draw(1))[0])[0, 1]) < 0.04
    assert ({*np.abs(flat)} == {1.0}) == (distribution == "rademacher")
    chex.assert_trees_all_equal(z, draw(0))


def test_random_direction_errors():
    with pytest.raises(ValueError, match=r"distribution must be one of \['normal', "):
        perturbation.hutchinson(jax.random.key(0), "gaussian")
    with pytest.raises(ValueError, match=r"perturbation must name at least one"):
        perturbation.resolve_all([])
    with pytest.raises(ValueError, match=r"perturbation must be one of"):
        perturbation.resolve_all(["layerwise", "sam"])
