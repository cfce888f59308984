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

from .tasks import BITS, TASKS, read

PRECISIONS = ("32", *map(str, BITS))
DRAWN = ("layerwise", "relative", "rounding")
COLORS = {"first-order": "#D55E00", "HERO": "#0072B2"}


def score(row: Row) -> float:
    """Return the mean accuracy over the precisions; zero of a run that diverged."""
    return float(np.mean([*(row["accuracy_by_bits"] or {"": 0.0}).values()]))


def table(record: dict[str, Any], part: str) -> str:
    """Return the test accuracies of a task in percent, and the settings."""
    titles = ["float", *(f"{bits} bit" for bits in BITS)]
    lines = [["method", "h", "gamma", *titles]]
    for name, rows in record[part].items():
        settings = settings_of(rows[0])
        numbers = ["", ""]
        if not name.startswith("SGD"):
            numbers = [f"{settings.h:g}", f"{settings.gamma:g}"]
        accuracies = [row["accuracy_by_bits"] for row in rows]
        cells = ["diverged"] * len(titles)
        if None not in accuracies:
            of_bits = [summary([100 * x[b] for x in accuracies]) for b in PRECISIONS]
            cells = [cell(x, 1) for x in of_bits]
        lines.append([name, *numbers, *cells])
    return results.markdown(lines)


def width(rows: Sequence[Row], images: int) -> float:
    """Return over how many octaves h is within a standard error of the best score.

    That of an accuracy over so many images held out.
    """
    scores = {row["h"]: score(row) for row in rows if row["h"]}
    most = max(scores.values())
    least = most - math.sqrt(most * (1 - most) / images)
    good = [h for h, value in scores.items() if value >= least]
    return math.log2(max(good) / min(good))


def widths(record: dict[str, Any]) -> str:
    """Return the widths of all methods, of each gamma by itself."""
    lines = [["method", "gamma", "best score", "octaves of h"]]
    for name, rows in record["search"].items():
        for gamma in sorted({row["gamma"] for row in rows if row["h"]}):
            of_gamma = [row for row in rows if row["gamma"] == gamma]
            octaves = width(of_gamma, record["config"]["validation_size"])
            most = 100 * max(map(score, of_gamma))
            lines.append([name, f"{gamma:g}", f"{most:.1f}", f"{octaves:.1f}"])
    return results.markdown(lines)


def plot(records: dict[str, dict[str, Any]]) -> Figure:
    """Draw the score of every step that was tried: a row of panels for each task."""
    figure = Figure(figsize=(9.0, 2.6 * len(records)), layout="constrained")
    panels = figure.subplots(len(records), len(DRAWN), squeeze=False, sharey="row")
    for line, (task, record) in zip(panels, records.items(), strict=True):
        for panel, direction in zip(line, DRAWN, strict=True):
            for method, color in COLORS.items():
                rows = record["search"].get(f"{method}, {direction}", [])
                gammas = sorted({row["gamma"] for row in rows})
                for gamma, style in zip(gammas, ("-", "--"), strict=False):
                    chosen = [row for row in rows if row["gamma"] == gamma]
                    panel.plot(
                        [row["h"] for row in chosen],
                        [100 * score(row) for row in chosen],
                        marker="o",
                        markersize=3,
                        color=color,
                        linestyle=style,
                        label=f"{method}, gamma {gamma:g}" if gamma else method,
                    )
            for row in record["test"].get("SGD", [])[:1]:
                panel.axhline(100 * score(row), color="#555555", linestyle=":")
            panel.set(xscale="log", title=f"{task}: {direction}", xlabel="h")
            panel.grid(alpha=0.3)
            if panel.get_legend_handles_labels()[0]:
                panel.legend(fontsize="x-small")
        line[0].set_ylabel("mean accuracy in %")
    return figure


def write(folder: Path) -> None:
    """Write `report.md` and `directions.png` of all records that are in a folder."""
    records = {task: read(folder, task) for task in TASKS}
    records = {task: x for task, x in records.items() if x["test"] or x["search"]}
    parts = ["# Directions"]
    for task, record in records.items():
        parts += [f"## {task}", "Its own search:", table(record, "test")]
        if record["transfer"]:
            parts += ["The settings of the digits:", table(record, "transfer")]
        if any(row["h"] for rows in record["search"].values() for row in rows):
            parts += ["How wide:", widths(record)]
    results.write_text(folder / "report.md", "\n\n".join(parts) + "\n")
    drawn = {
        task: record
        for task, record in records.items()
        if any(name.endswith(DRAWN) for name in record["search"])
    }
    if drawn:
        results.write_figure(folder / "directions.png", plot(drawn))
    print("\n\n".join(parts))
