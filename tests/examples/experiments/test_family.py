"""The family side by side: its settings, its gradients, its files."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hero_jax
from examples.experiments import family
from examples.experiments.common import comparison, statistics
from examples.experiments.common import digits as quickstart

EXAMPLES = Path(__file__).parents[3] / "examples"

RESULTS = EXAMPLES / "results" / "family"
FOUND_BY_THE_QUICK_START = {"SGD, tuned", "first-order", "GRAD-L1", "HERO"}


def test_methods_are_the_winners_of_the_search():
    record = json.loads((RESULTS / "search.json").read_text())
    assert set(record["trials"]) == set(family.TRIALS)
    assert not set(record["seeds"]) & set(range(10))
    for name, trials in record["trials"].items():
        tried = [
            (m.settings, m.learning_rate, m.weight_decay) for m in family.TRIALS[name]
        ]
        assert tried == [_numbers(trial) for trial in trials]
        assert len(tried) == 8
        best = max(trials, key=lambda trial: trial["score"]["mean"])
        method = family.METHODS[name]
        assert _numbers(best) == (
            method.settings,
            method.learning_rate,
            method.weight_decay,
        )
        assert {m.gradient for m in family.TRIALS[name]} == {method.gradient}


def _numbers(trial):
    return trial["settings"], trial["learning_rate"], trial["weight_decay"]


def test_the_others_have_the_settings_of_the_quick_start():
    methods = dict(family.METHODS)
    for name in FOUND_BY_THE_QUICK_START:
        expected, method = quickstart.METHODS[name], methods.pop(name)
        settings, its = (
            dict(getattr(x.gradient, "keywords", {})) | x.settings
            for x in (method, expected)
        )
        assert settings == its
        assert _rates(method) == _rates(expected)
    four, one = methods.pop("HERO, 4 random z"), methods["HERO, random z"]
    assert (four.settings, _rates(four)) == (one.settings, _rates(one))
    assert methods.keys() == family.TRIALS.keys()


def _rates(method):
    return method.learning_rate, method.weight_decay


def test_straight_through_gradient_is_the_one_at_the_rounded_weights():
    """L = sum c (W - t)^2 / 2 has the gradient c (Q(W) - t); biases are not rounded."""
    W = np.linspace(-1.0, 2.0, 10, dtype=np.float32).reshape(2, 5) ** 3
    c, t = np.float32(3.0), np.float32(0.25)
    step = (W.max() - W.min()) / 15.0
    zero = np.round(-W.min() / step)
    Q = (np.round(W / step + zero) - zero) * step
    assert np.abs(Q - W).max() > 0.1

    def loss(params, scale):
        return sum(scale * jnp.sum((x - t) ** 2) / 2 for x in params.values()), "aux"

    params = {"kernel": jnp.asarray(W), "bias": jnp.array([0.1, 0.2])}
    value_and_grad = family.straight_through_value_and_grad(loss, bits=4, has_aux=True)
    (value, aux), grads = value_and_grad(params, c)
    np.testing.assert_allclose(grads["kernel"], c * (Q - t), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grads["bias"], c * (params["bias"] - t), rtol=1e-5)
    everything = np.concatenate([Q.ravel(), params["bias"]])
    np.testing.assert_allclose(value, c * np.sum((everything - t) ** 2) / 2, rtol=1e-5)
    assert aux == "aux"


def test_random_z_is_another_one_at_every_step_and_averaged_over_probes():
    """L = a |W|^2 / 2, so U - W = h z shows in the gradient, and the penalty with it.

    The gradient is a (W + h z) (1 + ...): a W + a h z + gamma 2 a (a h z).
    """
    a, h, gamma, W = 2.0, 0.1, 0.3, {"kernel": jnp.ones((3, 4))}

    def loss(W, key):
        del key
        return a * jnp.sum(W["kernel"] ** 2) / 2

    def z_of(key, probes):
        gradient = family.random_z_value_and_grad(loss, h=h, gamma=gamma, probes=probes)
        difference = gradient(W, key)[1]["kernel"] - a * W["kernel"]
        return difference / (a * h * (1 + 2 * gamma * a))

    def expected(key, probes):
        drawn = [
            hero_jax.perturbation.hutchinson(k)(W, W)["kernel"]
            for k in jax.random.split(key, probes)
        ]
        return np.mean(drawn, 0)

    one, two = jax.random.key(1), jax.random.key(2)
    for key, probes in ((one, 1), (two, 1), (one, 4)):
        np.testing.assert_allclose(
            z_of(key, probes), expected(key, probes), rtol=1e-4, atol=1e-5
        )
    assert np.abs(z_of(one, 1) - z_of(two, 1)).max() > 0.1


def _constant_value_and_grad(loss_fn, *, scale, has_aux):
    """The loss is a random number, all gradients are `scale`."""
    del loss_fn, has_aux

    def value_and_grad(params, batch_stats, images, labels, key):
        grads = jax.tree.map(lambda W: jnp.full_like(W, scale), params)
        logits = jax.nn.one_hot(labels, images.shape[-3] + 2)
        return (jax.random.uniform(key), (batch_stats, logits)), grads

    return value_and_grad


def test_a_step_takes_its_numbers_and_a_new_key_from_the_state(monkeypatch):
    """Trials share a program; the first step is -rate (scale + decay W)."""
    start = lambda seed: ({"W": jnp.arange(6.0).reshape(2, 3)}, {})
    monkeypatch.setattr(quickstart, "init_network", start)
    data = quickstart.load_data(0.4, 0)
    indices = np.arange(quickstart.BATCH_SIZE)
    shared, losses = set(), []
    for rate, decay, scale in ((0.1, 0.0, 2.0), (0.05, 0.3, 0.5)):
        method = quickstart.Method(
            _constant_value_and_grad, {"scale": scale}, rate, decay
        )
        program = family.make_program(method, 7)
        shared.add(program.step)
        state = program.init(3)
        W = jax.tree.map(np.array, state.params)
        state, first = program.step(state, data, indices)
        for new, old in zip(*map(jax.tree.leaves, (state.params, W)), strict=True):
            expected = old - rate * (scale + decay * old)
            np.testing.assert_allclose(new, expected, rtol=1e-5, atol=1e-6)
        assert first[1] == 1.0  # accuracy
        second = program.step(state, data, indices)[1]
        losses += [float(first[0]), float(second[0])]
    assert len(shared) == 1
    assert losses[:2] == losses[2:]  # the key is the seed's
    assert losses[0] != losses[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["CURE", "HERO, 4 random z", "QAT, 4 bits"])
def test_methods_take_the_loss_with_its_key(name):
    """Traced, not run: the arguments in their places, the state as it was."""
    data = quickstart.load_data(0.4, 0)
    program = family.make_program(family.METHODS[name], 7)
    state = jax.eval_shape(lambda: program.init(0))
    new, (loss, accuracy) = jax.eval_shape(
        program.step, state, data, np.arange(quickstart.BATCH_SIZE)
    )
    assert loss.shape == accuracy.shape == ()
    assert jax.tree.structure(new) == jax.tree.structure(state)
    for a, b in zip(*map(jax.tree.leaves, (new, state)), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


@pytest.mark.slow
def test_methods_are_trained_measured_and_drawn(tmp_path, monkeypatch, capsys):
    """One epoch; a method that diverges is reported and the others go on."""
    lost = quickstart.Method(jax.value_and_grad, learning_rate=1e30)
    monkeypatch.setattr(family, "BITS", (32, 4, 3, 2))
    curvature = (jnp.array(0.5), jnp.array(0.25))
    monkeypatch.setattr(quickstart, "measure_curvature", lambda *_: curvature)
    monkeypatch.setattr(comparison, "ROUNDS", 3)
    monkeypatch.setattr(comparison, "STEPS", 1)
    kept = family.METHODS["SGD, tuned"]
    monkeypatch.setattr(
        family, "METHODS", {"lost": lost, "SGD, tuned": kept, "unasked": kept}
    )
    record = family.main(
        [
            *("--epochs=1", "--seeds=5", f"--out={tmp_path}", "--quiet"),
            *("--methods", "SGD, tuned", "lost"),
        ]
    )
    results = record["results"]
    assert [*results] == ["lost", "SGD, tuned"]
    assert record["seeds"] == 1
    assert results["lost"]["diverged_seeds"] == [5]
    assert "accuracy" not in results["lost"]
    kept = results["SGD, tuned"]
    assert kept["diverged_seeds"] == []
    assert [*kept["accuracy"]] == ["32", "4", "3", "2"]
    assert kept["hessian_norm"] == {"mean": 0.5, "stderr": None, "values": [0.5]}
    assert kept["hessian_norm_exact"]["mean"] == 0.25
    assert kept["relative_step_time"] > 0.0
    written = json.loads((tmp_path / "family.json").read_text())
    assert written["results"] == results
    assert written["environment"]["jax"]
    assert (tmp_path / "family.png").read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in tmp_path.iterdir()} == {"family.json", "family.png"}
    printed = capsys.readouterr().out
    assert "| SGD, tuned | " in printed
    assert "| lost       | diverged " in printed


def test_seeds_that_end_are_averaged_and_the_others_named():
    row = {
        "diverged_seeds": [1, 2],
        "accuracy": {str(bits): statistics.summary([50.0]) for bits in family.BITS},
        "hessian_norm": statistics.summary([0.5]),
        "relative_step_time": 2.0,
    }
    text = comparison.table({"SAM": row}, family.BITS)
    assert "| SAM (without seed 1, 2: diverged) | 50.0 " in text


def test_the_page_shows_what_the_command_wrote():
    record = json.loads((RESULTS / "family.json").read_text())
    page = (EXAMPLES.parent / "docs" / "family.md").read_text()
    assert comparison.table(record["results"], family.BITS) in page
    assert record["environment"]["date"] in page
    assert [*record["results"]] == [*family.METHODS]
    for name, method in family.METHODS.items():
        assert _numbers(record["results"][name]) == (method.settings, *_rates(method))
