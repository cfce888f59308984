"""The language model: its text, its causality, and every optimizer's first step."""

import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import hero_jax
from examples.experiments.common import statistics
from examples.experiments.language_model import __main__ as language_model
from examples.experiments.language_model import corpus, directions, search, training
from examples.experiments.language_model.model import Transformer, make_loss
from examples.experiments.language_model.training import (
    METHODS,
    PRECISIONS,
    Direction,
    Settings,
    Task,
)
from hero_jax import quant

IN_A_HURRY = True  # to compile: nothing here trains for long

TINY = Transformer(vocabulary=11, context=6, width=8, blocks=1)


@pytest.fixture(scope="module")
def params():
    return training.init_params(TINY, 0)


def test_a_later_character_changes_no_earlier_logit(params):
    # Weights with which attention matters everywhere.
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape), params)
    tokens = np.array([[1, 2, 3, 4, 5, 6]])
    apply = jax.jit(TINY.apply)
    logits = apply({"params": params}, tokens)
    for changed in range(6):
        other = tokens.copy()
        other[0, changed] = 9
        changed_logits = apply({"params": params}, other)
        before = changed_logits[:, :changed], logits[:, :changed]
        np.testing.assert_allclose(*before, atol=1e-6)
        # All that can see it do.
        seen = np.abs(changed_logits - logits)[0, changed:].max(-1)
        assert seen.min() > 1e-4


def test_all_characters_are_about_equally_likely_at_first(params):
    tokens = np.random.default_rng(0).integers(0, 11, (40, 7))
    loss = jax.jit(make_loss(TINY))(params, tokens)
    # Logits of 0.02 sqrt(width) add half their square, 0.002, on average.
    assert loss == pytest.approx(math.log(11), abs=0.02)


def paragraphs(text):
    return {" ".join(p.split()) for p in text.split("\n\n")} - {""}


def invented(count, length=300):
    """Topics of random words: those of the library differ from Python to Python."""
    rng = np.random.default_rng(0)
    return {
        f"topic {i}": "".join(rng.choice([*"abcdefgh \n"], length)) + f" {i}\n\n"
        for i in range(count)
    }


@pytest.mark.parametrize("load", [corpus.load_topics, lambda: invented(15)])
def test_no_paragraph_is_in_two_parts_of_the_text(load):
    topics = load()
    parts = corpus.split(topics)
    text = ["".join(parts.vocabulary[i] for i in part) for part in parts[1:]]
    assert "".join(text) == "".join(topics.values())
    train, validation, test = map(paragraphs, text)
    assert not train & validation
    assert not (train | validation) & test
    # Each has at least a tenth, and would not without its first topic.
    total = sum(map(len, text))
    names = [*topics]
    for part in (text[2], text[1]):
        mine = []
        while "".join(topics[n] for n in mine) != part:
            mine.insert(0, names.pop())
        assert len(part) >= 0.1 * total > len(part) - len(topics[mine[0]])


def test_repeated_paragraphs_stay_where_they_come_first():
    topics = {"b": "two\n\n one  line\n\nthree", "a": "one\nline\n\nfour", "c": "two"}
    kept = corpus.without_repetition(topics)
    assert kept == {"a": "one\nline\n\nfour\n\n", "b": "two\n\nthree\n\n"}


def test_a_text_too_short_to_split_is_named():
    with pytest.raises(ValueError, match="nothing is left to train on of 2 topics"):
        corpus.split({"a": "x", "b": "y"})


def test_windows_predict_every_character_once():
    text = np.arange(14)
    windows = corpus.windows(text, 4)
    np.testing.assert_array_equal(windows[:, 0], [0, 4, 8])
    np.testing.assert_array_equal(windows[:, 1:].ravel(), range(1, 13))
    np.testing.assert_array_equal(corpus.windows(text[:13], 4), windows)


def test_batches_come_from_everywhere():
    rng = np.random.default_rng(0)
    drawn = corpus.batch(np.arange(7), 4, 300, rng)
    assert drawn.shape == (300, 5)
    assert {*drawn[:, 0]} == {0, 1, 2}
    assert (np.diff(drawn, axis=1) == 1).all()


