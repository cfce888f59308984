"""Surfaces point by point, filters by numpy, areas of figures that have one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hero_jax import landscape
from tests import problems

AXIS = np.linspace(-1.0, 1.0, 9)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("points_at_once", [1, 4])
@pytest.mark.parametrize("batch_size", [None, 3])
def test_surface_is_the_loss_at_every_point(batch_size, points_at_once):
    params, args = problems.mlp_params(), problems.mlp_batch()
    d, e = problems.mlp_params(seed=2), problems.mlp_params(seed=3)
    a, b = jnp.array([-0.5, 0.0, 1.0]), jnp.array([0.0, 0.25])
    surface = landscape.loss_surface(
        problems.mlp_loss,
        params,
        (d, e),
        (a, b),
        *args,
        batch_size=batch_size,
        points_at_once=points_at_once,
    )

    def at(s, t):
        moved = jax.tree.map(lambda w, x, y: w + s * x + t * y, params, d, e)
        return problems.mlp_loss(moved, *args)

    expected = [[at(s, t) for t in b] for s in a]
    np.testing.assert_allclose(surface, expected, rtol=1e-12)
    line = landscape.loss_surface(problems.mlp_loss, params, [d], [a], *args)
    np.testing.assert_allclose(line, np.array(expected)[:, 0], rtol=1e-12)


def test_surface_of_several_quantities_and_of_half_precision():
    w = jnp.ones(2, jnp.bfloat16)
    loss_fn = lambda w: {"loss": jnp.sum(w), "weights": w}
    result = landscape.loss_surface(loss_fn, w, [w], [jnp.array([0.0, 0.001])])
    # added in float32: bfloat16 would round the step away
    np.testing.assert_allclose(result["loss"], [2.0, 2.002], rtol=1e-6)
    assert result["weights"].shape == (2, 2)
    count = landscape.loss_surface(
        lambda w, x: jnp.sum(x > 0), w, [w], [jnp.zeros(1)], jnp.ones(4), batch_size=3
    )
    np.testing.assert_allclose(count, [(3 * 3 + 1 * 1) / 4])  # the mean over examples


def test_statistics_are_kept_or_estimated_anew():
    x = jnp.array([1.0, 3.0])
    loss_fn = lambda w, mean, x: jnp.mean((w * x - mean) ** 2)
    stats_fn = lambda w, kept, x: jnp.mean(w * x) + 0.0 * kept
    w, line = jnp.array(1.0), [jnp.array([0.0, 1.0])]
    kept = landscape.loss_surface(
        loss_fn, w, [w], line, 2.0, x, batch_size=1, batch_argnums=(2,)
    )
    anew = landscape.loss_surface(
        loss_fn,
        w,
        [w],
        line,
        2.0,
        x,
        stats_fn=stats_fn,
        batch_size=1,
        batch_argnums=(2,),
    )
    np.testing.assert_allclose(kept, [1.0, 8.0])  # (0 + 16) / 2 with the mean of W
    np.testing.assert_allclose(anew, [1.0, 4.0])


def test_progress_counts_points():
    seen = []
    landscape.loss_surface(
        lambda w: jnp.sum(w),
        jnp.ones(2),
        [jnp.ones(2)],
        [jnp.arange(5.0)],
        progress=lambda done, total: seen.append((done, total)),
    )
    assert sorted(seen) == [(k, 5) for k in range(1, 6)]


def test_filters_have_the_norms_of_the_weights():
    rng = np.random.default_rng(0)
    params = {
        "conv": {"kernel": rng.normal(size=(3, 3, 4, 5)), "bias": rng.normal(size=5)},
        "depthwise": rng.normal(size=(3, 3, 1, 6)),
        "dense": rng.normal(size=(7, 2)),
        "scale": rng.normal(size=4),
        "temperature": rng.normal(),
    }
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    d = landscape.random_direction(jax.random.key(0), params)
    for found, w in (
        (d["conv"]["kernel"], params["conv"]["kernel"]),
        (d["depthwise"], params["depthwise"]),
        (d["dense"], params["dense"]),
    ):
        found, w = (np.asarray(x).reshape(-1, x.shape[-1]) for x in (found, w))
        np.testing.assert_allclose(
            np.linalg.norm(found, axis=0), np.linalg.norm(w, axis=0), rtol=1e-5
        )
        assert np.abs(found - w).max() > 0.1
    for still in (d["conv"]["bias"], d["scale"], d["temperature"]):
        np.testing.assert_array_equal(still, 0.0)


def test_filter_normalization_of_a_given_direction():
    w = jnp.array([[3.0, 0.0], [4.0, 2.0]])
    d = jnp.array([[0.0, 1.0], [2.0, 1.0]])
    np.testing.assert_allclose(
        landscape.filter_normalized(d, w), [[0.0, 2**0.5], [5.0, 2**0.5]], rtol=1e-6
    )
    rows = landscape.filter_normalized(d, w, axis=0)
    np.testing.assert_allclose(rows, [[0.0, 3.0], [4.0, 2.0]], rtol=1e-6)
    with pytest.raises(
        ValueError, match=r"axis must be one of every leaf \(2, 2\), got 3"
    ):
        landscape.filter_normalized(d, w, axis=3)
    zero = landscape.filter_normalized(jnp.zeros((2, 2)), w)
    np.testing.assert_array_equal(zero, 0.0)


def test_scaled_to_the_norm_of_all_weights():
    w = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    d = landscape.scaled({"a": jnp.array([0.0]), "b": jnp.array([-2.0])}, w)
    assert (float(d["a"][0]), float(d["b"][0])) == (0.0, -5.0)
    zero = landscape.scaled(jax.tree.map(jnp.zeros_like, w), w)
    assert float(zero["b"][0]) == 0.0


def test_area_of_a_paraboloid():
    x, y = np.linspace(-1.0, 1.0, 201), np.linspace(-2.0, 2.0, 301)
    bowl = 5.0 + x[:, None] ** 2 / 0.3**2 + y[None, :] ** 2 / 1.5**2
    area = landscape.area_within((x, y), bowl, increase=1.0)
    assert area.is_closed
    np.testing.assert_allclose(area.area, np.pi * 0.3 * 1.5, rtol=1e-3)
    half = landscape.area_within((x, y), bowl, increase=0.5)
    np.testing.assert_allclose(half.area, area.area / 2, rtol=2e-3)


def test_only_the_region_around_the_weights_counts_and_not_its_holes():
    x = np.linspace(-3.0, 3.0, 301)
    basins = np.minimum(x**2, (np.abs(x) - 2.0) ** 2)[:, None] + x[None, :] ** 2
    area = landscape.area_within((x, x), basins, increase=0.25)
    np.testing.assert_allclose(area.area, np.pi / 4, rtol=1e-3)
    # a valley around the origin's own basin, whose outline contains the origin, too
    r = np.hypot(x[:, None], x[None, :])
    ring = np.interp(
        r, [0, 1, 1.25, 1.5, 2, 2.5, 3, 5], [0, 0.1, 0.5, 0.1, 0, 0.1, 0.5, 2]
    )
    inner = landscape.area_within((x, x), ring, increase=0.1)
    np.testing.assert_allclose(inner.area, np.pi, rtol=2e-2)
    assert inner.is_closed
    peak = np.exp(-((x[:, None] - 1.0) ** 2 + x[None, :] ** 2) / 0.02)
    bowl = (x[:, None] ** 2 + x[None, :] ** 2) / 4
    with_hole = landscape.area_within((x, x), bowl + 5.0 * peak, increase=1.0)
    whole = landscape.area_within((x, x), bowl, increase=1.0)
    # the hole is where 5 exp(-r^2 / 0.02) > 3 / 4 or so
    hole = np.pi * 0.02 * np.log(5.0 / 0.75)
    np.testing.assert_allclose(whole.area - with_hole.area, hole, rtol=0.1)


def test_area_that_goes_on_beyond_the_grid():
    flat = landscape.area_within((AXIS, AXIS), np.zeros((9, 9)))
    assert not flat.is_closed
    np.testing.assert_allclose(flat.area, 4.0)
    valley = landscape.area_within((AXIS, AXIS), np.outer(AXIS**2, np.ones(9)))
    assert not valley.is_closed


def test_what_is_not_finite_is_outside():
    surface = np.full((9, 9), np.nan)
    surface[3:6, 3:6] = 0.0
    area = landscape.area_within((AXIS, AXIS), surface, increase=0.1)
    assert area.is_closed
    assert 0.25 <= area.area < 0.5  # the points of a square of side 0.5, and some more


@pytest.mark.parametrize(
    ("x", "shape", "increase", "message"),
    [
        (AXIS, (9, 9), 0.0, "increase must be finite and > 0"),
        (AXIS[::-1], (9, 9), 0.1, "must ascend"),
        (AXIS + 0.1, (9, 9), 0.1, "have 0 among them"),
        (AXIS + 1.0, (9, 9), 0.1, "not at an end"),
    ],
)
def test_areas_of_bad_grids(x, shape, increase, message):
    with pytest.raises(ValueError, match=message):
        landscape.area_within((x, AXIS), np.zeros(shape), increase)


def test_area_around_a_loss_that_is_not_finite():
    with pytest.raises(ValueError, match=r"at \(0, 0\) must be finite, got nan"):
        landscape.area_within((AXIS, AXIS), np.full((9, 9), np.nan))


@pytest.mark.parametrize(
    ("directions", "coordinates", "kwargs", "error", "message"),
    [
        (jnp.ones(2), [AXIS], {}, ValueError, "directions.0. must have the shapes"),
        ([jnp.ones(2)], [AXIS] * 2, {}, ValueError, "is shorter than argument 1"),
        (
            [jnp.ones(3)],
            [AXIS],
            {},
            ValueError,
            r"directions\[0\] must have the shapes",
        ),
        ([jnp.ones(2)], [np.ones((2, 2))], {}, ValueError, "must be 1D"),
        ([jnp.ones(2)], [AXIS], {"points_at_once": 0}, ValueError, "points_at_once"),
    ],
)
def test_bad_surfaces(directions, coordinates, kwargs, error, message):
    with pytest.raises(error, match=message):
        landscape.loss_surface(
            lambda w: jnp.sum(w), jnp.ones(2), directions, coordinates, **kwargs
        )
