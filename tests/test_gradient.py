"""HERO's gradient against dense Hessians, closed forms and finite differences."""

import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hero_jax
from hero_jax import family
from tests import paper
from tests.problems import (
    DIRECTIONS,
    dense_hero,
    derivatives,
    mlp_batch,
    mlp_loss,
    mlp_params,
    numpy_direction,
    quadratic,
)

# Leaf order: hidden 0 bias, kernel; hidden 1 bias, kernel; out kernel, temperature.
MASKS = {
    "default": (None, None),
    "weights": (None, [False, True, False, True, True, False]),
    "everything": (None, [True] * 6),
    "nothing": (None, [False] * 6),
    "one perturbed": ([False, True, False, False, False, False], None),
    "disjoint": (
        [True, False, False, True, False, True],
        [False, True, False, False, True, True],
    ),
}


def as_tree(mask, params):
    if mask is None:
        return None
    return jax.tree.unflatten(jax.tree.structure(params), mask)


def float64_close(actual, expected, tolerance=1e-10):
    """Float64 rounds at 1e-16; sums of a few dozen terms leave 1e-10 far away."""
    chex.assert_trees_all_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("reduction", "masks"),
    [("sum", masks) for masks in MASKS] + [("mean", "default"), ("mean", "disjoint")],
)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_equals_dense_hessian(direction, reduction, masks):
    params, batch = mlp_params(), mlp_batch()
    perturbed, penalized = MASKS[masks]
    h, gamma = 0.3, 0.7
    (value, gradient, metrics) = jax.jit(
        paper.hero_value_and_grad(
            mlp_loss,
            h=h,
            gamma=gamma,
            perturbation=direction,
            reduction=reduction,
            perturb_mask=as_tree(perturbed, params),
            penalty_mask=as_tree(penalized, params),
            return_metrics=True,
        )
    )(params, *batch)
    expected, expected_metrics = dense_hero(
        mlp_loss,
        params,
        *batch,
        h=h,
        gamma=gamma,
        direction=direction,
        reduction=reduction,
        perturbed=perturbed,
        penalized=penalized,
    )
    float64_close(gradient, expected)
    float64_close(metrics._asdict(), expected_metrics)
    float64_close(value, mlp_loss(params, *batch))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_product_equals_reverse_over_reverse(direction, reduction):
    params, batch = mlp_params(), mlp_batch()
    grad_fn = jax.grad(mlp_loss)
    g = grad_fn(params, *batch)
    z = getattr(hero_jax.perturbation, direction)(params, g)
    U = jax.tree.map(lambda w, d: w + 0.3 * d, params, z)

    def G(U):
        """Eq. 12, with g held constant, over the weights of two dimensions."""
        difference = jax.tree.map(jnp.subtract, grad_fn(U, *batch), g)
        squares = [d**2 for d in jax.tree.leaves(difference) if d.ndim >= 2]
        return sum(s.sum() if reduction == "sum" else s.mean() for s in squares)

    expected = jax.tree.map(
        lambda a, b: a + 0.7 * b, grad_fn(U, *batch), jax.jit(jax.grad(G))(U)
    )
    value_and_grad = paper.hero_value_and_grad(
        mlp_loss, h=0.3, gamma=0.7, perturbation=direction, reduction=reduction
    )
    _, gradient = jax.jit(value_and_grad)(params, *batch)
    float64_close(gradient, expected)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_several_directions_are_averaged():
    params, batch = mlp_params(), mlp_batch()

    def results(perturbation):
        value_and_grad = paper.hero_value_and_grad(
            mlp_loss, h=0.3, gamma=0.7, perturbation=perturbation, return_metrics=True
        )
        return value_and_grad(params, *batch)

    each = [results(direction) for direction in DIRECTIONS]
    _, *expected = jax.tree.map(lambda *x: np.mean(x, axis=0), *each)
    functions = tuple(getattr(hero_jax.perturbation, name) for name in DIRECTIONS)
    for together in (list(DIRECTIONS), functions):
        value, *found = results(together)
        float64_close(found, expected)
        assert float(value) == float(mlp_loss(params, *batch))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_random_probes_estimate_the_sum_of_squared_eigenvalues():
    """Eq. 9, with the dense Hessian; and its gradient, by reverse over forward."""
    params, batch = mlp_params(), mlp_batch()
    _, _, H = derivatives(mlp_loss, params, *batch)
    h = 1e-5

    @jax.jit
    def penalties(keys):
        def of(key):
            _, _, metrics = paper.hero_value_and_grad(
                mlp_loss,
                h=h,
                gamma=0.0,
                perturbation=hero_jax.perturbation.hutchinson(key),
                penalty_mask=True,
                return_metrics=True,
            )(params, *batch)
            return metrics.penalty / h**2

        return jax.lax.map(of, keys)

    samples = penalties(jax.random.split(jax.random.key(0), 4000))
    stderr = float(samples.std() / np.sqrt(samples.size))
    total = float(jnp.sum(H**2))
    assert stderr < 0.05 * total
    assert abs(float(samples.mean()) - total) < 3 * stderr


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_closed_form_on_a_quadratic(direction):
    """L = W'AW/2: grad L(U) = A(W + hz), and the penalty's gradient is 2h A A z."""
    A = quadratic([5.0, 2.0, 0.5, 0.0, -1.0])
    W = np.random.default_rng(1).normal(size=5)
    h, gamma = 0.4, 0.3
    z = numpy_direction(direction, W, A @ W, [slice(None)])
    expected = A @ (W + h * z) + 2 * gamma * h * A @ A @ z
    value, gradient = paper.hero_value_and_grad(
        lambda w: w @ A @ w / 2,
        h=h,
        gamma=gamma,
        perturbation=direction,
        penalty_mask=True,
    )(jnp.asarray(W))
    float64_close(gradient, expected)
    float64_close(value, W @ A @ W / 2)


