"""Traces against those of the dense Hessian, and how honest their errors are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from hero_jax import curvature
from tests import problems
from tests.curvature.dense import diagonal_loss

KEYS, PROBES = 400, 3

pytestmark = pytest.mark.usefixtures("x64")


def estimates(dense, deflation):
    """Traces by many keys."""

    @jax.jit
    @jax.vmap
    def of(key):
        tr = curvature.trace(
            problems.mlp_loss,
            dense.params,
            *dense.args,
            num_samples=PROBES,
            deflation=deflation,
            key=key,
        )
        return tr.whole, tr.layers

    return of(jax.random.split(jax.random.key(0), KEYS))


@pytest.mark.slow
@pytest.mark.parametrize("deflation", [0, 6])
def test_mean_and_standard_error_are_calibrated(dense, deflation):
    whole, layers = estimates(dense, deflation)
    expected = [np.trace(dense.H)] + [np.trace(dense.H[i, i]) for i in dense.slices]
    for estimate, truth in zip([whole, *layers.values()], expected, strict=True):
        values = np.asarray(estimate.value)
        error = values.std(ddof=1) / KEYS**0.5
        # unbiased: inside 4 standard errors over all keys
        assert abs(values.mean() - truth) < 4 * error + 1e-12
        if values.std() < 1e-9:  # a leaf of one weight: its probe is exact
            continue
        # the mean square of the reported error is the variance; without Bessel's
        # correction it would be two thirds of it
        ratio = np.mean(np.asarray(estimate.stderr) ** 2) / values.var(ddof=1)
        assert 0.8 < ratio < 1.25
    # 95 % intervals of Student's t cover the truth 95 % of the time, but for the
    # probes not being normal
    half = stats.t.ppf(0.975, df=PROBES - 1) * np.asarray(whole.stderr)
    coverage = np.mean(np.abs(np.asarray(whole.value) - expected[0]) < half)
    assert 0.9 < coverage < 0.985


def test_deflation_lowers_the_error_at_the_same_cost():
    """On a spectrum like that of a network: a few outliers, and a bulk near zero."""
    eigenvalues = [50.0, 30.0, 10.0] + [0.1] * 97
    basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(100, 100)))
    H = jnp.asarray(basis * eigenvalues @ basis.T)
    loss = lambda w: w @ H @ w / 2
    w = jnp.ones(100)
    plain = curvature.trace(loss, w, num_samples=26).whole
    deflated = curvature.trace(loss, w, num_samples=20, deflation=6).whole
    assert plain.stderr > 1.0
    assert deflated.stderr < 1e-2 * plain.stderr
    np.testing.assert_allclose(deflated.value, np.sum(eigenvalues), rtol=1e-3)


def test_deflation_by_the_whole_space_is_exact(dense):
    size = dense.W.size
    tr = curvature.trace(
        problems.mlp_loss, dense.params, *dense.args, num_samples=2, deflation=size
    )
    np.testing.assert_allclose(tr.whole.value, np.trace(dense.H), rtol=1e-8)
    blocks = [np.trace(dense.H[i, i]) for i in dense.slices]
    values = [e.value for e in tr.layers.values()]
    np.testing.assert_allclose(values, blocks, rtol=1e-6, atol=1e-8)
    assert tr.whole.stderr < 1e-8


def test_batches_change_nothing(dense):
    whole, parts = (
        curvature.trace(
            problems.mlp_loss,
            dense.params,
            *dense.args,
            num_samples=4,
            deflation=3,
            batch_size=batch_size,
        )
        for batch_size in (None, 3)
    )
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)


def test_probes_of_their_own_know_nothing_of_other_layers(dense):
    """Mean and standard error over keys; a probe's variance is 2 sum H_ab^2."""

    @jax.jit
    @jax.vmap
    def of(key):
        return curvature.layer_traces(
            problems.mlp_loss,
            dense.params,
            *dense.args,
            mask=True,
            num_samples=PROBES,
            key=key,
        )

    found = of(jax.random.split(jax.random.key(0), KEYS))
    for i, estimate in zip(dense.slices, found.values(), strict=True):
        H = dense.H[i, i]
        variance = 2.0 * np.sum(np.square(H - np.diag(np.diag(H)))) / PROBES
        error = np.sqrt(variance / KEYS)
        assert abs(estimate.value.mean() - np.trace(H)) < 4.0 * error + 1e-12
        mean_square = np.mean(np.square(estimate.stderr))
        np.testing.assert_allclose(mean_square, variance, rtol=0.25, atol=1e-20)


