"""The report: words and tables in Markdown, and pictures."""

import itertools
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from examples.image_classification.results import markdown
from hero_jax import plot
from hero_jax.curvature import SpectralDensity

from .measure import DIRECTIONS, LONGEST_STEP, Settings

Record = dict[str, Any]
Arrays = dict[str, np.ndarray]

COLORS = ("C0", "C1", "C2", "C3", "C4", "C5", "C6", "C8")
PICTURES = {
    "contours": "Loss above that of the weights",
    "slices": "Loss along four directions",
    "spectrum": "Density of eigenvalues",
    "curves": "Hessian norm and generalization gap",
}


def words(
    records: list[Record], settings: Settings, environment: Record, pictures: list[str]
) -> str:
    """Return the words, with those pictures that were drawn."""
    c = settings.loss_increase
    parts = [
        "# Curvature around trained weights",
        f"Over the training images, with the labels trained on and BatchNorm's "
        f"{settings.statistics} statistics. `{environment['command']}`, jax "
        f"{environment['jax']}, {environment['device']}, {environment['date']}.",
        _summary(records, settings),
        "‖Hv - λv‖ certifies the eigenvalue: one lies within that distance. Contours "
        f"and slices take {settings.surface_images} images at most. The area is in "
        "units of filter-normalized directions, and ≥ where the region reaches the "
        "edge of the grid. The gap is that to a test set with the same label noise.",
        *(f"![{alt}]({x}.png)" for x, alt in PICTURES.items() if x in pictures),
        f"## Theorem 3: how far to a loss {c:g} higher",
        _theorem(records),
        "The bounds hold for the quadratic model of the loss. Measured are the "
        "smallest perturbations along each direction with which the loss itself is so "
        "high: of random directions and eigenvectors either way, of z and the "
        "quantization error forwards. A dash: none up to "
        f"{LONGEST_STEP:g} times the length of the weights.",
    ]
    return "\n\n".join(parts) + "\n"


def _pm(x: dict[str, float], digits: int = 3) -> str:
    return f"{x['value']:.{digits}g} ± {x['stderr']:.2g}"


def _summary(records: list[Record], settings: Settings) -> str:
    rows = [["", *(record["name"] for record in records)]]

    def row(title: str, cell: Any) -> None:
        rows.append([title, *(cell(record) for record in records)])

    row("test accuracy", lambda r: f"{r['test_accuracy']:.1%}")
    row("training accuracy", lambda r: f"{r['train_accuracy']:.1%}")
    row("training loss", lambda r: f"{r['loss']:.4f}")
    row("‖g‖", lambda r: f"{r['gradient_norm']:.3g}")
    row("largest eigenvalue λ", lambda r: f"{r['top_eigenvalue']:.4g}")
    row("‖Hv - λv‖", lambda r: f"{r['top_residual']:.1g}")
    row("lowest eigenvalue", lambda r: f"{r['lowest_eigenvalue']:.3g}")
    row("largest of Gauss-Newton", lambda r: f"{r['gauss_newton_eigenvalue']:.4g}")
    row("trace", lambda r: _pm(r["trace"], 4))
    row("‖Hz‖, exact", lambda r: f"{r['hessian_norm']:.3g}")
    row(f"‖Hz‖, h = {settings.h:g}", lambda r: f"{r['hessian_norm_h']:.3g}")
    row(
        f"area within +{settings.loss_increase:g}",
        lambda r: ("" if r["area_is_closed"] else "≥ ") + f"{r['area']:.3f}",
    )
    row(f"loss change at {settings.bits} bits", lambda r: _measured(r["quantization"]))
    row("predicted", lambda r: _predicted(r["quantization"]))
    if any("gap" in record for record in records):
        row(
            f"gap, last {settings.gap_epochs} epochs at most",
            lambda r: f"{100 * r['gap']['mean']:.1f} points" if "gap" in r else "-",
        )
    return markdown(rows)


def _measured(change: dict[str, float]) -> str:
    return f"{change['measured']:+.2g}"


def _predicted(change: dict[str, float]) -> str:
    return f"{change['first_order'] + change['second_order']:+.2g}"