@pytest.mark.parametrize(
    "value_and_grad",
    [
        paper.hero_value_and_grad(mlp_loss, h=0.0, gamma=0.0),
        paper.hero_value_and_grad(mlp_loss, h=0.0, gamma=0.5),
        family.grad_l1_value_and_grad(mlp_loss, strength=0.0),
        family.gnp_value_and_grad(mlp_loss, strength=0.0),
    ],
    ids=["h=gamma=0", "h=0", "GRAD-L1", "GNP"],
)
def test_switched_off_is_the_base_gradient_bit_for_bit(value_and_grad):
    params, batch = mlp_params(dtype=jnp.float32), mlp_batch(dtype=jnp.float32)
    chex.assert_trees_all_equal(
        value_and_grad(params, *batch), jax.value_and_grad(mlp_loss)(params, *batch)
    )


@pytest.mark.usefixtures("x64")
def test_traced_zero_is_the_base_gradient_too():
    params, batch = mlp_params(), mlp_batch()
    hero = jax.jit(
        lambda h, gamma: paper.hero_value_and_grad(
            mlp_loss, h=h, gamma=gamma, return_metrics=True
        )(params, *batch)
    )
    value, gradient, metrics = hero(0.0, 0.0)
    expected = jax.value_and_grad(mlp_loss)(params, *batch)
    # Another program than the base gradient's: equal up to rounding.
    float64_close((value, gradient), expected, 1e-14)
    float64_close(metrics.hessian_norm, 0.0, 1e-14)


@pytest.mark.usefixtures("x64")
def test_gamma_zero_is_the_gradient_at_the_perturbed_weights():
    params, batch = mlp_params(), mlp_batch()
    g = jax.grad(mlp_loss)(params, *batch)
    U = jax.tree.map(
        lambda w, d: w + 0.3 * d, params, hero_jax.perturbation.layerwise(params, g)
    )
    _, gradient = paper.hero_value_and_grad(mlp_loss, h=0.3, gamma=0.0)(params, *batch)
    float64_close(gradient, jax.grad(mlp_loss)(U, *batch))


def test_perturbation_may_return_any_real_number_type():
    run = lambda z: paper.hero_value_and_grad(
        lambda w: w**2, h=0.5, gamma=0.0, perturbation=lambda params, grads: z
    )(jnp.asarray(2.0))[1]
    for z in (1.0, np.float64(1.0), jnp.bfloat16(1.0)):
        np.testing.assert_allclose(run(z), 5.0)
    with pytest.raises(
        TypeError, match=r"the perturbation's result must have real .*co"
    ):
        run(1.0j)


def test_perturbation_can_be_any_function():
    W = jnp.array([[1.0, 2.0]])
    _, gradient = paper.hero_value_and_grad(
        lambda w: jnp.sum(w**2),
        h=0.5,
        gamma=0.0,
        perturbation=lambda params, grads: jax.tree.map(jnp.ones_like, params),
    )(W)
    np.testing.assert_allclose(gradient, 2 * (W + 0.5))


