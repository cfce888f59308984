"""One step of every method against its formula; evaluation and curvature."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hero_jax
from examples.image_classification import evaluate, input_pipeline, train
from examples.image_classification.config import Config
from hero_jax import models
from tests.examples.image_classification.small import Small

IN_A_HURRY = True
"""What is compiled here runs for some steps only."""

CONFIG = Config(
    dataset="digits",
    augmentation="none",
    model="resnet8",
    method="sgd",
    train_size=128,
    test_size=60,
    batch_size=32,
    epochs=3,
    weight_decay=0.01,
)


def setting(model=None, **fields):
    config = dataclasses.replace(CONFIG, **fields)
    pipeline = input_pipeline.create(config)
    model = model or Small()
    return config, model, pipeline, train.make_program(config, model, pipeline)


def loss_of(model, batch_stats, images, labels):
    """The mean cross-entropy as a function of the weights."""

    def loss(params):
        variables = {"params": params, "batch_stats": batch_stats}
        logits, _ = model.apply(variables, images, train=True, mutable=["batch_stats"])
        log = jax.nn.log_softmax(logits)
        return -jnp.mean(log[jnp.arange(len(labels)), labels])

    return loss


METHODS = {
    "sgd": ({}, lambda loss: jax.grad(loss)),
    "grad_l1": (
        {"strength": 0.05},
        lambda loss: jax.grad(
            lambda params: (
                loss(params)
                + 0.05
                * sum(jnp.abs(g).sum() for g in jax.tree.leaves(jax.grad(loss)(params)))
            )
        ),
    ),
    "first_order": (
        {"h": 0.7, "perturbation": "normalized"},
        lambda loss: lambda params: jax.grad(loss)(moved(loss, params)),
    ),
    "hero": (
        {"h": 0.7, "gamma": 0.3, "perturbation": "normalized", "reduction": "mean"},
        lambda loss: lambda params: hero_gradient(loss, params),
    ),
}


def moved(loss, params):
    g = jax.grad(loss)(params)
    return jax.tree.map(lambda w, d: w + 0.7 * d / optax.tree.norm(g), params, g)


def hero_gradient(loss, params):
    """Eq. 13 by reverse over reverse, which the library does not use."""
    g = jax.grad(loss)(params)

    def penalty(U):
        pairs = zip(*map(jax.tree.leaves, (jax.grad(loss)(U), g)), strict=True)
        return sum(jnp.mean((a - b) ** 2) for a, b in pairs if a.ndim >= 2)

    U = moved(loss, params)
    return jax.tree.map(
        lambda a, b: a + 0.3 * b, jax.grad(loss)(U), jax.grad(penalty)(U)
    )


@pytest.mark.parametrize(
    "method",
    [
        "hero",
        *(
            pytest.param(m, marks=pytest.mark.slow)
            for m in ("sgd", "grad_l1", "first_order")
        ),
    ],
)
def test_a_step_is_the_methods_gradient_with_momentum_and_decay(method):
    fields, gradient_of = METHODS[method]
    config, model, pipeline, program = setting(method=method, **fields)
    state = program.init()
    item = next(pipeline.epoch(0))
    velocity = jax.tree.map(jnp.zeros_like, state.params)
    for k in range(2):
        params = jax.tree.map(np.asarray, state.params)
        batch = pipeline.batch(item, np.int32(k))
        stats = jax.tree.map(np.asarray, state.batch_stats)
        loss = loss_of(model, stats, batch.images, batch.labels)
        grads = jax.jit(gradient_of(loss))(params)
        rate = 0.1 * 0.5 * (1 + np.cos(np.pi * k / 12))  # three epochs of four steps
        velocity = jax.tree.map(
            lambda v, g, w: 0.9 * v + g + 0.01 * w, velocity, grads, params
        )
        state, outputs = program.step(state, item)
        expected = jax.tree.map(lambda w, v, r=rate: w - r * v, params, velocity)
        # Two orders of summation, float32, gradients of gradients.
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6),
            state.params,
            expected,
        )
        np.testing.assert_allclose(outputs[0], loss(params), rtol=1e-5)
        assert (outputs[4] > 0.0) == (method in ("hero", "first_order"))
        np.testing.assert_allclose(outputs[3], optax.tree.norm(grads), rtol=1e-4)
        assert int(state.step) == k + 1
    del config


def gradients(**fields):
    """Of two steps from the same weights; without momentum and decay, at rate 1."""
    fields = {"method": "hero", "h": 0.7, "gamma": 0.3, **fields}
    plain = {"momentum": 0.0, "weight_decay": 0.0, "learning_rate": 1.0, "epochs": 1000}
    _, _, pipeline, program = setting(perturbation="normalized", **fields, **plain)
    item, results = next(pipeline.epoch(0)), []
    for k in range(2):
        state = program.init()
        before = jax.tree.map(np.asarray, state.params)
        state, _ = program.step(state._replace(step=jnp.int32(k)), item)
        results.append(jax.tree.map(np.subtract, before, state.params))
    return results


@pytest.mark.slow
def test_options_make_the_penalty_cheaper():
    """Against the gradients with the whole penalty, and with none."""
    whole, none = gradients(), gradients(method="first_order")
    penalty = jax.tree.map(np.subtract, whole, none)

    def close(actual, expected):
        # Weights of 1 less a gradient: float32 rounds at 1e-7 of the weights.
        for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=3e-6)

    first, second = gradients(penalty_every=2)
    close(first, jax.tree.map(lambda a, b: a + 2 * b, none[0], penalty[0]))
    close(second, none[1])
    first, second = gradients(gamma_warmup_epochs=1.0)  # of four steps
    close(first, none[0])
    close(second, jax.tree.map(lambda a, b: a + b / 4, none[1], penalty[1]))
    first, second = gradients(h_warmup_epochs=1.0)
    close(first, gradients(method="sgd")[0])
    close(second, gradients(h=0.7 / 4)[1])
    close(gradients(penalty_layers="."), whole)
    close(gradients(hvp_examples=32), whole)
    for fields in (
        {"hvp": "finite_difference"},
        {"hvp_examples": 8},
        {"penalty_layers": "Dense_0"},
    ):
        other = jax.tree.map(np.subtract, gradients(**fields), none)
        error = optax.tree.norm(jax.tree.map(np.subtract, other, penalty))
        assert 1e-3 < error / optax.tree.norm(penalty) < 3.0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["first_order", "hero"])
def test_h_follows_the_loss_of_the_step_before(method):
    fields = METHODS[method][0] | {"method": method, "h": 1e-3}
    fields["perturbation"] = "relative"
    _, model, pipeline, program = setting(**fields, share=0.3)
    state, item = program.init(), next(pipeline.epoch(0))
    assert state.h == jnp.float32(1e-3)
    for _ in range(30):  # until something is learnt
        state, _ = program.step(state, item)
    h = np.float32(0.2)
    batch = pipeline.batch(item, state.step)
    loss = loss_of(model, state.batch_stats, batch.images, batch.labels)
    value, g = jax.value_and_grad(loss)(state.params)
    masks = hero_jax.leaves.weights(g)
    along = hero_jax.perturbation.relative(state.params, g)
    U = jax.tree.map(lambda w, d, m: w + m * h * d, state.params, along, masks)
    factor = np.sqrt(0.3 * (np.log(10) - value) / (loss(U) - value))
    assert 0.7 < factor < 1.1
    copies = [jax.tree.map(jnp.array, state) for _ in range(2)]  # a step uses one up
    following, outputs = program.step(copies[0]._replace(h=h), item)
    assert following.h == pytest.approx(h * factor, rel=1e-3)
    assert outputs[-1] == h  # that of the step itself

    # The gradient of a step is that of the fixed h of the same length.
    _, _, _, fixed = setting(**fields)
    other, _ = fixed.step(copies[1]._replace(h=h), item)
    assert other.h == h
    chex.assert_trees_all_close(following.params, other.params, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("fields", [{"method": "sgd", "h": 0.1}, {"h": 0.0}])
def test_without_a_step_no_h_follows_the_loss(fields):
    """Not even from zero to its lower limit."""
    _, _, pipeline, program = setting(perturbation="relative", share=0.3, **fields)
    state, outputs = program.step(program.init(), next(pipeline.epoch(0)))
    assert state.h == np.float32(fields["h"])
    assert outputs[-1] == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("moved", ["all", "weights", "others"])
def test_what_moves_is_what_the_config_says(moved):
    """Against a step of the leaves that are listed here, kernels of the network."""
    _, model, pipeline, program = setting()
    state, item = program.init(), next(pipeline.epoch(0))
    batch = pipeline.batch(item, np.int32(0))
    loss = loss_of(model, state.batch_stats, batch.images, batch.labels)
    params = jax.tree.map(np.asarray, state.params)
    chosen = jax.tree.map(
        lambda x: {"all": True, "weights": x.ndim > 1, "others": x.ndim < 2}[moved],
        params,
    )
    g = jax.tree.map(lambda g, x: g * x, jax.grad(loss)(params), chosen)
    length = optax.tree.norm(g)
    U = jax.tree.map(lambda w, g: w + 0.7 * g / length, params, g)
    actual = gradients(method="first_order", moved=moved)[0]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=3e-6),
        actual,
        jax.grad(loss)(U),
    )


def test_steps_without_penalty_take_no_product():
    _, _, pipeline, program = setting(method="hero", penalty_every=2)
    item, shapes = next(pipeline.epoch(0)), program.shapes()
    assert "cond[" in str(jax.make_jaxpr(program.step)(shapes, item))


def test_layers_to_penalize_must_be_there():
    with pytest.raises(ValueError, match=r"penalty_layers must be found in .* 'Conv9'"):
        gradients(penalty_layers="Conv9")


def test_statistics_come_from_the_clean_weights():
    _, model, pipeline, program = setting(method="hero", h=5.0, gamma=0.1)
    state, item = program.init(), next(pipeline.epoch(0))
    batch = pipeline.batch(item, np.int32(0))
    variables = jax.tree.map(jnp.copy, evaluate.variables_of(state))
    _, new = model.apply(variables, batch.images, train=True, mutable=["batch_stats"])
    state, _ = program.step(state, item)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        state.batch_stats,
        new["batch_stats"],
    )


def test_accuracy_is_on_noisy_and_on_clean_labels():
    _, model, pipeline, program = setting(label_noise=0.7)
    state, item = program.init(), next(pipeline.epoch(0))
    batch = pipeline.batch(item, np.int32(0))
    variables = evaluate.variables_of(state)
    logits, _ = model.apply(
        variables, batch.images, train=True, mutable=["batch_stats"]
    )
    predicted = np.asarray(logits).argmax(1)
    expected = [np.mean(predicted == y) for y in (batch.labels, batch.clean_labels)]
    assert expected[0] != expected[1]
    _, outputs = program.step(state, item)
    np.testing.assert_allclose(outputs[1:3], expected, rtol=1e-6)


@pytest.mark.slow
def test_micro_batches_have_perturbations_of_their_own():
    """The update is the mean of HERO's gradients of the micro-batches."""
    fields, gradient_of = METHODS["hero"]
    _, model, pipeline, program = setting(
        method="hero", accumulation=2, momentum=0.0, **fields
    )
    assert pipeline.steps == 8
    state, item = program.init(), next(pipeline.epoch(0))
    params = jax.tree.map(np.asarray, state.params)
    grads = []
    for k in range(2):
        stats = jax.tree.map(np.asarray, state.batch_stats)
        batch = pipeline.batch(item, np.int32(k))
        assert len(batch.labels) == 16
        grads.append(
            jax.jit(gradient_of(loss_of(model, stats, batch.images, batch.labels)))(
                params
            )
        )
        state, _ = program.step(state, item)
        if k == 0:
            jax.tree.map(np.testing.assert_array_equal, state.params, params)
    expected = jax.tree.map(
        lambda w, a, b: w - 0.1 * ((a + b) / 2 + 0.01 * w), params, *grads
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6),
        state.params,
        expected,
    )


