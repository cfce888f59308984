"""What a run says while it goes on: metrics files, TensorBoard, progress, pictures.

The columns of `metrics.csv`, one row per epoch:

    epoch, step            counted from 1; micro-batches since the beginning
    learning_rate          of the last update
    train_loss, train_accuracy, train_accuracy_clean, train_grad_norm, train_penalty,
    train_h                means over the steps of the epoch, on augmented images: loss,
                           accuracy on the noisy and on the true labels, norm of the
                           method's gradient before clipping, penalty with the settings
                           of the run, length of the step (both 0 for SGD and GRAD-L1)
    test_loss, test_accuracy
                           at the end of the epoch, on all test images
    hessian_norm, penalty, grad_norm
                           at the end of the epoch, in the same way for all methods, on
                           the same few batches: ||Hz|| and G(U) with z of Eq. 11 and
                           h = curvature_h, and ||g||
    skipped_images         unreadable ones, to train and to test on

Nothing that goes wrong here ends a run: it is told once, on stderr.
"""

import contextlib
import csv
import functools
import io
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import RecordWriter
from tqdm import tqdm

from .results import write_figure, write_text

Row = dict[str, float]

TELL_EVERY = 60
"""Seconds between two lines about the progress where there is no bar."""


class Logbook:
    """Metrics by epoch, in `metrics.csv`, and seconds by epoch, in `times.csv`.

    Both files, of a folder if there is one, are written anew after every epoch, whole
    or not at all, from rows that checkpoints hold, too. The metrics of a run that was
    killed and resumed are the same to the last digit; the times are not.
    """

    def __init__(
        self,
        folder: Path | None,
        rows: list[Row],
        times: list[Row],
        quiet: bool,
        noisy: bool = False,
    ) -> None:
        self.rows, self.times = rows, times
        self._folder, self._quiet, self._noisy = folder, quiet, noisy
        self._events: Any = None
        if folder is not None:
            name = f"events.out.tfevents.{int(time.time())}.{os.getpid()}"
            with self._without_events():
                (folder / "tensorboard").mkdir(exist_ok=True)
                self._events = RecordWriter(str(folder / "tensorboard" / name))
            # TensorBoard forgets what an earlier attempt has from this epoch on.
            self._event(file_version="brain.Event:2")
            self._event(step=len(rows) + 1, session_log={"status": 1})

    def write(self, row: Row, times: Row) -> None:
        """Write the metrics and seconds of an epoch, and print what matters most."""
        self._write_files()
        values = [
            {"tag": name, "simple_value": value}
            for name, value in (row | times).items()
            if name != "epoch"
        ]
        self._event(step=int(row["epoch"]), summary={"value": values})
        clean = f"(clean labels {row['train_accuracy_clean']:6.2%}) "
        say(
            f"epoch {row['epoch']:3.0f}  "
            f"train loss {row['train_loss']:.4f} "
            f"accuracy {row['train_accuracy']:6.2%} "
            f"{clean if self._noisy else ''} "
            f"test loss {row['test_loss']:.4f} "
            f"accuracy {row['test_accuracy']:6.2%}  "
            f"‖Hz‖ {row['hessian_norm']:.4f}  ‖g‖ {row['grad_norm']:.4f}  "
            f"lr {row['learning_rate']:.4f}  "
            f"{times['images_per_second']:.0f} images/s",
            self._quiet,
        )

    def close(self) -> None:
        """Write what there is, also if a run that was complete has only been tested."""
        self._write_files()
        self._close_events()

    def _close_events(self) -> None:
        if self._events is not None:
            with contextlib.suppress(OSError):
                self._events.close()
        self._events = None

    def _write_files(self) -> None:
        if self._folder is not None and self.rows:
            try:
                write_rows(self._folder / "metrics.csv", self.rows)
                write_rows(self._folder / "times.csv", self.times)
            except OSError as error:
                tell_once(
                    f"{error}: the run goes on, and tries again after each epoch."
                )

    def _event(self, **fields: Any) -> None:
        """Write a line for TensorBoard that is on the disk at once.

        The writer of tensorboardX leaves that to a thread, and waits for ever for one
        that has died.
        """
        if self._events is not None:
            with self._without_events():
                event = Event(wall_time=time.time(), **fields)
                self._events.write(event.SerializeToString())
                self._events.flush()

    @contextlib.contextmanager
    def _without_events(self) -> Iterator[None]:
        """Go on without TensorBoard where the block cannot write."""
        try:
            yield
        except OSError as error:
            text = f"nothing more is written for TensorBoard ({error}); the run goes on"
            tell_once(f"{text}.")
            self._close_events()