def test_a_masked_leaf_stays_put_whatever_the_perturbation_returns():
    params = {"moves": jnp.ones((2, 2)), "stays": jnp.ones((2, 2))}
    _, gradient = paper.hero_value_and_grad(
        lambda p: jnp.sum(p["moves"] ** 2) + jnp.sum(p["stays"] ** 2),
        h=0.5,
        gamma=0.0,
        perturbation=lambda params, grads: jax.tree.map(jnp.ones_like, params),
        perturb_mask={"moves": True, "stays": False},
    )(params)
    chex.assert_trees_all_close(
        gradient, {"moves": jnp.full((2, 2), 3.0), "stays": jnp.full((2, 2), 2.0)}
    )


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_arguments_reach_the_loss_unchanged():
    """Two differentiated arguments, others in between, keyword arguments, aux."""

    def loss(x, params, extra, *, scale, name):
        assert name == "kept"
        value = scale * mlp_loss(params, x, extra["y"])
        return value, {"x": x, "value": value}

    params, (x, y) = mlp_params(), mlp_batch()
    kwargs = {"h": 0.3, "gamma": 0.7, "has_aux": True}
    (value, aux), gradient = paper.hero_value_and_grad(loss, 1, **kwargs)(
        x, params, {"y": y}, scale=3.0, name="kept"
    )
    scaled = lambda p: 3.0 * mlp_loss(p, x, y)
    options = {"direction": "layerwise", "reduction": "sum", "h": 0.3, "gamma": 0.7}
    float64_close(gradient, dense_hero(scaled, params, **options)[0])
    float64_close((value, aux["value"]), (scaled(params), scaled(params)))
    chex.assert_trees_all_equal(aux["x"], x)

    _, both = paper.hero_value_and_grad(loss, (0, 1), **kwargs)(
        x, params, {"y": y}, scale=3.0, name="kept"
    )
    of_both = lambda xp: 3.0 * mlp_loss(xp[1], xp[0], y)
    float64_close(both, dense_hero(of_both, (x, params), **options)[0])


class NormalizedNet(nn.Module):
    """A network with BatchNorm statistics and dropout."""

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False, momentum=0.5)(nn.Dense(8)(x))
        return nn.Dense(1)(nn.Dropout(0.5, deterministic=False)(jnp.tanh(x)))


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: paper.hero_value_and_grad(f, h=1.0, gamma=0.5, has_aux=True),
        lambda f: paper.hero_value_and_grad(f, h=1.0, gamma=0.0, has_aux=True),
        lambda f: family.grad_l1_value_and_grad(f, strength=0.5, has_aux=True),
        lambda f: family.gnp_value_and_grad(f, strength=1.0, radius=1.0, has_aux=True),
        lambda f: family.gsam_value_and_grad(f, h=1.0, alpha=0.5, has_aux=True),
    ],
    ids=["hero", "first-order", "GRAD-L1", "GNP", "GSAM"],
)
def test_aux_comes_from_one_clean_pass(transform):
    model = NormalizedNet()
    x = jax.random.normal(jax.random.key(0), (16, 4))
    key = jax.random.key(1)
    variables = model.init({"params": key, "dropout": key}, x)

    def loss(params, batch_stats, key):
        out, new = model.apply(
            {"params": params, "batch_stats": batch_stats},
            x,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        return jnp.mean((out - 1.0) ** 2), new["batch_stats"]

    arguments = (variables["params"], variables["batch_stats"], key)
    expected = jax.jit(loss)(*arguments)
    value, _ = jax.jit(transform(loss))(*arguments)
    # Two compilations of the same float32 formula: a few rounding errors apart.
    chex.assert_trees_all_close(value, expected, rtol=1e-6)


def test_dropout_mask_is_the_same_in_all_passes():
    """The loss is linear in W under any mask, so a common mask leaves no difference."""

    def loss(W, key):
        return jnp.sum(jnp.where(jax.random.bernoulli(key, 0.5, W.shape), W, 0.0))

    W = jax.random.normal(jax.random.key(0), (20, 20))
    _, _, metrics = paper.hero_value_and_grad(
        loss, h=1.0, gamma=1.0, return_metrics=True
    )(W, jax.random.key(1))
    assert float(metrics.grad_norm) > 0.0
    assert float(metrics.grad_difference_norm) == 0.0


@pytest.mark.slow
def test_vmap_over_h_gamma_and_params():
    batch = mlp_batch(dtype=jnp.float32)
    many = [mlp_params(seed, jnp.float32) for seed in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *many)
    hs, gammas = jnp.array([0.0, 0.2, 0.5]), jnp.array([0.3, 0.0, 0.1])

    def run(params, h, gamma):
        return paper.hero_value_and_grad(mlp_loss, h=h, gamma=gamma)(params, *batch)

    together = jax.jit(jax.vmap(run))(stacked, hs, gammas)
    one_by_one = [run(p, h, c) for p, h, c in zip(many, hs, gammas, strict=True)]
    expected = jax.tree.map(lambda *x: jnp.stack(x), *one_by_one)
    chex.assert_trees_all_close(together, expected, rtol=2e-5, atol=1e-5)


def test_switched_off_takes_one_gradient():
    traces = []

    def loss(w):
        traces.append(None)
        return jnp.sum(w**2)

    value, _, metrics = paper.hero_value_and_grad(
        loss, h=0.0, gamma=0.5, return_metrics=True
    )(jnp.ones((2, 2)))
    assert len(traces) == 1
    assert metrics.perturbed_loss == value
    assert metrics.perturbed_grad_norm == metrics.grad_norm == 4.0
    assert metrics.penalty == metrics.hessian_norm == 0.0


def test_compiles_once():
    params, batch = mlp_params(dtype=jnp.float32), mlp_batch(dtype=jnp.float32)
    traces = []

    def loss(params, *batch):
        traces.append(None)
        return mlp_loss(params, *batch)

    step = jax.jit(paper.hero_value_and_grad(loss, h=0.3, gamma=0.7))
    (_, gradient) = step(params, *batch)
    traced = len(traces)
    step(gradient, *batch)
    assert len(traces) == traced == 2  # the clean pass and the perturbed one


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype",
    [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow), jnp.float32],
)
def test_dtypes_are_kept(dtype):
    params, batch = mlp_params(dtype=dtype), mlp_batch(dtype=dtype)
    for value_and_grad in (
        paper.hero_value_and_grad(mlp_loss, h=0.1, gamma=0.1),
        paper.hero_value_and_grad(mlp_loss, h=0.1, gamma=0.0),
        family.grad_l1_value_and_grad(mlp_loss, strength=0.1),
        family.gnp_value_and_grad(mlp_loss, strength=0.1),
        family.gnp_value_and_grad(mlp_loss, strength=0.1, radius=0.1),
        family.gsam_value_and_grad(mlp_loss, h=0.1, alpha=0.1),
    ):
        value, gradient = jax.jit(value_and_grad)(params, *batch)
        chex.assert_trees_all_equal_shapes_and_dtypes(gradient, params)
        chex.assert_tree_all_finite((value, gradient))


