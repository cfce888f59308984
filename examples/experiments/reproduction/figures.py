"""The figures of the report, from the records of the runs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure

from hero_jax import landscape

from . import paper
from .statistics import accuracies, summary
from .tables import METHODS, Records, name_of

COLORS = {
    "hero": "C3",
    "first_order": "C1",
    "grad_l1": "C2",
    "sgd": "C0",
    "sgd_recipe": "C7",
}
BITS = ("3", "4", "5", "6", "8", "32")
INCREASE = 0.1
"""Of the loss, at the marked line of Figure 3."""


def figure_1(records: Records) -> Figure:
    """Draw test accuracy against the bits of the weights, at every label noise."""
    noises = [n for n in (0, *paper.NOISES) if name_of("hero", n) in records]
    figure = Figure(figsize=(3.1 * len(noises), 3.7), layout="constrained")
    panels = figure.subplots(1, len(noises), squeeze=False)[0]
    places = range(len(BITS))
    for axes, noise in zip(panels, noises, strict=True):
        for method, title in METHODS.items():
            name = name_of(method, noise)
            if name not in records:
                continue
            found = [
                summary([*accuracies(records[name], bits).values()]) for bits in BITS
            ]
            axes.errorbar(
                places,
                [x.mean for x in found],
                [x.error for x in found],
                marker="o",
                ms=3.5,
                capsize=2,
                color=COLORS[method],
                label=title,
            )
        axes.set_xticks(places, ["float" if bits == "32" else bits for bits in BITS])
        axes.set(
            xlabel="bits per weight",
            title=f"{noise} % label noise" if noise else "no label noise",
        )
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("test accuracy (%)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def figure_2(records: Records) -> Figure:
    """Draw `||Hz||` over training, and the train-test gap at its end."""
    figure = Figure(figsize=(9.2, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for method, title in METHODS.items():
        if method not in records:
            continue
        runs = records[method]["runs"]
        norms = _curves(runs, "hessian_norm")
        gaps = 100 * (_curves(runs, "train_accuracy") - _curves(runs, "test_accuracy"))
        epochs = np.arange(1, norms.shape[1] + 1)
        late = epochs > len(epochs) // 2
        style = {"color": COLORS[method], "label": title, "lw": 1.5}
        left.plot(epochs, norms.mean(0), **style)
        right.plot(epochs[late], gaps.mean(0)[late], **style)
        for axes, values, shown in (
            (left, norms, epochs > 0),
            (right, gaps, late),
        ):
            low, high = values.min(0), values.max(0)
            axes.fill_between(
                epochs[shown], low[shown], high[shown], color=COLORS[method], alpha=0.15
            )
    left.set(yscale="log", title="Hessian norm ‖Hz‖")
    right.set(title="generalization gap, second half (points of accuracy)")
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3, which="both")
    left.legend(fontsize="small")
    return figure


def figure_3(records: Records) -> Figure:
    """Draw the loss around the weights, at one scale for all."""
    shown = [x for x in METHODS if "surface" in records.get(x, {})]
    figure = Figure(figsize=(3.9 * len(shown) + 0.8, 4.0), layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False, sharey=True)[0]
    levels = INCREASE * 2.0 ** np.arange(-2.0, 7.0)
    filled: Any = None
    for axes, method in zip(panels, shown, strict=True):
        axis, rise = surface_of(records[method])
        filled = axes.contourf(
            axis,
            axis,
            rise.T,
            levels=levels,
            cmap="Blues",
            norm=BoundaryNorm(levels, 256, extend="both"),
            extend="both",
        )
        axes.contour(axis, axis, rise.T, levels=[INCREASE], colors="red", linewidths=2)
        axes.plot(0.0, 0.0, "k+")
        within = landscape.area_within((axis, axis), rise, INCREASE)
        bound = "" if within.is_closed else "≥ "
        axes.set(
            title=f"{METHODS[method]}\narea within +{INCREASE:g}: "
            f"{bound}{within.area:.3f}",
            aspect="equal",
            xlabel="first random direction",
        )
    panels[0].set_ylabel("second random direction")
    shown_levels = figure.colorbar(filled, ax=[*panels], label="loss above that of W")
    shown_levels.set_ticks([*levels], labels=[f"{level:.3g}" for level in levels])
    return figure


def surface_of(record: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return the axis, and the loss above that of the weights."""
    axis = np.array(record["surface"]["axis"])
    loss = np.array(record["surface"]["loss"])
    return axis, loss - loss[len(axis) // 2, len(axis) // 2]


def tuning(searches: dict[str, list[dict[str, Any]]]) -> Figure | None:
    """Draw accuracy held out, over h and gamma: HERO, and with gamma 0 first-order.

    Args:
      searches: settings with means, of "clean_hero_layerwise" and so on.
    """
    maps = []
    for kind in ("clean", "noise40"):
        for direction in ("layerwise", "adaptive"):
            names = [f"{kind}_{x}_{direction}" for x in ("first_order", "hero")]
            names.append(f"wider_{kind}_{direction}")
            rows = [row for name in names for row in searches.get(name, [])]
            if rows:
                maps.append((kind, direction, rows))
    if not maps:
        return None
    figure = Figure(figsize=(3.9 * len(maps), 7.4), layout="constrained")
    panels = figure.subplots(2, len(maps), squeeze=False)
    for column, (kind, direction, rows) in enumerate(maps):
        noise = "no noise" if kind == "clean" else "40 % noise"
        for axes, bits in zip(panels[:, column], ("32", "4"), strict=True):
            what = "full precision" if bits == "32" else "4 bits"
            _map(axes, rows, bits)
            axes.set(title=f"{direction}, {noise}: {what}", xlabel="gamma")
    panels[0, 0].set_ylabel("h")
    panels[1, 0].set_ylabel("h")
    return figure


def _map(axes: Any, rows: Sequence[dict[str, Any]], bits: str) -> None:
    """Draw the accuracy over h and gamma, where there is one."""
    hs = sorted({row["h"] for row in rows})
    gammas = sorted({row["gamma"] for row in rows})
    values = np.full((len(hs), len(gammas)), np.nan)
    for row in rows:
        if row["accuracy_by_bits"] is not None:
            place = hs.index(row["h"]), gammas.index(row["gamma"])
            values[place] = 100.0 * row["accuracy_by_bits"][bits]["mean"]
    image = axes.imshow(values, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(gammas)), [f"{x:g}" for x in gammas])
    axes.set_yticks(range(len(hs)), [f"{x:g}" for x in hs])
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            dark = np.dot(image.cmap(image.norm(value))[:3], (0.3, 0.6, 0.1)) < 0.5
            color = "white" if dark else "black"
            axes.text(
                j, i, f"{value:.1f}", ha="center", va="center", color=color, fontsize=9
            )


def _curves(runs: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    """Return a metric, `[seeds, epochs]`."""
    values = [[np.nan if x is None else x for x in run["epochs"][name]] for run in runs]
    return np.array(values, np.float64)