def test_missing_topics_are_explained(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(SystemExit):
        language_model.main([])
    assert "which this Python comes without" in capsys.readouterr().err


# One matrix that Muon makes orthogonal, one that it leaves to Adam, and a vector.
def toy_loss(params, x):
    hidden = jnp.tanh(x @ params["block_0"]["kernel"] + params["block_0"]["bias"])
    return jnp.mean(jnp.sin(hidden @ params["head"]) ** 2)


def toy():
    rng = np.random.default_rng(3)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))
    params = {"block_0": {"kernel": draw(4, 3), "bias": draw(3)}, "head": draw(3, 2)}
    return params, draw(5, 4)


def gradient_by_hand(method, params, x, h, gamma):
    """Eq. 11-13 with the dense Hessian; the vector is perturbed, not penalized."""
    leaves, structure = jax.tree.flatten(params)
    W, unravel = ravel_pytree(params)
    loss = lambda w: toy_loss(unravel(w), x)
    grad, hessian = jax.jit(jax.grad(loss)), jax.jit(jax.hessian(loss))
    at = np.split(np.arange(W.size), np.cumsum([leaf.size for leaf in leaves])[:-1])
    W = np.asarray(W)
    U, g = W.copy(), np.asarray(grad(W))
    for i in at:
        z = W[i] ** 2 / np.linalg.norm(W[i]) * g[i] / np.linalg.norm(g[i])
        U[i] += h * z
    at_U = np.asarray(grad(U))
    difference = at_U - g
    for i, leaf in zip(at, leaves, strict=True):
        difference[i] *= leaf.ndim > 1
    gradient = {
        "plain": g,
        "first-order": at_U,
        "HERO": at_U + 2.0 * gamma * np.asarray(hessian(U)) @ difference,
    }[method]
    parts = [gradient[i].reshape(x.shape) for i, x in zip(at, leaves, strict=True)]
    return structure.unflatten(parts)


def orthogonal_by_hand(g):
    """Five steps of the polynomial of Newton and Schulz, by singular values."""
    u, s, vt = np.linalg.svd(g / np.linalg.norm(g), full_matrices=False)
    for _ in range(5):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    return u @ np.diag(s) @ vt


def update_by_hand(optimizer, path, W, g, rate, decay):
    """The first step: moments are of one gradient, corrected for their start."""
    W, g = np.asarray(W), np.asarray(g)
    if optimizer == "SGD":
        return -rate * (g + decay * W)
    if optimizer == "Lion":
        return -rate * (np.sign(g) + decay * W)
    if optimizer == "LAMB":
        u = g / (np.abs(g) + 1e-6) + decay * W
        return -rate * np.linalg.norm(W) / np.linalg.norm(u) * u
    if optimizer == "AdamW":
        return -rate * (g / (np.abs(g) + 1e-8) + decay * W)
    if path == "block_0/kernel":  # Muon; 4 inputs, 3 outputs: no larger than 1
        return -rate * (orthogonal_by_hand(g) + decay * W)
    ahead = 1.0 + 0.9 / (1.0 + 0.9)  # Nesterov's variant of Adam, after one step
    return -rate * (ahead * g / (np.abs(g) + 1e-8) + decay * W)


CASES = [("Muon", "HERO"), *(("SGD", method) for method in METHODS)]
CASES += [
    pytest.param(optimizer, "HERO", marks=pytest.mark.slow)
    for optimizer in ("AdamW", "Lion", "LAMB")
]


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("optimizer", "method"), CASES)
def test_first_step_is_the_optimizers_with_the_gradient_by_hand(optimizer, method):
    params, x = toy()
    settings = Settings(learning_rate=0.1, weight_decay=0.2, h=0.7, gamma=0.3)
    g = gradient_by_hand(method, params, x, 0.7, 0.3)
    rate = 0.1 / 3  # 2 of 20 steps warm up: a third, two thirds, all of it
    expected = jax.tree_util.tree_map_with_path(
        lambda path, W, g: update_by_hand(
            optimizer,
            jax.tree_util.keystr(path, simple=True, separator="/"),
            W,
            g,
            rate,
            0.2,
        ),
        params,
        g,
    )
    before = jax.tree.map(np.asarray, params)
    init, step = training.make_program(
        toy_loss, optimizer, method, 20, Direction("layerwise"), 2.0
    )
    state, loss = step(init(params, settings), x, settings)
    assert loss == pytest.approx(toy_loss(before, x))
    update = jax.tree.map(lambda a, b: np.asarray(a) - b, state[0], before)
    # Newton-Schulz and Adam's moments are a few products in double precision.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8),
        update,
        expected,
    )
    # Neither the next step nor other settings need another program.
    other = Settings(*(2.0 * x for x in settings))
    state, loss = step(state, x, other)
    assert np.isfinite(loss)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state[0]))
    assert step._cache_size() == 1


