"""The runs of a row: epoch by epoch, to be stopped and resumed between epochs."""

import contextlib
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from examples.experiments.sweep.grid import Run
from examples.experiments.sweep.many_runs import ManyRuns
from examples.image_classification import evaluate
from examples.image_classification.checkpoints import Checkpoints
from examples.image_classification.config import Config
from examples.image_classification.logbook import Progress, say
from examples.image_classification.loop import RunError
from examples.image_classification.stopping import Stop
from examples.image_classification.train import OUTPUTS, TrainState

CURVES = {
    "train_loss": "loss",
    "train_accuracy": "accuracy",
    "train_accuracy_clean": "clean accuracy",
}
"""Names in results, of the outputs of a step that are averaged over an epoch."""

SAVE_EVERY = 60.0
"""Seconds between checkpoints, at the least."""

Curves = dict[str, list[float | None]]


class Trained(NamedTuple):
    """Runs that have come to their end.

    Attributes:
      records: for JSON, of each run.
      networks: of each run, on the host.
      seconds: of all of them.
    """

    records: list[dict[str, Any]]
    networks: list[evaluate.Variables]
    seconds: float


def train(
    many: ManyRuns,
    config: Config,
    data: int,
    steps: int,
    runs: Sequence[Run],
    folder: Path,
    stop: Stop,
    quiet: bool,
) -> Trained | None:
    """Train runs together, from their last checkpoint on.

    An epoch that was interrupted is done again, so that the result does not depend on
    how a run was cut into pieces.

    Args:
      many: the program.
      config: of the program.
      data: checksum of the images.
      steps: of an epoch.
      runs: which.
      folder: for checkpoints.
      stop: when to stop.
      quiet: whether to print nothing.

    Returns:
      None if it was stopped, by a signal or because the next epoch would end after the
      deadline; one epoch is done in any case.

    Raises:
      RunError: the checkpoint is of other data.
      CheckpointError: a checkpoint cannot be written or read.
    """
    with contextlib.ExitStack() as stack:
        checkpoints = Checkpoints(folder, keep=1)
        stack.enter_context(contextlib.closing(checkpoints))
        before, done, curves, spent = _restored(checkpoints, many, runs, data)
        images = len(runs) * steps * config.micro_batch
        progress = Progress(config.epochs * images, done * images, quiet)
        stack.enter_context(contextlib.closing(progress))

        def look(losses: np.ndarray) -> None:
            text = f"epoch {done + 1}, loss {np.median(losses):.3f}"
            if done:
                text += f", accuracy {_median(curves, 'test_accuracy'):.1%}"
            progress.show(len(losses) * config.micro_batch, text)

        saved = time.monotonic()
        start, longest = saved, 0.0
        for state, outputs in many.epochs(runs, look, before, done):
            networks = many.networks(state, runs)
            for run, curve, variables, values in zip(
                runs, curves, networks, outputs, strict=True
            ):
                _add(curve, values, many.measure(variables, run))
            done += 1
            now = time.monotonic()
            seconds, start = now - start, now
            spent, longest = spent + seconds, max(longest, seconds)
            if done == config.epochs:
                break
            if all(curve["train_loss"][-1] is None for curve in curves):
                break  # all have diverged
            ends = stop.now(1.1 * longest)
            if ends or now - saved > SAVE_EVERY:
                record = {"data": data, "curves": curves, "seconds": spent}
                checkpoints.save(done, many.fetch(state), record, None)
                say(_told(runs, done, curves, spent), quiet)
                saved = now
            if ends:
                return None
        networks = many.networks(state, runs)
        tested = [many.test(variables, 0.0) for variables in networks]
    records = [
        {
            "seed": run.seed,
            "test_loss": result and result.test_loss,
            "accuracy_by_bits": result and result.accuracy_by_bits,
            "epochs": curve,
        }
        for run, result, curve in zip(runs, tested, curves, strict=True)
    ]
    say(_told(runs, done, curves, spent), quiet)
    return Trained(records, networks, spent)


def _restored(
    checkpoints: Checkpoints, many: ManyRuns, runs: Sequence[Run], data: int
) -> tuple[TrainState | None, int, list[Curves], float]:
    """Return state, epochs, curves and seconds so far."""
    restored = checkpoints.restore(many.shapes(runs))
    if restored is None:
        return None, 0, [{} for _ in runs], 0.0
    state, record = restored
    if record["data"] != data:
        raise RunError(
            f"the data are not those that {checkpoints.latest()} was trained on: bring "
            "them back, or delete that folder to begin again."
        )
    curves = record["curves"]
    done = len(curves[0]["test_accuracy"])
    return many.place(state), done, curves, float(record["seconds"])


def _add(curve: Curves, outputs: np.ndarray, measured: dict[str, float]) -> None:
    """Append what is known of an epoch; None where it is not finite."""
    means = dict(zip(OUTPUTS, outputs.mean(0), strict=True))
    values = {name: float(means[output]) for name, output in CURVES.items()}
    for name, value in (values | measured).items():
        finite = float(f"{value:.6g}") if math.isfinite(value) else None
        curve.setdefault(name, []).append(finite)


def _median(curves: Sequence[Curves], name: str) -> float:
    values = [curve[name][-1] for curve in curves]
    return float(np.median([math.nan if x is None else x for x in values]))


def _told(
    runs: Sequence[Run], done: int, curves: Sequence[Curves], seconds: float
) -> str:
    seeds = ", ".join(str(run.seed) for run in runs)
    return (
        f"seed {seeds}: epoch {done}, train loss {_median(curves, 'train_loss'):.4f}, "
        f"accuracy {_median(curves, 'train_accuracy'):.2%}, test accuracy "
        f"{_median(curves, 'test_accuracy'):.2%}, {seconds:.0f} s"
    )
