"""Densities against the eigenvalues of the dense Hessian."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hero_jax import curvature
from tests import problems
from tests.curvature.dense import classifier, classifier_data, diagonal_loss

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize("batch_size", [None, 3])
def test_moments_are_those_of_the_eigenvalues(dense, batch_size):
    density = curvature.spectral_density(
        problems.mlp_loss,
        dense.params,
        *dense.args,
        num_samples=200,
        steps=10,
        batch_size=batch_size,
    )
    assert density.nodes.shape == (200, 10)
    values = np.linalg.eigvalsh(dense.H)
    for power in range(5):
        moment = density.moment(power)
        expected = np.mean(values**power)
        assert abs(moment.value - expected) < 4 * moment.stderr + 1e-12
        # and the error is small enough for that to say something
        assert moment.stderr < 0.2 * abs(expected) + 1e-12


@pytest.mark.slow
def test_several_densities_after_vmap():
    w, grid = jnp.array([1.0, 2.0, 3.0]), jnp.linspace(0.0, 70.0, 4)
    density = lambda key: curvature.spectral_density(
        lambda w: jnp.sum(w**4), w, key=key, num_samples=2, steps=2
    )
    keys = jax.random.split(jax.random.key(0), 5)
    for read in (lambda x: x.moment(1), lambda x: x.on_grid(grid, 5.0)):
        found = read(jax.vmap(density)(keys))
        expected = [read(density(key)) for key in keys]
        for each in ("value", "stderr"):
            np.testing.assert_allclose(
                getattr(found, each),
                [getattr(x, each) for x in expected],
                rtol=1e-9,
                atol=1e-15,
            )


def test_the_measure_of_one_probe_is_exact_with_all_steps(dense):
    """Gauss quadrature with n nodes has the eigenvalues themselves."""
    density = curvature.spectral_density(
        problems.mlp_loss, dense.params, *dense.args, num_samples=1, steps=dense.W.size
    )
    values = np.linalg.eigvalsh(dense.H)
    np.testing.assert_allclose(density.nodes[0], values, atol=1e-8)


def test_density_on_a_grid_has_mass_one_and_its_bells_at_the_eigenvalues():
    eigenvalues = [0.0] * 6 + [1.0] * 3 + [9.0]
    density = curvature.spectral_density(
        diagonal_loss(eigenvalues), jnp.ones(10), num_samples=3, steps=10
    )
    grid = np.linspace(-2.0, 11.0, 2001)
    curve = density.on_grid(grid, width=0.1)
    step = grid[1] - grid[0]
    np.testing.assert_allclose(np.sum(curve.value) * step, 1.0, rtol=1e-6)
    # Signs as probes of a diagonal matrix: every weight is exactly a share of 10.
    for eigenvalue, share in ((0.0, 0.6), (1.0, 0.3), (9.0, 0.1)):
        near = np.abs(grid - eigenvalue) < 0.45
        np.testing.assert_allclose(np.sum(curve.value[near]) * step, share, rtol=1e-3)
    np.testing.assert_allclose(curve.stderr, 0.0, atol=1e-9)


def test_smoothing_inside_jit():
    density = curvature.spectral_density(diagonal_loss([1.0, 2.0]), jnp.ones(2))
    grid = jnp.linspace(0.0, 3.0, 5)
    smooth = jax.jit(lambda width: density.on_grid(grid, width).value)
    np.testing.assert_allclose(smooth(0.5), density.on_grid(grid, 0.5).value)


def test_one_probe_has_no_standard_error():
    density = curvature.spectral_density(
        diagonal_loss([1.0, 2.0]), jnp.ones(2), num_samples=1
    )
    assert np.isnan(density.moment(1).stderr)


def test_density_of_the_gauss_newton_matrix():
    params, x, labels = classifier_data()
    density = curvature.spectral_density(
        classifier, params, x, labels, steps=15, matrix="gauss_newton"
    )
    assert density.nodes.min() > -1e-10


def test_arguments_out_of_range():
    loss, w = diagonal_loss([1.0, 2.0]), jnp.ones(2)
    with pytest.raises(ValueError, match=r"steps must be from 1, or k, to 2, .* got 3"):
        curvature.spectral_density(loss, w, steps=3)
    with pytest.raises(ValueError, match="num_samples must be an integer >= 1"):
        curvature.spectral_density(loss, w, num_samples=0)
    density = curvature.spectral_density(loss, w)
    with pytest.raises(ValueError, match=r"width must be finite and > 0, got 0\.0"):
        density.on_grid(jnp.ones(3), width=0.0)