def prepare_streams(errors: str = "replace") -> None:
    """Let no closed stream, and no character that one lacks (‖), end a command."""
    # No other file is to take the number of a stream that is closed.
    while (opened := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(opened)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def say(text: str, quiet: bool = False) -> None:
    """Print a line, above the progress bar if there is one; nothing if quiet."""
    if quiet or sys.stdout is None:
        return
    try:
        _print(text, sys.stdout)
    except OSError as error:  # it is full, or nobody listens any more
        tell_once(f"nothing more can be printed ({error}); the run goes on.")
        discard_output()


def discard_output() -> None:
    """Let what is still to be printed go nowhere, without an error at the exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def tell(text: str) -> None:
    """Print a line on stderr, if that is possible."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            _print(text, sys.stderr)


tell_once = functools.cache(tell)
"""Print a line on stderr, but no line twice."""


def _print(text: str, file: TextIO) -> None:
    tqdm.write(text, file)
    file.flush()


class Progress:
    """A bar over all images of a run, on stderr.

    Where that is no terminal, it is a line after the first step, which has been
    compiled then, and one a minute.
    """

    def __init__(self, total: int, done: int, quiet: bool) -> None:
        self._total, self._done, self._quiet = total, done, quiet
        self._begun, self._told = time.monotonic(), -math.inf
        self._bar: Any = None
        if not quiet and sys.stderr is not None and sys.stderr.isatty():
            style = {"unit": "images", "unit_scale": True, "dynamic_ncols": True}
            self._bar = tqdm(total=total, initial=done, **style)

    def show(self, images: int, text: str) -> None:
        """Move on, and show a text behind the bar."""
        self._done += images
        now = time.monotonic()
        if self._bar is not None:
            try:
                self._bar.set_postfix_str(text, refresh=False)
                self._bar.update(images)
            except OSError:  # the terminal is gone
                self._bar.disable = True
                self._bar = None
        elif not self._quiet and now - self._told >= TELL_EVERY:
            self._told = now
            share, seconds = self._done / self._total, now - self._begun
            tell(f"{share:.1%} after {seconds:.0f} s: {text}")

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.close()


def plot(rows: list[Row], accuracy: dict[str, float], title: str, path: Path) -> None:
    """Draw loss, accuracy and ||Hz|| by epoch, and accuracy by bits."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(12.0, 3.4), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(1, 4)
    epochs = [row["epoch"] for row in rows]
    noisy = any(row["train_accuracy_clean"] != row["train_accuracy"] for row in rows)
    for place, name, text, factor in (
        (0, "train_loss", "training", 1),
        (0, "test_loss", "test", 1),
        (1, "train_accuracy", "training", 100),
        (1, "train_accuracy_clean", "training, true labels", 100),
        (1, "test_accuracy", "test", 100),
        (2, "hessian_norm", "training", 1),
    ):
        if noisy or name != "train_accuracy_clean":
            values = [factor * row[name] for row in rows]
            marks = "o-" if len(rows) < 20 else "-"
            axes[place].plot(epochs, values, marks, ms=3, label=text)
    for axis, label in zip(axes, ("loss", "accuracy (%)", "‖Hz‖"), strict=False):
        axis.set(xlabel="epoch", ylabel=label)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend()
    places = range(len(accuracy))
    axes[3].plot(places, [100 * value for value in accuracy.values()], "o-")
    axes[3].set_xticks(places, ["float" if b == "32" else b for b in accuracy])
    axes[3].set(xlabel="bits per weight", ylabel="test accuracy (%)")
    for axis in axes:
        axis.grid(alpha=0.3)
    write_figure(path, figure)


def write_rows(path: Path, rows: list[Row]) -> None:
    """Write rows of the same columns as CSV, with titles, whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
