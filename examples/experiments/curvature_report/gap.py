"""The generalization gap of a run: training accuracy less test accuracy (Figure 2b)."""

from __future__ import annotations

import csv
import math
import statistics
from pathlib import Path
from typing import NamedTuple


class Gap(NamedTuple):
    """Training accuracy less test accuracy.

    Attributes:
      mean: over the last epochs.
      deviation: standard deviation over them; epochs of one run depend on each other,
        so this is no standard error. NaN for one epoch.
      by_epoch: of every epoch in the file.
    """

    mean: float
    deviation: float
    by_epoch: list[float]


def generalization_gap(
    path: str | Path,
    last: int = 50,
    *,
    label_noise: float = 0.0,
    num_classes: int = 10,
    train: str = "train_accuracy",
    test: str = "test_accuracy",
) -> Gap:
    r"""Read the generalization gap of a run from its metrics, a row for every epoch.

    Args:
      path: CSV file with a line of titles, as `metrics.csv` of the training recipe.
      last: epochs to average, at least 1; 50 in the paper. All, if there are fewer.
      label_noise: share p of the training labels that were redrawn from all K classes,
        0 to 1. Test labels with the same noise would agree with the network on
        `(1 - p) accuracy + p / K` of the images, which then takes the place of the test
        accuracy: both ends of the gap are of one distribution. Accuracies must then be
        fractions.
      num_classes: K.
      train: title of the training accuracy.
      test: title of the test accuracy.

    Returns:
      The gap in the units of the file.

    Raises:
      OSError: the file cannot be read.
      ValueError: an argument is out of range, a column is missing, a value is no
        number, or there are no rows.

    References:
      Yang et al., `HERO <https://arxiv.org/abs/2111.11986>`_, 2021, Figure 2b.
    """
    if last < 1:
        raise ValueError(f"last must be at least 1, got {last}.")
    if not 0.0 <= label_noise <= 1.0:
        raise ValueError(f"label_noise must be 0 to 1, got {label_noise}.")
    path = Path(path)
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        titles, rows = [*(reader.fieldnames or ())], list(reader)
    for name in (train, test):
        if name not in titles:
            raise ValueError(f"{path} has no column {name!r}; it has {titles}.")
    if not rows:
        raise ValueError(f"{path} has no rows.")
    gaps = []
    for number, row in enumerate(rows, start=2):
        try:
            accuracy = (1.0 - label_noise) * float(row[test])
            gaps.append(float(row[train]) - accuracy - label_noise / num_classes)
        except (TypeError, ValueError):
            raise ValueError(
                f"line {number} of {path} has no numbers: {train}={row[train]!r}, "
                f"{test}={row[test]!r}."
            ) from None
    if label_noise and any(float(row[test]) > 1.0 for row in rows):
        raise ValueError(
            f"label_noise={label_noise} needs accuracies as fractions of 1, but {path} "
            f"has a {test} above 1."
        )
    chosen = gaps[-last:]
    deviation = statistics.stdev(chosen) if len(chosen) > 1 else math.nan
    return Gap(statistics.fmean(chosen), deviation, gaps)
