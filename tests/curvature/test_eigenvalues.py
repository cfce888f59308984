"""Eigenpairs against `numpy.linalg.eigh` of the dense Hessian."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from hero_jax import curvature
from tests import problems
from tests.curvature.dense import classifier, classifier_data, diagonal_loss

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize(
    ("which", "batch_size"), [("largest", 3), ("smallest", None), ("magnitude", None)]
)
def test_eigenpairs_are_those_of_the_dense_hessian(dense, which, batch_size):
    values, vectors = np.linalg.eigh(dense.H)
    order = {"largest": -values, "smallest": values, "magnitude": -np.abs(values)}
    expected = np.argsort(order[which])[:3]
    top = curvature.top_eigenvalues(
        problems.mlp_loss,
        dense.params,
        *dense.args,
        k=3,
        which=which,
        steps=40,
        batch_size=batch_size,
    )
    # 1e-6 of the largest, which Lanczos has reached by far.
    np.testing.assert_allclose(
        top.values, values[expected], atol=1e-6 * abs(values).max()
    )
    found = np.asarray(jax.vmap(lambda v: ravel_pytree(v)[0])(top.vectors))
    np.testing.assert_allclose(
        np.abs(np.sum(found.T * vectors[:, expected], 0)), 1.0, atol=1e-6
    )
    actual = np.linalg.norm(dense.H @ found.T - top.values * found.T, axis=0)
    np.testing.assert_allclose(top.residuals, actual, atol=1e-9)


def test_the_residual_certifies_a_value_that_has_not_converged(dense):
    values = np.linalg.eigvalsh(dense.H)
    for steps in (2, 8):
        top = curvature.top_eigenvalues(
            problems.mlp_loss, dense.params, *dense.args, steps=steps
        )
        distance = np.abs(values - top.values[0]).min()
        assert distance <= top.residuals[0]
        assert top.values[0] <= values[-1] + 1e-12  # found from below
    assert top.residuals[0] > 1e-6  # 8 steps are too few: the certificate says so


@pytest.mark.slow
def test_gauss_newton_eigenvalues_are_not_negative():
    params, x, labels = classifier_data()
    lowest = {
        matrix: curvature.top_eigenvalues(
            classifier, params, x, labels, which="smallest", steps=30, matrix=matrix
        ).values[0]
        for matrix in ("hessian", "gauss_newton")
    }
    assert lowest["hessian"] < -1e-3
    assert lowest["gauss_newton"] > -1e-12


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize(
    ("eigenvalues", "largest"),
    [
        ([0.0] * 5, 0.0),
        ([2.0] * 5, 2.0),
        ([3.0, 0.0, 0.0, 0.0, 0.0], 3.0),
        ([1.0, 1.0, 1.0, -5.0, -5.0], 1.0),
        ([7.0], 7.0),
        ([1e-12, 0.0, 3e-12], 3e-12),
        ([1e18, 1.0, 0.0], 1e18),
    ],
)
def test_krylov_spaces_that_end_early(eigenvalues, largest, dtype):
    w = jnp.ones(len(eigenvalues), dtype)
    loss = diagonal_loss(jnp.asarray(eigenvalues, dtype))
    top = curvature.top_eigenvalues(loss, w, steps=len(eigenvalues))
    np.testing.assert_allclose(top.values[0], largest, rtol=1e-5, atol=1e-30)
    assert top.residuals[0] <= 1e-5 * max(map(abs, eigenvalues))


def test_a_multiple_eigenvalue_is_found_once():
    top = curvature.top_eigenvalues(
        diagonal_loss([2.0, 2.0, 1.0, 1.0]), jnp.ones(4), k=3
    )
    np.testing.assert_allclose(top.values, [2.0, 1.0, np.nan], atol=1e-12)
    assert np.isnan(top.residuals[2])


def test_a_loss_that_is_not_a_number_is_not_hidden():
    loss = lambda w: jnp.nan * jnp.sum(w**2)
    assert np.isnan(curvature.top_eigenvalues(loss, jnp.ones(3)).values[0])
    late = lambda w: jnp.sum(jnp.asarray([1.0, jnp.inf, 2.0]) * w**2)
    assert not np.isfinite(curvature.top_eigenvalues(late, jnp.ones(3)).values[0])


def test_layer_eigenvalues_are_those_of_the_blocks(dense):
    top = curvature.layer_eigenvalues(
        problems.mlp_loss,
        dense.params,
        *dense.args,
        mask=True,
        steps=25,  # more than most blocks have dimensions
    )
    blocks = [dense.H[i, i] for i in dense.slices]
    expected = [np.linalg.eigvalsh(block)[-1] for block in blocks]
    assert [*top][:2] == ["hidden/0/bias", "hidden/0/kernel"]
    np.testing.assert_allclose([*top.values()], expected, rtol=1e-6, atol=1e-12)
    weights_only = curvature.layer_eigenvalues(
        problems.mlp_loss, dense.params, *dense.args
    )
    assert [*weights_only] == ["hidden/0/kernel", "hidden/1/kernel", "out/kernel"]


@pytest.mark.slow
def test_works_inside_jit_and_vmap_over_weights(dense):
    flat = jnp.stack([jnp.asarray(dense.W), 0.5 * jnp.asarray(dense.W)])

    @jax.jit
    @jax.vmap
    def largest(w):
        return curvature.top_eigenvalues(
            problems.mlp_loss, dense.unravel(w), *dense.args, steps=40
        ).values[0]

    loss = lambda w: problems.mlp_loss(dense.unravel(w), *dense.args)
    hessian = jax.jit(jax.hessian(loss))
    expected = [np.linalg.eigvalsh(hessian(w))[-1] for w in flat]
    np.testing.assert_allclose(largest(flat), expected, rtol=1e-6)


@pytest.mark.slow
def test_examples_sharded_over_devices(dense):
    x, y = problems.mlp_batch(size=16)
    mesh = jax.sharding.Mesh(jax.devices(), ("data",))
    over_all = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    values = [
        curvature.top_eigenvalues(
            problems.mlp_loss, dense.params, *args, steps=30, batch_size=8
        ).values
        for args in ((x, y), jax.device_put((x, y), over_all))
    ]
    np.testing.assert_allclose(*values, rtol=1e-9)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"k": 0}, ValueError, "k must be an integer >= 1"),
        ({"k": 4}, ValueError, "steps must be from 4, or k, to 3, the number of w"),
        (
            {"k": 2, "steps": 1},
            ValueError,
            "steps must be from 2, or k, to 3, .* got 1",
        ),
        ({"steps": 4}, ValueError, "steps must be from 1, or k, to 3, .* got 4"),
        ({"which": "LA"}, ValueError, "which must be one of"),
    ],
)
def test_arguments_out_of_range(kwargs, error, message):
    with pytest.raises(error, match=message):
        curvature.top_eigenvalues(lambda w: jnp.sum(w**2), jnp.ones(3), **kwargs)


def test_no_layer_chosen():
    with pytest.raises(ValueError, match="mask must choose a leaf"):
        curvature.layer_eigenvalues(lambda w: jnp.sum(w**2), jnp.ones(3))
