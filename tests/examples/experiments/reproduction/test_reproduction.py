"""Rows: their pieces, what is carried elsewhere, what is written of them."""

import contextlib
import dataclasses
import functools
import json
import os
import re
import shutil
import signal

import jax
import numpy as np
import pytest

import hero_jax
from examples.experiments.reproduction import __main__ as reproduction
from examples.experiments.reproduction import (
    entries,
    surface,
    tables,
    tuning,
    unfinished,
    work,
)
from examples.experiments.reproduction.entries import Row
from examples.experiments.sweep import heat_maps
from examples.experiments.sweep.grid import Grid
from examples.experiments.sweep.many_runs import ManyRuns, Result
from examples.image_classification import (
    evaluate,
    input_pipeline,
    loop,
    results,
    stopping,
)
from examples.image_classification import run as runs
from examples.image_classification.config import Config
from examples.image_classification.named import named
from examples.image_classification.run import Options, open_pipeline
from tests.examples.image_classification import small
from tests.examples.image_classification.small import make_model

CONFIG = Config(
    dataset="digits",
    augmentation="none",
    model="resnet8",
    train_size=64,
    test_size=50,
    batch_size=32,
    epochs=2,
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


@pytest.fixture(autouse=True, scope="module")
def few():
    """A network that is quick to compile, on one device, and few rows."""
    with pytest.MonkeyPatch.context() as patch, small.in_place():
        patch.setattr(work, "Options", functools.partial(Options, devices=1))
        patch.setattr(runs, "plot", lambda *_: None)
        patch.setattr(surface, "POINTS", 3)
        patch.setattr(surface, "IMAGES", 40)
        patch.setattr(surface, "AT_ONCE", 20)
        patch.setattr(reproduction, "rows", lambda: [ROW, DIVERGES, OTHER_SEED])
        yield


def command(folder, *arguments):
    """The exit status of a command, with its own folders."""
    places = ["--results", str(folder / "results"), "--work", str(folder / "work")]
    return reproduction.main(["--scale", "budget", "--quiet", *places, *arguments])


def record_of(folder, name="row"):
    return json.loads((folder / "results" / "budget" / f"{name}.json").read_text())


def without_times(record):
    kept = [{x: run[x] for x in run if x != "seconds"} for run in record["runs"]]
    return kept, record["surface"]


def measured(*_):
    """Stand in for what takes long to compile."""
    return {"value": 1.0}, {"surface": {}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a row of one seed, trained in one piece."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reproduction, "rows", lambda: [ROW])
        patch.setattr(surface, "measure", measured)
        assert command(folder, "--all") == 0
    return folder


@pytest.mark.slow
def test_a_stopped_row_goes_on_from_what_lies_beside_the_results(
    tmp_path, whole, monkeypatch
):
    monkeypatch.setattr(reproduction, "rows", lambda: [ROW])
    monkeypatch.setattr(surface, "measure", measured)
    kept = tmp_path / "results" / "budget" / "unfinished"
    path = tmp_path / "results" / "budget" / "row.json"
    steps = []
    while not path.exists():
        # Stopped after each step, and all but the results is lost.
        status = command(tmp_path, "--all", "--minutes", "0")
        assert status == stopping.STOPPED
        shutil.rmtree(tmp_path / "work")
        steps += [int(x.name) for x in kept.glob("row/*/checkpoints/*")]
        assert len([*kept.rglob("checkpoints/*")]) <= 1
        texts = [x.read_text() for x in kept.rglob("*.txt")]
        assert not any(str(tmp_path) in text for text in texts), "to be committed"
        if steps[-1] == 3:  # the last step, and all that follows, in one piece
            assert command(tmp_path, "--only", "row") == 0
    assert steps == [1, 2, 3]
    assert without_times(record_of(tmp_path)) == without_times(record_of(whole))
    assert not [*kept.rglob("*.txt")]


@pytest.mark.slow
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
        "measuring": (surface, "measure", 1),
    }[moment]
    monkeypatch.setattr(place, name, interrupting(getattr(place, name), number))
    assert command(tmp_path, "--all") == stopping.STOPPED
    assert not (tmp_path / "results" / "budget" / "diverges.json").exists()
    kept = tmp_path / "results" / "budget" / "unfinished" / "row"
    steps = [int(path.name) for path in kept.glob("*/checkpoints/*")]
    assert steps == {"loading": [1], "last epoch": [4], "measuring": []}[moment]
    assert (kept.parents[1] / "row.json").exists() == (moment == "measuring")
    assert command(tmp_path, "--only", "row") == 0
    assert [run["seed"] for run in record_of(tmp_path)["runs"]] == [0, 1]


@pytest.mark.slow
def test_a_record_has_what_the_tables_need(whole, tmp_path, monkeypatch, capsys):
    shutil.copytree(whole / "results", tmp_path / "results")
    assert command(tmp_path, "--only", "row") == 0  # adds the other seed
    record = record_of(tmp_path)
    assert record["runs"][0] == record_of(whole)["runs"][0]
    assert [run["seed"] for run in record["runs"]] == [0, 1]
    assert record.keys() == committed().keys()
    for run in record["runs"]:
        assert run.keys() == committed()["runs"][0].keys() - {"devices"}
        assert run["revisions"] == [
            f"{results.revision()} on {jax.device_count()} device(s)"
        ]
        assert run["seconds"] > 0.0
        assert {len(x) for x in run["epochs"].values()} == {2}
    last = record["runs"][1]
    weights = tmp_path / "work" / "budget" / "row" / "row_seed_1.safetensors"
    config = dataclasses.replace(CONFIG, seed=1)
    with open_pipeline(config, Options(devices=1)) as pipeline:
        check_measurements(last, config, pipeline, hero_jax.quant.load(weights))
    monkeypatch.setattr(tables, "FIFTEEN_EPOCHS", CONFIG)
    cells = tables.budget_scale({"row": record}).splitlines()[-1].split("|")
    assert [x.strip() for x in cells[1:4]] == ["row", "1", "channel"]
    accuracy = 100 * last["accuracy_by_bits_per_channel"]["2"]
    assert cells[6].strip() == f"{accuracy:.1f}"
    assert command(tmp_path, "--list") == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [x.split("|")[-2].strip() for x in lines] == ["0", "1", "0"]


def committed():
    return json.loads((reproduction.RESULTS / "budget" / "sgd.json").read_text())


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
    flat, unravel = jax.flatten_util.ravel_pytree(weights["params"])
    model, item = make_model(config, pipeline, True), pipeline.sample(1)[0]
    images = pipeline.standardized(np.asarray(item.images)[:40])

    def loss_fn(flat):
        logits = model.apply(weights | {"params": unravel(flat)}, images, train=False)
        chances = jax.nn.log_softmax(logits)
        return -chances[np.arange(40), np.asarray(item.labels)[:40]].mean()

    hessian = jax.hessian(loss_fn)(flat)
    expected = np.linalg.eigvalsh(np.asarray(hessian, np.float64))[-1]
    # Five digits are written of a value in single precision.
    np.testing.assert_allclose(run["largest_eigenvalue"]["value"], expected, rtol=1e-3)
    _, more = surface.measure(config, pipeline, weights, True)
    assert more["surface"]["axis"] == [-1.0, 0.0, 1.0]
    middle = more["surface"]["loss"][1][1]
    np.testing.assert_allclose(middle, loss_fn(flat), rtol=1e-3)


def test_results_of_other_configs_and_images_are_not_mixed(
    tmp_path, whole, monkeypatch, capsys
):
    path = tmp_path / "results" / "budget" / "row.json"
    path.parent.mkdir(parents=True)
    third = dataclasses.replace(ROW, seeds=(2,))
    monkeypatch.setattr(reproduction, "rows", lambda: [third])
    record = record_of(whole)
    path.write_text(json.dumps(record | {"config": record["config"] | {"h": 5.0}}))
    assert command(tmp_path, "--all") == 1
    assert "runs of another config (h was 5.0, now 0.02)" in capsys.readouterr().err
    path.write_text(json.dumps(record | {"data": record["data"] + 1}))
    new = {"data": record["data"], "seconds": 1.0, "runs": [{"seed": 2}]}
    monkeypatch.setattr(work, "_trained", lambda *_: new)
    assert command(tmp_path, "--all") == 1
    assert "has runs of other images" in capsys.readouterr().err
    assert record_of(tmp_path)["runs"] == record["runs"]


@pytest.mark.slow
def test_a_row_that_diverges_is_a_result(tmp_path):
    assert command(tmp_path, "--only", "diverges") == 0
    (run,) = record_of(tmp_path, "diverges")["runs"]
    assert run["accuracy_by_bits"] is None
    assert run["diverged"].startswith("loss is nan at step")
    assert str(tmp_path) not in json.dumps(run)
    assert command(tmp_path, "--only", "diverges") == 0  # nothing is missing
    table = tables.budget_scale({"diverges": record_of(tmp_path, "diverges")})
    assert "diverged" in table.splitlines()[-1]


def folder_of(place, *steps):
    """A run with checkpoints, in each of which stands where it is from."""
    for step in steps:
        checkpoint = place / "checkpoints" / str(step)
        checkpoint.mkdir(parents=True)
        (checkpoint / "state").write_text(f"{place.name} {step}")
    for file in ("config.toml", unfinished.REVISIONS):
        (place / file).write_text(place.name)
    return place


def test_what_came_further_is_not_replaced(tmp_path):
    def states(place):
        return [x.read_text() for x in sorted(place.glob("checkpoints/*/state"))]

    run, kept = folder_of(tmp_path / "run", 3, 12), folder_of(tmp_path / "kept", 7)
    unfinished.copy(kept, run)
    assert states(run) == ["run 12", "run 3"]
    unfinished.copy(run, kept)
    assert states(kept) == ["run 12"]
    later = folder_of(tmp_path / "later", 20)
    unfinished.copy(later, run)
    unfinished.copy(tmp_path / "nothing", run)
    assert states(run) == ["later 20"]


def test_a_copy_that_was_interrupted_does_no_harm(tmp_path, monkeypatch):
    kept, run = folder_of(tmp_path / "kept", 7), tmp_path / "run"
    for function in ("copy", "rmtree", "copytree"):
        with monkeypatch.context() as patch:

            def killed(*_, **__):
                raise KeyboardInterrupt

            patch.setattr(unfinished.shutil, function, killed)
            with pytest.raises(KeyboardInterrupt):
                unfinished.copy(kept, run)
        assert not run.exists()
    unfinished.copy(kept, run)
    assert (run / "checkpoints" / "7" / "state").read_text() == "kept 7"
    assert (run / "config.toml").exists()
    folder_of(tmp_path / "later", 8).rename(tmp_path / ".kept.partial")
    unfinished.forget(kept)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_field_that_is_added_later_changes_no_row(monkeypatch):
    before = work.name_of(CONFIG, 0)
    asdict = dataclasses.asdict
    record = {"config": asdict(CONFIG)}
    monkeypatch.setattr(dataclasses, "asdict", lambda x: asdict(x) | {"new": 1})
    assert work.name_of(CONFIG, 0) == before
    assert work.differences(record, CONFIG) == []
    other = dataclasses.replace(CONFIG, h=3.0)
    assert work.name_of(other, 0) != before
    assert work.differences(record, other) == [f"h was {CONFIG.h}, now 3.0"]


def test_the_rows_of_15_epochs_have_the_settings_that_were_fixed_before():
    rows = [x for x in entries.rows() if x.scale == "budget"]
    keys = [(row.name, row.seeds) for row in rows]
    assert len({*keys}) == len(keys)
    paper = {"perturbation": "layerwise", "reduction": "sum", "h": 2.0, "gamma": 0.1}
    ours = {"h_warmup_epochs": 1.5}
    recommended = {
        "hero_relative": ours,
        "first_order_relative": ours | {"h": 0.04},
        "first_order_share": {"h": 0.001, "share": 0.3},
    }
    allowed = {"method", "label_noise", "epochs", "bits", "weight_decay"}
    for row in rows:
        fields = dataclasses.asdict(row.config)
        settings = recommended.get(re.sub("_noise.*", "", row.name), paper)
        defaults = dataclasses.asdict(Config(**settings))
        changed = {x for x in fields if fields[x] != defaults[x]}
        assert (row.config.model, row.config.epochs) == ("resnet20", 15)
        if row.name != "released_noise40":
            assert changed <= allowed
    configs = {row.name: row.config for row in rows}
    full = named("cifar10_resnet20_released_noise40")
    full = dataclasses.replace(full, epochs=15, bits=configs["sgd"].bits)
    assert configs["released_noise40"] == full
    assert [name for name, _ in keys[:6]] == [
        *("sgd", "sgd_noise40", "sgd_decay", "sgd_decay_noise40"),
        *("first_order_share_noise40", "hero_relative_noise40"),
    ]


STOPPED_RUNS = [*(reproduction.RESULTS / "budget").glob("unfinished/*/*")]


@pytest.mark.parametrize("place", STOPPED_RUNS, ids=lambda x: x.parent.name)
def test_a_stopped_run_that_was_committed_goes_on(place, tmp_path, monkeypatch):
    (checkpoint,) = (place / "checkpoints").iterdir()
    record = json.loads((checkpoint / "record" / "metadata").read_text())
    kept = tmp_path / "results" / "budget" / "unfinished" / place.parent.name
    shutil.copytree(place.parent, kept)
    images, labels = np.zeros((200, 32, 32, 3), np.uint8), np.arange(200) % 10
    arrays = {"x_train": images, "y_train": labels, "x_test": images, "y_test": labels}
    np.savez(tmp_path / "data.npz", **arrays)

    def same_shapes(config, _):
        dataset = str(tmp_path / "data.npz")
        pipeline = input_pipeline.create(dataclasses.replace(config, dataset=dataset))
        pipeline.checksum, pipeline.steps = record["data"], 50_000 // 128
        pipeline.sample = lambda _: []
        return contextlib.closing(pipeline)

    reached = []

    def epoch(_, state, number, outputs, __):
        reached.append((int(state.step), number, len(outputs)))
        return state

    monkeypatch.setattr(loop, "make_model", MAKE_MODEL)
    monkeypatch.setattr(reproduction, "rows", entries.rows)
    monkeypatch.setattr(runs, "open_pipeline", same_shapes)
    monkeypatch.setattr(loop.Training, "_epoch", epoch)
    assert command(tmp_path, "--only", place.parent.name) == stopping.STOPPED
    epochs, rest = divmod(int(checkpoint.name), 50_000 // 128)
    assert reached == [(int(checkpoint.name), epochs, rest)]
    assert len(record["outputs"]) == rest
    assert len(record["metrics"]) == epochs


MAKE_MODEL = loop.make_model


def test_another_data_set_is_refused_before_training(tmp_path, capsys, monkeypatch):
    row = dataclasses.replace(
        ROW, config=dataclasses.replace(CONFIG, dataset="cifar10", train_size=None)
    )
    monkeypatch.setattr(reproduction, "rows", lambda: [row])
    images, labels = np.zeros((60, 8, 8, 3), np.uint8), np.arange(60) % 10
    path = tmp_path / "data.npz"
    names = ("x_train", "y_train", "x_test", "y_test")
    np.savez(path, **dict(zip(names, (images, labels) * 2, strict=True)))
    assert command(tmp_path, "--all", "--dataset", str(path)) == 1
    error = capsys.readouterr().err
    assert "10 classes and 50000 training images" in error
    assert error.rstrip().endswith("with 10 and 60")
    assert command(tmp_path, "--all", "--dataset", str(tmp_path / "x.npz")) == 1
    assert "x.npz" in capsys.readouterr().err
    assert command(tmp_path, "--only", "nothing") == 1
    assert "--only must be one of row" in capsys.readouterr().err


def test_a_host_is_divided_before_jax_is_used(tmp_path, capsys):
    assert jax.devices()
    assert command(tmp_path, "--all", "--host-devices", "2") == 1
    assert "host_devices must be set before JAX is used" in capsys.readouterr().err


def test_settings_are_searched_in_order_and_the_best_one_is_taken(
    tmp_path, monkeypatch, capsys
):
    """One run at a time, by a stand-in for training; the row itself is not trained."""
    grids = {
        "layerwise": Grid(h=(0.5, 1.0), gamma=(0.1,)),
        "adaptive": Grid(h=(0.5, 1.0), gamma=(0.2,)),
    }
    more = Grid(learning_rate=(0.05,), weight_decay=(1e-3,))
    tried = dataclasses.replace(CONFIG, validation_size=20, test_size=None, bits=(4,))
    monkeypatch.setattr(tuning, "TUNING", tried)
    monkeypatch.setattr(tuning, "GRIDS", {"hero": grids})
    monkeypatch.setattr(tuning, "MORE", {"hero": more})
    trained = []

    def train(many, runs, _):
        (run,) = runs
        settings, seed = run
        trained.append((many._config.perturbation, settings, seed, many._config))
        value = settings.h / 2 + settings.gamma
        if settings.learning_rate == 0.05:
            value += 0.05
        if seed == tuning.SECOND_SEED and settings.gamma == 0.2:
            return [Result()]  # the favourite diverges
        return [Result({"32": value, "4": value / 2}, 1.0, 1.0)]

    monkeypatch.setattr(ManyRuns, "train", train)
    monkeypatch.setattr(heat_maps, "plot", lambda *_: None)
    config = dataclasses.replace(CONFIG, method="hero", label_noise=0.2)
    row = dataclasses.replace(ROW, scale="cpu", config=config, tuned="noise40")
    monkeypatch.setattr(reproduction, "rows", lambda: [row])
    monkeypatch.setattr(work, "_trained", lambda *_: {"data": 1, "runs": [{"seed": 0}]})

    def once(*arguments):
        places = ["--results", str(tmp_path / "results"), "--work", str(tmp_path)]
        return reproduction.main(
            ["--scale", "cpu", "--quiet", "--all", *places, *arguments]
        )

    before = -1
    while once("--minutes", "0") == stopping.STOPPED:
        assert len(trained) > before, "every piece comes further"
        before = len(trained)
    assert len({*(x[:3] for x in trained)}) == len(trained)  # nothing is done twice
    kinds = [(direction, run.h, run.learning_rate) for direction, run, *_ in trained]
    assert kinds[:5] == [
        *(("layerwise", 0.5, 0.1), ("layerwise", 1.0, 0.1)),
        *(("adaptive", 0.5, 0.1), ("adaptive", 1.0, 0.1)),
        ("adaptive", 1.0, 0.05),  # more of the best one
    ]
    released = trained[5:7]
    assert {x[1][:2] for x in released} == {(0.5, 5.0)}
    assert {x[3].reduction for x in released} == {"mean"}
    finals = trained[7:]
    assert [x[2] for x in finals] == [tuning.SECOND_SEED] * 3
    assert {x[3].label_noise for x in trained} == {0.4}
    assert [x[0] for x in finals] == ["adaptive", "adaptive", "layerwise"]
    record = json.loads((tmp_path / "results" / "cpu" / "row.json").read_text())
    wanted = {"perturbation": "layerwise", "h": 1.0, "gamma": 0.1, "label_noise": 0.2}
    assert wanted.items() <= record["config"].items()
    assert capsys.readouterr().err.count("the same command goes on") > 3