def test_the_learning_rate_falls_by_updates_not_by_micro_batches():
    config = dataclasses.replace(CONFIG, accumulation=2)
    _, schedule = train.make_optimizer(config, 24)
    np.testing.assert_allclose(schedule(6), 0.05, rtol=1e-6)
    np.testing.assert_allclose(schedule(12), 0.0, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [2, 1])
def test_adamw_is_that_of_its_authors(accumulation):
    """Two updates by the formula of Loshchilov and Hutter, with decay of the step."""
    rate, decay = 0.01, 0.3
    _, model, pipeline, program = setting(
        method="first_order",
        h=0.7,
        perturbation="normalized",
        optimizer="adamw",
        learning_rate=rate,
        weight_decay=decay,
        momentum=0.8,
        accumulation=accumulation,
        warmup_epochs=0.5,  # two updates of twelve
    )
    state, item = program.init(), next(pipeline.epoch(0))
    mean = square = jax.tree.map(lambda x: np.zeros(x.shape), state.params)
    expected = jax.tree.map(np.asarray, state.params)
    for k in range(3):
        grads = []
        params = jax.tree.map(np.asarray, state.params)
        for j in range(accumulation * k, accumulation * (k + 1)):
            batch = pipeline.batch(item, np.int32(j % pipeline.steps))
            stats = jax.tree.map(np.asarray, state.batch_stats)
            loss = loss_of(model, stats, batch.images, batch.labels)
            grads.append(jax.jit(lambda w, f=loss: jax.grad(f)(moved(f, w)))(params))
            state, _ = program.step(state, item)
        g = jax.tree.map(lambda *x: np.mean(x, axis=0), *grads)
        mean = jax.tree.map(lambda m, g: 0.8 * m + 0.2 * g, mean, g)
        square = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, square, g)
        now = rate * (k / 2 if k < 2 else 0.5 * (1 + np.cos(np.pi * (k - 2) / 10)))
        expected = jax.tree.map(
            lambda w, m, v, k=k, now=now: (
                w
                - now
                * m
                / (1 - 0.8 ** (k + 1))
                / (np.sqrt(v / (1 - 0.999 ** (k + 1))) + 1e-8)
                - now * decay * w
            ),
            params,
            mean,
            square,
        )
        for actual, wanted, v in zip(
            *map(jax.tree.leaves, (state.params, expected, square)), strict=True
        ):
            real = v > 1e-10  # a gradient that is all rounding is scaled up, too
            assert real.mean() > 0.1 or v.ndim == 1
            np.testing.assert_allclose(
                np.asarray(actual)[real], wanted[real], rtol=1e-3, atol=1e-5
            )


