"""The figures of the report, from the records of the runs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from examples.experiments.common.statistics import standard_error
from hero_jax import landscape, plot

from .tables import METHODS, NOISES, Records, accuracies, name_of

COLORS = dict(zip(METHODS, ("C3", "C1", "C2", "C0", "C7"), strict=True))
BITS = ("3", "4", "5", "6", "8", "32")
INCREASE = 0.1
"""Of the loss, at the marked line of Figure 3."""


def figure_1(records: Records) -> Figure:
    """Draw test accuracy against the bits of the weights, at every label noise."""
    noises = [noise for noise in NOISES if name_of("hero", noise) in records]
    figure = Figure(figsize=(3.1 * len(noises), 3.7), layout="constrained")
    panels = figure.subplots(1, len(noises), squeeze=False)[0]
    places = range(len(BITS))
    for axes, noise in zip(panels, noises, strict=True):
        for method, title in METHODS.items():
            name = name_of(method, noise)
            if name not in records:
                continue
            values = [[*accuracies(records[name], bits).values()] for bits in BITS]
            means = [np.mean(x) for x in values]
            errors = [standard_error(x) for x in values]
            style = {"color": COLORS[method], "label": title, "marker": "o"}
            axes.errorbar(places, means, errors, ms=3.5, capsize=2, **style)
        axes.set_xticks(places, ["float" if bits == "32" else bits for bits in BITS])
        title = f"{noise} % label noise" if noise else "no label noise"
        axes.set(xlabel="bits per weight", title=title)
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
        for axes, values, shown in ((left, norms, epochs > 0), (right, gaps, late)):
            x, values, color = epochs[shown], values[:, shown], COLORS[method]
            axes.plot(x, values.mean(0), color=color, label=title, lw=1.5)
            axes.fill_between(x, values.min(0), values.max(0), color=color, alpha=0.15)
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
    style: Any = {"increase": INCREASE, "levels": levels, "colorbar": False}
    for axes, method in zip(panels, shown, strict=True):
        surface = {k: np.array(x) for k, x in records[method]["surface"].items()}
        plane, loss = (surface["axis"], surface["axis"]), surface["loss"]
        plot.surface(plane, loss, axes, **style)
        within = landscape.area_within(plane, loss, INCREASE)
        bound = "" if within.is_closed else "≥ "
        area = f"area within +{INCREASE:g}: {bound}{within.area:.3f}"
        axes.set(title=f"{METHODS[method]}\n{area}", ylabel="")
        axes.set_xlabel("first random direction")
    panels[0].set_ylabel("second random direction")
    filled, label = panels[0].collections[0], "loss above that of W"
    shown_levels = figure.colorbar(filled, ax=[*panels], label=label)
    shown_levels.set_ticks([*levels], labels=[f"{level:.3g}" for level in levels])
    return figure


def _curves(runs: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    """Return a metric, `[seeds, epochs]`."""
    values = [[np.nan if x is None else x for x in run["epochs"][name]] for run in runs]
    return np.array(values, np.float64)
