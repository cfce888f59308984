"""Roots of a quadratic, and the bounds of Theorem 3."""

import jax.numpy as jnp
import numpy as np
import pytest

from hero_jax import bounds, curvature
from tests import problems

pytestmark = pytest.mark.usefixtures("x64")


def quadratic(seed=0):
    H = problems.quadratic([8.0, 3.0, 1.0, 0.5, 0.0], seed)
    g = np.random.default_rng(seed).normal(size=5)
    return H, g, lambda w: jnp.asarray(g) @ w + w @ jnp.asarray(H) @ w / 2


@pytest.mark.parametrize("seed", range(4))
def test_the_root_along_a_direction_and_theorem_3(seed):
    H, g, loss = quadratic(seed)
    c = 0.3
    for d in np.random.default_rng(seed).normal(size=(8, 5)):
        found = curvature.smallest_harmful_step(
            loss, jnp.zeros(5), jnp.asarray(d), loss_increase=c, max_step=50.0
        )
        a, b = d @ H @ d / 2, g @ d
        root = (-b + np.sqrt(b**2 + 4 * a * c)) / (2 * a)
        np.testing.assert_allclose(found.step, root, rtol=1e-6)
        np.testing.assert_allclose(found.l2_norm, root * np.linalg.norm(d), rtol=1e-6)
        np.testing.assert_allclose(found.linf_norm, root * np.abs(d).max(), rtol=1e-6)
        l2 = bounds.l2_bound(np.linalg.norm(g), 8.0, c)
        linf = bounds.linf_bound(np.abs(g).sum(), 8.0, c, 5)
        assert found.l2_norm >= l2
        assert found.linf_norm >= linf


def test_the_first_crossing_counts_and_nothing_is_found_downhill():
    wave = lambda w: jnp.sin(w[0])  # rises by 0.5 at pi / 6, then falls again
    w, d = jnp.zeros(1), jnp.ones(1)
    found = curvature.smallest_harmful_step(
        wave, w, d, loss_increase=0.5, max_step=20.0
    )
    np.testing.assert_allclose(found.step, np.pi / 6, rtol=1e-6)
    down = curvature.smallest_harmful_step(
        lambda w: -w[0], w, d, loss_increase=0.5, max_step=20.0
    )
    assert np.isinf([down.step, down.l2_norm, down.linf_norm]).all()


def test_both_ways_along_a_direction_without_a_sign():
    loss = lambda w: w[0] ** 2 + 3.0 * w[0]  # steeper towards +
    w, roots = jnp.zeros(1), np.array([(-3 + 17**0.5) / 2, (3 + 17**0.5) / 2])
    for d, forward in ((jnp.ones(1), roots[0]), (-jnp.ones(1), roots[1])):
        for both_ways, root in ((False, forward), (True, roots[0])):
            found = curvature.smallest_harmful_step(
                loss, w, d, loss_increase=2.0, max_step=20.0, both_ways=both_ways
            )
            np.testing.assert_allclose(found.step, root, rtol=1e-5)


def test_progress_counts_passes_and_a_loss_without_value_has_no_step():
    seen = []
    curvature.smallest_harmful_step(
        lambda w: jnp.sum(w),
        jnp.zeros(1),
        jnp.ones(1),
        loss_increase=1.0,
        max_step=1.0,
        num_steps=3,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert sorted(seen) == [(done, 23) for done in range(1, 24)]
    nothing = curvature.smallest_harmful_step(
        lambda w: jnp.nan * jnp.sum(w),
        jnp.zeros(1),
        jnp.ones(1),
        loss_increase=1.0,
        max_step=1.0,
    )
    assert np.isnan(nothing.l2_norm)


def test_a_loss_that_is_not_finite_does_harm():
    loss = lambda w: jnp.where(w[0] < 2.0, 0.0, jnp.nan)
    found = curvature.smallest_harmful_step(
        loss, jnp.zeros(1), jnp.ones(1), loss_increase=1.0, max_step=10.0
    )
    np.testing.assert_allclose(found.step, 2.0, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize(
    ("level", "at", "c", "bend"),
    [
        (1.0, 0.0, 1e-20, 1.0),  # a rise below the resolution of the loss
        (1.0, 0.0, 1e-3, 1.0),
        (0.0, 1.0, 1.0, 1e40),  # a step below the resolution of the weights
        (0.0, 1.0, 1.0, 1e4),
    ],
)
def test_what_the_precision_does_not_tell_is_not_told(dtype, level, at, c, bend):
    """The root of `bend t^2 = c`, or none."""
    # Factors of range within float32.
    root = bend**0.25
    loss = lambda w: level + ((w[0] - at) * root * root) ** 2
    found = curvature.smallest_harmful_step(
        loss, jnp.full(1, at, dtype), jnp.ones(1), loss_increase=c, max_step=10.0
    )
    eps = jnp.finfo(dtype).eps
    truth = np.sqrt(c / bend)
    resolved = c > 16 * eps * level and truth > 10 * eps * at
    if resolved:
        np.testing.assert_allclose(found.step, truth, rtol=0.1)
    else:
        assert np.isnan([found.step, found.l2_norm, found.linf_norm]).all()


def test_longest_and_shortest_step_are_tried():
    line = lambda w: w[0]
    w, d = jnp.zeros(1), jnp.ones(1)
    at_the_end = curvature.smallest_harmful_step(
        line, w, d, loss_increase=3.9999, max_step=4.0
    )
    np.testing.assert_allclose(at_the_end.step, 3.9999, rtol=1e-5)
    at_once = curvature.smallest_harmful_step(
        line, w, d, loss_increase=0.01, max_step=4.0, growth=2.0, num_steps=3
    )
    np.testing.assert_allclose(at_once.step, 0.01, rtol=1e-4)


def test_in_batches(dense):
    steps = [
        curvature.smallest_harmful_step(
            problems.mlp_loss,
            dense.params,
            dense.unravel(dense.g),
            *dense.args,
            loss_increase=0.1,
            max_step=1.0,
            batch_size=batch_size,
        ).step
        for batch_size in (None, 3)
    ]
    np.testing.assert_allclose(*steps, rtol=1e-9)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"loss_increase": 0.0}, r"loss_increase must be finite and > 0"),
        ({"max_step": -1.0}, "max_step must be finite and >= 0"),
        ({"growth": 1.0}, r"growth must be above 1, got 1\.0"),
        ({"num_steps": 0}, "num_steps must be an integer >= 1"),
    ],
)
def test_arguments_out_of_range(kwargs, message):
    kwargs = {"loss_increase": 0.1, "max_step": 1.0} | kwargs
    with pytest.raises(ValueError, match=message):
        curvature.smallest_harmful_step(
            lambda w: jnp.sum(w**2), jnp.ones(3), jnp.ones(3), **kwargs
        )
