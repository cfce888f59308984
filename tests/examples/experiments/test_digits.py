"""The experiment of the README's table: its data, its search, its files."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from examples.experiments import digits as experiment
from examples.experiments.common import comparison, digits

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "examples" / "results"


def test_data_are_split_once_and_the_validation_set_is_not_the_test_set():
    one, two = (digits.load_data(0.4, seed) for seed in (0, 1))
    assert one.train_images.shape == (1000, 8, 8, 1)
    assert one.test_images.shape == (797, 8, 8, 1)
    np.testing.assert_array_equal(one.train_images, two.train_images)
    np.testing.assert_array_equal(one.test_labels, two.test_labels)
    assert np.any(one.train_labels != two.train_labels)

    held_out = digits.load_data(0.0, 0, validation=250)
    assert held_out.train_images.shape == (750, 8, 8, 1)
    clean = digits.load_data(0.0, 0)
    labels = np.concatenate([held_out.train_labels, held_out.test_labels])
    np.testing.assert_array_equal(labels, clean.train_labels)


def test_batches_cover_each_epoch_without_repetition():
    one, two = digits.batches(1000, epochs=2, seed=0)
    for epoch in (one, two):
        assert epoch.shape == (7, 128)
        assert len({*epoch.ravel()}) == 896
    assert not np.array_equal(one, two)


@pytest.mark.slow
def test_the_experiment(tmp_path, capsys):
    """Ten epochs from one seed: HERO's loss surface is already the flatter one."""
    arguments = ["--epochs=10", "--seeds=0", f"--out={tmp_path}", "--quiet"]
    record = experiment.main([*arguments, "--methods", "HERO", "SGD"])
    results = record["results"]
    assert list(results) == ["SGD", "HERO"]
    norm = {name: result["hessian_norm"]["mean"] for name, result in results.items()}
    assert 0.0 < norm["HERO"] < norm["SGD"]
    for result in results.values():
        accuracy = {int(k): x["mean"] for k, x in result["accuracy"].items()}
        assert tuple(accuracy) == digits.BITS
        # Better than chance by far, and 8 bits cost next to nothing.
        assert accuracy[32] > 30.0
        assert abs(accuracy[8] - accuracy[32]) < 3.0
    assert results["SGD"]["relative_step_time"] == 1.0
    assert results["HERO"]["relative_step_time"] > 1.0

    written = json.loads((tmp_path / "quickstart.json").read_text())
    assert written["results"] == results
    assert written["environment"]["jax"]
    assert (tmp_path / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in tmp_path.iterdir()} == {"quickstart.json", "quickstart.png"}
    assert "| HERO " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--label-noise", "1.5"], "--label-noise: must be from 0 to 1, got 1.5"),
        (["--seeds", "2", "2"], "--seeds must be different and at least 0, got [2, 2]"),
        (["--seeds", "-1"], "--seeds must be different and at least 0, got [-1]"),
        (["--epochs", "-3"], "--epochs: must be at least 1, got -3"),
        (["--methods", "Adam"], "invalid choice: 'Adam'"),
        (["--search", "--methods", "SGD"], "--search must be of some of SGD, tuned, "),
        (["--out", "/dev/null/x"], "--out: must be a folder that can be written to"),
    ],
)
def test_bad_options_are_named_before_any_work(arguments, message, capsys):
    with pytest.raises(SystemExit):
        experiment.main(arguments)
    assert message in capsys.readouterr().err


def test_a_search_judges_by_held_out_images_and_goes_on_where_one_diverges(
    tmp_path, monkeypatch
):
    """Two settings and seeds; the accuracy is 0.1 rate + 0.01 seed, NaN at rate 2."""
    seen = []

    def train(program, data, epochs, seed, _):
        seen.append((len(data.train_labels), len(data.test_labels), epochs))
        if program == 2.0:
            raise FloatingPointError
        return program, seed

    accuracy = lambda state, _, bits: 0.1 * state[0] + 0.01 * state[1] + 0.0 * bits
    monkeypatch.setattr(digits, "train", train)
    monkeypatch.setattr(digits, "evaluate", accuracy)
    methods = [digits.Method(jax.grad, learning_rate=rate) for rate in (1.0, 2.0, 3.0)]
    options = comparison.parse(
        ["--search", "--epochs=5", "--quiet", f"--out={tmp_path}"],
        *(None, {"A": methods[2], "B": methods[0]}, {"A": methods}, ""),
    )
    record = comparison.search(
        *(options, "search", {"A": methods[2]}, {"A": methods}, (3, 4)),
        make_program=lambda method, _: method.learning_rate,
    )
    scores = [trial["score"]["values"] for trial in record["trials"]["A"]]
    np.testing.assert_allclose(scores, [[13, 14], [0, 0], [33, 34]])
    assert {*seen} == {(750, 250, 5)}
    assert json.loads((tmp_path / "search.json").read_text())["seeds"] == [3, 4]


def test_every_method_gets_the_same_number_of_trials():
    assert {len(trials) for trials in experiment.TRIALS.values()} == {12}
    assert not set(experiment.SEARCH_SEEDS) & set(range(10))


def test_the_methods_have_the_settings_that_won_the_search():
    record = json.loads((RESULTS / "quickstart_search.json").read_text())
    assert set(record["trials"]) == set(experiment.TRIALS)
    for name, trials in record["trials"].items():
        best = max(trials, key=lambda trial: trial["score"]["mean"])
        numbers = digits.METHODS[name].numbers()
        assert {key: best[key] for key in numbers} == numbers


def test_the_documents_show_what_the_experiment_wrote():
    """Accuracies and times are in the README, norms in the page on curvature."""
    record = json.loads((RESULTS / "quickstart.json").read_text())
    readme = (ROOT / "README.md").read_text()
    curvature = (ROOT / "docs" / "curvature.md").read_text()
    text = comparison.table(record["results"], exact=True)
    rows = [x.split("|") for x in text.splitlines()]
    norms = [k for k, title in enumerate(rows[0]) if "‖Hz‖" in title]
    assert len(norms) == 2
    others = [k for k in range(len(rows[0])) if k not in norms]
    assert _columns(rows, others) in readme
    assert _columns(rows, [0, 1, *norms, -1]) in curvature
    assert record["environment"]["date"] in readme
    for name, method in digits.METHODS.items():
        assert record["results"][name]["settings"] == method.settings


def _columns(rows, kept):
    return "\n".join("|".join(cells[k] for k in kept) for cells in rows)
