"""The epochs of a run: steps, measurements, checkpoints, signals."""

import contextlib
import math
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from . import config as configs
from . import evaluate, hosts, results
from .checkpoints import Checkpoints
from .config import Config
from .errors import NotFiniteError, RunError
from .logbook import Logbook, Progress, Row, say
from .pipeline import Pipeline
from .stepping import take_steps
from .stopping import Stop, Stopped
from .train import OUTPUTS, Program, TrainState, make_model, make_program


class Training:
    """The epochs of a run, from the latest checkpoint on.

    Every process asks `stop` after every step; `keep` latest checkpoints stay.
    """

    def __init__(
        self,
        config: Config,
        pipeline: Pipeline,
        out: Path,
        keep: int,
        quiet: bool,
        stop: Stop,
    ) -> None:
        self._config, self._pipeline, self._stop = config, pipeline, stop
        self._devices = pipeline.devices
        self._quiet = quiet or not hosts.is_first()
        model = make_model(config, pipeline, config.normalizes_together)
        self._program: Program = make_program(config, model, pipeline)
        try:
            self._shapes = self._program.shapes()
        except ValueError as error:
            raise RunError(str(error)) from None
        whole = make_model(config, pipeline, synchronized=True)
        self._measure = evaluate.make_measure(config, whole, pipeline)
        self.evaluate = evaluate.make_evaluate(model, pipeline)
        self._out: Path | None = None
        self._checkpoints: Checkpoints | None = None
        if hosts.is_first():
            self._out = out
            results.write_text(out / "config.toml", configs.dumps(config))
            self._checkpoints = Checkpoints(out / "checkpoints", keep)
        on_device = config.epoch_on_device
        if on_device is None:
            on_device = jax.default_backend() != "cpu"
        self._in_one_loop = on_device and pipeline.on_device

    def close(self) -> None:
        """Wait for the last checkpoint, and release threads."""
        if self._checkpoints is not None:
            self._checkpoints.close()

    def run(self) -> tuple[TrainState, list[Row], float]:
        """Train to the end; return state, on the host, metrics by epoch, seconds."""
        state, record = self._begin()
        rows, times, outputs = (record[x] for x in ("metrics", "times", "outputs"))
        steps, epochs = self._pipeline.steps, self._config.epochs
        step, images = len(rows) * steps + len(outputs), self._config.micro_batch
        noisy = self._config.label_noise > 0.0
        book = Logbook(self._out, rows, times, self._quiet, noisy)
        progress = Progress(epochs * steps * images, step * images, self._quiet)
        text = f"training for {epochs * steps} steps; compiling first"
        if step:
            text = f"resumed after step {step} of {epochs * steps}"
        say(text, self._quiet)
        with contextlib.closing(book), contextlib.closing(progress):
            for epoch in range(len(rows), epochs):
                start, before = time.perf_counter(), len(outputs)
                started = start - record["spent"]
                state = self._epoch(state, epoch, outputs, progress)
                step = epoch * steps + len(outputs)
                if len(outputs) < steps:
                    record["skipped"] = hosts.total(self._pipeline.skipped)
                    record["spent"] = time.perf_counter() - started
                    self._save(step, state, record, None)
                    raise self._stopped(step)
                seconds = time.perf_counter() - start
                rows.append(self._row(state, epoch, outputs))
                times.append(
                    {
                        "epoch": epoch + 1,
                        "images_per_second": (steps - before) * images / seconds,
                        "seconds": time.perf_counter() - started,
                    }
                )
                outputs.clear()
                record |= {"skipped": 0, "spent": 0.0}
                self._save(step, state, record, rows[-1]["test_accuracy"])
                book.write(rows[-1], times[-1])
                if epoch + 1 < epochs and self._stop.now():
                    raise self._stopped(step)
        seconds = sum(row["seconds"] for row in times)
        return self._devices.fetch(state), rows, seconds

    def _begin(self) -> tuple[TrainState, dict[str, Any]]:
        """Return the state to start from, and what else a checkpoint has.

        That is a checksum of the data, metrics and times of the finished epochs, and of
        the unfinished one outputs, unreadable images and seconds spent.
        """
        restored = None
        with hosts.together():
            if self._checkpoints is not None:
                restored = self._checkpoints.restore(self._shapes)
        record = hosts.of_first(None if restored is None else restored[1])
        if record is None:
            record = {"data": self._pipeline.checksum, "skipped": 0, "spent": 0.0}
            record |= {"outputs": [], "metrics": [], "times": []}
            return self._program.init(), record
        if record["data"] != self._pipeline.checksum:
            raise RunError(
                f"the data are not those that {self._latest()} was trained "
                "on: bring them back, or begin again with another --out."
            )
        if restored is None:  # another process has it
            zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), self._shapes)
            restored = zeros, record
        state = hosts.arrays_of_first(restored[0])
        if hosts.is_first():
            self._pipeline.skipped = record["skipped"]
        return self._devices.replicate(state), record

    def _latest(self) -> str:
        if self._checkpoints is None:
            return "with process 0"
        return str(self._checkpoints.latest() or "none")

    def _save(
        self,
        step: int,
        state: TrainState,
        record: dict[str, Any],
        accuracy: float | None,
    ) -> None:
        if self._checkpoints is not None:
            self._checkpoints.save(step, self._devices.fetch(state), record, accuracy)

    def _stopped(self, step: int) -> Stopped:
        if self._checkpoints is not None:
            self._checkpoints.wait()
        return Stopped(
            f"stopped after step {step} and saved; the same command resumes."
        )

    def _epoch(
        self,
        state: TrainState,
        epoch: int,
        outputs: list[list[float]],
        progress: Progress,
    ) -> TrainState:
        """Take the steps of an epoch that are left, and append to the outputs."""

        def look(values: Any) -> None:
            outputs.append([float(value) for value in values])
            named = dict(zip(OUTPUTS, outputs[-1], strict=True))
            self._check_finite(named, epoch, len(outputs))
            loss, accuracy, *_ = outputs[-1]
            text = f"epoch {epoch + 1}, loss {loss:.3f}, accuracy {accuracy:.1%}"
            progress.show(self._config.micro_batch, text)

        if not outputs:
            self._pipeline.skipped = 0
        items = self._pipeline.epoch(epoch, len(outputs))
        if self._in_one_loop and not outputs:
            state, all_values = self._program.epoch(state, next(items))
            for values in self._devices.fetch(all_values):
                look(values)
            self._stop.now()
            return state
        return take_steps(
            self._program.step,
            state,
            items,
            lambda values: look(self._devices.fetch(values)),
            self._stop.now,
        )

    def _row(self, state: TrainState, epoch: int, outputs: list[list[float]]) -> Row:
        """Measure at the end of an epoch."""
        fetched = self._devices.fetch(state)
        (test,) = self.evaluate([evaluate.variables_of(fetched)])
        means = np.mean(outputs, axis=0)
        loss, accuracy, clean_accuracy, norm, penalty, h = map(float, means)
        updates = int(fetched.step) // self._config.accumulation
        row = {
            "epoch": epoch + 1,
            "step": int(fetched.step),
            "learning_rate": float(self._program.schedule(updates - 1)),
            "train_loss": loss,
            "train_accuracy": accuracy,
            "train_accuracy_clean": clean_accuracy,
            "train_grad_norm": norm,
            "train_penalty": penalty,
            "train_h": h,
            "test_loss": test.loss,
            "test_accuracy": test.accuracy,
            **self._measure(evaluate.variables_of(state)),
            "skipped_images": hosts.total(self._pipeline.skipped),
        }
        self._check_finite(row, epoch, len(outputs))
        return row

    def _check_finite(self, values: dict[str, float], epoch: int, step: int) -> None:
        for name, value in values.items():
            if not math.isfinite(value):
                if self._checkpoints is not None:
                    self._checkpoints.wait()
                raise NotFiniteError(
                    f"{name} is {value} at step {epoch * self._pipeline.steps + step} "
                    f"(epoch {epoch + 1}). Last good checkpoint: "
                    f"{self._latest()}. Begin again in another "
                    "folder with a lower learning_rate, h or gamma, or with clip_norm."
                )