def test_clipping_limits_the_gradient_before_weight_decay():
    fields = {"clip_norm": 0.01, "momentum": 0.0, "weight_decay": 0.5}
    _, _, pipeline, program = setting(**fields)
    state, item = program.init(), next(pipeline.epoch(0))
    params = jax.tree.map(np.asarray, state.params)
    state, outputs = program.step(state, item)
    assert outputs[3] > 0.1  # reported as it was
    clipped = jax.tree.map(
        lambda new, w: (w - new) / 0.1 - 0.5 * w, state.params, params
    )
    np.testing.assert_allclose(optax.tree.norm(clipped), 0.01, rtol=1e-2)


@pytest.mark.slow
def test_an_epoch_in_one_loop_is_the_same_as_its_steps():
    _, _, pipeline, program = setting()
    item = next(pipeline.epoch(1))
    together, all_outputs = program.epoch(program.init(), item)
    state, outputs = program.init(), []
    for _ in range(pipeline.steps):
        state, values = program.step(state, item)
        outputs.append(values)
    # The same sums in another order, through four steps.
    np.testing.assert_allclose(all_outputs, outputs, rtol=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
        together,
        state,
    )


def test_nothing_is_compiled_twice_and_the_old_state_is_used_up():
    _, _, pipeline, program = setting()
    first = state = program.init()
    for epoch in range(2):
        for item in pipeline.epoch(epoch):
            state, _ = program.step(state, item)
    assert program.step._cache_size() == 1
    assert all(x.is_deleted() for x in jax.tree.leaves(first.params))


