"""The pictures of a report."""

import itertools
from typing import Any

import numpy as np
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure

from examples.experiments.common.statistics import standard_error
from hero_jax.curvature import SpectralDensity

from .measure import DIRECTIONS

Record = dict[str, Any]
Arrays = dict[str, np.ndarray]

COLORS = ("C0", "C1", "C2", "C3", "C4", "C5", "C6", "C8")


def _panels(
    count: int, width: float = 4.6, height: float = 3.8, **kwargs: Any
) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width * count, height), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False, **kwargs)[0]


def curves(records: list[Record], arrays: list[Arrays]) -> Figure | None:
    """Draw the norm `||Hz||` and the generalization gap over training: Figure 2."""
    if not any("gap" in a for a in arrays):
        return None
    figure, (left, right) = _panels(2)
    for record, a, color in zip(records, arrays, itertools.cycle(COLORS), strict=False):
        if "gap" in a:
            epochs = np.arange(1, len(a["gap"]) + 1)
            left.plot(epochs, a["hessian_norm"], color=color, label=record["name"])
            right.plot(epochs, 100.0 * a["gap"], color=color, label=record["name"])
    left.set(yscale="log", title="Hessian norm ‖Hz‖, as measured in training")
    right.set(title="generalization gap (points of accuracy)")
    right.axhline(0.0, color="k", lw=0.5)
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure


def contours(records: list[Record], arrays: list[Arrays], increase: float) -> Figure:
    """Draw the loss above that of the weights, at one scale for all: Figure 3."""
    figure, panels = _panels(len(records), sharex=True, sharey=True)
    rises = [a["contour"] - _centre(a["contour"]) for a in arrays]
    # Levels in equal ratios around the contour; the same colours everywhere.
    levels = increase * 2.0 ** np.arange(-3.0, 7.0)
    filled: Any = None
    for axes, record, a, rise in zip(panels, records, arrays, rises, strict=True):
        x = a["contour axis"]
        filled = axes.contourf(
            x,
            x,
            rise.T,
            levels=levels,
            cmap="Blues",
            norm=BoundaryNorm(levels, 256, extend="both"),
            extend="both",
        )
        # The line is that of the area, whose grid may be a finer one.
        near, around = a["area axis"], a["area"]
        line = (around - _centre(around)).T
        axes.contour(near, near, line, levels=[increase], colors="red", linewidths=2.0)
        axes.plot(0.0, 0.0, "k+")
        bound = "" if record["area_is_closed"] else "≥ "
        axes.set(
            title=f"{record['name']}\narea within +{increase:g}: {bound}"
            f"{record['area']:.3f}",
            aspect="equal",
            xlabel="first random direction",
        )
    panels[0].set_ylabel("second random direction")
    shown = figure.colorbar(filled, ax=list(panels), label="loss above that of W")
    shown.set_ticks([*levels], labels=[f"{level:.3g}" for level in levels])
    return figure


