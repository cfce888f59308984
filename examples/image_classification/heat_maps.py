"""Pictures of a sweep: mean accuracy over h and gamma."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .grid import Grid, Row, settings_of
from .results import replace_file


def plot(
    grid: Grid, summaries: Sequence[Row], best: Row | None, title: str, path: Path
) -> None:
    """Draw a map for each precision, all on one scale of colours.

    Of several learning rates and weight decays it shows those of the best setting.
    Settings of which a run diverged are grey and hatched; the best one has a frame.

    Args:
      grid: of the sweep.
      summaries: of all its settings.
      best: one of them, if any has a score.
      title: of the picture.
      path: where to write it.
    """
    from matplotlib.figure import Figure

    shown = settings_of(best or summaries[0])
    rows = {
        (x["h"], x["gamma"]): x
        for x in summaries
        if settings_of(x)[2:] == (shown.learning_rate, shown.weight_decay)
    }
    precisions = [] if best is None else [*best["accuracy_by_bits"]]
    maps = {
        bits: [[_mean(rows[h, gamma], bits) for gamma in grid.gamma] for h in grid.h]
        for bits in precisions or ["32"]
    }
    values = np.array([*maps.values()])
    finite = values[np.isfinite(values)]
    limits = {"vmin": finite.min(), "vmax": finite.max()} if finite.size else {}
    width = max(3.2, 1.3 + 0.85 * len(grid.gamma))
    figure = Figure(
        figsize=(0.8 + width * len(maps), 1.6 + 0.55 * len(grid.h)),
        layout="constrained",
    )
    for name in ("learning_rate", "weight_decay"):
        if len(getattr(grid, name)) > 1:
            title += f", {name.replace('_', ' ')} {getattr(shown, name):g}"
    figure.suptitle(title)
    axes = figure.subplots(1, len(maps), sharey=True, squeeze=False)[0]
    for axis, (bits, means) in zip(axes, maps.items(), strict=True):
        image = axis.imshow(np.array(means), aspect="auto", cmap="viridis", **limits)
        axis.set_xticks(range(len(grid.gamma)), [f"{x:g}" for x in grid.gamma])
        axis.set_yticks(range(len(grid.h)), [f"{x:g}" for x in grid.h])
        axis.set(
            xlabel="gamma",
            title="full precision" if bits == "32" else f"{bits} bits",
        )
        for i, h in enumerate(grid.h):
            for j, gamma in enumerate(grid.gamma):
                _write(axis, i, j, rows[h, gamma], bits, image)
                if best is not None and settings_of(best)[:2] == (h, gamma):
                    _frame(axis, i, j, edgecolor="red", linewidth=2.5, zorder=3)
    axes[0].set_ylabel("h")
    if finite.size:
        figure.colorbar(image, ax=axes, label="validation accuracy (%)")
    replace_file(path, lambda partial: figure.savefig(partial, dpi=120))


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
