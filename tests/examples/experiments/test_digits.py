"""The quick start, end to end and small, and its parts."""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.experiments import quickstart_search
from examples.experiments.common import digits as quickstart
from examples.image_classification.results import write_json

EXAMPLES = Path(__file__).parents[3] / "examples"


def test_data_are_split_once_and_the_validation_set_is_not_the_test_set():
    one, two = (quickstart.load_data(0.4, seed) for seed in (0, 1))
    assert one.train_images.shape == (1000, 8, 8, 1)
    assert one.test_images.shape == (797, 8, 8, 1)
    np.testing.assert_array_equal(one.train_images, two.train_images)
    np.testing.assert_array_equal(one.test_labels, two.test_labels)
    assert np.any(one.train_labels != two.train_labels)

    held_out = quickstart.load_data(0.0, 0, validation=250)
    assert held_out.train_images.shape == (750, 8, 8, 1)
    clean = quickstart.load_data(0.0, 0)
    labels = np.concatenate([held_out.train_labels, held_out.test_labels])
    np.testing.assert_array_equal(labels, clean.train_labels)


def test_batches_cover_each_epoch_without_repetition():
    indices = list(quickstart.batches(1000, epochs=2, seed=0))
    assert len(indices) == 14
    for epoch in (indices[:7], indices[7:]):
        seen = np.concatenate(epoch)
        assert len(seen) == len(set(seen)) == 896
    assert not np.array_equal(indices[0], indices[7])


def test_quick_start(tmp_path, capsys):
    """Ten epochs from one seed: HERO's loss surface is already the flatter one."""
    record = quickstart.main(
        ["--epochs=10", "--seeds=1", f"--out={tmp_path}", "--quiet"]
    )
    results = record["results"]
    assert list(results) == [*quickstart.METHODS]
    norm = {name: result["hessian_norm"]["mean"] for name, result in results.items()}
    assert 0.0 < norm["HERO"] < norm["SGD"]
    for result in results.values():
        accuracy = {int(k): x["mean"] for k, x in result["accuracy"].items()}
        assert tuple(accuracy) == quickstart.BITS
        # Better than chance by far, and 8 bits cost next to nothing.
        assert accuracy[32] > 30.0
        assert abs(accuracy[8] - accuracy[32]) < 3.0
    assert results["SGD"]["relative_step_time"] == 1.0
    assert results["HERO"]["relative_step_time"] > 1.0

    written = json.loads((tmp_path / "quickstart.json").read_text())
    assert written["results"]["HERO"]["accuracy"]["3"]["values"]
    assert written["environment"]["jax"]
    assert (tmp_path / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in tmp_path.iterdir()} == {"quickstart.json", "quickstart.png"}
    assert "| HERO " in capsys.readouterr().out


@pytest.mark.slow
def test_hero_beats_sgd_clearly_with_the_defaults(tmp_path):
    """Forty percent of the labels are noise: about 20 points apart, 30 at 3 bits."""
    results = quickstart.main([f"--out={tmp_path}", "--quiet"])["results"]

    def accuracy(method, bits):
        return results[method]["accuracy"][str(bits)]["mean"]

    for baseline in ("SGD", "SGD, tuned"):
        assert accuracy("HERO", 32) > accuracy(baseline, 32) + 8.0
        assert accuracy("HERO", 3) > accuracy(baseline, 3) + 15.0


def test_methods_share_weights_and_batches():
    programs = [quickstart.make_program(m, 7) for m in quickstart.METHODS.values()]
    first = [jnp.concatenate([x.ravel() for x in _leaves(p.init(3))]) for p in programs]
    for other in first[1:]:
        np.testing.assert_array_equal(first[0], other)


def _leaves(state):
    return jax.tree.leaves((state.params, state.batch_stats))


def test_a_loss_that_is_not_finite_stops_the_run():
    method = quickstart.Method(quickstart.jax.value_and_grad, learning_rate=1e30)
    with pytest.raises(FloatingPointError, match=r"SGD: the loss of seed 5 is .* epo"):
        quickstart.run({"SGD": method}, [5], 2, 0.0, quiet=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--label-noise", "1.5"], "--label-noise must be from 0 to 1, got 1.5"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--epochs", "-3"], "--epochs must be at least 1, got -3"),
        (["--out", "/dev/null/x"], "--out must be a folder that can be written to"),
    ],
)
def test_bad_options_are_named_before_any_work(arguments, message, capsys):
    with pytest.raises(SystemExit):
        quickstart.main(arguments)
    assert message in capsys.readouterr().err


def test_an_earlier_result_survives_until_it_is_replaced(tmp_path, monkeypatch):
    kept = tmp_path / "quickstart.json"
    kept.write_text("kept")
    quickstart.parse([f"--out={tmp_path}"])
    assert kept.read_text() == "kept"

    def fail(_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_json(kept, {})
    assert [p.read_text() for p in tmp_path.iterdir()] == ["kept"]


def test_every_method_gets_the_same_number_of_trials():
    assert {len(trials) for trials in quickstart_search.TRIALS.values()} == {12}
    assert not set(quickstart_search.SEEDS) & set(range(10))


def test_the_quick_start_uses_the_winners_of_the_search():
    record = json.loads((EXAMPLES / "results" / "quickstart_search.json").read_text())
    assert set(record["trials"]) == set(quickstart_search.TRIALS)
    for name, trials in record["trials"].items():
        best = max(trials, key=lambda trial: trial["score"]["mean"])
        method = quickstart.METHODS[name]
        assert best["settings"] == method.settings
        assert best["learning_rate"] == method.learning_rate
        assert best["weight_decay"] == method.weight_decay


def test_the_documents_show_what_the_quick_start_wrote():
    """Accuracies and times are in the README, norms in the page on curvature."""
    record = json.loads((EXAMPLES / "results" / "quickstart.json").read_text())
    readme = (EXAMPLES.parent / "README.md").read_text()
    curvature = (EXAMPLES.parent / "docs" / "curvature.md").read_text()
    rows = [x.split("|") for x in quickstart.table(record["results"]).splitlines()]
    norms = [k for k, title in enumerate(rows[0]) if "‖Hz‖" in title]
    assert len(norms) == 2
    others = [k for k in range(len(rows[0])) if k not in norms]
    assert _columns(rows, others) in readme
    assert _columns(rows, [0, 1, *norms, -1]) in curvature
    assert record["environment"]["date"] in readme
    for name, method in quickstart.METHODS.items():
        assert record["results"][name]["settings"] == method.settings


def _columns(rows, kept):
    return "\n".join("|".join(cells[k] for k in kept) for cells in rows)
