"""hero() as a link of an optax chain: equal to the function, at home in any wrapper."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hero_jax
from tests import paper
from tests.problems import mlp_batch, mlp_loss, mlp_params

VARIANTS = {
    "layerwise": {"h": 0.5, "gamma": 0.1},
    "adaptive mean": {
        "h": 0.5,
        "gamma": 5.0,
        "perturbation": "adaptive",
        "reduction": "mean",
    },
    "normalized": {"h": 0.05, "gamma": 0.1, "perturbation": "normalized"},
    "first-order": {"h": 0.5, "gamma": 0.0},
    "off": {"h": 0.0, "gamma": 0.0},
    "masked": {
        "h": 0.5,
        "gamma": 0.1,
        "perturb_mask": lambda p: jax.tree.map(lambda x: x.ndim >= 2, p),
        "penalty_mask": {"hidden": True, "out": False},
    },
    "scheduled": {
        "h": optax.linear_schedule(0.1, 0.5, 5),
        "gamma": optax.linear_schedule(0.0, 0.1, 5),
    },
}
main_variants = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=marks)
        for name in VARIANTS
        for marks in [() if name in ("layerwise", "scheduled") else pytest.mark.slow]
    ],
)
"""Two are fast; the slow tests have all of them."""

BATCH = mlp_batch(dtype=jnp.float32)
GRAD_FN = jax.grad(lambda params: mlp_loss(params, *BATCH))


def initial(dtype=jnp.float32):
    return mlp_params(dtype=dtype)


def optimizer(variant):
    return optimizer_of(paper.hero(**variant))


def optimizer_of(hero):
    return optax.chain(
        hero,
        optax.add_decayed_weights(1e-2),
        optax.sgd(0.05, momentum=0.9),
    )


def run(tx, params, steps=6, grad_fn=GRAD_FN, jit=True, **extra):
    """Train for a few steps; return the weights and the state."""

    def step(params, state):
        updates, state = tx.update(
            grad_fn(params), state, params, grad_fn=grad_fn, **extra
        )
        return optax.apply_updates(params, updates), state

    step = jax.jit(step) if jit else step
    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def close(actual, expected):
    """Equal up to the rounding of six steps in float32, compiled differently."""
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-5)


@functools.cache
def trained(name, steps=6):
    """What steps of a variant's chain lead to."""
    return run(optimizer(VARIANTS[name]), initial(), steps)


@functools.cache
def reference_of(name):
    return reference(VARIANTS[name])


def reference(variant, steps=6):
    """The same training by hero_value_and_grad and a loop."""
    params = initial()
    tx = optax.chain(optax.add_decayed_weights(1e-2), optax.sgd(0.05, momentum=0.9))
    state = tx.init(params)

    @jax.jit
    def gradient(params, t):
        at_t = {
            name: value(t) if name in ("h", "gamma") and callable(value) else value
            for name, value in variant.items()
        }
        return paper.hero_value_and_grad(mlp_loss, **at_t)(params, *BATCH)[1]

    for t in range(steps):
        updates, state = tx.update(gradient(params, t), state, params)
        params = optax.apply_updates(params, updates)
    return params


@main_variants
def test_equals_the_function(name):
    close(trained(name)[0], reference_of(name))


@pytest.mark.slow
@main_variants
def test_jit_changes_nothing(name):
    params, _ = run(optimizer(VARIANTS[name]), initial(), steps=2, jit=False)
    close(params, trained(name, steps=2)[0])


@main_variants
def test_compiles_once_and_keeps_its_state_stable(name):
    tx = optimizer(VARIANTS[name])
    step = jax.jit(lambda p, s: tx.update(GRAD_FN(p), s, p, grad_fn=GRAD_FN))
    params = initial()
    state = tx.init(params)
    _, first = step(params, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, first)
    _, second = step(params, first)
    chex.assert_trees_all_equal_shapes_and_dtypes(first, second)
    assert step._cache_size() == 1


@main_variants
def test_inside_scan_and_cond(name):
    tx = optimizer(VARIANTS[name])

    def body(carry, skip):
        params, state = carry

        def advance():
            updates, new = tx.update(GRAD_FN(params), state, params, grad_fn=GRAD_FN)
            return optax.apply_updates(params, updates), new

        return jax.lax.cond(skip, lambda: carry, advance), None

    params = initial()
    carry = jax.jit(jax.lax.scan, static_argnums=0)(
        body, (params, tx.init(params)), jnp.array([False, True] + [False] * 5)
    )[0]
    close(carry[0], trained(name)[0])
    assert int(optax.tree.get(carry[1], "count", filtering=_of_hero)) == 6


