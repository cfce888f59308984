"""The words and tables of a report, in Markdown."""

from typing import Any

from examples.image_classification.results import markdown

from .measure import DIRECTIONS, LONGEST_STEP, Settings

Record = dict[str, Any]


def report(
    records: list[Record], settings: Settings, environment: Record, pictures: list[str]
) -> str:
    """Return the report; `pictures` are the names of those that were drawn."""
    c, bits = settings.loss_increase, settings.bits
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
        _figure("contours", "Loss above that of the weights", pictures),
        _figure("slices", "Loss along four directions", pictures),
        _figure("perturbation", "Accuracy against perturbation", pictures),
        _figure("spectrum", "Density of eigenvalues", pictures),
        _figure("curves", "Hessian norm and generalization gap", pictures),
        f"## Theorem 3: how far to a loss {c:g} higher",
        _theorem(records),
        "The bounds hold for the quadratic model of the loss. Measured are the "
        "smallest perturbations along each direction with which the loss itself is so "
        "high: of random directions and eigenvectors either way, of z and the "
        "quantization error forwards. A dash: none up to "
        f"{LONGEST_STEP:g} times the length of the weights.",
        f"## Quantized to {bits} bits, layer by layer",
        _figure("layers", "Curvature and loss change of every layer", pictures),
        *(_layers(record, bits) for record in records),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _figure(name: str, alt: str, pictures: list[str]) -> str:
    return f"![{alt}]({name}.png)" if name in pictures else ""


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
        row(f"gap, last {settings.gap_epochs} epochs at most", _gap)
    return markdown(rows)


def _gap(record: Record) -> str:
    if "gap" not in record:
        return "-"
    return f"{100 * record['gap']['mean']:.1f} points"


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
            found = (r["theorem_3"]["measured"][name][norm] for r in records)
            cells = ("-" if x is None else f"{x:.3g}" for x in found)
            rows.append([f"{symbol}, {name}", *cells])
    return markdown(rows)


def _layers(record: Record, bits: int) -> str:
    rows = [
        [
            record["name"],
            "weights",
            "largest eigenvalue",
            "trace",
            "trace / weights",
            f"loss at {bits} bits",
            "predicted",
        ]
    ]
    rows += [
        [
            name,
            f"{layer['size']:,}",
            f"{layer['top_eigenvalue']:.3g}",
            _pm(layer["trace"]),
            _pm(layer["average_trace"]),
            _measured(layer["quantization"]),
            _predicted(layer["quantization"]),
        ]
        for name, layer in record["layers"].items()
    ]
    return markdown(rows)
