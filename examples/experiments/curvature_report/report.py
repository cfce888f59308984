"""The report: words and tables in Markdown, and the picture."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from examples.image_classification.results import markdown
from hero_jax import plot

from .measure import DIRECTIONS, LONGEST_STEP, Settings, Surfaces

Record = dict[str, Any]


def words(records: list[Record], settings: Settings, environment: Record) -> str:
    """Return the words."""
    c = settings.loss_increase
    parts = [
        "# Curvature around trained weights",
        f"Over the training images, with the labels trained on and BatchNorm's "
        f"{settings.statistics} statistics. `{environment['command']}`, jax "
        f"{environment['jax']}, {environment['device']}, {environment['date']}.",
        _summary(records, settings),
        "‖Hv - λv‖ certifies the eigenvalue: one lies within that distance. Contours "
        f"take {settings.surface_images} images at most. The area is in units of "
        "filter-normalized directions, and ≥ where the region reaches the edge of the "
        "grid. The gap is that to a test set with the same label noise.",
        "![Loss above that of the weights](contours.png)",
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
    title = f"loss change at {settings.bits} bits"
    row(title, lambda r: f"{r['quantization']['measured']:+.2g}")
    orders = "first_order", "second_order"
    row("predicted", lambda r: f"{sum(r['quantization'][x] for x in orders):+.2g}")
    if any("gap" in record for record in records):
        row(
            f"gap, last {settings.gap_epochs} epochs at most",
            lambda r: f"{100 * r['gap']['mean']:.1f} points" if "gap" in r else "-",
        )
    return markdown(rows)


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


def contours(
    records: list[Record], surfaces: Sequence[Surfaces], increase: float
) -> Figure:
    """Draw the loss above that of the weights, at one scale for all: Figure 3."""
    size = 4.6 * len(records), 3.8
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(records), squeeze=False, sharex=True, sharey=True)
    levels = [increase * 2.0**k for k in range(-3, 7)]
    for axes, record, around in zip(panels[0], records, surfaces, strict=True):
        grid = (around.axis, around.axis)
        plot.surface(
            grid, around.loss, axes, increase=None, levels=levels, colorbar=False
        )
        # The line is that of the area, whose grid may be a finer one.
        near, loss = around.near_axis, around.near_loss
        rise = (loss - loss[len(near) // 2, len(near) // 2]).T
        axes.contour(near, near, rise, levels=[increase], colors="red", linewidths=2.0)
        bound = "" if record["area_is_closed"] else "≥ "
        area = f"area within +{increase:g}: {bound}{record['area']:.3f}"
        axes.set(
            title=f"{record['name']}\n{area}",
            xlabel="first random direction",
            ylabel="second random direction" if axes is panels[0, 0] else "",
        )
    filled, label = panels[0, 0].collections[0], "loss above that of W"
    figure.colorbar(filled, ax=[*panels[0]], label=label, format="%.3g")
    return figure