def _of_hero(path, _):
    return any(getattr(key, "tuple_name", None) == "HeroState" for key in path)


@pytest.mark.slow
@main_variants
@pytest.mark.parametrize(
    "dtype",
    [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow), jnp.float32],
)
def test_updates_keep_the_dtype_of_the_gradients(name, dtype):
    tx, params = paper.hero(**VARIANTS[name]), initial(dtype)
    grads = jax.eval_shape(GRAD_FN, params)
    updates, state = jax.jit(
        lambda p: tx.update(GRAD_FN(p), tx.init(p), p, grad_fn=GRAD_FN)
    )(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)
    chex.assert_trees_all_equal_dtypes(state, tx.init(params))
    chex.assert_tree_all_finite(updates)


@pytest.mark.usefixtures("x64")
@main_variants
def test_state_is_stable_when_gradients_are_narrower_than_the_weights(name):
    tx, params = paper.hero(**VARIANTS[name]), initial(jnp.float64)
    grad_fn = lambda p: jax.tree.map(lambda x: x.astype(jnp.float32), GRAD_FN(p))
    _, state = jax.eval_shape(
        lambda p: tx.update(grad_fn(p), tx.init(p), p, grad_fn=grad_fn), params
    )
    chex.assert_trees_all_equal_dtypes(state, tx.init(params))


@main_variants
def test_zero_gradient_is_finite(name):
    params = initial()
    zero = lambda p: jax.tree.map(jnp.zeros_like, p)
    updates, state = run(optimizer(VARIANTS[name]), params, steps=2, grad_fn=zero)
    chex.assert_tree_all_finite((updates, state))


@pytest.mark.slow
@main_variants
def test_vmap_over_stacked_weights(name):
    tx = optimizer(VARIANTS[name])
    many = [mlp_params(seed, jnp.float32) for seed in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *many)

    def step(params):
        return tx.update(GRAD_FN(params), tx.init(params), params, grad_fn=GRAD_FN)

    together = jax.jit(jax.vmap(step))(stacked)
    step = jax.jit(step)
    expected = jax.tree.map(lambda *x: np.stack(x), *[step(p) for p in many])
    close(together, expected)


@pytest.mark.slow
def test_vmap_over_h_and_gamma():
    params, grads = initial(), GRAD_FN(initial())

    def update(h, gamma):
        tx = paper.hero(h=h, gamma=gamma)
        return tx.update(grads, tx.init(params), params, grad_fn=GRAD_FN)[0]

    hs, gammas = jnp.array([0.0, 0.2, 0.5]), jnp.array([0.3, 0.0, 0.1])
    expected = [update(float(h), float(c)) for h, c in zip(hs, gammas, strict=True)]
    close(
        jax.jit(jax.vmap(update))(hs, gammas),
        jax.tree.map(lambda *x: np.stack(x), *expected),
    )


@main_variants
def test_other_extra_arguments_are_accepted(name):
    tx = optimizer(VARIANTS[name])
    params, _ = run(tx, initial(), value=jnp.array(1.0), tag=None)
    close(params, trained(name)[0])


def test_off_passes_the_gradient_through_bit_for_bit():
    tx, params = paper.hero(h=0.0, gamma=0.0), initial()
    grads = GRAD_FN(params)
    updates, _ = tx.update(grads, tx.init(params), params, grad_fn=GRAD_FN)
    chex.assert_trees_all_equal(updates, grads)


def test_metrics_are_those_of_the_function():
    params = initial()
    tx = paper.hero(h=0.5, gamma=0.1)
    _, state = tx.update(GRAD_FN(params), tx.init(params), params, grad_fn=GRAD_FN)
    _, _, metrics = paper.hero_value_and_grad(
        mlp_loss, h=0.5, gamma=0.1, return_metrics=True
    )(params, *BATCH)
    assert state.metrics.perturbed_loss is None
    close(state.metrics, metrics._replace(perturbed_loss=None))
    assert float(state.metrics.hessian_norm) > 0.0


