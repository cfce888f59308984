"""The comparison of directions: who is tested with what, and what goes on."""

import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from examples.experiments.directions import __main__ as directions
from examples.experiments.directions import moves, report, tabular, tasks
from examples.experiments.sweep.grid import Run
from examples.image_classification.train import Settings

(SEARCH_SEED,), SEEDS = tasks.seeds_of(tasks.DIGITS)
METHODS = ["SGD", "first-order, relative", "HERO, relative"]
MORE = "first-order, relative, 2 times the epochs"


def accuracy(config, run):
    """Best at h = 0.02 with right labels, at h = 0.04 with wrong ones; high if tested.

    Of several seeds the first is best, and none is the one of the search.
    """
    top, fall = (0.04, 0.05) if config.label_noise else (0.02, 0.1)
    value = 0.5 - fall * np.log2(max(run.settings.h, 0.01) / top) ** 2
    return value + 0.1 * (config.validation_size is None) - 0.01 * run.seed


@pytest.fixture
def trained(monkeypatch):
    """Put a formula in place of training; list what would have been trained."""
    calls = []

    def search(config, runs, how, rows, keep, *_):
        del how
        for run in runs:
            calls.append((config, run))
            bits = dict.fromkeys(report.PRECISIONS, accuracy(config, run))
            row = run.settings._asdict() | {"seed": run.seed, "seconds": 0.0}
            rows = [*rows, row | {"accuracy_by_bits": bits}]
        keep(rows)

    monkeypatch.setattr(directions, "search", search)
    return calls


def run(folder, *names, methods=METHODS):
    arguments = ["--task", *names, "--methods", *methods, "--results", str(folder)]
    assert directions.main([*arguments, "--quiet"]) == 0
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in names}


def test_every_method_tries_as_many_settings():
    for name, method in tasks.METHODS.items():
        if method.grid:
            config = method.config(tasks.DIGITS)
            runs = method.search(config).runs()
            assert method.tuned or {x.settings.learning_rate for x in runs} == {0.2}
            assert len(runs) == tasks.BUDGET, name
            of_cifar = method.search(tasks.SMALL_CIFAR).runs()
            assert len(of_cifar) == tasks.BUDGET // (1 if method.tuned else 2), name
            assert {*of_cifar} <= {*runs}
            assert len({*method.search(tasks.TABLE).runs()}) == 5 * len(runs)
        if method.like:
            like = tasks.METHODS[method.like]
            assert method.fields == like.fields


@pytest.mark.parametrize("task", tasks.TASKS.values())
def test_no_seed_is_of_both_search_and_test(task):
    searched, tested = tasks.seeds_of(task)
    assert not {*searched} & {*tested}
    assert len({*tested}) >= 3


def test_the_best_setting_of_the_search_is_tested_and_that_of_the_digits_too(
    trained, tmp_path, monkeypatch
):
    """The best of both digits lies between theirs. Held out are fewer than tested."""
    more = dataclasses.replace(tasks.DIGITS, test_size=300)
    monkeypatch.setitem(tasks.TASKS, "digits", more)
    monkeypatch.setitem(tasks.TASKS, "cifar", more)
    names = ["digits_noise40", "digits", "cifar"]
    records = run(tmp_path, *names, methods=[*METHODS, MORE])
    for name, between in zip(METHODS[1:], (0.02828, 0.02), strict=True):
        for task, part, h in [
            ("digits_noise40", "test", 0.04),
            ("digits", "test", 0.02),
            ("cifar", "test", 0.02),
            ("cifar", "transfer", between),
        ]:
            rows = records[task][part][name]
            assert [row["seed"] for row in rows] == list(SEEDS)
            assert {row["h"] for row in rows} == {h}
            assert {row["learning_rate"] for row in rows} == {0.2}
    assert not records["digits"]["transfer"]
    assert not records["digits"]["search"].keys() & {"SGD", MORE}
    doubled = [config for config, run in trained if config.epochs == 40]
    assert len(doubled) == 3 * len(SEEDS)
    assert all(
        (config.validation_size is None) == (run.seed != SEARCH_SEED)
        for config, run in trained
    )
    assert "| first-order, relative" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "directions.png").stat().st_size > 10_000


def test_a_search_that_is_not_over_has_no_best_setting(trained, tmp_path):
    record = run(tmp_path, "digits_noise40")["digits_noise40"]
    name = METHODS[1]
    assert tasks.best(name, "digits_noise40", record)["h"] == 0.04
    over = copy.deepcopy(record)
    record["search"][name].pop()
    assert tasks.best(name, "digits_noise40", record) is None
    assert tasks.best(name, "digits_noise40", over, record) is None
    assert trained


def test_a_setting_that_diverges_anywhere_is_not_the_best(trained, tmp_path):
    one = run(tmp_path, "digits_noise40")["digits_noise40"]
    name = METHODS[1]
    other = copy.deepcopy(one)
    for row in other["search"][name]:
        if row["h"] == 0.04:
            row["accuracy_by_bits"] = None
    assert tasks.best(name, "digits", one, other)["h"] in (0.02828, 0.05657)
    assert trained


def test_what_is_there_is_not_trained_again(trained, tmp_path):
    first = run(tmp_path, "digits_noise40", methods=METHODS[:2])
    before = len(trained)
    path = tmp_path / "digits_noise40.json"
    text = path.read_text().replace('"date": "', '"date": "then, not ')
    old = json.loads(text)
    other = old["test"]["SGD"][0] | {"h": 5.0}  # of other settings than today's
    old["test"]["SGD"].append(other)
    path.write_text(json.dumps(old))
    both = run(tmp_path, "digits_noise40")
    assert {config.method for config, _ in trained[before:]} == {"hero"}
    for part in ("search", "test"):
        for name, rows in first["digits_noise40"][part].items():
            assert both["digits_noise40"][part][name] == rows
    assert "then" not in both["digits_noise40"]["environment"]["date"]