def _theorem(records: list[Record]) -> str:
    rows = [["", *(record["name"] for record in records)]]
    for norm, symbol in (("l2", "‖δ‖₂"), ("linf", "‖δ‖∞")):
        bounds = (r["theorem_3"][f"{norm}_bound"] for r in records)
        rows.append([f"bound on {symbol}", *(f"{x:.3g}" for x in bounds)])
        for name in DIRECTIONS:
            steps = (r["theorem_3"]["measured"][name][norm] for r in records)
            cells = ("-" if x is None else f"{x:.3g}" for x in steps)
            rows.append([f"{symbol}, {name}", *cells])
    return markdown(rows)


def draw(
    records: list[Record], arrays: list[Arrays], settings: Settings
) -> dict[str, Figure]:
    """Return the pictures by name."""
    drawn = {
        "contours": contours(records, arrays, settings.loss_increase),
        "slices": slices(records, arrays),
        "spectrum": spectrum(records, arrays),
    }
    if any("gap" in a for a in arrays):
        drawn["curves"] = curves(records, arrays)
    return drawn


def _panels(
    count: int, width: float = 4.6, height: float = 3.8, **kwargs: Any
) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width * count, height), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False, **kwargs)[0]


def _colored(records: list[Record], arrays: list[Arrays]) -> Any:
    return zip(records, arrays, itertools.cycle(COLORS), strict=False)


def curves(records: list[Record], arrays: list[Arrays]) -> Figure:
    """Draw the norm `||Hz||` and the generalization gap over training: Figure 2."""
    figure, (left, right) = _panels(2)
    for record, a, color in _colored(records, arrays):
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
    levels = [increase * 2.0**k for k in range(-3, 7)]
    for axes, record, a in zip(panels, records, arrays, strict=True):
        grid = (a["contour axis"],) * 2
        plot.surface(
            grid, a["contour"], axes, increase=None, levels=levels, colorbar=False
        )
        # The line is that of the area, whose grid may be a finer one.
        near, around = a["area axis"], a["area"]
        rise = (around - around[len(near) // 2, len(near) // 2]).T
        axes.contour(near, near, rise, levels=[increase], colors="red", linewidths=2.0)
        bound = "" if record["area_is_closed"] else "≥ "
        area = f"area within +{increase:g}: {bound}{record['area']:.3f}"
        axes.set(
            title=f"{record['name']}\n{area}",
            xlabel="first random direction",
            ylabel="second random direction" if axes is panels[0] else "",
        )
    filled, label = panels[0].collections[0], "loss above that of W"
    figure.colorbar(filled, ax=list(panels), label=label, format="%.3g")
    return figure


def slices(records: list[Record], arrays: list[Arrays]) -> Figure:
    """Draw the loss along one direction each, against the relative step."""
    figure, panels = _panels(len(DIRECTIONS), width=3.8)
    for axes, name in zip(panels, DIRECTIONS, strict=True):
        for record, a, color in _colored(records, arrays):
            look = {"marker": ".", "color": color, "label": record["name"]}
            plot.line(a[f"slice {name} axis"], a[f"slice {name}"], axes, **look)
        tops = [np.nanmin([np.nanmax(x.get_ydata()), 2.0]) for x in axes.lines]
        highest = max(0.0, *tops)
        ylabel = axes.get_ylabel() if axes is panels[0] else ""
        axes.set(title=name, xlabel="step / ‖W‖", ylabel=ylabel)
        axes.set_ylim(-0.15 * highest, highest)
        axes.axhline(0.0, color="k", lw=0.5)
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize="small")
    return figure


def spectrum(records: list[Record], arrays: list[Arrays]) -> Figure:
    """Draw the density of eigenvalues: bulk, and outliers as single bells."""
    count = len(records)
    figure = Figure(figsize=(7.0, 2.2 * count + 0.6), layout="constrained")
    panels = figure.subplots(count, 1, squeeze=False, sharex=True)[:, 0]
    nodes = np.concatenate([a["density_nodes"] for a in arrays])
    width = np.ptp(nodes) / 300.0
    for axes, (record, a, color) in zip(panels, _colored(records, arrays), strict=True):
        density = SpectralDensity(a["density_nodes"], a["density_weights"])
        largest = record["top_eigenvalue"]
        plot.spectrum(density, [largest], axes, width=width, color=color)
        axes.set(
            title=f"{record['name']}: largest {largest:.3g}",
            xlabel="eigenvalue (dotted: the largest, by Lanczos)",
            ylabel="",
        )
        axes.label_outer()
        axes.grid(alpha=0.3)
    figure.supylabel("share of eigenvalues per unit")
    return figure