def where_finite(tx):
    """Keep the old state where the new gradient is not finite."""

    def update(grads, state, params, **extra):
        updates, new = tx.update(grads, state, params, **extra)
        ok = jnp.isfinite(optax.tree.norm(grads))
        return updates, jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, state)

    return optax.GradientTransformationExtraArgs(tx.init, update)


READING_THE_OLD_STATE = {
    "where": where_finite,
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 5),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "conditionally_transform": lambda tx: optax.conditionally_transform(
        tx, lambda step: step > 0
    ),
    "conditionally_mask": lambda tx: optax.conditionally_mask(
        tx, lambda step: step > 0
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrapper", "inner"),
    [
        pytest.param(
            *(wrapper, inner),
            id=f"{wrapper}-{name}",
            marks=() if name == "link" or wrapper == "MultiSteps" else pytest.mark.slow,
        )
        for wrapper in READING_THE_OLD_STATE
        for name, inner in (("link", lambda tx: tx), ("chain", optimizer_of))
    ],
)
def test_a_fresh_state_can_be_donated(wrapper, inner):
    """And the states after it: those of a step, compiled or not."""
    variant = VARIANTS["layerwise"]
    tx = READING_THE_OLD_STATE[wrapper](inner(paper.hero(**variant)))

    def step(state):
        params = initial()
        return tx.update(GRAD_FN(params), state, params, grad_fn=GRAD_FN)

    plain, donating = jax.jit(step), jax.jit(step, donate_argnums=0)
    for start in (lambda: tx.init(initial()), lambda: step(tx.init(initial()))[1]):
        state, kept = start(), start()
        for _ in range(3):
            found, state = donating(state)
            expected, kept = plain(kept)
            chex.assert_trees_all_equal(found, expected)
        chex.assert_trees_all_equal(state, kept)