@pytest.mark.parametrize(
    ("scores", "octaves"),
    [([0.2, 0.5, 0.5, 0.2], 1.0), ([0.2, 0.5, 0.2, 0.2], 0.0), ([0.5, 0.49, 0.1], 1.0)],
)
def test_width_counts_what_is_within_a_standard_error(scores, octaves):
    """With 100 images that is 5 points at 50 %."""
    rows = [
        {"h": 2.0**k, "gamma": 0.0, "accuracy_by_bits": {"32": x, "4": x}}
        for k, x in enumerate(scores)
    ]
    plain = rows[0] | {"h": 0.0}
    assert report.width(report.curve([plain, *rows], 0.0), 100) == octaves
    rows[-1]["accuracy_by_bits"] = None  # diverged
    assert report.width(report.curve(rows, 0.0), 100) == octaves
    # Of two seeds that differ by 0.002 the error is 0.001; the images do not matter.
    two = {h: [x[0] - 0.001, x[0] + 0.001] for h, x in report.curve(rows, 0.0).items()}
    assert report.width(two, 1) == (1.0 if scores[:3].count(0.5) == 2 else 0.0)


@pytest.mark.slow
@pytest.mark.usefixtures("small_network")
def test_a_search_trains(tmp_path, monkeypatch):
    small = dataclasses.replace(tasks.DIGITS, epochs=1)
    monkeypatch.setitem(tasks.TASKS, "digits", small)
    records = run(tmp_path, "digits", methods=["SGD", "HERO, rounding"])
    rows = records["digits"]["search"]["HERO, rounding"]
    assert len(rows) == tasks.BUDGET
    assert len({row["train_loss"] for row in rows}) > 6


def test_moves_are_those_of_the_formula():
    """A kernel moves by about 1.7 / n of its norm; relative moves it by h."""
    record = json.loads((tasks.FOLDER / "moves.json").read_text())
    for rows in record["networks"].values():
        assert rows["relative, h = 0.02"]["kernel"] == pytest.approx(0.02, rel=1e-4)
        assert rows["layerwise, h = 1"]["kernels"] < 0.002
        assert rows["layerwise, h = 1"]["normalization"] > 0.03
    assert set(rows) - {"rounding to 4 bits itself"} == set(moves.STEPS)
    page = Path(__file__).parents[3] / "docs" / "choosing.md"
    assert moves.table(record["networks"]["resnet20"]) in page.read_text()


def test_the_page_has_the_tables_of_the_records():
    records = {task: tasks.read(tasks.FOLDER, task) for task in tasks.TASKS}
    records = {task: record for task, record in records.items() if record["test"]}
    text = (tasks.FOLDER / "report.md").read_text()
    page = (Path(__file__).parents[3] / "docs" / "choosing.md").read_text()
    for precision in ("32", "3"):
        table = report.overview(records, precision)
        assert table in page
        assert table in text
    assert report.transfers(records) in text
    for task, record in records.items():
        for part in ("test", "transfer"):
            for name, rows in record[part].items():
                seeds = tasks.seeds_of(tasks.TASKS[task])[1]
                assert [row["seed"] for row in rows] == [*seeds], (task, name)


def test_a_table_is_split_and_its_training_labels_alone_are_wrong():
    table = dataclasses.replace(tasks.TABLE, validation_size=None, label_noise=0.4)
    clean = dataclasses.replace(table, label_noise=0.0)
    x, y, x_test, y_test = tabular.load(table, seed=1)
    assert len(x) + len(x_test) == 1797
    np.testing.assert_array_equal(y_test, tabular.load(clean, seed=0)[3])
    wrong = y != tabular.load(clean, seed=1)[1]
    assert abs(wrong.mean() - 0.4 * 0.9) < 0.05
    assert (tabular.load(table, seed=2)[1] != y).any()
    np.testing.assert_allclose(x.mean(0), 0.0, atol=1e-5)
    held_out = tabular.load(dataclasses.replace(table, validation_size=200), seed=1)
    assert [len(part) for part in held_out] == [698, 698, 200, 200]
    pool = {tuple(row) for row in np.concatenate([held_out[0], held_out[2]])}
    assert len(pool) == 898  # all of the training half, none of them twice


@pytest.mark.slow
def test_runs_on_a_table_are_the_same_alone_and_together():
    """And the network learns: a linear one reaches 94 % on these digits."""
    config = tasks.METHODS["HERO, relative"].config(tasks.TABLE)
    settings = Settings.of(config)._replace(h=0.02, gamma=0.5)
    runs = [Run(settings, 0), Run(settings._replace(h=0.01), 1)]
    together = tabular.train(config, runs)
    assert all(row["accuracy_by_bits"]["32"] > 0.93 for row in together)
    short = dataclasses.replace(config, epochs=2, h_warmup_epochs=1)
    for row, run in zip(tabular.train(short, runs), runs, strict=True):
        (alone,) = tabular.train(short, [run])
        assert alone["train_loss"] == pytest.approx(row["train_loss"], rel=1e-4)
        names = ("h", "gamma", "seed")
        assert [row[x] for x in names] == [alone[x] for x in names]
