"""A whole run: train, test, write down; stop and resume."""

import collections
import contextlib
import dataclasses
import json
import math
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import hero_jax
from hero_jax import models

from . import config as configs
from . import evaluate, input_pipeline, results
from .checkpoints import Checkpoints
from .config import Config
from .input_pipeline import Pipeline
from .logbook import Logbook, Progress, Row, plot, say
from .train import OUTPUTS, Program, TrainState, make_program

AHEAD = 2
"""Steps that are dispatched before the outputs of an earlier one are looked at."""


class RunError(Exception):
    """A run cannot begin or go on; the message says why."""


class Stopped(Exception):  # noqa: N818 - no error
    """The run was asked to stop, and has saved its state."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Where and how to run; none of it changes the numbers.

    Attributes:
      out: folder to write; the command line makes it `runs/CONFIG/seed_SEED` if None.
      data_dir: where TensorFlow data sets lie; their own default if None.
      download: let TensorFlow Datasets fetch a data set that is not there.
      workers: processes that decode images; 0 for threads.
      keep: number of latest checkpoints that stay, beside the best one.
      quiet: print nothing and show no progress bar.
    """

    out: Path | None = None
    data_dir: Path | None = None
    download: bool = False
    workers: int = 8
    keep: int = 2
    quiet: bool = False

    def __post_init__(self) -> None:
        """Raise `ValueError` where a field is out of range."""
        for name, least in (("workers", 0), ("keep", 1)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"{name} must be at least {least}, got {getattr(self, name)}."
                )


def run(config: Config, options: Options) -> dict[str, Any]:
    """Train and test; go on where an earlier attempt in the same folder ended.

    Args:
      config: what to train, on what, and how.
      options: where and how to run.

    Returns:
      The record that is written to `result.json`.

    Raises:
      RunError: the folder cannot be written or belongs to another config, or a
        quantity is not finite.
      Stopped: a signal asked for it.
      CheckpointError: a checkpoint cannot be written or read.
      DatasetError: the data set is missing or malformed.
    """
    if options.out is None:
        raise RunError("out must be a folder, got None.")
    out = options.out

    def tell(text: str) -> None:
        if not options.quiet:
            say(text)

    _check_folder(out, config)
    if (out / "result.json").exists():
        tell(f"finished already: {out / 'result.json'}")
        record: dict[str, Any] = json.loads((out / "result.json").read_text())
        return record
    pipeline = input_pipeline.create(
        config,
        data_dir=options.data_dir,
        download=options.download,
        workers=options.workers,
    )
    training = Training(config, pipeline, out, options)
    results.write_text(out / "config.toml", configs.dumps(config))
    with contextlib.closing(training):
        state, rows, seconds = training.run()
    networks = {32: evaluate.variables_of(state)}
    for bits in config.bits:
        networks[bits] = evaluate.quantized(networks[32], bits)
    tested = dict(zip(networks, training.evaluate([*networks.values()]), strict=True))
    accuracy = {str(bits): result.accuracy for bits, result in tested.items()}
    hero_jax.quant.save(out / "weights.safetensors", networks[32])
    title = f"{config.model} on {Path(config.dataset).name}, {config.method}"
    plot(rows, accuracy, title, out / "curves.png")
    record = {
        "environment": results.environment(),
        "config": dataclasses.asdict(config),
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        "train_images": pipeline.steps * config.micro_batch,
        "test_images": pipeline.num_test,
        "seconds": round(seconds, 1),
        "test_loss": tested[32].loss,
        "test_accuracy": tested[32].accuracy,
        "best_test_accuracy": max(row["test_accuracy"] for row in rows),
        "accuracy_by_bits": accuracy,
        "epochs": rows,
    }
    results.write_json(out / "result.json", record)
    widths = ("float" if bits == "32" else f"{bits} bit" for bits in accuracy)
    values = (f"{value:.2%}" for value in accuracy.values())
    pairs = (" ".join(pair) for pair in zip(widths, values, strict=True))
    tell(f"test accuracy: {', '.join(pairs)}")
    tell(f"wrote {out / 'result.json'}, weights.safetensors and curves.png")
    return record


