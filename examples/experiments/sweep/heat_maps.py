"""Pictures of a sweep: mean accuracy over two of its settings."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from examples.image_classification.results import write_figure

from .grid import Grid, Row, percent, settings_of


def plot(
    grid: Grid, summaries: Sequence[Row], best: Row | None, title: str, path: Path
) -> None:
    """Draw a map for each precision, all on one scale of colours.

    The two settings are those that have several values, h and gamma first; of others it
    shows the best value. With h = 0 all gammas and shares show the same. Settings of
    which a run diverged are grey and hatched; the best one has a frame.
    """
    from matplotlib.figure import Figure

    shown = settings_of(best or summaries[0])._asdict()
    down, across, *fixed = sorted(
        shown, key=lambda name: len(getattr(grid, name)) == 1
    )  # the sort is stable
    downs, acrosses = getattr(grid, down), getattr(grid, across)
    rows = {}
    for x in summaries:
        stands_for = {} if x["h"] else {"gamma": grid.gamma, "share": grid.share}
        for other in itertools.product(*stands_for.values()):
            spread = x | dict(zip(stands_for, other, strict=True))
            if all(spread[name] == shown[name] for name in fixed):
                rows[downs.index(spread[down]), acrosses.index(spread[across])] = x
    precisions = ["32"] if best is None else [*best["accuracy_by_bits"]]
    values = np.full((len(precisions), len(downs), len(acrosses)), np.nan)
    for (i, j), x in rows.items():
        if x["accuracy_by_bits"] is not None:
            values[:, i, j] = [x["accuracy_by_bits"][b]["mean"] for b in precisions]
    values *= 100
    some = np.isfinite(values).any()
    limits = {"vmin": np.nanmin(values), "vmax": np.nanmax(values)} if some else {}
    width = max(3.2, 1.3 + 0.85 * len(acrosses))
    figure = Figure(
        figsize=(0.8 + width * len(precisions), 1.6 + 0.55 * len(downs)),
        layout="constrained",
    )
    for name in fixed:
        if len(getattr(grid, name)) > 1:
            title += f", {name.replace('_', ' ')} {shown[name]:g}"
    figure.suptitle(title)
    axes = figure.subplots(1, len(precisions), sharey=True, squeeze=False)[0]
    for axis, bits, means in zip(axes, precisions, values, strict=True):
        image = axis.imshow(means, aspect="auto", cmap="viridis", **limits)
        axis.set_xticks(range(len(acrosses)), [f"{x:g}" for x in acrosses])
        axis.set_yticks(range(len(downs)), [f"{x:g}" for x in downs])
        axis.set(
            xlabel=across.replace("_", " "),
            title="full precision" if bits == "32" else f"{bits} bits",
        )
        for (i, j), x in rows.items():
            color, text = "black", "diverged"
            if x["accuracy_by_bits"] is None:
                grey = {"facecolor": "0.85", "edgecolor": "0.6", "linewidth": 0}
                _patch(axis, i, j, hatch="///", **grey)
            else:
                text = percent(x["accuracy_by_bits"][bits]).replace(" ±", "\n±")
                red, green, blue, _ = image.cmap(image.norm(means[i, j]))
                if 0.3 * red + 0.6 * green + 0.1 * blue < 0.5:
                    color = "white"
            axis.text(j, i, text, ha="center", va="center", fontsize=8, color=color)
        if best is not None:
            i, j = downs.index(best[down]), acrosses.index(best[across])
            frame = {"facecolor": "none", "edgecolor": "red", "linewidth": 2.5}
            _patch(axis, i, j, zorder=3, **frame)
    axes[0].set_ylabel(down.replace("_", " "))
    if some:
        figure.colorbar(image, ax=axes, label="validation accuracy (%)")
    write_figure(path, figure)


def _patch(axis: Any, i: int, j: int, **style: Any) -> None:
    from matplotlib.patches import Rectangle

    axis.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, **style))