def test_a_small_layer_among_large_ones():
    """All entries of the Hessian are 1, so the trace of a layer is its size."""
    params = {"large": jnp.ones((30, 30)), "small": jnp.ones((2, 2))}
    loss = lambda w: (w["large"].sum() + w["small"].sum()) ** 2 / 2
    shared = curvature.trace(loss, params).layers["small"]
    assert shared.stderr > 4.0
    deflated = curvature.layer_traces(loss, params, deflation=2)["small"]
    for own in (curvature.layer_traces(loss, params)["small"], deflated):
        assert own.stderr < 1.0
        assert abs(own.value - 4.0) < 4.0 * own.stderr + 1e-9
    assert deflated.stderr < 1e-9
    assert curvature.layer_traces(loss, params, mask={"large": False, "small": True})


def test_progress_of_layer_traces_counts_all_products():
    seen = []
    curvature.layer_traces(
        lambda w: jnp.sum(w["a"] ** 2) + jnp.sum(w["b"] ** 2),
        {"a": jnp.ones((2, 3)), "b": jnp.ones((1, 2)), "c": jnp.ones(3)},
        num_samples=3,
        deflation=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert sorted(seen) == [(done, 8) for done in range(1, 9)]


@pytest.mark.parametrize("transform", [jax.vmap, lambda f: jax.jit(jax.vmap(f))])
def test_averages_after_vmap(transform):
    loss = lambda w: jnp.sum(w["a"] ** 2)
    params = {"a": jnp.ones((2, 3)), "none": jnp.ones((0, 3))}
    keys = jax.random.split(jax.random.key(0), 3)
    tr = transform(lambda key: curvature.trace(loss, params, key=key))(keys)
    assert [*tr.averages] == ["a"]
    np.testing.assert_allclose(tr.averages["a"].value, [2.0] * 3)
    inside = jax.jit(lambda tr: tr.averages["a"].value)(tr)
    np.testing.assert_allclose(inside, [2.0] * 3)


def test_averages_are_per_weight():
    tr = curvature.trace(
        lambda w: jnp.sum(w["a"] ** 2), {"a": jnp.ones((2, 3)), "b": jnp.ones(4)}
    )
    assert tr.sizes == {"a": 6, "b": 4}
    assert tr.averages["a"].value == 2.0
    assert tr.averages["b"].value == 0.0


def test_numbers_empty_leaves_and_names_that_coincide():
    params = {
        "a": 2.0,
        "b": jnp.ones((0, 3)),
        "c/d": jnp.ones(2),
        "c": {"d": jnp.ones(1)},
    }
    loss = lambda w: (
        w["a"] ** 2 + jnp.sum(w["c/d"] ** 2) + 3.0 * jnp.sum(w["c"]["d"] ** 2)
    )
    tr = curvature.trace(loss, params)
    values = [float(e.value) for e in tr.layers.values()]
    np.testing.assert_allclose(values, [2.0, 0.0, 6.0, 4.0], atol=1e-6)
    assert len(tr.averages) == 3
    largest = curvature.layer_eigenvalues(loss, params, mask=True)
    np.testing.assert_allclose([*largest.values()], [2.0, 6.0, 2.0], rtol=1e-6)
    assert curvature.top_eigenvalues(loss, params).values[0] > 5.9
    assert curvature.trace(lambda w: jnp.sum(w), jnp.ones((0, 3))).whole.value == 0.0


def test_deflation_where_the_space_ends_early():
    for eigenvalues in ([0.0] * 4, [2.0] * 4, [5.0, 0.0, 0.0, 0.0]):
        tr = curvature.trace(diagonal_loss(eigenvalues), jnp.ones(4), deflation=4)
        assert np.isfinite(tr.whole.stderr)
        assert abs(tr.whole.value - sum(eigenvalues)) < 4 * tr.whole.stderr + 1e-9


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_samples": 0}, "num_samples must be an integer >= 2, got 0"),
        ({"num_samples": 1}, "num_samples must be an integer >= 2, got 1"),
        ({"deflation": 4}, r"steps must be from 1, .* to 3, .* got 4 \(at deflation\)"),
        ({"deflation": -1}, r"steps must be an integer >= 1, got -1 \(at deflation\)"),
    ],
)
def test_arguments_out_of_range(kwargs, message):
    for estimate in (curvature.trace, curvature.layer_traces):
        with pytest.raises(ValueError, match=message):
            estimate(lambda w: jnp.sum(w**2), jnp.ones((1, 3)), **kwargs)