class Training:
    """The epochs of a run, from the latest checkpoint on.

    Args:
      config: of the run.
      pipeline: its data.
      out: its folder.
      options: how to run.
    """

    def __init__(
        self, config: Config, pipeline: Pipeline, out: Path, options: Options
    ) -> None:
        model = models.create(
            config.model, num_classes=pipeline.num_classes, dtype=np.dtype(config.dtype)
        )
        self._config, self._pipeline, self._out = config, pipeline, out
        self._quiet = options.quiet
        self._program: Program = make_program(config, model, pipeline)
        try:
            self._abstract_state = jax.eval_shape(self._program.init)
        except ValueError as error:
            raise RunError(f"{config.model} does not fit the data: {error}") from None
        self._measure = evaluate.make_measure(config, model, pipeline)
        self.evaluate = evaluate.make_evaluate(model, pipeline)
        self._checkpoints = Checkpoints(out / "checkpoints", options.keep)
        on_device = config.epoch_on_device
        if on_device is None:
            on_device = jax.default_backend() != "cpu"
        self._in_one_loop = on_device and pipeline.on_device

    def close(self) -> None:
        """Wait for the last checkpoint."""
        self._checkpoints.close()

    def run(self) -> tuple[TrainState, list[Row], float]:
        """Train to the end; return the state, metrics by epoch, and seconds."""
        state, outputs = self._begin()
        steps, epochs = self._pipeline.steps, self._config.epochs
        step = int(state.step)
        done = step // steps
        book = Logbook(self._out, done, self._quiet)
        images = self._config.micro_batch
        progress = Progress(epochs * steps * images, step * images, self._quiet)
        if step and not self._quiet:
            say(f"resumed after step {step}, in epoch {min(done + 1, epochs)}")
        with contextlib.closing(book), contextlib.closing(progress), Signals() as stop:
            for epoch in range(done, epochs):
                start = time.perf_counter()
                before = len(outputs)
                state = self._epoch(state, epoch, outputs, progress, stop)
                if len(outputs) < steps:
                    self._save(state, outputs, None)
                    raise self._stopped(state)
                seconds = time.perf_counter() - start
                row = self._row(state, epoch, outputs)
                times = {
                    "images_per_second": (steps - before) * images / seconds,
                    "seconds": time.perf_counter() - start,
                }
                book.add(row, times)
                outputs = []
                self._save(state, outputs, row["test_accuracy"])
                if stop.requested and epoch + 1 < epochs:
                    raise self._stopped(state)
            return state, book.rows, book.seconds()

    def _begin(self) -> tuple[TrainState, list[list[float]]]:
        """Return the state to start from, and the outputs of its unfinished epoch."""
        restored = self._checkpoints.restore(self._abstract_state)
        if restored is None:
            return self._program.init(), []
        state, record = restored
        self._pipeline.skipped = record["skipped"]
        return state, record["outputs"]

    def _save(
        self, state: TrainState, outputs: list[list[float]], accuracy: float | None
    ) -> None:
        skipped = self._pipeline.skipped if outputs else 0
        record = {"outputs": outputs, "skipped": skipped}
        self._checkpoints.save(int(state.step), state, record, accuracy)

    def _stopped(self, state: TrainState) -> Stopped:
        self._checkpoints.wait()
        return Stopped(
            f"stopped after step {int(state.step)} and saved; the same command resumes."
        )

    def _epoch(
        self,
        state: TrainState,
        epoch: int,
        outputs: list[list[float]],
        progress: Progress,
        stop: "Signals",
    ) -> TrainState:
        """Take the steps of an epoch that are left, and append to the outputs."""

        def look(values: Any) -> None:
            outputs.append([float(value) for value in np.asarray(values)])
            self._check_finite(
                dict(zip(OUTPUTS, outputs[-1], strict=True)), epoch, len(outputs)
            )
            loss, accuracy = outputs[-1][:2]
            progress.update(self._config.micro_batch, epoch + 1, loss, accuracy)

        if not outputs:
            self._pipeline.skipped = 0
        items = self._pipeline.epoch(epoch, len(outputs))
        if self._in_one_loop and not outputs:
            state, all_values = self._program.epoch(state, next(items))
            for values in np.asarray(all_values):
                look(values)
            return state
        waiting: collections.deque[jax.Array] = collections.deque()
        for item in items:
            state, values = self._program.step(state, item)
            waiting.append(values)
            if len(waiting) > AHEAD:
                look(waiting.popleft())
            if stop.requested:
                break
        for values in waiting:
            look(values)
        return state

    def _row(self, state: TrainState, epoch: int, outputs: list[list[float]]) -> Row:
        """Measure at the end of an epoch."""
        (test,) = self.evaluate([evaluate.variables_of(state)])
        loss, accuracy, clean_accuracy, _ = np.mean(outputs, axis=0)
        updates = int(state.step) // self._config.accumulation
        row = {
            "epoch": epoch + 1,
            "step": int(state.step),
            "learning_rate": float(self._program.schedule(updates - 1)),
            "train_loss": float(loss),
            "train_accuracy": float(accuracy),
            "train_accuracy_clean": float(clean_accuracy),
            "test_loss": test.loss,
            "test_accuracy": test.accuracy,
            **self._measure(state),
            "skipped_images": self._pipeline.skipped,
        }
        self._check_finite(row, epoch, len(outputs))
        return row

    def _check_finite(self, values: dict[str, float], epoch: int, step: int) -> None:
        for name, value in values.items():
            if not math.isfinite(value):
                self._checkpoints.wait()
                raise RunError(
                    f"{name} is {value} at step {epoch * self._pipeline.steps + step} "
                    f"(epoch {epoch + 1}): lower learning_rate, h or gamma, or set "
                    "clip_norm. Last good checkpoint: "
                    f"{self._checkpoints.latest() or 'none'}."
                )


class Signals:
    """Notes that SIGTERM or SIGINT came, instead of ending the process at once."""

    def __init__(self) -> None:
        self.requested = False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        """Take the signals over, if this is the main thread."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._handlers[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: object) -> None:
        del frame
        self.requested = True
        signal.signal(number, self._handlers[number])  # the second one ends it

    def __exit__(self, *exception: object) -> None:
        """Give the signals back."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


def _check_folder(out: Path, config: Config) -> None:
    """Make the folder, or check that it is one of this config."""
    path = out / "config.toml"
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass  # better to fail now than after the training
    except OSError as error:
        raise RunError(
            f"out must be a folder that can be written to: {error}"
        ) from None
    if not path.exists():
        return
    try:
        before = dataclasses.asdict(configs.load(path))
    except (TypeError, ValueError) as error:
        raise RunError(f"out is not the folder of a run: {error}") from None
    differences = [
        f"{name} was {before[name]!r}, now {value!r}"
        for name, value in dataclasses.asdict(config).items()
        if before[name] != value
    ]
    if differences:
        raise RunError(
            f"{out} belongs to a run with another config ({'; '.join(differences)}). "
            "Choose another --out, or delete the folder."
        )