class TestWrappers:
    """optax's wrappers: each works, or says what to do instead."""

    variant = VARIANTS["layerwise"]

    def test_named_chain(self):
        tx = optax.named_chain(
            ("hero", paper.hero(**self.variant)),
            ("decay", optax.add_decayed_weights(1e-2)),
            ("sgd", optax.sgd(0.05, momentum=0.9)),
        )
        params, state = run(tx, initial())
        close(params, reference_of("layerwise"))
        assert float(state["hero"].metrics.penalty) > 0.0

    @pytest.mark.slow
    def test_inject_hyperparams(self):
        factory = optax.inject_hyperparams(paper.hero)
        variant = {**VARIANTS["scheduled"], "perturbation": "adaptive"}
        tx = optax.chain(
            factory(**variant),
            optax.add_decayed_weights(1e-2),
            optax.sgd(0.05, momentum=0.9),
        )
        params, state = run(tx, initial())
        close(params, reference(variant))
        assert float(state[0].hyperparams["h"]) == 0.5

    def test_inject_hyperparams_leaves_out_the_product_where_gamma_is_zero(self):
        """A rule for the loss that has a gradient, and NaN for its derivative."""

        @jax.custom_jvp
        def gradient(w):
            return w

        gradient.defjvp(lambda w, dw: (w[0], dw[0] * jnp.nan))
        schedule = optax.piecewise_constant_schedule(0.0, {0: 1.0})
        for gamma, is_computed in ((schedule, False), (0.1, True)):
            tx = optax.inject_hyperparams(paper.hero)(h=0.5, gamma=gamma)
            w = jnp.ones((2, 2))
            update = jax.jit(functools.partial(tx.update, grad_fn=gradient))
            updates, _ = update(w, tx.init(w), w)
            assert bool(jnp.isnan(updates).all()) == is_computed

    def test_inject_hyperparams_changed_by_hand(self):
        tx = optax.inject_hyperparams(paper.hero)(h=0.5, gamma=0.1)
        params = initial()
        state = tx.init(params)
        state.hyperparams["gamma"] = jnp.array(0.7)
        grads = GRAD_FN(params)
        updates, _ = tx.update(grads, state, params, grad_fn=GRAD_FN)
        other = paper.hero(h=0.5, gamma=0.7)
        expected, _ = other.update(grads, other.init(params), params, grad_fn=GRAD_FN)
        close(updates, expected)

    def test_inject_hyperparams_with_a_function_for_direction(self):
        direction = hero_jax.perturbation.adaptive
        arguments = {"h": 0.5, "gamma": 0.1, "perturbation": direction}
        static = optax.inject_hyperparams(paper.hero, static_args="perturbation")
        params = initial()
        grads = GRAD_FN(params)
        tx, plain = static(**arguments), paper.hero(**arguments)
        close(
            tx.update(grads, tx.init(params), params, grad_fn=GRAD_FN)[0],
            plain.update(grads, plain.init(params), params, grad_fn=GRAD_FN)[0],
        )
        with pytest.raises(TypeError, match=r"static_args"):
            optax.inject_hyperparams(paper.hero)(**arguments).init(params)

    def test_apply_if_finite_behind_hero_skips_the_step(self):
        """The gradient at W is finite, that at U is not: only HERO can see it."""
        W = {"w": jnp.ones((2, 2))}

        def grad_fn(p):
            bad = p["w"][0, 0] > 1.0
            return {"w": jnp.where(bad, jnp.nan, p["w"])}

        inner = optax.chain(
            optax.add_decayed_weights(1e-2), optax.sgd(0.05, momentum=0.9)
        )
        tx = optax.chain(paper.hero(h=0.5, gamma=0.1), optax.apply_if_finite(inner, 5))
        params, state = run(tx, W, steps=3, grad_fn=grad_fn)
        chex.assert_trees_all_equal(params, W)
        assert int(state[1].total_notfinite) == 3
        chex.assert_trees_all_equal(state[1].inner_state, inner.init(W))

        # With the gradient taken beforehand, the whole chain is behind HERO.
        def loss(p):
            return jnp.where(p["w"][0, 0] > 1.0, jnp.nan, 1.0) * jnp.sum(p["w"] ** 2)

        guarded = optax.apply_if_finite(inner, 5)
        _, grads = paper.hero_value_and_grad(loss, h=0.5, gamma=0.1)(W)
        updates, state = guarded.update(grads, guarded.init(W), W)
        assert int(state.total_notfinite) == 1
        chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, W))

    def test_apply_if_finite_around_finite_steps(self):
        tx = optax.apply_if_finite(optimizer(self.variant), 5)
        close(run(tx, initial())[0], reference_of("layerwise"))

    def test_multi_steps_behind_hero_averages_the_micro_batches(self):
        batches = [mlp_batch(seed, jnp.float32) for seed in (1, 2)]
        inner = optax.sgd(0.05)
        accumulate = optax.MultiSteps(inner, every_k_schedule=2)
        tx = optax.chain(
            paper.hero(**self.variant), accumulate.gradient_transformation()
        )
        params = initial()
        state = tx.init(params)
        gradients, moved = [], params
        for batch in batches:
            grad_fn = jax.grad(lambda p, batch=batch: mlp_loss(p, *batch))
            updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
            moved = optax.apply_updates(moved, updates)
            value_and_grad = paper.hero_value_and_grad(mlp_loss, **self.variant)
            gradients.append(value_and_grad(params, *batch)[1])
        expected = jax.tree.map(
            lambda p, a, b: p - 0.05 * (a + b) / 2, params, *gradients
        )
        close(moved, expected)

    @pytest.mark.slow
    def test_multi_steps_around_hero_with_the_grad_fn_of_the_whole_batch(self):
        tx = optax.MultiSteps(optimizer(self.variant), every_k_schedule=2)
        params = initial()
        halves = [jax.tree.map(lambda x, k=k: x[k::2][:3], BATCH) for k in (0, 1)]
        whole = jax.tree.map(lambda *x: jnp.concatenate(x), *halves)
        grad_of = lambda batch: jax.grad(lambda p: mlp_loss(p, *batch))
        state = tx.init(params)
        moved = params
        for half in halves:
            updates, state = tx.update(
                grad_of(half)(params), state, params, grad_fn=grad_of(whole)
            )
            moved = optax.apply_updates(moved, updates)
        close(moved, run(optimizer(self.variant), params, 1, grad_of(whole))[0])

    @pytest.mark.parametrize("wrapper", ["masked", "partition"])
    def test_part_of_the_weights(self, wrapper):
        """With a grad_fn of that part: HERO on it, the plain gradient elsewhere."""
        params = initial()
        label = {"hidden": "hero", "out": "plain"}
        hero = paper.hero(**self.variant)
        if wrapper == "masked":
            tx = optax.masked(hero, {"hidden": True, "out": False})
        else:
            tx = optax.partition({"hero": hero, "plain": optax.identity()}, label)

        def grad_of_part(part):
            return {
                **part,
                "hidden": GRAD_FN({**params, "hidden": part["hidden"]})["hidden"],
            }

        grads = GRAD_FN(params)
        updates, _ = tx.update(grads, tx.init(params), params, grad_fn=grad_of_part)
        loss_of_part = lambda hidden: mlp_loss({**params, "hidden": hidden}, *BATCH)
        _, expected = paper.hero_value_and_grad(loss_of_part, **self.variant)(
            params["hidden"]
        )
        close(updates["hidden"], expected)
        chex.assert_trees_all_equal(updates["out"], grads["out"])

        with pytest.raises(ValueError, match=r"masked or optax\.partition.*perturb_ma"):
            tx.update(grads, tx.init(params), params, grad_fn=GRAD_FN)

    def test_map_params(self):
        tx, params = optimizer(self.variant), initial()
        state = optax.tree.map_params(tx, lambda x: x + 1, tx.init(params))
        chex.assert_trees_all_equal(
            state[2][0].trace, jax.tree.map(jnp.ones_like, params)
        )
        assert int(state[0].count) == 0