@pytest.mark.slow
def test_main_writes_what_training_by_hand_gives(tmp_path, capsys, monkeypatch):
    topics = invented(9)
    monkeypatch.setattr(language_model, "load_topics", lambda: topics)
    monkeypatch.setattr(language_model, "METHODS", ("first-order",))
    sizes = {"batch_size": 4, "context": 16, "width": 8, "blocks": 1}
    monkeypatch.setattr(language_model, "SIZES", sizes)
    arguments = ["--optimizers", "Lion", "--steps", "3", "--seeds", "4", "2"]
    record = language_model.main([*arguments, "--out", str(tmp_path)])
    written = json.loads((tmp_path / "language_model.json").read_text())
    assert written["found"] == record["found"]
    assert written["text"]["characters"] == sum(
        written["text"][part] for part in ("train", "validation", "test")
    )
    assert (tmp_path / "language_model.png").read_bytes().startswith(b"\x89PNG")
    assert "Python's help topics" in capsys.readouterr().out
    assert written["perturbation"] == "adaptive"
    assert [*record["found"]] == ["Lion"]
    assert [*record["found"]["Lion"]] == ["first-order"]

    parts = corpus.split(topics)
    model = Transformer(len(parts.vocabulary), context=16, width=8, blocks=1)
    trials = json.loads(language_model.SEARCH.read_text())["found"]
    settings = search.winner(trials, "Lion", "first-order")
    init, step = training.make_program(
        make_loss(model), "Lion", "first-order", 3, Direction("adaptive"), 2.0
    )
    state = init(training.init_params(model, 2), settings)
    rng = np.random.default_rng(2)
    for _ in range(3):
        state, _ = step(state, corpus.batch(parts.train, 16, 4, rng), settings)
    params, *_ = state
    windows = corpus.windows(parts.test, 16)
    rounded = quant.dequantize(quant.quantize(params, bits=3, axis=-1))
    assert np.unique(rounded["Embed_0"]["embedding"][:, 0]).size <= 8
    for name, weights in (("float", params), ("3 bit, channel", rounded)):
        logits = jax.jit(model.apply)({"params": weights}, windows[:, :-1])
        logits = np.asarray(logits, float)
        shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        chosen = np.take_along_axis(shares, windows[:, 1:, None], -1)
        expected = -np.log2(chosen).mean()
        result = record["found"]["Lion"]["first-order"]["bits_per_character"][name]
        assert result["values"][1] == pytest.approx(expected, rel=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run(monkeypatch):
    def step(state, _, settings):
        return state, np.nan if settings.learning_rate > 0.2 else 1.0

    program = lambda params, _: (params, ()), step
    monkeypatch.setattr(training, "make_program", lambda *_: program)
    monkeypatch.setattr(search, "winner", lambda *_: Settings(0.3))
    task = Task(TINY, np.arange(11), np.arange(11), num_steps=5, batch_size=2)
    cases = [(Settings(rate), 0) for rate in (0.3, 0.1)]
    first, second = task.attempts("SGD", "plain", Direction("adaptive"), cases)
    assert first is None
    assert second["3 bit, tensor"] > 0.0
    with pytest.raises(FloatingPointError, match="SGD, plain: the loss of seed 7"):
        language_model.run(task, ["SGD"], [7])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps: must be at least 1, got 0"),
        (["--seeds", "1", "1"], "--seeds must be different and at least 0, got [1, 1]"),
        (["--optimizers", "Adam"], "invalid choice: 'Adam'"),
        (["--out", "/dev/null/x"], "--out: must be a folder that can be written to"),
    ],
)
def test_bad_options_are_named_before_any_work(arguments, message, capsys):
    with pytest.raises(SystemExit):
        language_model.main(arguments)
    assert message in capsys.readouterr().err


