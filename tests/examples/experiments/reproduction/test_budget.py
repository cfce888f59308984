"""The scale "budget": ordinary runs, one a row, that may be carried elsewhere."""

import dataclasses
import importlib.util
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest

import hero_jax
from examples.experiments.reproduction import __main__ as reproduce
from examples.experiments.reproduction import (
    entries,
    records,
    report,
    surface,
    tables,
    unfinished,
    work,
)
from examples.experiments.reproduction.entries import Row
from examples.image_classification import evaluate, loop, results, stopping
from examples.image_classification import run as runs
from examples.image_classification.config import Config
from examples.image_classification.named import named
from examples.image_classification.run import Options, open_pipeline
from tests.examples.image_classification.small import make_model

CONFIG = Config(
    dataset="digits",
    augmentation="none",
    model="resnet8",
    train_size=96,
    test_size=50,
    batch_size=32,
    epochs=3,
    curvature_batches=1,
    bits=(4, 2),
    method="sgd",
)
ROW = Row(name="row", scale="budget", config=CONFIG, seeds=(0,), surface=True)
OTHER_SEED = dataclasses.replace(ROW, seeds=(1,), surface=False)
DIVERGES = dataclasses.replace(
    ROW, name="diverges", config=dataclasses.replace(CONFIG, learning_rate=1e30)
)