@pytest.mark.usefixtures("x64")
def test_mixed_dtypes_are_kept_under_x64():
    params = {
        "a": jnp.ones((2, 2), jnp.bfloat16),
        "b": jnp.ones((2, 2), jnp.float32),
        "c": jnp.ones((2, 2), jnp.float64),
    }
    loss = lambda p: sum(jnp.sum(x.astype(float) ** 3) for x in p.values())
    h = jnp.asarray(0.1, jnp.float64)
    _, gradient = jax.jit(
        lambda h: paper.hero_value_and_grad(loss, h=h, gamma=h)(params)
    )(h)
    chex.assert_trees_all_equal_shapes_and_dtypes(gradient, params)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_needs_no_implicit_dtype_promotion(direction):
    params = {
        "a": jnp.ones((2, 2), jnp.bfloat16),
        "b": jnp.ones((2, 2), jnp.float32),
        "c": jnp.ones((2, 2), jnp.float64),
    }
    loss = lambda p: sum(jnp.sum(x.astype(jnp.float64) ** 3) for x in p.values())
    tx = paper.hero(h=0.1, gamma=0.1, perturbation=direction)
    with jax.numpy_dtype_promotion("strict"):
        _, gradient, metrics = paper.hero_value_and_grad(
            loss, h=0.1, gamma=0.1, perturbation=direction, return_metrics=True
        )(params)
        grad_fn = jax.grad(loss)
        _, state = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
    chex.assert_trees_all_equal_shapes_and_dtypes(gradient, params)
    assert metrics.penalty.dtype == state.metrics.penalty.dtype == jnp.float64


