"""Sensitivities against dense Hessians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hero_jax import mixed_precision, quant
from tests import problems
from tests.curvature import dense as written_out

WEIGHTS = (1, 3, 4)
"""Positions of the kernels among the leaves."""


def blocks(dense):
    """Return the own block of the Hessian for every kernel."""
    return [dense.H[dense.slices[i], dense.slices[i]] for i in WEIGHTS]


def vectors(errors):
    """Return the errors of every kernel, `[choices, n]`."""
    return [np.asarray(d).reshape(len(d), -1) for d in errors.layers.values()]


def test_the_positions_are_those_of_the_kernels(dense, errors):
    paths = [p for p, _ in jax.tree_util.tree_leaves_with_path(dense.params)]
    names = [
        jax.tree_util.keystr(paths[i], simple=True, separator="/") for i in WEIGHTS
    ]
    assert names == [*errors.layers]


@pytest.mark.parametrize("batch_size", [None, 3])
def test_eigenvalue_is_the_largest_of_the_block(dense, errors, batch_size):
    found = mixed_precision.eigenvalue(
        problems.mlp_loss,
        dense.params,
        errors,
        *dense.args,
        steps=20,
        batch_size=batch_size,
    )
    for row, H, d in zip(
        found.layers.values(), blocks(dense), vectors(errors), strict=True
    ):
        expected = np.linalg.eigvalsh(H)[-1] * np.sum(d**2, 1) / 2
        np.testing.assert_allclose(row, expected, rtol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_eigenvalue_spread_is_that_of_parts_of_the_data(dense, errors, batch_size):
    """Of 11 examples 9 are used; what does not count examples is whole in each part."""
    x, y = problems.mlp_batch(size=11)
    scaled = lambda params, scale, x, y: scale.sum() * problems.mlp_loss(params, x, y)
    found = mixed_precision.eigenvalue_spread(
        scaled,
        dense.params,
        errors,
        jnp.ones(2) / 2,
        x,
        y,
        subsets=3,
        steps=20,
        batch_argnums=(2, 3),
        batch_size=batch_size,
    )
    flat = lambda w, x, y: problems.mlp_loss(dense.unravel(w), x, y)
    hessian = jax.jit(jax.hessian(flat))
    tops = []
    for k in range(3):
        part = slice(3 * k, 3 * k + 3)
        H = np.asarray(hessian(jnp.asarray(dense.W), x[part], y[part]))
        own = [H[dense.slices[i], dense.slices[i]] for i in WEIGHTS]
        tops.append([np.linalg.eigvalsh(block)[-1] for block in own])
    mean, spread = np.mean(tops, 0), np.std(tops, 0, ddof=1)
    for i, (path, d) in enumerate(zip(found.layers, vectors(errors), strict=True)):
        half = np.sum(d**2, 1) / 2
        np.testing.assert_allclose(
            found.layers[path], (abs(mean[i]) + spread[i]) * half, rtol=1e-8
        )
        np.testing.assert_allclose(
            found.stderr[path], spread[i] / np.sqrt(3) * half, rtol=1e-8
        )


def test_average_trace_within_its_standard_error(dense, errors):
    found = mixed_precision.average_trace(
        problems.mlp_loss, dense.params, errors, *dense.args, num_samples=400
    )
    for k, path in enumerate(errors.layers):
        i = dense.slices[WEIGHTS[k]]
        H = dense.H[i, i]
        half = np.sum(vectors(errors)[k] ** 2, 1) / 2 / len(H)
        error = np.abs(found.layers[path] - np.trace(H) * half)
        assert np.all(error < 4.0 * np.asarray(found.stderr[path]))
        # The variance of a probe, sum of v_a H_ab v_b over a and b in the layer alone.
        stderr = np.sqrt(2 * np.sum(np.square(H - np.diag(np.diag(H)))) / 400) * half
        np.testing.assert_allclose(found.stderr[path], stderr, rtol=0.15)


@pytest.mark.slow
def test_average_trace_is_exact_for_a_diagonal_hessian(x64):
    del x64
    params = {"a": jnp.ones((2, 2)), "b": jnp.linspace(0.0, 1.0, 6).reshape(2, 3)}
    scale = jnp.arange(1.0, 7.0).reshape(2, 3)
    loss = lambda p: jnp.sum(p["a"] ** 2) + jnp.sum(scale * p["b"] ** 2) / 2
    errors = mixed_precision.weight_errors(params, (2, 3))
    found = mixed_precision.average_trace(loss, params, errors)
    d = np.asarray(errors.layers["b"]).reshape(2, -1)
    np.testing.assert_allclose(found.layers["b"], 3.5 * np.sum(d**2, 1) / 2)
    np.testing.assert_allclose(found.stderr["b"], 0.0, atol=1e-15)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_quadratic_is_the_form_with_the_dense_hessian(dense, errors, batch_size):
    arguments = (problems.mlp_loss, dense.params, errors, *dense.args)
    found = mixed_precision.quadratic(*arguments, batch_size=batch_size)
    sloped = mixed_precision.quadratic(
        *arguments, batch_size=batch_size, first_order=True, pairwise=True
    )
    assert found.interactions is None
    assert found.stderr is None
    d = vectors(errors)
    for k, path in enumerate(errors.layers):
        i = dense.slices[WEIGHTS[k]]
        forms = [v @ dense.H[i, i] @ v / 2 for v in d[k]]
        np.testing.assert_allclose(found.layers[path], forms, rtol=1e-9)
        slopes = d[k] @ dense.g[i]
        np.testing.assert_allclose(sloped.layers[path], forms + slopes, rtol=1e-9)
        for m in range(3):
            j = dense.slices[WEIGHTS[m]]
            expected = d[k] @ dense.H[i, j] @ d[m].T
            np.testing.assert_allclose(
                sloped.interactions[k, :, m], expected, rtol=1e-8, atol=1e-12
            )


def test_forms_with_the_gauss_newton_matrix_are_never_negative(x64):
    """J'CJ written out; of two layers together, too."""
    del x64
    params, x, labels = written_out.classifier_data()
    errors = mixed_precision.weight_errors(params, (2, 4))
    found = mixed_precision.quadratic(
        written_out.classifier,
        params,
        errors,
        x,
        labels,
        pairwise=True,
        matrix="gauss_newton",
    )
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    outputs = lambda w: written_out.outputs(unravel(w), x, labels)
    shape = outputs(flat).shape
    criterion = lambda y: written_out.criterion(y.reshape(shape), x, labels)
    J = jax.jit(jax.jacobian(lambda w: outputs(w).ravel()))(flat)
    G = J.T @ jax.jit(jax.hessian(criterion))(outputs(flat).ravel()) @ J
    for b in (2, 4):
        d = jax.flatten_util.ravel_pytree(
            jax.tree.map(jnp.subtract, quant.fake_quantize(params, b), params)
        )[0]
        total = found.total({"in": b, "out": b})
        assert total == pytest.approx(float(d @ G @ d / 2), rel=1e-9)
        assert total > 0.0


