"""What a run says while it goes on: metrics files, TensorBoard, progress, pictures.

The columns of `metrics.csv`, one row per epoch:

    epoch, step            counted from 1; micro-batches since the beginning
    learning_rate          of the last update
    train_loss, train_accuracy, train_accuracy_clean, train_grad_norm, train_penalty
                           means over the steps of the epoch, on augmented images: loss,
                           accuracy on the noisy and on the true labels, norm of the
                           method's gradient before clipping, G(U) of Eq. 12 with the
                           settings of the run (0 for SGD and GRAD-L1)
    test_loss, test_accuracy
                           at the end of the epoch, on all test images
    hessian_norm, penalty, grad_norm
                           at the end of the epoch, in the same way for all methods, on
                           the same few batches: ||Hz|| and G(U) with z of Eq. 11 and
                           h = curvature_h, and ||g||
    skipped_images         unreadable ones, to train and to test on
"""

import contextlib
import csv
import io
import sys
from pathlib import Path
from typing import Any

from .results import replace_file, write_text

Row = dict[str, float]


class Logbook:
    """Metrics by epoch, in `metrics.csv`, and seconds by epoch, in `times.csv`.

    Both files are written anew after every epoch, whole or not at all, from rows that
    checkpoints hold, too. The metrics of a run that was killed and resumed are the same
    to the last digit; the times are not.

    Args:
      folder: of the run; nothing is written if None.
      rows: metrics of the epochs so far.
      times: of the same epochs.
      quiet: whether to print nothing.
    """

    def __init__(
        self, folder: Path | None, rows: list[Row], times: list[Row], quiet: bool
    ) -> None:
        self.rows, self.times = rows, times
        self._folder, self._quiet = folder, quiet
        self._writer: Any = None
        if folder is None:
            return
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            return
        self._writer = SummaryWriter(
            str(folder / "tensorboard"), purge_step=len(rows) + 1
        )

    def add(self, row: Row, times: Row) -> None:
        """Note the metrics and seconds of an epoch."""
        self.rows.append(row)
        self.times.append(times)

    def write(self) -> None:
        """Write the files, and print what matters most of the last epoch."""
        row, times = self.rows[-1], self.times[-1]
        self._write_files()
        if self._writer is not None:
            for name, value in (row | times).items():
                if name != "epoch":
                    self._writer.add_scalar(name, value, int(row["epoch"]))
            self._writer.flush()
        say(
            f"epoch {row['epoch']:3.0f}  "
            f"train loss {row['train_loss']:.4f} "
            f"accuracy {row['train_accuracy']:6.2%} "
            f"(clean labels {row['train_accuracy_clean']:6.2%})  "
            f"test loss {row['test_loss']:.4f} "
            f"accuracy {row['test_accuracy']:6.2%}  "
            f"‖Hz‖ {row['hessian_norm']:.4f}  ‖g‖ {row['grad_norm']:.4f}  "
            f"lr {row['learning_rate']:.4f}  "
            f"{times['images_per_second']:.0f} images/s",
            self._quiet,
        )

    def seconds(self) -> float:
        """Return the time of all epochs so far, also those of earlier attempts."""
        return sum(row["seconds"] for row in self.times)

    def close(self) -> None:
        """Write what there is, also if a run that was complete has only been tested."""
        self._write_files()
        if self._writer is not None:
            self._writer.close()

    def _write_files(self) -> None:
        if self._folder is not None and self.rows:
            write_rows(self._folder / "metrics.csv", self.rows)
            write_rows(self._folder / "times.csv", self.times)


def say(text: str, quiet: bool = False) -> None:
    """Print a line, above the progress bar if there is one; nothing if quiet."""
    if quiet:
        return
    with contextlib.suppress(BrokenPipeError):  # nobody listens any more
        try:
            from tqdm import tqdm
        except ImportError:
            print(text, flush=True)
        else:
            tqdm.write(text)
            sys.stdout.flush()


class Progress:
    """A bar over all images of a run; none where nobody looks, or without tqdm."""

    def __init__(self, total: int, done: int, quiet: bool) -> None:
        self._bar: Any = None
        try:
            from tqdm import tqdm
        except ImportError:
            return
        self._bar = tqdm(
            total=total,
            initial=done,
            unit="images",
            unit_scale=True,
            disable=True if quiet else None,
            dynamic_ncols=True,
        )

    def update(self, images: int, epoch: int, loss: float, accuracy: float) -> None:
        """Move on, and show the values of the latest step."""
        self.show(images, f"epoch {epoch}, loss {loss:.3f}, accuracy {accuracy:.1%}")

    def show(self, images: int, text: str) -> None:
        """Move on, and show a text behind the bar."""
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(images)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


def plot(rows: list[Row], accuracy: dict[str, float], title: str, path: Path) -> None:
    """Draw loss, accuracy and ||Hz|| by epoch, and accuracy by bits."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(12.0, 3.4), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(1, 4)
    epochs = [row["epoch"] for row in rows]
    panels = [
        ("loss", {"train_loss": "training", "test_loss": "test"}, 1),
        (
            "accuracy (%)",
            {
                "train_accuracy": "training",
                "train_accuracy_clean": "training, true labels",
                "test_accuracy": "test",
            },
            100,
        ),
        ("‖Hz‖", {"hessian_norm": "training"}, 1),
    ]
    if all(row["train_accuracy_clean"] == row["train_accuracy"] for row in rows):
        del panels[1][1]["train_accuracy_clean"]  # no label is false
    for axis, (label, names, factor) in zip(axes, panels, strict=False):
        for name, text in names.items():
            values = [factor * row[name] for row in rows]
            axis.plot(epochs, values, "o-" if len(rows) < 20 else "-", ms=3, label=text)
        axis.set(xlabel="epoch", ylabel=label)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        axis.legend()
    places = range(len(accuracy))
    axes[-1].plot(places, [100 * value for value in accuracy.values()], "o-")
    axes[-1].set_xticks(places, ["float" if b == "32" else b for b in accuracy])
    axes[-1].set(xlabel="bits per weight", ylabel="test accuracy (%)")
    axes[-1].grid(alpha=0.3)
    replace_file(path, lambda partial: figure.savefig(partial, dpi=120))


def write_rows(path: Path, rows: list[Row]) -> None:
    """Write rows of the same columns as CSV, with titles, whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
