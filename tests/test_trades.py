"""The cheaper products with the Hessian, against the exact one and its definition."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hero_jax
from hero_jax import FiniteDifference
from hero_jax.parts import in_parts
from tests import paper
from tests.problems import dense_hero, mlp_batch, mlp_loss, mlp_params, quadratic

SETTINGS = {"h": 0.3, "gamma": 0.7}
pytestmark = pytest.mark.usefixtures("x64")


def gradient(params, batch, **options):
    options = {**SETTINGS, **options}
    value_and_grad = paper.hero_value_and_grad(mlp_loss, **options)
    return jax.jit(value_and_grad)(params, *batch)[1]


def every(k):
    """Return the loss over every k-th example."""
    return lambda params, x, y: mlp_loss(params, x[::k], y[::k])


def distance(a, b):
    difference = jax.tree.map(jnp.subtract, a, b)
    return float(optax.tree.norm(difference) / optax.tree.norm(b))


@pytest.mark.slow
@pytest.mark.parametrize(
    "reduction", ["sum", pytest.param("mean", marks=pytest.mark.slow)]
)
def test_a_difference_tends_to_the_product_with_the_dense_hessian(reduction):
    """A forward difference errs in proportion to its step, down to rounding."""
    params, batch = mlp_params(), mlp_batch()
    expected, _ = dense_hero(
        mlp_loss,
        params,
        *batch,
        **SETTINGS,
        direction="layerwise",
        reduction=reduction,
    )
    errors = [
        distance(
            gradient(
                params,
                batch,
                reduction=reduction,
                hvp=FiniteDifference(step),
            ),
            expected,
        )
        for step in (1e-4, 1e-5, 1e-6)
    ]
    np.testing.assert_allclose(np.divide(errors[:-1], errors[1:]), 10, rtol=0.05)
    assert errors[-1] < 1e-5


def test_a_difference_is_exact_on_a_quadratic_whatever_the_step():
    A = quadratic([10.0, 3.0, -1.0, 0.5])
    W = jnp.array([[1.0, -2.0], [0.5, 3.0]])
    loss = lambda W: W.ravel() @ A @ W.ravel() / 2

    def run(**options):
        return paper.hero_value_and_grad(loss, **SETTINGS, **options)(W)[1]

    for step in (3e-3, 0.5):
        result = run(hvp=FiniteDifference(step))
        np.testing.assert_allclose(result, run(), rtol=1e-11)


def test_a_step_is_measured_by_the_norms_of_what_moves():
    """The gradient is asked for at a distance of step times the norm of U."""
    seen = []

    @jax.custom_vjp
    def loss(w):
        return jnp.sum(w["a"] ** 4) + jnp.sum(w["b"] ** 4)

    def backward(w, dy):
        seen.append(w)
        return (jax.tree.map(lambda x: 4 * dy * x**3, w),)

    loss.defvjp(lambda w: (loss(w), w), backward)
    params = {"a": jnp.array([[1.0, 2.0]]), "b": jnp.array([100.0])}
    paper.hero_value_and_grad(loss, h=0.1, gamma=1.0, hvp=FiniteDifference(step=0.01))(
        params
    )
    _, U, ahead = seen
    moved = jnp.linalg.norm(ahead["a"] - U["a"])
    np.testing.assert_allclose(moved, 0.01 * jnp.linalg.norm(U["a"]), rtol=1e-10)
    assert ahead["b"] == U["b"]  # no weight tensor, not penalized


def test_a_difference_of_nothing_is_nothing():
    linear = lambda w: jnp.sum(w)
    for w in (jnp.ones((2, 2)), jnp.zeros((2, 2))):
        _, result = paper.hero_value_and_grad(
            linear, **SETTINGS, hvp=FiniteDifference()
        )(w)
        np.testing.assert_array_equal(result, 1.0)


def test_a_difference_takes_three_gradients():
    traces = []

    def loss(w):
        traces.append(None)
        return jnp.sum(jnp.sin(w))

    for hvp, count in (("exact", 2), (FiniteDifference(), 3)):
        traces.clear()
        paper.hero_value_and_grad(loss, **SETTINGS, hvp=hvp)(jnp.ones((2, 2)))
        assert len(traces) == count


@pytest.mark.slow
@pytest.mark.parametrize(
    "hvp", ["exact", pytest.param(FiniteDifference(1e-6), marks=pytest.mark.slow)]
)
def test_parts_of_the_batch_average_to_the_whole(hvp):
    """Unbiased: the products over all places of the spaced examples have the mean."""
    params, batch = mlp_params(), mlp_batch(size=8)
    parts = [
        gradient(
            params,
            jax.tree.map(lambda x, k=k: jnp.roll(x, -k, axis=0), batch),
            hvp=hvp,
            hvp_loss_fn=every(4),
        )
        for k in range(4)
    ]
    mean = jax.tree.map(lambda *x: sum(x) / 4, *parts)
    whole = gradient(params, batch, hvp=hvp)
    # Exact sums round at 1e-16; a difference by a step of 1e-6 errs by as much.
    assert distance(mean, whole) < (1e-12 if hvp == "exact" else 1e-5)
    assert all(distance(part, whole) > 0.01 for part in parts)


@pytest.mark.slow
def test_a_product_of_another_loss_leaves_the_metrics_alone():
    params, batch = mlp_params(), mlp_batch(size=6)
    run = functools.partial(gradient, params)
    poisoned = jax.tree.map(lambda x: x.at[1].add(10.0), batch)
    at_U = [run(b, gamma=0.0) for b in (batch, poisoned)]
    product = [
        jax.tree.map(jnp.subtract, run(b, hvp_loss_fn=every(2)), g)
        for b, g in zip((batch, poisoned), at_U, strict=True)
    ]
    # The difference of gradients is that of all examples, the Hessian is not.
    assert distance(*product) > 0.01
    *_, metrics = paper.hero_value_and_grad(
        mlp_loss, **SETTINGS, hvp_loss_fn=every(2), return_metrics=True
    )(params, *batch)
    *_, expected = paper.hero_value_and_grad(mlp_loss, **SETTINGS, return_metrics=True)(
        params, *batch
    )
    length = optax.tree.norm(product[0])
    np.testing.assert_allclose(metrics.penalty_grad_norm, length, rtol=1e-10)
    same = {"penalty_grad_norm": None}
    chex.assert_trees_all_equal(metrics._replace(**same), expected._replace(**same))

    def dense(x, y):
        loss = lambda w: mlp_loss({**params, "out": w}, x, y)
        return jax.jit(jax.hessian(loss))(params["out"])["kernel"]["kernel"]

    only = {"hidden": False, "out": {"kernel": True, "temperature": False}}
    mask = {"perturb_mask": only, "penalty_mask": only}
    g, dL = (run(batch, h=h, gamma=0.0, **mask)["out"]["kernel"] for h in (0.0, 0.3))
    actual = run(batch, hvp_loss_fn=every(2), **mask)["out"]["kernel"]
    z = hero_jax.perturbation.layerwise(
        params["out"]["kernel"], jax.grad(mlp_loss)(params, *batch)["out"]["kernel"]
    )
    params["out"]["kernel"] += 0.3 * z
    H = dense(*(x[::2] for x in batch))
    expected = dL + 2 * 0.7 * jnp.einsum("ijkl,kl->ij", H, dL - g)
    np.testing.assert_allclose(actual, expected, rtol=1e-10)


@pytest.mark.slow
def test_parts_of_each_perturbation():
    params, batch = mlp_params(), mlp_batch(size=8)
    chunks = [jax.tree.map(lambda x, k=k: x[k : k + 4], batch) for k in (0, 4)]
    expected = [gradient(params, chunk, hvp_loss_fn=every(2)) for chunk in chunks]
    mean = jax.tree.map(lambda *x: sum(x) / 2, *expected)
    make = paper.hero_value_and_grad(mlp_loss, **SETTINGS, hvp_loss_fn=every(2))
    _, actual = in_parts(make, 4, batch_argnums=(1, 2))(params, *batch)
    chex.assert_trees_all_close(actual, mean, rtol=1e-10)


@pytest.mark.slow
def test_layers_that_are_not_penalized_cost_less():
    """Products with zeros would cost as much as any."""
    width = 64
    layers = [
        jax.random.normal(key, (width, width))
        for key in jax.random.split(jax.random.key(0), 6)
    ]

    def loss(layers, x):
        for w in layers:
            x = jnp.tanh(x @ w / 8)
        return jnp.mean(x**2)

    def flops(**options):
        step = jax.jit(paper.hero_value_and_grad(loss, **SETTINGS, **options))
        return (
            step.lower(layers, jnp.ones((32, width))).compile().cost_analysis()["flops"]
        )

    last = [False] * 5 + [True]
    first_order, whole = flops(penalty_mask=[False] * 6), flops()
    # Of the six products per layer, dy W and x^T dy alone are left below the last.
    assert flops(penalty_mask=last) - first_order < 0.5 * (whole - first_order)


@pytest.mark.slow
def test_every_kth_penalty_has_the_mean_of_all():
    params, batch = mlp_params(), mlp_batch()
    grad_fn = lambda p: jax.grad(mlp_loss)(p, *batch)

    def updates(gamma, count):
        tx = paper.hero(h=0.3, gamma=gamma)
        state = tx.init(params)._replace(count=jnp.int32(count))
        return jax.jit(
            lambda state: tx.update(grad_fn(params), state, params, grad_fn=grad_fn)[0]
        )(state)

    schedule = hero_jax.schedules.every(3, 0.7)
    each = [updates(schedule, count) for count in range(4)]
    chex.assert_trees_all_close(each[1], updates(0.0, 0), rtol=1e-10)
    chex.assert_trees_all_equal(each[0], each[3])
    mean = jax.tree.map(lambda *x: sum(x) / 3, *each[:3])
    chex.assert_trees_all_close(mean, updates(0.7, 0), rtol=1e-10)
    plain = hero_jax.schedules.every(3, 0.7, rescale=False)
    chex.assert_trees_all_close(updates(plain, 3), updates(0.7, 0), rtol=1e-10)


def test_every_kth_value_of_a_schedule():
    schedule = hero_jax.schedules.every(2, optax.linear_schedule(0.0, 1.0, 4))
    assert [float(schedule(k)) for k in range(6)] == [0.0, 0.0, 1.0, 0.0, 2.0, 0.0]


@pytest.mark.slow
def test_a_link_takes_another_gradient_for_its_product():
    params, batch = mlp_params(), mlp_batch(size=8)
    spaced = jax.tree.map(lambda x: x[::2], batch)
    whole, part = (lambda p, b=b: jax.grad(mlp_loss)(p, *b) for b in (batch, spaced))
    tx = paper.hero(**SETTINGS)
    updates, _ = tx.update(
        whole(params), tx.init(params), params, grad_fn=whole, hvp_grad_fn=part
    )
    chex.assert_trees_all_close(
        updates, gradient(params, batch, hvp_loss_fn=every(2)), rtol=1e-10
    )


MISUSES = {
    "product": (
        lambda: gradient(mlp_params(), mlp_batch(), hvp="finite_difference"),
        *(
            ValueError,
            r"hvp must be 'exact' or .*FiniteDifference\(step=...\), got 'fi",
        ),
    ),
    "zero step": (
        lambda: FiniteDifference(0.0),
        *(ValueError, r"step must be finite and > 0, got 0.0"),
    ),
    "step": (
        lambda: FiniteDifference("small"),
        *(TypeError, r"step must be a real number"),
    ),
    "no loss": (
        lambda: gradient(mlp_params(), mlp_batch(), hvp_loss_fn=3),
        *(TypeError, r"hvp_loss_fn must be a callable"),
    ),
    "no scalar": (
        lambda: gradient(mlp_params(), mlp_batch(), hvp_loss_fn=lambda *_: jnp.ones(2)),
        *(TypeError, r"hvp_loss_fn must return a scalar loss"),
    ),
}


@pytest.mark.parametrize("case", MISUSES)
def test_misuse_is_named(case):
    misuse, error, message = MISUSES[case]
    with pytest.raises(error, match=message):
        misuse()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 0.1), ValueError, "k must be an integer >= 1, got 0"),
        ((2.0, 0.1), TypeError, "k must be an integer >= 1, got 2.0"),
        ((2, -0.1), ValueError, "gamma must be finite and >= 0, got -0.1"),
    ],
)
def test_misuse_of_every_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        hero_jax.schedules.every(*arguments)


@pytest.mark.parametrize("power", [1, 2])
def test_h_goes_to_where_the_loss_may_go(power):
    """Against the root of the equation, of a loss that rises as a power of h."""
    loss, slope, share = 0.4, 7.0, 0.3
    exact = (share * (np.log(10) - loss) / slope) ** (1 / power)
    for first in (1e-3, 0.9):
        h, all_h = jnp.float32(first), []
        for _ in range(90):
            all_h.append(float(h))
            h = hero_jax.schedules.next_h(
                h, loss, loss + slope * h**power, untrained_loss=np.log(10), share=share
            )
        ratios = np.divide(all_h[1:], all_h[:-1])
        assert ratios.min() > 0.7 - 1e-6
        assert ratios.max() < 2.0 + 1e-6
        np.testing.assert_allclose(all_h[-10:], exact, rtol=1e-5)


@pytest.mark.parametrize(
    ("h", "loss", "perturbed", "expected"),
    [
        (0.1, 1.0, 0.9, 0.2),  # downhill
        (0.1, 1.0, 1.0, 0.2),  # level
        (0.1, 1.0, 1.028, 0.2),  # far below what is allowed
        (0.1, 1.0, 1.032, 0.11),
        (0.1, 1.0, 1.4, 0.1 * np.sqrt(0.3 / 0.4)),
        (0.1, 2.1, 2.2, 0.07),  # worse than knowing nothing
        (0.1, 2.0, 2.0 + 1e-9, 0.2),  # nothing to lose, and nothing lost
        (0.1, np.nan, np.nan, 0.07),
        (0.1, 1.0, np.inf, 0.07),
        (0.1, np.inf, 1.0, 0.07),
        (1.1e-4, 1.0, 9.0, 1e-4),
        (0.99, 1.0, 1.0, 1.0),
    ],
)
def test_h_shrinks_where_the_loss_may_not_go(h, loss, perturbed, expected):
    args = jnp.float32(h), jnp.float32(loss), jnp.float32(perturbed)
    options = {"untrained_loss": np.float64(2.0), "share": 0.3}
    for f in (hero_jax.schedules.next_h, jax.jit(hero_jax.schedules.next_h)):
        result = f(*args, **options)
        assert result.dtype == jnp.float32  # or a second step is compiled anew
        assert result == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("share", [-0.1, 0.0, 1.5, np.nan, "0.3"])
def test_a_share_is_between_none_and_all(share):
    with pytest.raises((TypeError, ValueError), match="share must be"):
        hero_jax.schedules.next_h(0.1, 1.0, 1.1, untrained_loss=2.0, share=share)


def test_an_h_of_zero_stays():
    assert hero_jax.schedules.next_h(0.0, 1.0, 1.0, untrained_loss=2.0) == 0.0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-0.1, 1.0, 1.1, 2.0), ValueError, "h must be finite and >= 0, got -0.1"),
        ((0.1, 1.0, 1.1, np.nan), ValueError, "untrained_loss must be finite, got nan"),
        ((0.1, 1.0, None, 2.0), TypeError, "perturbed_loss must be a number, got None"),
    ],
)
def test_misuse_of_next_h_is_named(arguments, error, message):
    *known, untrained = arguments
    with pytest.raises(error, match=message):
        hero_jax.schedules.next_h(*known, untrained_loss=untrained)


def program_of(tx):
    params, batch = mlp_params(), mlp_batch()
    grad_fn = lambda p: jax.grad(mlp_loss)(p, *batch)
    return str(
        jax.make_jaxpr(
            lambda state: tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
        )(tx.init(params))
    )


def test_a_link_leaves_the_product_out_where_its_schedule_is_zero():
    schedule = hero_jax.schedules.every(2, 0.1)
    assert "cond[" in program_of(paper.hero(h=0.3, gamma=schedule))
    assert "cond[" not in program_of(paper.hero(h=0.3, gamma=0.1))


@pytest.mark.slow
def test_a_link_takes_differences():
    params, batch = mlp_params(), mlp_batch()
    grad_fn = lambda p: jax.grad(mlp_loss)(p, *batch)
    options = {"hvp": FiniteDifference(step=0.1)}
    tx = paper.hero(**SETTINGS, **options)
    updates, _ = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
    expected = gradient(params, batch, **options)
    chex.assert_trees_all_close(updates, expected, rtol=1e-10)
    assert distance(expected, gradient(params, batch)) > 1e-3


def test_branches_may_differ_in_their_dtypes():
    """The link's gradients are bfloat16, those of its product float32."""
    params = {"w": jnp.ones((2, 2), jnp.float32)}
    whole = lambda p: jax.tree.map(lambda x: (4 * x**3).astype(jnp.bfloat16), p)
    part = lambda p: jax.tree.map(lambda x: 4 * x**3, p)
    tx = paper.hero(h=0.3, gamma=hero_jax.schedules.every(2, 0.1))
    updates, _ = jax.jit(
        lambda g, state: tx.update(g, state, params, grad_fn=whole, hvp_grad_fn=part)
    )(whole(params), tx.init(params))
    assert updates["w"].dtype == jnp.bfloat16