def test_small_perturbation_of_half_precision_weights_is_not_rounded_away():
    """A step of 1e-3 per entry is below half an ulp of 1.0 in bfloat16 (4e-3)."""
    W = jnp.ones((4, 4), jnp.bfloat16)
    _, _, metrics = paper.hero_value_and_grad(
        lambda w: jnp.sum(w.astype(jnp.float32) ** 2) / 2,
        h=4e-3,
        gamma=0.0,
        perturbation="normalized",
        return_metrics=True,
    )(W)
    # H is the identity: the difference of the gradients is the step itself.
    np.testing.assert_allclose(metrics.grad_difference_norm, 4e-3, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_penalty_of_half_precision_weights_is_free_of_their_rounding(direction):
    """The difference of the gradients is far below the rounding of a bfloat16."""
    W = jax.random.normal(jax.random.key(0), (30, 20)) / 5
    x = jax.random.normal(jax.random.key(1), (50, 30))

    def loss(w, x):
        out = jnp.tanh(x @ w)
        return jnp.mean(out**2), {"out": out, "w": w, "key": jax.random.key(0), "n": 1}

    run = paper.hero_value_and_grad(
        loss, h=1e-2, gamma=1.0, perturbation=direction, has_aux=True,
        return_metrics=True,
    )  # fmt: skip
    W = W.astype(jnp.bfloat16)
    (value, aux), gradient, metrics = jax.jit(run)(W, x)
    (_, _), _, expected = jax.jit(run)(W.astype(jnp.float32), x)
    chex.assert_trees_all_close(metrics, expected, rtol=1e-5)
    # What comes out has the dtypes of a plain call.
    plain = jax.eval_shape(loss, W, x)
    chex.assert_trees_all_equal_shapes_and_dtypes((value, aux), plain)
    assert gradient.dtype == jnp.bfloat16


def test_loss_that_cannot_take_float32_weights_says_so():
    def loss(w):
        image = jnp.ones((1, 4, 4, 1), jnp.bfloat16)
        return jax.lax.conv(image, w, (1, 1), "SAME").sum()

    W = jnp.ones((4, 4, 1, 1), jnp.bfloat16)
    with pytest.raises(TypeError, match=r"same dtypes") as caught:
        paper.hero_value_and_grad(loss, h=0.1, gamma=0.1)(W)
    notes = " ".join(caught.value.__notes__)
    assert "called with float32 weights in place of half-precision ones" in notes


FINITE_CASES = {
    "zero gradient": ({"w": jnp.ones((2, 2))}, lambda p: 0.0 * p["w"].sum()),
    "zero weights": ({"w": jnp.zeros((2, 2))}, lambda p: p["w"].sum()),
    "both zero": ({"w": jnp.zeros((2, 2))}, lambda p: (p["w"] ** 2).sum()),
    "scalar": (jnp.asarray(2.0), lambda p: p**2),
    "Python float": ({"w": 2.0}, lambda p: p["w"] ** 2),
    "empty tree": ({}, lambda p: jnp.asarray(1.0)),
    "None leaf": ({"w": jnp.ones(2), "b": None}, lambda p: (p["w"] ** 2).sum()),
    "empty leaf": (
        {"w": jnp.ones((2, 2)), "b": jnp.zeros((0, 3))},
        lambda p: (p["w"] ** 2).sum() + p["b"].sum(),
    ),
    "huge gradient": (jnp.ones((2, 2)), lambda p: 1e30 * p.sum()),
    "tiny gradient": (jnp.ones((2, 2)), lambda p: 1e-30 * p.sum()),
}


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", FINITE_CASES)
def test_degenerate_inputs_give_finite_results(case, direction, reduction):
    params, loss = FINITE_CASES[case]
    result = paper.hero_value_and_grad(
        loss,
        h=0.5,
        gamma=0.1,
        perturbation=direction,
        reduction=reduction,
        penalty_mask=True,  # most have no leaf of two dimensions
        return_metrics=True,
    )(params)
    chex.assert_tree_all_finite(result)
    chex.assert_trees_all_equal_structs(result[1], params)


@pytest.mark.parametrize("where", ["at W", "at U", "at W, hidden at U"])
def test_non_finite_gradients_are_visible(where):
    """Whatever the masks: no gradient comes out finite if one on the way was not."""

    @jax.custom_jvp
    def poison(x):
        return jnp.zeros_like(x)

    @poison.defjvp
    def _(primals, tangents):
        (x,), (dx,) = primals, tangents
        at_W = x == 1.0
        bad = at_W if where.startswith("at W") else ~at_W
        return jnp.zeros_like(x), jnp.where(bad, jnp.nan, 1.0) * dx

    params = {"w": jnp.ones((2, 2)), "v": jnp.ones((2, 2))}
    hidden = {"w": False, "v": True} if "hidden" in where else None

    def loss(p):
        return poison(p["w"]).sum() + jnp.sum(p["v"] ** 2)

    for gamma in (0.0, 0.1):
        _, gradient = paper.hero_value_and_grad(
            loss, h=0.5, gamma=gamma, perturb_mask=hidden, penalty_mask=hidden
        )(params)
        assert not all(jnp.isfinite(x).all() for x in jax.tree.leaves(gradient))


def square(w):
    return jnp.sum(w**2)


def hero_link(gamma, **options):
    """Return `params -> updates` of the link."""
    tx = paper.hero(h=0.5, gamma=gamma, **options)
    grad_fn = jax.grad(square)
    return lambda w: tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)[0]


def hero_function(gamma, **options):
    """Return `params -> gradient` of the function."""
    f = paper.hero_value_and_grad(square, h=0.5, gamma=gamma, **options)
    return lambda w: f(w)[1]


HEROES = {
    "function": hero_function,
    "traced": lambda gamma, **kw: (
        lambda w: jax.jit(lambda gamma: hero_function(gamma, **kw)(w))(gamma)
    ),
    "link": hero_link,
    "schedule": lambda gamma, **kw: hero_link(lambda count: gamma, **kw),
}


