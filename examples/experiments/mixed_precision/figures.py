"""The pictures of mixed precision."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from examples.experiments.common.statistics import summary

from .weights import MEASURES

Record = dict[str, Any]
Groups = dict[str, list[Record]]

STYLES = {
    "uniform": ("k", "o-"),
    "HAWQ": ("C0", "s-"),
    "Q-BERT": ("C4", "x-"),
    "HAWQ-V2": ("C1", "^-"),
    "quadratic": ("C2", "D-"),
    "pairwise": ("C6", "P-"),
    "measured": ("C5", "v-"),
    "greedy": ("C3", "*-"),
}
"""Colour and marker of every way to choose bits."""


def pareto(groups: Groups) -> Figure:
    """Draw test accuracy against the bytes of the quantized layers."""
    figure, panels = _panels(len(groups))
    for axes, (name, records) in zip(panels, groups.items(), strict=True):
        first = records[0]
        uniform = first["uniform_bytes"]
        curves = {"uniform": ([*uniform.values()], _uniform(records))}
        for measure in MEASURES:
            curves[measure] = (
                np.mean(
                    [[a["bytes"] for a in r["allocations"][measure]] for r in records],
                    0,
                ),
                np.array([r["accuracy"][measure] for r in records]),
            )
        for measure, (size, accuracy) in curves.items():
            color, style = STYLES[measure]
            order = np.argsort(size, kind="stable")
            wide = {"lw": 2.5, "zorder": 3} if measure == "uniform" else {"lw": 1.2}
            axes.errorbar(
                np.asarray(size)[order] / 1000,
                accuracy.mean(0)[order],
                _stderr(accuracy)[order],
                fmt=style,
                color=color,
                label=measure,
                markersize=5,
                capsize=2,
                **wide,
            )
        in_float = np.mean([r["accuracy"]["float"] for r in records])
        axes.axhline(in_float, color="gray", ls=":", label="float")
        axes.set(title=name, xlabel="kilobytes of the quantized layers")
        axes.grid(alpha=0.3)
    return _with_legend(figure, panels)


def allocations(groups: Groups, budget: float, budgets: list[float]) -> Figure:
    """Draw the bits of every layer as each measure chooses them at one budget."""
    at = budgets.index(budget)
    layers = max(len(records[0]["layers"]) for records in groups.values())
    height = 2.6 if layers <= 8 else 4.0
    figure = Figure(
        figsize=(max(9.0, 0.42 * layers), 0.4 + height * len(groups)),
        layout="constrained",
    )
    panels = figure.subplots(len(groups), 1, squeeze=False)[:, 0]
    for axes, records in zip(panels, groups.values(), strict=True):
        first = records[0]
        paths = [*first["layers"]]
        bits = np.array([first["allocations"][m][at]["bits"] for m in MEASURES])
        axes.imshow(bits, cmap="YlGnBu", vmin=1, vmax=9, aspect="auto")
        for row, column in np.ndindex(*bits.shape):
            b = bits[row, column]
            ink = "white" if b > 5 else "black"
            axes.text(column, row, str(b), ha="center", va="center", color=ink)
        axes.set_yticks(range(len(MEASURES)), MEASURES)
        labels = [_label(p, first["layers"][p]["size"]) for p in paths]
        steep = {"rotation": 90, "fontsize": "x-small"} if len(paths) > 8 else {}
        axes.set_xticks(range(len(paths)), labels, **steep)
        axes.set_title(f"{first['name']}: bits at {budget:g} on average")
    panels[-1].set_xlabel("layers and their numbers of weights")
    return figure


def predictions(groups: Groups, target: float) -> Figure:
    """Draw predicted and real loss of random allocations of one size."""
    names = [
        m
        for m in MEASURES
        if m in next(iter(groups.values()))[0]["random"]["predicted"]
    ]
    figure = Figure(
        figsize=(2.5 * len(names), 0.4 + 2.5 * len(groups)), layout="constrained"
    )
    panels = figure.subplots(len(groups), len(names), squeeze=False)
    for row, records in zip(panels, groups.values(), strict=True):
        first = records[0]
        for axes, measure in zip(row, names, strict=True):
            predicted = np.array(first["random"]["predicted"][measure])
            axes.plot(predicted, first["random"]["accuracy_lost"], ".", alpha=0.6)
            if (predicted > 0).all() and predicted.max() > 20 * predicted.min():
                axes.set_xscale("log")
            rho = first["rank_correlation"][measure]["allocations"]
            shown = "none" if rho is None else f"{rho:.2f}"
            axes.set_title(f"{measure}: rank {shown}", fontsize="medium")
            axes.tick_params(labelsize="x-small")
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.grid(alpha=0.3)
        row[0].set_ylabel(f"{first['name']}\npoints lost", fontsize="small")
    figure.supxlabel("predicted increase of the calibration loss", fontsize="medium")
    figure.suptitle(f"Random allocations of about {target:g} bits", fontsize="medium")
    return figure


def activations(groups: Groups, budgets: list[float]) -> Figure | None:
    """Draw test accuracy against the average bits of the activations."""
    if not all("activations" in r for records in groups.values() for r in records):
        return None
    figure, panels = _panels(len(groups))
    for axes, (name, records) in zip(panels, groups.items(), strict=True):
        for weights, style in (("float", "-"), ("mixed", ":")):
            rows = [r["activations"][f"accuracy, {weights} weights"] for r in records]
            uniform = np.array([[*row["uniform"].values()] for row in rows])
            bits = [int(b) for b in rows[0]["uniform"]]
            label = f"uniform, {weights} weights"
            axes.plot(bits, uniform.mean(0), f"ko{style}", label=label)
            for measure in rows[0]:
                if measure in ("float", "uniform"):
                    continue
                color, marked = STYLES[measure]
                mean = np.mean([row[measure] for row in rows], 0)
                axes.plot(
                    budgets,
                    mean,
                    f"{marked[0]}{style}",
                    color=color,
                    label=f"{measure}, {weights} weights",
                )
        axes.set(title=name, xlabel="average bits of the activations")
        axes.grid(alpha=0.3)
    return _with_legend(figure, panels)


def _panels(count: int) -> tuple[Figure, Any]:
    figure = Figure(figsize=(5.4 * count, 5.2), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def _with_legend(figure: Figure, panels: Any) -> Figure:
    """Put one legend below all panels, whose lines are the same."""
    panels[0].set_ylabel("test accuracy (%)")
    handles, labels = panels[0].get_legend_handles_labels()
    columns = 5 if len(panels) > 1 else 3
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, fontsize="small"
    )
    return figure


def _label(path: str, size: int) -> str:
    return f"{path.removesuffix('/kernel')}\n{size:,}"


def _uniform(records: list[Record]) -> np.ndarray:
    return np.array([[*r["accuracy"]["uniform"].values()] for r in records])


def _stderr(rows: np.ndarray) -> np.ndarray:
    """Return the standard error over networks; zero for one."""
    return np.array([summary(column)["stderr"] or 0.0 for column in rows.T])
