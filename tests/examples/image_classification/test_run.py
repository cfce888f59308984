"""Whole runs: files, resuming after every kind of end, clear errors."""

import csv
import dataclasses
import errno
import fcntl
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from tensorboardX.record_writer import RecordWriter

import hero_jax
from examples.image_classification import __main__ as command
from examples.image_classification import config as configs
from examples.image_classification import (
    evaluate,
    input_pipeline,
    logbook,
    loop,
    results,
    train,
)
from examples.image_classification import run as run_module
from examples.image_classification.checkpoints import CheckpointError, Checkpoints
from examples.image_classification.config import Config
from examples.image_classification.run import Options, run
from examples.image_classification.stopping import Stop
from hero_jax import quant
from tests.examples.image_classification import small

ROOT = Path(__file__).parents[3]
SMALL = small.__name__
"""The command, with a network that is quick to compile."""

IN_A_HURRY = True
"""What is compiled here runs for some steps only."""

CONFIG = Config(
    dataset="digits",
    augmentation="crop_flip",
    model="resnet8",
    method="sgd",
    label_noise=0.2,
    train_size=256,
    test_size=100,
    batch_size=64,
    epochs=3,
    curvature_batches=1,
    bits=(8, 3),
)


def options(out, **fields):
    return Options(**{"out": out, "devices": 1, "quiet": True, **fields})


@pytest.fixture(scope="module", autouse=True)
def small_network():
    """Train a network that is quick to compile."""
    with small.in_place():
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory, small_network):  # noqa: ARG001
    """The folder of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(CONFIG, options(out))
    return out


def assert_same_result(out, whole):
    """Bitwise, for all that does not depend on whether a run was interrupted."""
    for name in ("metrics.csv", "config.toml"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    weights = (quant.load(path / "weights.safetensors") for path in (out, whole))
    jax.tree.map(np.testing.assert_array_equal, *weights)
    one, two = (json.loads((path / "result.json").read_text()) for path in (out, whole))
    for name in ("epochs", "accuracy_by_bits", "test_loss", "config", "parameters"):
        assert one[name] == two[name]


def test_a_run_writes_all_that_the_package_promises(whole):
    assert {path.name for path in whole.iterdir()} == {
        ".lock",
        "checkpoints",
        "config.toml",
        "curves.png",
        "metrics.csv",
        "result.json",
        "tensorboard",
        "times.csv",
        "weights.json",
        "weights.safetensors",
    }
    with (whole / "metrics.csv").open() as file:
        rows = [*csv.DictReader(file)]
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert [row["step"] for row in rows] == ["4", "8", "12"]
    for row in rows:
        assert 0.0 < float(row["train_loss"]) < 10.0
        assert 0.0 <= float(row["train_accuracy"]) <= 1.0
        assert float(row["hessian_norm"]) > 0.0
        assert float(row["grad_norm"]) > 0.0
    # The last update of a cosine over twelve: 0.05 (1 + cos(11/12 pi)).
    rate = 0.05 * (1 + np.cos(11 / 12 * np.pi))
    np.testing.assert_allclose(float(rows[-1]["learning_rate"]), rate, rtol=1e-4)
    record = json.loads((whole / "result.json").read_text())
    assert list(record["accuracy_by_bits"]) == ["32", "8", "3"]
    assert record["accuracy_by_bits"]["32"] == float(rows[-1]["test_accuracy"])
    assert record["parameters"] == 65 * 7 + 2 * 7 + 8 * 10
    assert record["test_images"] == 100
    assert record["environment"]["jax"]
    assert configs.load(whole / "config.toml") == CONFIG
    weights = quant.load(whole / "weights.safetensors")
    assert set(weights) == {"params", "batch_stats"}
    assert (whole / "curves.png").read_bytes().startswith(b"\x89PNG")
    (events,) = (whole / "tensorboard").iterdir()
    for name in (b"test_accuracy", b"hessian_norm", b"images_per_second"):
        assert events.read_bytes().count(name) == 3


def test_a_finished_run_is_not_run_again(whole, capsys):
    before = (whole / "result.json").stat().st_mtime_ns
    record = run(CONFIG, Options(out=whole))
    assert record == json.loads((whole / "result.json").read_text())
    assert (whole / "result.json").stat().st_mtime_ns == before
    assert "finished already" in capsys.readouterr().out


def test_the_folder_of_another_config_is_left_alone(whole):
    other = dataclasses.replace(CONFIG, epochs=4, train_size=None)
    message = r"another config \(train_size was 256, now None; epochs was 3, now 4\)"
    with pytest.raises(loop.RunError, match=message):
        run(other, options(whole))


def test_the_best_checkpoint_is_the_most_accurate(whole):
    rows = json.loads((whole / "result.json").read_text())["epochs"]
    best = max(row["test_accuracy"] for row in rows)
    checkpoints = Checkpoints(whole / "checkpoints", keep=2)
    (found,) = (row for row in rows if row["step"] == checkpoints.best())
    assert found["test_accuracy"] == best
    checkpoints.close()


def test_metrics_are_the_means_of_what_the_steps_return(tmp_path):
    config = dataclasses.replace(CONFIG, accumulation=2)
    pipeline = input_pipeline.create(config)
    training = loop.Training(config, pipeline, tmp_path, 1, True, Stop())
    state = training._program.init()._replace(step=np.int32(8))
    outputs = [[1.0, 0.2, 0.3, 4.0, 5.0, 0.1], [2.0, 0.4, 0.5, 6.0, 7.0, 0.3]]
    row = training._row(state, 0, outputs)
    training.close()
    names = ("loss", "accuracy", "accuracy_clean", "grad_norm", "penalty", "h")
    means = [row[f"train_{name}"] for name in names]
    np.testing.assert_allclose(means, [1.5, 0.3, 0.4, 5.0, 6.0, 0.2])
    # Eight micro-batches are four updates of twelve; the last one was the fourth.
    rate = 0.05 * (1 + np.cos(3 / 12 * np.pi))
    np.testing.assert_allclose(row["learning_rate"], rate, rtol=1e-5)


@pytest.fixture
def unfinished(whole, tmp_path):
    """A copy of the run as if it had ended after the second epoch."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "result.json").unlink()
    shutil.rmtree(out / "checkpoints" / "12")
    return out


@pytest.mark.slow
def test_lost_metrics_come_back_from_the_checkpoint(unfinished, whole):
    (unfinished / "metrics.csv").unlink()
    (unfinished / "times.csv").write_text("damaged")
    run(CONFIG, options(unfinished))
    assert_same_result(unfinished, whole)
    with (unfinished / "times.csv").open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2", "3"]


@pytest.mark.slow
def test_other_data_are_refused(tmp_path):
    rng = np.random.default_rng(0)
    data = {
        "x_train": rng.integers(0, 256, (256, 8, 8, 1), np.uint8),
        "y_train": np.arange(256) % 10,
        "x_test": rng.integers(0, 256, (100, 8, 8, 1), np.uint8),
        "y_test": np.arange(100) % 10,
    }
    path, out = tmp_path / "mine.npz", tmp_path / "run"
    np.savez(path, **data)
    config = dataclasses.replace(CONFIG, dataset=str(path), epochs=1)
    run(config, options(out))
    (out / "result.json").unlink()
    np.savez(path, **data | {"y_train": np.arange(256) % 10 ^ 1})
    with pytest.raises(loop.RunError, match=r"the data are not those that .*/4 was tr"):
        run(config, options(out))


def test_a_folder_without_its_config_is_refused(unfinished):
    (unfinished / "config.toml").unlink()
    with pytest.raises(loop.RunError, match=r"has results, but no config.toml"):
        run(dataclasses.replace(CONFIG, seed=5), options(unfinished))


@pytest.mark.parametrize(
    "damaged", ['{"epochs": [', "[1]", "[]", "{}", '"epochs"', '{"a": 1}']
)
def test_a_damaged_result_is_named(damaged, unfinished):
    (unfinished / "result.json").write_text(damaged)
    with pytest.raises(loop.RunError, match=r"result.json is damaged .*: delete it"):
        run(CONFIG, options(unfinished))


def test_an_empty_config_is_named(unfinished):
    (unfinished / "config.toml").write_text("\n")
    with pytest.raises(loop.RunError, match=r"config.toml is empty: bring"):
        run(CONFIG, options(unfinished))


@pytest.mark.slow
def test_a_run_that_was_killed_as_it_began_begins_again(tmp_path, monkeypatch):
    """The config is there before the folder of checkpoints, which alone is nothing."""

    def killed(folder, _):
        assert (folder.parent / "config.toml").exists()
        raise KeyboardInterrupt

    config = dataclasses.replace(CONFIG, epochs=1)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "Checkpoints", killed)
        with pytest.raises(KeyboardInterrupt):
            run(config, options(tmp_path / "one"))
    assert run(config, options(tmp_path / "one"))["epochs"]
    (tmp_path / "two" / "checkpoints").mkdir(parents=True)
    assert run(config, options(tmp_path / "two"))["epochs"]