@pytest.mark.parametrize("make", HEROES.values(), ids=[*HEROES])
def test_gamma_with_nothing_to_penalize_is_refused(make):
    """Of w^2 for one weight: H = 2, z = w, and grad L(U) - g = 2 h w."""
    w = jnp.array([3.0])
    told = (
        r"gamma must have leaves .* two or more .*\(1,\).* penalty_mask=True .* gamma=0"
    )
    with pytest.raises(ValueError, match=told):
        make(0.7)(w)
    with pytest.raises(ValueError, match=r"penalty_mask \(a function\) selects none"):
        make(0.7, penalty_mask=lambda w: jax.tree.map(lambda x: x.ndim == 4, w))(
            jnp.ones((2, 2))
        )
    first_order = 2 * (w + 0.5 * w)
    np.testing.assert_allclose(make(0.7, penalty_mask=False)(w), first_order)
    np.testing.assert_allclose(
        make(0.7, penalty_mask=True)(w), first_order + 0.7 * 2 * 2 * 0.5 * 2 * w
    )


def test_what_is_switched_off_needs_nothing_to_act_on():
    w, nothing = jnp.array([3.0]), lambda w: False
    assert float(hero_function(0)(w)[0]) == float(hero_function(0.0)(w)[0]) == 9.0
    assert float(hero_link(0.0)(w)[0]) == 9.0
    for value_and_grad in (
        paper.hero_value_and_grad(square, h=0.0, gamma=0.1, perturb_mask=nothing),
        family.gsam_value_and_grad(square, h=0.0, alpha=0.0, perturb_mask=nothing),
        family.gnp_value_and_grad(square, strength=0.0, penalty_mask=nothing),
    ):
        assert float(value_and_grad(w)[1][0]) == 6.0


@pytest.mark.parametrize(
    ("method", "options", "mask"),
    [
        (paper.hero_value_and_grad, {"h": 0.5, "gamma": 0.0}, "perturb_mask"),
        (family.gsam_value_and_grad, {"h": 0.5, "alpha": 0.1}, "perturb_mask"),
        (family.gnp_value_and_grad, {"strength": 0.1}, "penalty_mask"),
        (family.grad_l1_value_and_grad, {"strength": 0.1}, "penalty_mask"),
    ],
)
def test_a_mask_function_that_selects_nothing_is_refused(method, options, mask):
    nothing = {mask: lambda w: jax.tree.map(lambda x: x.ndim == 4, w)}
    told = rf"{next(iter(options))} must have leaves to act on, and {mask} \(a function"
    with pytest.raises(ValueError, match=told):
        method(square, **options, **nothing)(jnp.ones((2, 2)))


def test_a_mask_function_is_called_with_the_whole_tree():
    params = {"dense": {"kernel": jnp.ones((2, 2))}}
    loss = lambda p: square(p["dense"]["kernel"])

    def run(mask):
        paper.hero_value_and_grad(loss, h=0.5, gamma=0.1, penalty_mask=mask)(params)

    by_path = r"penalty_mask\(params\).*whole tree.*x\.ndim >= 2.*tree_map_with_path"
    for mask, got in (
        (lambda path: "kernel" in path, "False"),
        (lambda x: jnp.array(True), "True"),
        (lambda params: None, "None"),
    ):
        with pytest.raises(TypeError, match=f"got {got}.*{by_path}"):
            run(mask)
    with pytest.raises(AttributeError, match="ndim") as caught:
        run(lambda x: x.ndim > 1)
    notes = " ".join(caught.value.__notes__)
    assert re.search(f"penalty_mask was called as {by_path}", notes)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("hvp", ["exact", hero_jax.FiniteDifference(1e-6)])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gamma_has_the_unit_of_one_over_the_loss(direction, hvp):
    """Of S times the loss, the penalty is S^2 times as large: gamma / S is the same."""
    params, batch = mlp_params(), mlp_batch()
    loss = lambda p: mlp_loss(p, *batch)
    expected, _ = dense_hero(
        mlp_loss,
        params,
        *batch,
        h=0.3,
        gamma=0.7,
        direction=direction,
        reduction="sum",
    )
    options = {"perturbation": direction, "hvp": hvp}

    @jax.jit
    def by_function(scale):
        scaled = paper.hero_value_and_grad(
            lambda p: scale * loss(p), h=0.3, gamma=0.7 / scale, **options
        )
        return jax.tree.map(lambda x: x / scale, scaled(params)[1])

    @jax.jit
    def by_link(scale):
        """What DynamicScale does to a gradient leaves gamma as it is."""
        grad_fn = lambda p: jax.tree.map(
            lambda x: x / scale, jax.grad(lambda p: scale * loss(p))(p)
        )
        tx = paper.hero(h=0.3, gamma=0.7, **options)
        return tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)[0]

    tolerance = 1e-10 if hvp == "exact" else 1e-4  # a difference errs by its step
    for scale in (2.0**15, 7.0):
        float64_close(by_function(scale), expected, tolerance)
        float64_close(by_link(scale), expected, tolerance)


@pytest.mark.slow
def test_a_scaled_loss_does_not_overflow_in_float16():
    """S g and S H (gamma (grad L(U) - g)) are in float16's range, S^2 H v is not."""
    params, batch = mlp_params(dtype=jnp.float32), mlp_batch(dtype=jnp.float32)
    scale = 2.0**12

    def loss(dtype, scale):
        def of(params):
            params, x, y = jax.tree.map(lambda x: x.astype(dtype), (params, *batch))
            return scale * mlp_loss(params, x, y).astype(jnp.float32)

        return of

    def run(dtype, scale):
        hero = paper.hero_value_and_grad(loss(dtype, scale), h=0.3, gamma=0.01 / scale)
        return jax.tree.map(lambda x: x / scale, hero(params)[1])

    found, expected = run(jnp.float16, scale), run(jnp.float32, 1.0)
    error = jax.tree.map(jnp.subtract, found, expected)
    # float16 has 11 bits, and a difference of gradients loses some of them.
    assert float(optax.tree.norm(error)) < 0.01 * float(optax.tree.norm(expected))


def notes_of(error):
    """What this library says besides; JAX has notes of its own."""
    notes = getattr(error, "__notes__", [])
    return [note for note in notes if note.startswith("hero_jax: ")]


@jax.custom_vjp
def fourth_power(w):
    return w**4


def _forward(w):
    power = fourth_power(w)  # calls itself, and the gradient needs it
    return power, (w, power)


fourth_power.defvjp(_forward, lambda kept, dy: (4 * dy * kept[1] / kept[0],))


@jax.custom_vjp
def called_back(w):
    return jax.pure_callback(
        lambda w: np.sum(w**4), jax.ShapeDtypeStruct((), w.dtype), w
    )


called_back.defvjp(
    lambda w: (called_back(w), w),
    lambda w, dy: (dy * jax.pure_callback(lambda w: 4 * w**3, w, w),),
)
WITHOUT_FORWARD_MODE = {
    "calls itself": lambda w: jnp.sum(fourth_power(w)),
    "callback": called_back,
    "igamma": lambda w: jnp.sum(jax.scipy.special.gammainc(jnp.exp(w), 1.0)),
}


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", WITHOUT_FORWARD_MODE)
def test_a_loss_without_forward_mode_has_a_way_round(case):
    loss, w = WITHOUT_FORWARD_MODE[case], jnp.array([[1.0, -2.0], [0.5, 1.5]])
    step = {"hvp": hero_jax.FiniteDifference(1e-6)}
    methods = [
        (lambda loss, **kw: paper.hero_value_and_grad(loss, h=0.3, gamma=0.1, **kw),
         "Pass hvp=hero_jax.FiniteDifference()", step),
        (lambda loss, **kw: family.gnp_value_and_grad(loss, strength=0.1, **kw),
         "Pass radius=", {"radius": 1e-6}),
        (lambda loss, **kw: family.grad_l1_value_and_grad(loss, strength=0.1, **kw),
         "Pass radius=", {"radius": 1e-6}),
    ]  # fmt: skip
    for method, way, options in methods:
        with pytest.raises(Exception, match=r".") as caught:
            method(loss)(w)
        (note,) = notes_of(caught.value)
        assert "the loss has no forward-mode rule (custom_vjp, callback" in note
        assert way in note
        found = method(loss, **options)(w)
        if case != "igamma":
            exact = method(lambda w: jnp.sum(w**4))(w)
            # A difference over a step errs by the step times the third derivative.
            float64_close(found, exact, 1e-4)
        assert jnp.isfinite(found[1]).all()


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_cure_has_a_way_round_for_inputs_without_forward_mode():
    w, x = jnp.array([1.0, -2.0]), jnp.array([[2.0, 0.5], [0.3, 1.0], [1.0, -1.0]])

    def cure(power, **options):
        loss = lambda w, x: jnp.mean(power(x @ w))
        return family.cure_value_and_grad(loss, h=0.5, gamma=0.1, **options)(w, x)

    with pytest.raises(TypeError, match="custom_vjp") as caught:
        cure(fourth_power)
    assert "Pass hvp=hero_jax.FiniteDifference()" in " ".join(notes_of(caught.value))
    # A difference over a step errs by the step times the third derivative.
    float64_close(
        cure(fourth_power, hvp=hero_jax.FiniteDifference(1e-6)),
        cure(lambda x: x**4),
        1e-4,
    )