def test_total_is_the_quadratic_model_of_every_allocation(dense, errors):
    found = mixed_precision.quadratic(
        problems.mlp_loss,
        dense.params,
        errors,
        *dense.args,
        first_order=True,
        pairwise=True,
    )
    rng = np.random.default_rng(0)
    for _ in range(10):
        bits = dict(
            zip(errors.layers, map(int, rng.choice(errors.choices, 3)), strict=True)
        )
        moved = quant.fake_quantize(dense.params, {**bits})
        d = np.asarray(jax.flatten_util.ravel_pytree(moved)[0]) - dense.W
        expected = dense.g @ d + d @ dense.H @ d / 2
        assert found.total(bits) == pytest.approx(expected, rel=1e-9)
    alone = found._replace(interactions=None).total(bits)
    assert abs(alone - expected) > 0.01 * abs(expected)


def test_interactions_make_the_better_allocation(dense, errors):
    """The program minimizes the quadratic model over all allocations."""
    found = mixed_precision.quadratic(
        problems.mlp_loss, dense.params, errors, *dense.args, pairwise=True
    )
    sizes = mixed_precision.layer_sizes(dense.params, errors.choices)
    budget = 3.2
    best = mixed_precision.allocate_bits(
        found.layers, sizes, budget, errors.choices, interactions=found.interactions
    )
    weights = {path: size.weights for path, size in sizes.items()}
    limit = budget * sum(weights.values())
    totals = [
        found.total(bits)
        for columns in np.ndindex(3, 3, 3)
        for bits in [
            dict(zip(errors.layers, (errors.choices[c] for c in columns), strict=True))
        ]
        if sum(weights[path] * b for path, b in bits.items()) <= limit
    ]
    assert best.sensitivity == pytest.approx(min(totals), rel=1e-9)


@pytest.mark.slow
def test_half_precision_weights_and_progress():
    params = problems.mlp_params(dtype=jnp.bfloat16)
    args = problems.mlp_batch(dtype=jnp.float32)
    errors = mixed_precision.weight_errors(params, (2, 4))
    told = []
    found = mixed_precision.quadratic(
        problems.mlp_loss,
        params,
        errors,
        *args,
        batch_size=4,
        progress=lambda done, total: told.append((done, total)),
    )
    assert told == [(k, 12) for k in range(1, 13)]  # 3 layers, 2 choices, 2 batches
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    expected = mixed_precision.quadratic(problems.mlp_loss, wide, errors, *args)
    for path, row in expected.layers.items():
        assert found.layers[path].dtype == jnp.float32
        np.testing.assert_allclose(found.layers[path], row, rtol=1e-3)


@pytest.mark.parametrize(
    "measure",
    [
        mixed_precision.eigenvalue,
        mixed_precision.eigenvalue_spread,
        mixed_precision.average_trace,
        mixed_precision.quadratic,
        mixed_precision.measured,
    ],
)
def test_errors_of_other_weights_are_refused(measure, dense, errors):
    other = errors._replace(layers={"x": jnp.ones((3, 2))})
    with pytest.raises(
        ValueError, match=r"errors must be of the layers of params.*got 'x'"
    ):
        measure(problems.mlp_loss, dense.params, other, *dense.args)
    other = errors._replace(choices=(2, 3))
    with pytest.raises(ValueError, match=r"for each of 2 choices, got .* \(3, 3, 5\)"):
        measure(problems.mlp_loss, dense.params, other, *dense.args)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"subsets": 1}, ValueError, r"subsets must be an integer >= 2, got 1"),
        ({"subsets": 8}, ValueError, r"subsets must be at most 7 examples, got 8"),
        (
            {"subsets": 2, "batch_argnums": None, "scale": 1},
            TypeError,
            r"unknown options \['scale'\]",
        ),
        ({"subsets": 2.0}, TypeError, r"subsets must be an integer"),
        ({"batch_argnums": 3}, TypeError, r"batch_argnums asks for .* argument 3"),
        ({"batchsize": 3, "subsets": 2}, TypeError, r"unknown options \['batchsize'\]"),
    ],
)
def test_misuse_is_named(dense, errors, change, error, message):
    with pytest.raises(error, match=message):
        mixed_precision.eigenvalue_spread(
            problems.mlp_loss, dense.params, errors, *dense.args, **change
        )