def test_a_finished_run_needs_no_disk_that_can_be_written(whole, monkeypatch, capsys):
    def read_only(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(run_module.tempfile, "TemporaryFile", read_only)
    monkeypatch.setattr(run_module, "locked", read_only)
    run(CONFIG, options(whole, quiet=False))
    assert "finished already" in capsys.readouterr().out


def test_what_killed_processes_left_is_removed(tmp_path):
    for name in (".0123456789abcdef.partial", ".mine.png", "metrics.csv"):
        (tmp_path / name).write_text("half")
    with run_module.locked(tmp_path):
        found = {path.name for path in tmp_path.iterdir()}
    assert found == {".lock", ".mine.png", "metrics.csv"}


def test_a_file_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    order = []
    sync, replace = os.fsync, Path.replace

    def synced(file):
        order.append(os.fstat(getattr(file, "fileno", lambda: file)()).st_ino)
        sync(file)

    def replaced(path, target):
        order.append("replaced")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    results.write_text(tmp_path / "a.txt", "text")
    assert order == [(tmp_path / "a.txt").stat().st_ino, "replaced"]


def test_names_that_are_not_utf8(tmp_path, monkeypatch):
    """In a command they do not matter; Orbax cannot write to such a folder."""
    name = os.fsdecode(b"caf\xe9")
    monkeypatch.setattr(sys, "orig_argv", ["python", "--data-dir", name])
    path = tmp_path / "a.json"
    results.write_json(path, results.environment())
    assert json.loads(path.read_text())["command"] == f"python --data-dir '{name}'"
    with pytest.raises(loop.RunError, match=r"out must be UTF-8, got '.*/caf\\xe9'"):
        run(CONFIG, options(tmp_path / name))
    assert [*tmp_path.iterdir()] == [path]


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.slow
def test_nothing_that_is_logged_stops_a_run(tmp_path, monkeypatch, capsys):
    """No room for the output, for TensorBoard, for the tables; told once each."""
    calls, flush = itertools.count(), RecordWriter.flush
    monkeypatch.setattr(
        RecordWriter, "flush", lambda x: flush(x) if next(calls) < 2 else no_space()
    )
    monkeypatch.setattr(logbook, "write_rows", no_space)
    with monkeypatch.context() as patch, Path("/dev/full").open("w") as full:
        patch.setattr(sys, "stdout", full)
        record = run(CONFIG, options(tmp_path, quiet=False))
    assert len(record["epochs"]) == 3
    assert (tmp_path / "result.json").exists()
    lines = [x for x in capsys.readouterr().err.splitlines() if "% after" not in x]
    told = ("can be printed", "written for TensorBoard", "tries again after each epoch")
    assert len(lines) == 3
    for text in told:
        assert sum(text in line for line in lines) == 1


@pytest.mark.slow
def test_standard_streams_may_be_closed(tmp_path, monkeypatch):
    before = os.dup(0)
    try:
        os.close(0)
        logbook.prepare_streams()
        assert os.path.samestat(os.fstat(0), Path(os.devnull).stat())
    finally:
        os.dup2(before, 0)
        os.close(before)
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    config = dataclasses.replace(CONFIG, epochs=1)
    assert run(config, options(tmp_path, quiet=False))["epochs"]


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_a_run_without_a_terminal_is_not_silent(noise, tmp_path, capsys):
    config = dataclasses.replace(CONFIG, epochs=1, label_noise=noise)
    run(config, options(tmp_path, quiet=False))
    told = capsys.readouterr()
    first, second = told.out.splitlines()[:2]
    assert first == "training for 4 steps; compiling first"
    assert told.err.startswith("25.0% after ")
    assert second.startswith("epoch   1  train loss")
    assert ("(clean labels" in second) == (noise > 0.0)


def delete(path, _):
    while path.exists():  # something may just be written to it
        shutil.rmtree(path, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.parametrize("end", [Path.rename, delete])
@pytest.mark.parametrize("tested", [False, True])
def test_a_folder_that_is_moved_or_deleted_ends_the_run(
    tmp_path, monkeypatch, end, tested
):
    """In the second epoch, or when only the result is missing."""
    out = tmp_path / "run"
    quantized, show = evaluate.quantized, loop.Progress.show

    def lost():
        if out.exists():
            end(out, tmp_path / "moved")

    def lost_at_step(self, images, text):
        if text.startswith("epoch 2"):
            lost()
        show(self, images, text)

    def lost_while_tested(*args):
        lost()
        return quantized(*args)

    if tested:
        monkeypatch.setattr(evaluate, "quantized", lost_while_tested)
    else:
        monkeypatch.setattr(loop.Progress, "show", lost_at_step)
    message = r"run/checkpoints was deleted or moved while this run wrote to it"
    with pytest.raises(CheckpointError, match=message):
        run(CONFIG, options(out))
    assert not (out / "result.json").exists()


def test_a_run_is_finished_when_all_but_the_picture_is_written(
    unfinished, whole, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        patch.setattr(quant, "save", no_space)
        with pytest.raises(OSError, match="No space"):
            run(CONFIG, options(unfinished))
    assert not (unfinished / "result.json").exists()
    (unfinished / "weights.safetensors").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "plot", no_space)
        run(CONFIG, options(unfinished))
    assert_same_result(unfinished, whole)
    assert "the picture is not written: [Errno 28]" in capsys.readouterr().err


def test_two_processes_do_not_share_a_folder(unfinished):
    with (unfinished / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(loop.RunError, match="another process is running in"):
            run(CONFIG, options(unfinished))


LITTLE_SPACE = """
import resource, signal, sys
from examples.image_classification.__main__ import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
sys.exit(main())
"""


@pytest.mark.slow
def test_a_full_disk_is_one_line(tmp_path):
    """A limit on the size of files stands in for a disk that is full."""
    arguments = ["digits", f"--out={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "-c", LITTLE_SPACE, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    errors = done.stderr
    assert done.returncode == 1, errors
    assert errors.startswith("error: out must be a folder that can be written to")
    assert errors.count("\n") == 1


@pytest.mark.slow
def test_another_seed_is_another_run(tmp_path):
    for seed in (0, 1):
        config = dataclasses.replace(CONFIG, seed=seed, epochs=1)
        run(config, options(tmp_path / str(seed)))
    one, two = (tmp_path / str(seed) / "metrics.csv" for seed in (0, 1))
    assert one.read_text().splitlines()[1] != two.read_text().splitlines()[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "step", [6, *(pytest.param(k, marks=pytest.mark.slow) for k in (1, 8))]
)
def test_a_signal_in_the_middle_of_an_epoch_saves_all(
    whole, tmp_path, monkeypatch, step
):
    """SIGTERM comes while step 1, 6 or 8 of 12 is looked at."""
    counter = interrupt(monkeypatch, step)
    with pytest.raises(loop.Stopped, match=r"stopped after step \d+ and saved"):
        run(CONFIG, options(tmp_path))
    assert not (tmp_path / "result.json").exists()
    run(CONFIG, options(tmp_path))
    assert next(counter) - 1 == 12, "no step is taken twice"
    assert_same_result(tmp_path, whole)


@pytest.mark.slow
def test_a_run_stops_when_its_time_is_up(tmp_path):
    run(CONFIG, options(tmp_path / "whole"))
    pieces = options(tmp_path / "pieces", minutes=0)
    for _ in range(2):
        with pytest.raises(loop.Stopped, match="and saved"):
            run(CONFIG, pieces)
    run(CONFIG, options(tmp_path / "pieces"))
    assert_same_result(tmp_path / "pieces", tmp_path / "whole")
    with pytest.raises(ValueError, match="minutes must be at least 0, got -1"):
        options(tmp_path, minutes=-1)


def interrupt(monkeypatch, step):
    """Send SIGTERM while a step is looked at; return the counter of all steps."""
    counter = itertools.count(1)
    show = loop.Progress.show

    def interrupted(self, *args):
        if next(counter) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        show(self, *args)

    monkeypatch.setattr(loop.Progress, "show", interrupted)
    return counter


def start(out, **environment):
    """Start the command in a process of its own."""
    path = out.parent / f"{out.name}.toml"
    path.write_text(configs.dumps(CONFIG))
    return subprocess.Popen(
        [
            *(sys.executable, "-m", SMALL, str(path)),
            f"--out={out}",
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", **environment},
    )


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 3])
def test_killed_runs_resume_to_the_same_bits(times, whole, tmp_path):
    """SIGKILL at random moments, so often; then the run is left in peace."""
    out = tmp_path / "run"
    seed = random.randrange(2**32)
    moments = random.Random(seed)
    kills = 0
    while kills < times:
        process = start(out)
        deadline = time.monotonic() + 60
        while not (out / "checkpoints").exists() and time.monotonic() < deadline:
            time.sleep(0.01)  # it is still importing
        time.sleep(moments.uniform(0.0, 2.0))
        process.kill()
        process.communicate()
        kills += 1
        if (out / "result.json").exists():
            break
    process = start(out)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, f"{errors} (seed {seed})"
    assert_same_result(out, whole)


@pytest.mark.slow
def test_sigterm_ends_the_command_cleanly(tmp_path):
    out = tmp_path / "run"
    process = start(out, PYTHONIOENCODING="ascii")  # which has no ‖
    assert any("epoch   1" in line for line in process.stdout)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    if (out / "result.json").exists():  # it may have been too quick for us
        assert process.returncode == 0, errors
    else:
        assert "the same command resumes" in errors
        assert process.returncode == 75, errors  # EX_TEMPFAIL of sysexits.h
    assert "Traceback" not in errors


def test_a_quantity_that_is_not_finite_stops_the_run(tmp_path):
    config = dataclasses.replace(CONFIG, learning_rate=1e30, epochs=2)
    message = (
        r"(loss|gradient norm) is (nan|inf) at step [2-4] \(epoch 1\). "
        "Last good checkpoint: none"
    )
    with pytest.raises(loop.RunError, match=message):
        run(config, options(tmp_path))


@pytest.mark.slow
def test_the_last_good_checkpoint_is_named(tmp_path, monkeypatch):
    look = loop.Training._check_finite

    def broken(self, values, epoch, step):
        if epoch == 1 and "loss" in values:
            values = values | {"loss": float("nan")}
        look(self, values, epoch, step)

    monkeypatch.setattr(loop.Training, "_check_finite", broken)
    with pytest.raises(loop.RunError, match=r"loss is nan at step 5 .*checkpoints/4"):
        run(CONFIG, options(tmp_path), Stop())  # a signal is for pytest


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint_is_named_and_the_one_before_takes_over(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "result.json").unlink()
    for path in (out / "checkpoints" / "12" / "state").rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(CheckpointError, match=r"checkpoints/12 cannot be read.*Delete"):
        run(CONFIG, options(out))
    shutil.rmtree(out / "checkpoints" / "12")
    run(CONFIG, options(out))
    assert_same_result(out, whole)


def test_a_network_that_does_not_fit_the_images_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "make_model", train.make_model)
    config = dataclasses.replace(CONFIG, model="vgg19_bn")
    with pytest.raises(loop.RunError, match="vgg19_bn does not fit the data: images"):
        run(config, options(tmp_path))
    assert not (tmp_path / "config.toml").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "/dev/null/x"], "out must be a folder that can be written to"),
        (["--dataset", "./nowhere"], "no folder nowhere"),
        (["--dataset", "nowhere.npz"], "no file nowhere.npz"),
    ],
)
def test_errors_are_one_line(arguments, message, tmp_path, capsys):
    if "--out" not in arguments:
        arguments = [*arguments, "--out", str(tmp_path)]
    assert command.main(["digits", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_photographs_from_files_to_result(tmp_path, monkeypatch):
    """The whole recipe on files, with a worker process and a broken file."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for label, name in enumerate(("dark", "light")):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for k in range(count):
                pixels = rng.integers(128 * label, 128 + 128 * label, (40, 50, 3))
                image = Image.fromarray(pixels.astype(np.uint8))
                image.save(folder / f"{k}.png")
    (tmp_path / "data" / "train" / "dark" / "0.png").write_bytes(b"")
    config = dataclasses.replace(
        CONFIG,
        dataset=str(tmp_path / "data"),
        augmentation="resized_crop",
        image_size=16,
        batch_size=4,
        train_size=None,
        test_size=None,
        label_noise=0.0,
    )
    runs = []
    for workers in (0, 1):
        out = tmp_path / f"workers{workers}"
        runs.append(run(config, options(out, workers=workers)))
    interrupt(
        monkeypatch, step=1
    )  # three of four batches are read, the broken file too
    out = tmp_path / "interrupted"
    with pytest.raises(loop.Stopped):
        run(config, options(out, workers=0))
    runs.append(run(config, options(out, workers=1)))
    assert runs[0]["epochs"] == runs[1]["epochs"] == runs[2]["epochs"]
    assert [row["skipped_images"] for row in runs[0]["epochs"]] == [1, 1, 1]
    assert runs[0]["test_images"] == 6


QUICK_TO_COMPILE = """
from hero_jax import models
from small import Small
models.create = lambda *_, axis_name=None, **__: Small(axis_name)
"""


@pytest.mark.slow
def test_the_folder_may_be_copied(tmp_path):
    """Under another name, to a place where nothing else of this project lies."""
    shutil.copytree(
        Path(loop.__file__).parent,
        tmp_path / "mine",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    (tmp_path / "hero_jax").symlink_to(Path(hero_jax.__file__).parent)
    shutil.copy(small.__file__, tmp_path / "small.py")
    (tmp_path / "sitecustomize.py").write_text(QUICK_TO_COMPILE)
    tiny = "--epochs 1 --method sgd --train-size 64 --batch-size 32 --test-size 20"
    done = subprocess.run(
        [sys.executable, "-m", "mine", "digits", *tiny.split(), "--bits", "4"],
        cwd=tmp_path,
        env=os.environ
        | {"PYTHONPATH": str(tmp_path), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "runs/digits/seed_0/result.json").read_text())
    assert record["train_images_per_epoch"] == 64
    texts = [path.read_text() for path in (tmp_path / "mine").glob("*.py")]
    assert not any("import examples" in x or "from examples" in x for x in texts)
