"""Tables of the tests, how wide the range of good steps is, and a picture of it."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from examples.experiments.common.statistics import cell, summary
from examples.experiments.sweep.grid import Row, settings_of
from examples.image_classification import results

from .tasks import BITS, DIGITS_TASKS, METHODS, TASKS, read

Record = dict[str, Any]
PRECISIONS = ("32", *map(str, BITS))
TITLES = ("float", *(f"{bits} bit" for bits in BITS))
PLAIN, TUNED = "SGD", "SGD, tuned"


def score(row: Row) -> float:
    """Return the mean accuracy over the precisions; zero of a run that diverged."""
    return float(np.mean([*(row["accuracy_by_bits"] or {"": 0.0}).values()]))


def accuracies(rows: Sequence[Row]) -> np.ndarray:
    """Return accuracies in percent `[seeds, precisions]`; NaN if a run diverged."""
    nothing = dict.fromkeys(PRECISIONS, math.nan)
    by_bits = [row["accuracy_by_bits"] or nothing for row in rows]
    return 100 * np.array([[x[bits] for bits in PRECISIONS] for x in by_bits])


def cells(values: np.ndarray) -> list[str]:
    """Format means and standard errors over the first axis."""
    if np.isnan(values).any():
        return ["diverged"] * values.shape[1]
    return [cell(summary(x), 1) for x in values.T]


def overview(records: dict[str, Record], precision: str) -> str:
    """Return the accuracies of methods that were tested on three tasks or more."""
    lines = [["method", *(task.replace("_", " ") for task in records)]]
    for name in METHODS:
        if sum(name in record["test"] for record in records.values()) < 3:
            continue
        tested = []
        for record in records.values():
            rows, text = record["test"].get(name, []), ""
            if rows:
                column = PRECISIONS.index(precision)
                (text,) = cells(accuracies(rows)[:, [column]])
            tested.append(text)
        lines.append([name, *tested])
    return results.markdown(lines)


def table(record: Record, part: str) -> str:
    """Return the test accuracies of a task in percent, and the settings."""
    lines = [["method", "h", "share", "gamma", *TITLES]]
    for name, rows in record[part].items():
        settings = settings_of(rows[0])
        numbers = [f"{settings.h:g}", "", f"{settings.gamma:g}"]
        if settings.share:
            numbers[:2] = ["", f"{settings.share:g}"]
        if name.startswith(PLAIN):
            numbers = ["", "", ""]
        lines.append([name, *numbers, *cells(accuracies(rows))])
    return results.markdown(lines)


def differences(record: Record) -> str:
    """Return by how many points methods differ, seed by seed."""
    tested = record["test"]
    pairs = [(name, TUNED) for name in tested if not name.startswith(PLAIN)]
    pairs += [
        (name, name.replace("HERO", "first-order"))
        for name in tested
        if name.startswith("HERO")
    ]
    lines = [["method", "minus", *TITLES]]
    for name, other in pairs:
        if other in tested and len(tested[name]) == len(tested[other]):
            gain = accuracies(tested[name]) - accuracies(tested[other])
            lines.append([name, other, *cells(gain)])
    return results.markdown(lines)


def curve(rows: Sequence[Row], gamma: float) -> dict[float, list[float]]:
    """Return the scores of each h, or share if h follows the loss, of all seeds."""
    scores: dict[float, list[float]] = {}
    for row in rows:
        if row["h"] and row["gamma"] == gamma:
            length = row.get("share") or row["h"]
            scores.setdefault(length, []).append(score(row))
    return dict(sorted(scores.items()))


def width(scores: dict[float, list[float]], images: int) -> float:
    """Return over how many octaves h is within a standard error of the best score.

    Over seeds; of one seed, that of an accuracy over so many images held out.
    """
    means = {h: float(np.mean(x)) for h, x in scores.items()}
    best = max(means, key=lambda h: means[h])
    error = summary(scores[best])["stderr"]
    if error is None:
        error = math.sqrt(means[best] * (1 - means[best]) / images)
    good = [h for h, value in means.items() if value >= means[best] - error]
    return math.log2(max(good) / min(good))


def widths(record: Record) -> str:
    """Return the widths of all methods, of each gamma by itself."""
    lines = [["method", "gamma", "best h or share", "score", "octaves of it"]]
    for name, rows in record["search"].items():
        for gamma in sorted({row["gamma"] for row in rows if row["h"]}):
            scores = curve(rows, gamma)
            octaves = width(scores, record["config"]["validation_size"])
            h = max(scores, key=lambda h: float(np.mean(scores[h])))
            most = f"{100 * np.mean(scores[h]):.1f}"
            lines.append([name, f"{gamma:g}", f"{h:g}", most, f"{octaves:.1f}"])
    return results.markdown(lines)


def transfers(records: dict[str, Record]) -> str:
    """Return what the settings of the digits gain on the other tasks.

    In points of the score over SGD: with the task's own search, and with the settings
    of the digits, whose share of it comes last.
    """
    lines = [["task", "method", "own search", "carried over", "share"]]
    for task, record in records.items():
        if task in DIGITS_TASKS or PLAIN not in record["test"]:
            continue
        plain = np.array([*map(score, record["test"][PLAIN])])
        for name, rows in record["transfer"].items():
            if not len(rows) == len(record["test"][name]) == len(plain):
                continue  # not over
            gains = [
                summary(100 * (np.array([*map(score, x)]) - plain))
                for x in (record["test"][name], rows)
            ]
            share = "nothing to gain"
            if gains[0]["mean"] > 2 * gains[0]["stderr"]:
                share = f"{gains[1]['mean'] / gains[0]['mean']:.0%}"
            lines.append([task, name, *(cell(x, 1) for x in gains), share])
    return results.markdown(lines)


PANELS = (
    ("first-order, relative", 0.0, 0.04, "h: share of a kernel's norm that it moves"),
    ("HERO, relative", 0.5, 0.02, "h, with gamma = 0.5"),
    ("first-order, share", 0.0, 0.3, "share of its lead that the loss may lose"),
)
"""Method, gamma, where one would begin, and what h is."""


def plot(records: dict[str, Record]) -> Figure:
    """Draw the score on images held out against h, of every task."""
    figure = Figure(figsize=(10.0, 4.6), layout="constrained")
    panels = figure.subplots(1, len(PANELS), sharey=True)
    for panel, (name, gamma, begin, label) in zip(panels, PANELS, strict=True):
        for k, (task, record) in enumerate(records.items()):
            scores = curve(record["search"].get(name, []), gamma)
            panel.plot(
                [*scores],
                [100 * np.mean(x) for x in scores.values()],
                "o-",
                markersize=3,
                color=f"C{k}",
                label=task.replace("_", " ") if scores else None,
            )
        panel.axvline(begin, color="#999999", linestyle=":")
        panel.set(title=name, xlabel=label)
        panel.set_xscale("linear" if "share" in name else "log")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("mean accuracy over the precisions in %")
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


def write(folder: Path) -> None:
    """Write `report.md` and `directions.png` of all records that are in a folder."""
    records = {task: read(folder, task) for task in TASKS}
    records = {task: x for task, x in records.items() if x["test"]}
    parts = ["# Directions", "Test accuracy in percent, in float:"]
    parts += [overview(records, "32"), "At 3 bits:", overview(records, "3")]
    if any(record["transfer"] for record in records.values()):
        parts += ["## What carries over", transfers(records)]
    for task, record in records.items():
        parts += [f"## {task}", "Its own search:", table(record, "test")]
        parts += ["In points, seed by seed:", differences(record)]
        if record["transfer"]:
            parts += ["The settings of the digits:", table(record, "transfer")]
        if record["search"]:
            parts += ["How wide, on images held out:", widths(record)]
    results.write_text(folder / "report.md", "\n\n".join(parts) + "\n")
    results.write_figure(folder / "directions.png", plot(records))
    print("\n\n".join(parts))