IN_A_HURRY = True
"""What is compiled here runs for some steps only."""


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A network that is quick to compile, and few rows."""
    monkeypatch.setattr(surface, "POINTS", 3)
    monkeypatch.setattr(surface, "IMAGES", 40)
    monkeypatch.setattr(surface, "AT_ONCE", 20)
    monkeypatch.setattr(tables, "FIFTEEN_EPOCHS", CONFIG)
    for module in (loop, surface, work):
        monkeypatch.setattr(module, "make_model", make_model)
    for module in (reproduce, report):
        monkeypatch.setattr(module, "entries", lambda: [ROW, DIVERGES, OTHER_SEED])


def command(folder, *arguments):
    """The exit status of a command, with its own folders."""
    places = ["--results", str(folder / "results"), "--work", str(folder / "work")]
    return reproduce.main(["--scale", "budget", "--quiet", *places, *arguments])


def record_of(folder, name="row"):
    return json.loads((folder / "results" / "budget" / f"{name}.json").read_text())


def without_times(record):
    (run,) = record["runs"]
    kept = {x: run[x] for x in run if x not in ("seconds", "revisions")}
    return kept, record["surface"]


def test_a_stopped_row_goes_on_from_what_lies_beside_the_results(tmp_path):
    assert command(tmp_path / "whole", "--next") == 0
    machine = tmp_path / "pieces"
    kept = machine / "results" / "budget" / "unfinished"
    steps = []
    while not (machine / "results" / "budget" / "row.json").exists():
        # Stopped after each step, and all but the results is lost.
        status = command(machine, "--next", "--minutes", "0")
        finished = (machine / "results" / "budget" / "row.json").exists()
        assert status == (0 if finished else stopping.STOPPED)
        shutil.rmtree(machine / "work")
        steps += [int(path.name) for path in kept.glob("row/*/checkpoints/*")]
        assert len([*kept.rglob("checkpoints/*")]) <= 1
        texts = [x.read_text() for x in kept.rglob("*.txt")]
        assert not any(str(tmp_path) in text for text in texts), "to be committed"
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8]
    assert without_times(record_of(machine)) == without_times(
        record_of(tmp_path / "whole")
    )
    assert not [*kept.rglob("*.txt")]


def test_what_came_further_is_not_replaced(tmp_path):
    def folder(name, *steps):
        for step in steps:
            checkpoint = tmp_path / name / "checkpoints" / str(step)
            checkpoint.mkdir(parents=True)
            (checkpoint / "state").write_text(f"{name} {step}")
        for file in ("config.toml", unfinished.REVISIONS):
            (tmp_path / name / file).write_text(name)
        return tmp_path / name

    def states(place):
        return [x.read_text() for x in sorted(place.glob("checkpoints/*/state"))]

    run, kept = folder("run", 3, 12), folder("kept", 7)
    unfinished.bring_back(kept, run)
    assert states(run) == ["run 12", "run 3"]
    unfinished.keep(run, kept)
    assert states(kept) == ["run 12"]
    later = folder("later", 20)
    unfinished.keep(run, later)
    assert states(later) == ["later 20"]
    unfinished.bring_back(later, run)
    assert states(run) == ["later 20"]
    unfinished.bring_back(tmp_path / "nothing", run)
    assert states(run) == ["later 20"]


@pytest.mark.parametrize("moment", ["loading", "last epoch", "measuring"])
def test_a_signal_at_any_moment_stops_all_that_follows(moment, tmp_path, monkeypatch):
    def interrupting(function, number):
        calls = []

        def interrupted(*args, **kwargs):
            calls.append(1)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGTERM)
            return function(*args, **kwargs)

        return interrupted

    place, name, number = {
        "loading": (runs, "open_pipeline", 1),
        "last epoch": (loop.Training, "_row", CONFIG.epochs),
        "measuring": (surface, "largest_eigenvalue", 1),
    }[moment]
    monkeypatch.setattr(place, name, interrupting(getattr(place, name), number))
    assert command(tmp_path, "--all") == stopping.STOPPED
    assert not (tmp_path / "results" / "budget" / "diverges.json").exists()
    kept = tmp_path / "results" / "budget" / "unfinished" / "row"
    steps = [int(path.name) for path in kept.glob("*/checkpoints/*")]
    assert steps == {"loading": [1], "last epoch": [9], "measuring": []}[moment]
    assert (kept.parents[1] / "row.json").exists() == (moment == "measuring")
    assert command(tmp_path, "--next") == 0
    assert {run["seed"] for run in record_of(tmp_path)["runs"]} == {0}


def test_a_copy_that_was_interrupted_does_no_harm(tmp_path, monkeypatch):
    def folder(name, step):
        checkpoint = tmp_path / name / "checkpoints" / str(step)
        checkpoint.mkdir(parents=True)
        (checkpoint / "state").write_text(name)
        for file in ("config.toml", unfinished.REVISIONS):
            (tmp_path / name / file).write_text(name)
        return tmp_path / name

    kept, run = folder("kept", 7), tmp_path / "run"
    for function in ("copy", "rmtree", "copytree"):
        with monkeypatch.context() as patch:

            def killed(*_, **__):
                raise KeyboardInterrupt

            patch.setattr(unfinished.shutil, function, killed)
            with pytest.raises(KeyboardInterrupt):
                unfinished.bring_back(kept, run)
        assert not run.exists()
    unfinished.bring_back(kept, run)
    assert (run / "checkpoints" / "7" / "state").read_text() == "kept"
    assert (run / "config.toml").exists()
    folder("later", 8).rename(tmp_path / ".kept.partial")
    unfinished.forget(kept)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_field_that_is_added_later_changes_no_row(tmp_path, monkeypatch):
    worker = work.Worker(
        work.Options(results=tmp_path, work=tmp_path),
    )
    before = worker._folder(ROW, CONFIG, [0])
    asdict = dataclasses.asdict
    record = {"config": asdict(CONFIG)}
    monkeypatch.setattr(dataclasses, "asdict", lambda x: asdict(x) | {"new": 1})
    assert worker._folder(ROW, CONFIG, [0]) == before
    monkeypatch.setattr(Config, "new", 1, raising=False)
    assert records.differences(record, CONFIG) == []
    other = dataclasses.replace(CONFIG, h=3.0)
    assert worker._folder(ROW, other, [0]) != before
    assert records.differences(record, other) == ["h was 2.0, now 3.0"]


def test_another_data_set_is_refused_before_training(tmp_path, capsys, monkeypatch):
    row = dataclasses.replace(
        ROW, config=dataclasses.replace(CONFIG, dataset="cifar10", train_size=None)
    )
    monkeypatch.setattr(reproduce, "entries", lambda: [row])
    images, labels = np.zeros((60, 8, 8, 3), np.uint8), np.arange(60) % 10
    path = tmp_path / "data.npz"
    names = ("x_train", "y_train", "x_test", "y_test")
    np.savez(path, **dict(zip(names, (images, labels) * 2, strict=True)))
    assert command(tmp_path, "--next", "--dataset", str(path)) == 1
    error = capsys.readouterr().err
    assert "10 classes and 50000 training images" in error
    assert error.rstrip().endswith("with 10 and 60")


def test_a_record_has_what_the_tables_need(tmp_path):
    assert command(tmp_path, "--only", "row") == 0
    record = record_of(tmp_path)
    assert [run["seed"] for run in record["runs"]] == [0, 1]
    for run in record["runs"]:
        assert run["revisions"] == [
            f"{results.revision()} on {jax.device_count()} device(s)"
        ]
        assert run["seconds"] > 0.0
        assert {len(x) for x in run["epochs"].values()} == {3}
        name = f"row_seed_{run['seed']}.safetensors"
        weights = hero_jax.quant.load(tmp_path / "work" / "budget" / "row" / name)
        config = dataclasses.replace(CONFIG, seed=run["seed"])
        with open_pipeline(config, Options(devices=1)) as pipeline:
            check_measurements(run, config, pipeline, weights)
    page = tables.budget_scale({"row": record})
    accuracy = 100 * record["runs"][1]["accuracy_by_bits_per_channel"]["2"]
    row = page.splitlines()[-1].split("|")
    assert [x.strip() for x in row[1:4]] == ["row", "1", "channel"]
    assert row[6].strip() == f"{accuracy:.1f}"


def check_measurements(run, config, pipeline, weights):
    """Compare with integers of the weights, and with the dense Hessian."""
    tested = evaluate.make_evaluate(make_model(config, pipeline, True), pipeline)
    names = {None: "accuracy_by_bits", -1: "accuracy_by_bits_per_channel"}
    for axis, name in names.items():
        for bits in config.bits:
            integers = hero_jax.quant.quantize(weights["params"], bits, axis=axis)
            params = hero_jax.quant.dequantize(integers)
            (expected,) = tested([weights | {"params": params}])
            assert run[name][str(bits)] == expected.accuracy
    loss_fn, arguments = surface._loss(config, pipeline, weights)
    flat, unravel = jax.flatten_util.ravel_pytree(weights["params"])
    hessian = jax.hessian(lambda w: loss_fn(unravel(w), *arguments))(flat)
    expected = np.linalg.eigvalsh(np.asarray(hessian, np.float64))[-1]
    # Five digits are written of a value in single precision.
    np.testing.assert_allclose(run["largest_eigenvalue"]["value"], expected, rtol=1e-3)


def test_a_row_that_diverges_is_a_result(tmp_path):
    assert command(tmp_path, "--only", "diverges") == 0
    (run,) = record_of(tmp_path, "diverges")["runs"]
    assert run["accuracy_by_bits"] is None
    assert run["diverged"].startswith("loss is nan at step")
    assert str(tmp_path) not in json.dumps(run)
    assert run["epochs"]["test_accuracy"] == []
    assert command(tmp_path, "--only", "diverges") == 0  # nothing is missing
    table = tables.budget_scale({"diverges": record_of(tmp_path, "diverges")})
    assert "diverged" in table.splitlines()[-1]


def test_the_time_of_an_interrupted_epoch_counts_whole(tmp_path, monkeypatch):
    clock = iter(range(0, 10**6, 100))
    monkeypatch.setattr(loop.time, "perf_counter", lambda: float(next(clock)))
    for _ in range(4):
        command(tmp_path, "--next", "--minutes", "0")
    (path,) = (tmp_path / "work" / "budget" / "row").glob("seed_*/times.csv")
    first = path.read_text().splitlines()[1]
    # Each of three pieces of the epoch takes at least one tick of the clock.
    assert float(first.split(",")[-1]) >= 300.0


def test_a_package_that_is_missing_is_named_before_training(
    tmp_path, capsys, monkeypatch
):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        work.importlib.util,
        "find_spec",
        lambda name: None if name == "safetensors" else find_spec(name),
    )
    assert command(tmp_path, "--next") == 1
    assert "needs the package safetensors" in capsys.readouterr().err


def test_the_rows_have_the_settings_that_were_fixed_before():
    rows = [x for x in entries.entries() if x.scale == "budget"]
    keys = [(row.name, row.seeds) for row in rows]
    assert len({*keys}) == len(keys)
    defaults = dataclasses.asdict(Config())
    allowed = {"method", "label_noise", "epochs", "bits", "weight_decay"}
    for row in rows:
        fields = dataclasses.asdict(row.config)
        changed = {x for x in fields if fields[x] != defaults[x]}
        assert (row.config.model, row.config.epochs) == ("resnet20", 15)
        if row.name != "released_noise40":
            assert changed <= allowed
    (released,) = (x.config for x in rows if x.name == "released_noise40")
    full = named("cifar10_resnet20_released_noise40")
    for name in ("method", "perturbation", "reduction", "h", "gamma", "label_noise"):
        assert getattr(released, name) == getattr(full, name)
    assert [name for name, _ in keys[:6]] == [
        *("sgd", "sgd_noise40", "sgd_decay", "sgd_decay_noise40"),
        *("first_order", "hero"),
    ]


def test_a_host_is_divided_before_jax_is_used(tmp_path, capsys):
    assert jax.devices()
    assert command(tmp_path, "--next", "--host-devices", "2") == 1
    assert "host_devices must be set before JAX is used" in capsys.readouterr().err
