"""Pictures of a sweep: mean accuracy over two of its settings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from examples.image_classification.results import write_figure

from .grid import Grid, Row, settings_of


def plot(
    grid: Grid, summaries: Sequence[Row], best: Row | None, title: str, path: Path
) -> None:
    """Draw a map for each precision, all on one scale of colours.

    The two settings are those that have several values, h and gamma first; of others it
    shows the best value. With h = 0 all gammas show the same.
    Settings of which a run diverged are grey and hatched; the best one has a frame.

    Args:
      grid: of the sweep.
      summaries: of all its settings.
      best: one of them, if any has a score.
      title: of the picture.
      path: where to write it.
    """
    from matplotlib.figure import Figure

    shown = settings_of(best or summaries[0])._asdict()
    down, across, *fixed = sorted(
        shown, key=lambda name: len(getattr(grid, name)) == 1
    )  # the sort is stable
    downs, acrosses = getattr(grid, down), getattr(grid, across)
    rows = {
        (x[down], x[across]): x
        for summary in summaries
        for x in _spread(grid, summary)
        if all(x[name] == shown[name] for name in fixed)
    }
    precisions = [] if best is None else [*best["accuracy_by_bits"]]
    maps = {
        bits: [[_mean(rows[y, x], bits) for x in acrosses] for y in downs]
        for bits in precisions or ["32"]
    }
    values = np.array([*maps.values()])
    finite = values[np.isfinite(values)]
    limits = {"vmin": finite.min(), "vmax": finite.max()} if finite.size else {}
    width = max(3.2, 1.3 + 0.85 * len(acrosses))
    figure = Figure(
        figsize=(0.8 + width * len(maps), 1.6 + 0.55 * len(downs)),
        layout="constrained",
    )
    for name in fixed:
        if len(getattr(grid, name)) > 1:
            title += f", {name.replace('_', ' ')} {shown[name]:g}"
    figure.suptitle(title)
    axes = figure.subplots(1, len(maps), sharey=True, squeeze=False)[0]
    for axis, (bits, means) in zip(axes, maps.items(), strict=True):
        image = axis.imshow(np.array(means), aspect="auto", cmap="viridis", **limits)
        axis.set_xticks(range(len(acrosses)), [f"{x:g}" for x in acrosses])
        axis.set_yticks(range(len(downs)), [f"{x:g}" for x in downs])
        axis.set(
            xlabel=across.replace("_", " "),
            title="full precision" if bits == "32" else f"{bits} bits",
        )
        for i, y in enumerate(downs):
            for j, x in enumerate(acrosses):
                _write(axis, i, j, rows[y, x], bits, image)
                if best is not None and (best[down], best[across]) == (y, x):
                    _frame(axis, i, j, edgecolor="red", linewidth=2.5, zorder=3)
    axes[0].set_ylabel(down.replace("_", " "))
    if finite.size:
        figure.colorbar(image, ax=axes, label="validation accuracy (%)")
    write_figure(path, figure)


def _spread(grid: Grid, row: Row) -> list[Row]:
    """Return the row of every gamma for which it stands."""
    return [row] if row["h"] else [row | {"gamma": gamma} for gamma in grid.gamma]


def _mean(row: Row, bits: str) -> float:
    """Return percent, or NaN of a setting that diverged."""
    accuracy = row["accuracy_by_bits"]
    return float("nan") if accuracy is None else 100 * float(accuracy[bits]["mean"])


def _write(axis: Any, i: int, j: int, row: Row, bits: str, image: Any) -> None:
    """Write mean and standard error into a cell."""
    if row["accuracy_by_bits"] is None:
        _frame(axis, i, j, facecolor="0.85", edgecolor="0.6", hatch="///", linewidth=0)
        axis.text(j, i, "diverged", ha="center", va="center", fontsize=8)
        return
    mean, error = _mean(row, bits), row["accuracy_by_bits"][bits]["standard_error"]
    text = f"{mean:.1f}" if error is None else f"{mean:.1f}\n± {100 * error:.1f}"
    dark = np.dot(image.cmap(image.norm(mean))[:3], (0.3, 0.6, 0.1)) < 0.5
    color = "white" if dark else "black"
    axis.text(j, i, text, ha="center", va="center", fontsize=8, color=color)


def _frame(axis: Any, i: int, j: int, **style: Any) -> None:
    from matplotlib.patches import Rectangle

    style = {"facecolor": "none", **style}
    axis.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, **style))