@pytest.mark.slow
def test_bfloat16_is_for_computing_only():
    model = models.create("resnet8", num_classes=10, dtype=jnp.bfloat16)
    _, _, pipeline, program = setting(model=model, dtype="bfloat16")
    state, outputs = program.step(program.init(), next(pipeline.epoch(0)))
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert np.all(np.isfinite(outputs))


def test_evaluation_is_exact_on_the_last_partial_batch():
    _, model, pipeline, program = setting(test_size=597)
    variables = evaluate.variables_of(program.init())
    (item,) = pipeline.test_items()
    batch = jax.tree.map(np.asarray, pipeline.test_batches(item))
    assert batch.real.shape == (2, 500)
    images = np.asarray(pipeline.standardized(batch.images))[batch.real]
    labels = batch.labels[batch.real]
    logits = np.asarray(model.apply(variables, images, train=False), np.float64)
    log = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    two = evaluate.quantized(variables, 2)
    one_result, two_result = evaluate.make_evaluate(model, pipeline)([variables, two])
    expected = -log[np.arange(597), labels].mean()
    np.testing.assert_allclose(one_result.loss, expected, rtol=1e-5)
    right = np.sum(logits.argmax(1) == labels)
    assert one_result.accuracy * 597 == pytest.approx(right, abs=1e-3)
    assert two_result.loss != one_result.loss