class TestMisuse:
    """Every error names the argument and what is allowed."""

    tx = paper.hero(h=0.5, gamma=0.1)

    def update(self, grads=None, params=None, **kwargs):
        params = initial() if params is None else params
        grads = GRAD_FN(initial()) if grads is None else grads
        return self.tx.update(grads, self.tx.init(initial()), params, **kwargs)

    def test_missing_arguments(self):
        with pytest.raises(
            ValueError, match=r"hero needs the weights, and grad_fn.*jax\.grad"
        ):
            self.update()
        state = self.tx.init(initial())
        with pytest.raises(
            ValueError, match=r"hero needs the weights, and grad_fn.*tx\.update"
        ):
            self.tx.update(GRAD_FN(initial()), state, grad_fn=GRAD_FN)
        with pytest.raises(TypeError, match=r"grad_fn must be a callable params -> gr"):
            self.update(grad_fn=GRAD_FN(initial()))

    def test_other_structures(self):
        with pytest.raises(ValueError, match=r"grads must have the tree structure of"):
            self.update(grads={"other": jnp.ones(3)}, grad_fn=GRAD_FN)
        with pytest.raises(ValueError, match=r"without value or aux.*must have the tr"):
            self.update(grad_fn=lambda p: (jnp.array(0.0), GRAD_FN(p)))
        with pytest.raises(ValueError, match=r"grad_fn's result.*must have the shapes"):
            self.update(grad_fn=lambda p: jax.tree.map(lambda x: x[None], p))

    @pytest.mark.parametrize(
        ("value", "error", "message"),
        [
            (-1.0, ValueError, r"h\(count\) must be finite and >= 0, got -1\.0"),
            (None, TypeError, r"h\(count\) must be a real number .* NoneType"),
            (jnp.ones(2), ValueError, r"h\(count\) must be a scalar, got shape \(2,\)"),
        ],
    )
    def test_what_a_schedule_returns(self, value, error, message):
        tx, params = paper.hero(h=lambda count: value, gamma=0.1), initial()
        with pytest.raises(error, match=message):
            tx.update(GRAD_FN(params), tx.init(params), params, grad_fn=GRAD_FN)

    def test_errors_of_grad_fn_are_left_alone(self):
        def broken(_):
            raise RuntimeError("mine")

        with pytest.raises(RuntimeError, match="mine"):
            self.update(grad_fn=broken)

    def test_a_type_error_within_grad_fn_is_not_taken_for_a_missing_batch(self):
        def broken(_):
            raise TypeError("mine")

        for grad_fn in (broken, jax.jit(broken), lambda p, *rest: broken(p)):
            with pytest.raises(TypeError, match="mine") as caught:
                self.update(grad_fn=grad_fn)
            notes = " ".join(getattr(caught.value, "__notes__", []))
            assert "hero_jax" not in notes

    def test_complex_weights(self):
        with pytest.raises(
            TypeError, match=r"real floating-point arrays .*, got complex"
        ):
            self.tx.init({"w": jnp.ones(2, jnp.complex64)})


def test_two_links_count_separately():
    """A schedule sees the number of updates, from zero."""
    seen = []

    def schedule(count):
        seen.append(int(count))
        return 0.5

    run(paper.hero(h=schedule, gamma=0.0), initial(), steps=3, jit=False)
    assert seen == [0, 1, 2]
    np.testing.assert_array_equal(seen, np.arange(3))