def test_search_finds_the_best_on_the_validation_text(tmp_path, monkeypatch):
    """Of losses that are known: least at certain settings, not finite at others."""
    topics = invented(9)
    monkeypatch.setattr(language_model, "load_topics", lambda: topics)
    tried = []

    def loss(optimizer, method, perturbation, settings):
        tried.append((optimizer, method, perturbation, settings))
        if settings.learning_rate == search.RATES[optimizer][-1]:
            return None
        rate = abs(settings.learning_rate - search.RATES[optimizer][1])
        wrong = {"adaptive": 0.0, "layerwise": 0.1, "normalized": 0.2}[perturbation]
        wrong = 0.0 if method == "plain" else wrong + abs(settings.h - 0.1)
        decay = abs(settings.weight_decay - (0.075 if optimizer == "AdamW" else 0.0))
        return 3.0 + rate + wrong + abs(settings.gamma - 0.1) + decay

    def attempts(self, optimizer, method, direction, cases):
        perturbation = direction.perturbation
        assert direction == Direction(perturbation)
        parts = corpus.split(topics)
        np.testing.assert_array_equal(self.text, parts.train)
        np.testing.assert_array_equal(self.held_out, parts.validation)
        for settings, seed in cases:
            assert seed == 100
            value = loss(optimizer, method, perturbation, settings)
            yield value and {
                name: 0.0 if bits == 8 else value + 1.0 / bits
                for name, (bits, _) in training.PRECISIONS.items()
            }

    monkeypatch.setattr(Task, "attempts", attempts)
    arguments = ["--search", "--optimizers", "Muon", "AdamW", "--out", str(tmp_path)]
    trials = language_model.main(arguments)["found"]
    assert trials["perturbation"] == "adaptive"
    for optimizer, rate, decay in (("AdamW", 0.01, 0.075), ("Muon", 0.02, 0.0)):
        for method in METHODS:
            same = [t for t in tried if t[:2] == (optimizer, method)]
            rates = 4 if method == "plain" else 0
            directions = 9 if (optimizer, method) == ("AdamW", "first-order") else 0
            assert len(same) == 4 + rates + directions
        # HERO takes over rate and decay.
        plain = Settings(rate, decay)
        assert search.winner(trials, optimizer, "plain") == plain
        first_order = plain._replace(h=0.1)
        assert search.winner(trials, optimizer, "first-order") == first_order
        hero = first_order._replace(gamma=0.1)
        assert search.winner(trials, optimizer, "HERO") == hero
    written = json.loads((tmp_path / "search.json").read_text())["found"]
    assert written["trials"] == trials["trials"]
    trial = written["trials"]["Muon"]["HERO"][0]
    # The mean over the precisions but 8 bits: 1/32, and twice 1/4 and 1/3.
    expected = trial["bits_per_character"]["float"] - 1 / 32
    expected += (1 / 32 + 2 / 4 + 2 / 3) / 5
    assert trial["score"] == pytest.approx(expected)
    assert written["rates"]["AdamW"][-1]["score"] is None


def test_a_search_without_a_finite_loss_says_so():
    with pytest.raises(FloatingPointError, match="none of 1 trials"):
        search.best([{"settings": {}, "score": None}])


def test_differences_are_taken_seed_by_seed():
    def of(*values):
        bits = statistics.summary(values)
        return {"bits_per_character": dict.fromkeys(training.PRECISIONS, bits)}

    results = {"Lion": {"plain": of(3.0, 5.0), "HERO": of(2.5, 4.75)}}
    rows = language_model.difference_table(results).splitlines()
    # Halves and quarters: -0.375 on average, and 0.25 / 2 of them either way.
    assert [x.strip() for x in rows[2].split("|")[1:4]] == [
        "Lion",
        "HERO",
        "-0.375 ± 0.125",
    ]
    results["Lion"]["HERO"] = of(3.25, 5.25)
    assert "+0.250 ± 0.000" in language_model.difference_table(results)