def test_a_fault_of_the_loss_is_not_called_a_lack_of_forward_mode():
    def broken(_):
        raise TypeError("mine")

    with pytest.raises(TypeError, match="mine") as caught:
        family.gnp_value_and_grad(broken, strength=0.1)(jnp.ones(2))
    assert not notes_of(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_auxiliary_output_may_be_anything(dtype):
    params, batch = mlp_params(dtype=dtype), mlp_batch(dtype=dtype)
    anything = {"text": "text", "function": len, "number": 0.5, "double": np.ones(2)}

    def loss(params, *batch):
        return mlp_loss(params, *batch), {**anything, "array": batch[0]}

    for value_and_grad in (
        paper.hero_value_and_grad(loss, h=0.1, gamma=0.1, has_aux=True),
        family.gnp_value_and_grad(loss, strength=0.1, radius=0.1, has_aux=True),
        family.grad_l1_value_and_grad(loss, strength=0.1, has_aux=True),
        family.gsam_value_and_grad(loss, h=0.1, alpha=0.1, has_aux=True),
    ):
        (value, aux), _ = value_and_grad(params, *batch)
        assert value.dtype == aux.pop("array").dtype == dtype
        assert all(aux[name] is value for name, value in anything.items())


def loss_of_anything(p):
    return sum(jnp.sum(jnp.abs(x)) for x in jax.tree.leaves(p))


VALID = {"h": 0.1, "gamma": 0.1}
MISUSES = {
    "negative h": ({"h": -0.5}, ValueError, r"h must be finite and >= 0, got -0\.5"),
    "negative array": ({"h": jnp.float32(-2)}, ValueError, r"h must be .* got -2"),
    "NaN gamma": ({"gamma": float("nan")}, ValueError, r"gamma must be .* got nan"),
    "string h": ({"h": "0.5"}, TypeError, r"h must be a real number .* str: '0\.5'"),
    "boolean h": ({"h": True}, TypeError, r"h must be a real number .* bool"),
    "missing h": ({"h": None}, TypeError, r"h must be a real .* NoneType"),
    "missing gamma": ({"gamma": None}, TypeError, r"gamma must be a real .* NoneType"),
    "complex h": ({"h": np.complex64(1)}, TypeError, r"h must be a real number"),
    "vector h": ({"h": jnp.ones(3)}, ValueError, r"h must be a scalar.*\(3,\).*vmap"),
    "schedule": ({"h": lambda t: 0.1}, TypeError, r"Schedules are accepted by"),
    "reduction": (
        {"reduction": "max"},
        ValueError,
        r"reduction must be one of \['mean', 'norm', 'sum'\], got 'max'",
    ),
    "perturbation": (
        {"perturbation": "sam"},
        ValueError,
        r"perturbation must be one of .*layerwise.* got 'sam'",
    ),
    "perturbation type": ({"perturbation": 3}, TypeError, r"perturbation must be"),
}


@pytest.mark.parametrize("case", MISUSES)
@pytest.mark.parametrize("factory", ["hero_value_and_grad", "hero"])
def test_misuse_is_named_when_the_transform_is_built(factory, case):
    if (factory, case) == ("hero", "schedule"):
        pytest.skip("hero takes schedules")
    arguments, error, message = MISUSES[case]
    build = (
        paper.hero
        if factory == "hero"
        else lambda **kw: paper.hero_value_and_grad(loss_of_anything, **kw)
    )
    with pytest.raises(error, match=message):
        build(**{**VALID, **arguments})


def test_misuse_is_named_when_the_gradient_is_taken():
    two = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}

    def call(params, **kwargs):
        return paper.hero_value_and_grad(loss_of_anything, **{**VALID, **kwargs})(
            params
        )

    with pytest.raises(TypeError, match=r"loss_fn must be a callable .* got int: 3"):
        paper.hero_value_and_grad(3, **VALID)
    with pytest.raises(TypeError, match=r"real floating-point.*complex64 at \['a'\]"):
        call({"a": jnp.ones(2, jnp.complex64)})
    with pytest.raises(TypeError, match=r"real floating-point.*int32 at \['a'\]"):
        call({"a": jnp.ones(2, jnp.int32)})
    with pytest.raises(TypeError, match=r"real floating-point.* got str at \['a'\]"):
        call({"a": "float32"})
    with pytest.raises(TypeError, match=r"argnums=0 .* got 0 positional"):
        paper.hero_value_and_grad(loss_of_anything, **VALID)(p=two)
    for name in ("perturb_mask", "penalty_mask"):
        with pytest.raises(ValueError, match=rf"{name} must have the tree structure"):
            call(two, **{name: {"a": True, "c": False}})
        with pytest.raises(TypeError, match=rf"{name} must have .*booleans.*1"):
            call(two, **{name: {"a": True, "b": 1}})
        with pytest.raises(TypeError, match=rf"{name} must have plain booleans"):
            jax.jit(lambda m, name=name: call(two, **{name: m}))(
                {"a": jnp.array(True), "b": jnp.array(False)}
            )
    with pytest.raises(ValueError, match=r"the perturbation's result must have the tr"):
        call(two, perturbation=lambda p, _: p["a"])
    with pytest.raises(ValueError, match=r"the perturbation's result .*shapes.*\(3,\)"):
        call(two, perturbation=lambda p, _: {**p, "b": jnp.ones(3)})