def test_quantized_networks_are_those_of_the_quantizer():
    _, _, _, program = setting()
    variables = evaluate.variables_of(program.init())
    tree = hero_jax.quant.quantize(variables["params"], 3)
    expected = hero_jax.quant.dequantize(tree)
    result = evaluate.quantized(variables, 3)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        result["params"],
        expected,
    )
    assert result["batch_stats"] is variables["batch_stats"]


@pytest.mark.slow
def test_curvature_is_that_of_the_mean_over_fixed_batches():
    config, model, pipeline, program = setting(
        method="sgd", curvature_h=1e-2, curvature_batches=3
    )
    state = program.init()
    measured = evaluate.make_measure(config, model, pipeline)(
        evaluate.variables_of(state)
    )
    norms, products = [], []
    item = next(pipeline.epoch(0))
    for k in range(3):
        batch = pipeline.batch(item, np.int32(k))
        loss = loss_of(model, state.batch_stats, batch.images, batch.labels)
        g = jax.jit(jax.grad(loss))(state.params)
        z = hero_jax.perturbation.layerwise(state.params, g)
        _, Hz = jax.jit(lambda w, z, f=loss: jax.jvp(jax.grad(f), (w,), (z,)))(
            state.params, z
        )
        norms.append(optax.tree.norm(g))
        products.append(optax.tree.norm(Hz))
    np.testing.assert_allclose(measured["grad_norm"], np.mean(norms), rtol=1e-4)
    # The finite difference of a short step against the exact product.
    np.testing.assert_allclose(measured["hessian_norm"], np.mean(products), rtol=2e-2)