def test_the_document_says_what_the_results_say():
    folder = language_model.SEARCH.parent
    record = json.loads((folder / "language_model.json").read_text())
    trials = json.loads(language_model.SEARCH.read_text())["found"]
    page = (folder.parents[2] / "docs" / "language_model.md").read_text()
    assert language_model.table(record["found"]) in page
    assert language_model.difference_table(record["found"]) in page
    assert f"{record['text']['characters']:,} characters" in page
    assert f"Python {record['text']['python']}" in page
    assert record["perturbation"] == trials["perturbation"]
    for optimizer, methods in record["found"].items():
        for method, result in methods.items():
            used = search.winner(trials, optimizer, method)
            assert result["settings"] == used._asdict()


@pytest.mark.usefixtures("x64")
def test_h_rises_over_the_first_steps():
    """5 of 20 steps: the first has a fifth of it, the fifth and later ones all."""
    params, x = toy()
    settings = Settings(learning_rate=0.0, h=0.7, gamma=0.3)
    direction = Direction("layerwise", warmup=0.25)
    init, step = training.make_program(toy_loss, "SGD", "HERO", 20, direction, 2.0)
    params_, opt_state, _, h = init(params, settings)
    for count, share in ((0, 0.2), (4, 1.0), (9, 1.0)):
        fresh = jax.tree.map(jnp.copy, (params_, opt_state))
        state = (*fresh, jnp.int32(count), jnp.float64(h))
        (_, (trace, *_), _, _), _ = step(state, x, settings)
        expected = gradient_by_hand("HERO", params, x, share * 0.7, 0.3)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-12),
            trace.trace,
            expected,
        )


@pytest.mark.usefixtures("x64")
def test_h_follows_the_loss():
    params, x = toy()
    settings = Settings(learning_rate=0.1, h=0.2)
    direction, entropy = Direction("relative", share=0.3), 2.0 * toy_loss(params, x)
    init, step = training.make_program(
        toy_loss, "SGD", "first-order", 20, direction, entropy
    )
    *_, metrics = hero_jax.hero_value_and_grad(toy_loss, h=0.2, return_metrics=True)(
        params, x
    )
    expected = hero_jax.schedules.next_h(
        jnp.float64(0.2),
        toy_loss(params, x),
        metrics.perturbed_loss,
        untrained_loss=entropy,
    )
    assert abs(expected / 0.2 - 1) > 0.01
    (*_, h), _ = step(init(params, settings), x, settings)
    assert h == pytest.approx(float(expected), rel=1e-6)


def test_the_page_has_the_table_of_the_directions():
    record = json.loads(
        (directions.SEARCH.parent / "directions.json").read_text(encoding="utf-8")
    )
    page = directions.SEARCH.parents[3] / "docs" / "language_model.md"
    assert directions.table(record) in page.read_text()


def test_directions_are_searched_on_one_text_and_tested_on_the_other():
    """Of losses that are known: least at the third h, not finite at the last."""

    class Known:
        def __init__(self, text):
            self.text = text

        def attempts(self, optimizer, kind, direction, cases):
            assert optimizer == "AdamW"
            assert kind in METHODS
            for settings, seed in cases:
                assert (seed == search.SEED) == (self.text == "validation")
                least = 0.1 if direction.perturbation == "layerwise" else 0.005
                octaves = np.log2(max(float(settings.h), 1e-3) / least)
                value = 3.0 + abs(octaves - 2) + float(self.text == "test")
                yield None if octaves == 5 else dict.fromkeys(PRECISIONS, value)

    record = directions.compare(Known("validation"), Known("test"))
    carried = json.loads(directions.CARRIED.read_text())["transfer"]
    for method, (direction, least, gamma) in directions.METHODS.items():
        assert [row["settings"]["h"] for row in record["search"][method]] == [
            least * 2**k for k in range(6)
        ]
        assert record["search"][method][-1]["score"] is None
        rows = record["test"][method]
        assert [row["seed"] for row in rows] == [0, 1, 2]
        assert {row["settings"]["h"] for row in rows} == {4 * least}
        assert {row["settings"]["gamma"] for row in rows} == {gamma}
        settings = record["transfer"][method][0]["settings"]
        assert settings["h"] == carried[method][0]["h"]
        assert settings["gamma"] == carried[method][0]["gamma"]
        assert direction.warmup == 0.1
    table = directions.table(record)
    assert table.count("as on the digits") == 3
    assert "| first-order, share 0.3" in table
    assert record["test"]["plain"][0]["settings"]["h"] == 0.0