def _centre(surface: np.ndarray) -> float:
    return float(surface[surface.shape[0] // 2, surface.shape[1] // 2])


def slices(records: list[Record], arrays: list[Arrays]) -> Figure:
    """Draw the loss along one direction each, against the relative step."""
    figure, panels = _panels(len(DIRECTIONS), width=3.8)
    for axes, name in zip(panels, DIRECTIONS, strict=True):
        highest = 0.0
        for record, a, color in zip(
            records, arrays, itertools.cycle(COLORS), strict=False
        ):
            values = a[f"slice {name}"]
            rise = values - values[len(values) // 2]
            axes.plot(
                a[f"slice {name} axis"], rise, ".-", color=color, label=record["name"]
            )
            highest = max(highest, np.nanmin([np.nanmax(rise), 2.0]))
        axes.set(title=name, xlabel="step / ‖W‖", ylim=(-0.15 * highest, highest))
        axes.axhline(0.0, color="k", lw=0.5)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("loss above that of W")
    panels[0].legend(fontsize="small")
    return figure


def spectrum(records: list[Record], arrays: list[Arrays]) -> Figure:
    """Draw the density of eigenvalues: bulk, and outliers as single bells."""
    count = len(records)
    figure = Figure(figsize=(7.0, 2.2 * count + 0.6), layout="constrained")
    panels = figure.subplots(count, 1, squeeze=False, sharex=True)[:, 0]
    low = min(float(a["density_nodes"].min()) for a in arrays)
    high = max(float(a["density_nodes"].max()) for a in arrays)
    width = (high - low) / 300.0
    grid = np.linspace(low - 5.0 * width, high + 5.0 * width, 2000)
    for axes, record, a, color in zip(
        panels, records, arrays, itertools.cycle(COLORS), strict=False
    ):
        density = SpectralDensity(a["density_nodes"], a["density_weights"])
        curve = np.asarray(density.on_grid(grid, width).value)
        axes.fill_between(grid, curve, 1e-12, color=color, alpha=0.4)
        axes.plot(grid, curve, color=color, lw=1.0)
        axes.axvline(record["top_eigenvalue"], color="k", ls=":", lw=1.0)
        one = 1.0 / (record["weights"] * width * (2.0 * np.pi) ** 0.5)
        axes.set(
            yscale="log",
            ylim=(one / 30.0, None),
            title=f"{record['name']}: largest {record['top_eigenvalue']:.3g}",
        )
        axes.grid(alpha=0.3)
    panels[-1].set_xlabel("eigenvalue (dotted: the largest, by Lanczos)")
    figure.supylabel("share of eigenvalues per unit")
    return figure


def layers(records: list[Record], bits: int) -> Figure:
    """Draw bars for every layer: eigenvalue, average trace, and quantization."""
    names = [*dict.fromkeys(name for record in records for name in record["layers"])]
    figure = Figure(figsize=(11.0, 1.2 + 0.32 * len(names) * len(records) / 2.0 + 1.0))
    figure.set_layout_engine("constrained")
    panels = figure.subplots(1, 3, sharey=True)
    at = np.arange(len(names), dtype=float)
    height = 0.8 / len(records)
    for k, (record, color) in enumerate(
        zip(records, itertools.cycle(COLORS), strict=False)
    ):
        rows = [record["layers"].get(name) for name in names]
        y = at + (k - (len(records) - 1) / 2.0) * height
        label = record["name"]

        def each(*keys: str, rows: list[Any] = rows) -> list[float]:
            values = []
            for row in rows:
                value: Any = row
                for key in keys:
                    value = np.nan if value is None else value[key]
                values.append(float(value) if value is not None else np.nan)
            return values

        panels[0].barh(y, each("top_eigenvalue"), height, color=color, label=label)
        panels[1].barh(
            y,
            each("average_trace", "value"),
            height,
            xerr=each("average_trace", "stderr"),
            color=color,
            capsize=2,
        )
        measured = each("quantization", "measured")
        predicted = np.add(
            each("quantization", "first_order"), each("quantization", "second_order")
        )
        panels[2].barh(y, measured, height, color=color)
        panels[2].plot(predicted, y, "kx", ms=4, label=None if k else "predicted")
    panels[0].set(yticks=at, yticklabels=names)
    panels[0].invert_yaxis()
    panels[0].set_title("largest eigenvalue of the block")
    panels[1].set_title("average trace per weight")
    smallest = min(
        (bar.get_width() for bar in panels[0].patches if bar.get_width() > 0.0),
        default=1.0,
    )
    panels[0].set(xscale="log", xlim=(smallest / 2.0, None))
    largest = max((abs(bar.get_width()) for bar in panels[1].patches), default=0.0)
    if largest > 0.0:  # traces may be negative, too
        decade = 10.0 ** np.floor(np.log10(largest))
        panels[1].set_xscale("symlog", linthresh=decade)
    panels[2].set_xscale("symlog", linthresh=1e-3)
    panels[2].set_title(f"loss change at {bits} bits, alone")
    panels[2].axvline(0.0, color="k", lw=0.5)
    for axes in panels:
        axes.grid(alpha=0.3, axis="x")
    figure.legend(loc="outside lower center", ncols=len(records) + 1)
    return figure


def perturbation(records: list[Record], arrays: list[Arrays]) -> Figure:
    """Draw the test accuracy against the relative size of random perturbations."""
    figure, (axes,) = _panels(1, width=6.0)
    for record, a, color in zip(records, arrays, itertools.cycle(COLORS), strict=False):
        accuracies = 100.0 * a["perturbation accuracy"]
        mean = accuracies.mean(0)
        error = standard_error(accuracies)
        x = a["perturbation axis"]
        axes.plot(x, mean, ".-", color=color, label=record["name"])
        axes.fill_between(x, mean - error, mean + error, color=color, alpha=0.25)
    axes.set(
        xlabel="relative size of a random perturbation of every filter",
        ylabel="test accuracy (%)",
        title="mean ± standard error over 5 directions",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure
