"""The report on mixed precision: words and tables in Markdown, and pictures."""

from argparse import Namespace
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from examples.experiments.common.statistics import cell, standard_error, summary
from examples.image_classification.results import markdown

from .measure import MEASURES

Record = dict[str, Any]
Groups = dict[str, list[Record]]

STYLES = {
    "uniform": ("k", "o"),
    "HAWQ": ("C0", "s"),
    "Q-BERT": ("C4", "x"),
    "HAWQ-V2": ("C1", "^"),
    "quadratic": ("C2", "D"),
    "pairwise": ("C6", "P"),
    "measured": ("C5", "v"),
    "greedy": ("C3", "*"),
}
"""Colour and marker of every way to choose bits."""


def words(groups: Groups, options: Namespace, environment: Record) -> str:
    """Return the report in Markdown."""
    records = [record for group in groups.values() for record in group]
    count = max(map(len, groups.values()))
    parts = [f"{name} {value}" for name, value in options.grid.items()]
    grid = ", ".join(parts) or "one affine grid per tensor, over all its weights"
    parts = [
        "# Mixed precision",
        f"Test accuracy in %, mean and standard error over {count} "
        f"network{'s' if count > 1 else ''} each. Sensitivities over "
        f"{options.images} training images at most, with the labels trained on. "
        f"Quantizer: {grid}; choices of {[*options.choices]} bits. "
        f"`{environment['command']}`, jax {environment['jax']}, "
        f"{environment['device']}, {environment['date']}.",
        "![Accuracy against bytes](pareto.png)",
    ]
    for name, group in groups.items():
        each = [record["accuracy"] for record in group]
        parts.append(f"## {name}: {_pm(r['float'] for r in each)} with float weights")
        parts.append(_by_budget(each, options))
    parts += [
        "## Which sensitivity foretells the loss of accuracy?",
        "Spearman's rank correlation with the measured loss of test accuracy over "
        f"{options.allocations} random allocations of about {options.average_bits:g} "
        "bits on average; mean and standard error over networks.",
        _correlations(groups),
        "## Layers",
        *(_layers(group[0]) for group in groups.values()),
        "## Files",
        _files(records),
    ]
    if options.activations:
        parts += [
            "## Activations",
            "The inputs of all layers, rounded to static grids over the range of the "
            "calibration images; BatchNorm's statistics as they are. Mixed weights are "
            "those of the file.",
        ]
        for name, group in groups.items():
            for kind in ("float", "mixed"):
                each = [r["activations"][f"accuracy, {kind} weights"] for r in group]
                in_float = _pm(r["float"] for r in each)
                parts.append(
                    f"### {name}, {kind} weights: {in_float} with float activations"
                )
                parts.append(_by_budget(each, options))
    return "\n\n".join(parts) + "\n"


def _pm(values: Any, digits: int = 1) -> str:
    """Format mean and standard error over networks."""
    known = [v for v in values if v is not None]
    return cell(summary(known), digits) if known else "none"


def _by_budget(each: list[Record], options: Namespace) -> str:
    """Return a table of the networks' accuracies, a row for each way to choose bits."""
    budgets = [f"{budget:g}" for budget in options.budgets]
    uniform = [row["uniform"] for row in each]
    alike = [_pm(u[b] for u in uniform) if b in uniform[0] else "" for b in budgets]
    rows = [["average bits", *budgets], ["uniform", *alike]]
    for measure in [name for name in each[0] if name in MEASURES]:
        columns = zip(*(row[measure] for row in each), strict=True)
        rows.append([measure, *map(_pm, columns)])
    return markdown(rows)


def _correlations(groups: Groups) -> str:
    rows = [["", *groups]]
    for measure in next(iter(groups.values()))[0]["rank_correlation"]:
        each = ([r["rank_correlation"][measure] for r in g] for g in groups.values())
        rows.append([measure, *(_pm((x["allocations"] for x in g), 2) for g in each)])
    return markdown(rows)


def _layers(record: Record) -> str:
    def number(value: float | None, times: int = 1) -> str:
        return "none" if value is None else f"{times * value:.3g}"

    rows = [["layer", "weights", "eigenvalue", "trace", "± error", "bits"]]
    for path, layer in record["layers"].items():
        size, bits = layer["size"], record["file"]["bits"][path]
        traces = (layer["average_trace"], layer["average_trace_stderr"])
        cells = [number(layer["eigenvalue"]), *(number(x, size) for x in traces)]
        rows.append([path, f"{size:,}", *cells, str(bits)])
    title = f"### {record['name']}: bits by {record['file']['measure']}"
    return f"{title}\n\n{markdown(rows)}"


def _files(records: list[Record]) -> str:
    titles = ["network", "file", "bytes", "of which layers", "bits", "accuracy"]
    rows = [[*titles, "float"]]
    for r in records:
        file = r["file"]
        sizes = (f"{file[x]:,}" for x in ("bytes", "layer_bytes"))
        percents = (f"{x:.1f}" for x in (file["accuracy"], r["accuracy"]["float"]))
        bits = f"{file['average_bits']:.3f}"
        rows.append([r["name"], file["name"], *sizes, bits, *percents])
    return markdown(rows)


def pareto(groups: Groups) -> Figure:
    """Draw test accuracy against the bytes of the quantized layers."""
    figure = Figure(figsize=(5.4 * len(groups), 5.2), layout="constrained")
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    for axes, (title, records) in zip(panels, groups.items(), strict=True):
        each = [r["accuracy"] for r in records]
        for name, (color, marker) in STYLES.items():
            if name == "uniform":
                size = np.array([*records[0]["uniform_bytes"].values()])
                rows = np.array([[*row["uniform"].values()] for row in each])
            else:
                taken = [[a["bytes"] for a in r["allocations"][name]] for r in records]
                size = np.mean(taken, 0)
                rows = np.array([row[name] for row in each])
            order = np.argsort(size, kind="stable")
            axes.errorbar(
                size[order] / 1000,
                rows.mean(0)[order],
                np.nan_to_num(standard_error(rows))[order],  # one network has none
                fmt=f"{marker}-",
                color=color,
                label=name,
                markersize=5,
                capsize=2,
                lw=2.5 if name == "uniform" else 1.2,
                zorder=3 if name == "uniform" else 2,
            )
        in_float = np.mean([row["float"] for row in each])
        axes.axhline(in_float, color="gray", ls=":", label="float")
        axes.set(title=title, xlabel="kilobytes of the quantized layers")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("test accuracy (%)")
    columns = 5 if len(panels) > 1 else 3
    lines = panels[0].get_legend_handles_labels()  # the same in all panels
    figure.legend(*lines, loc="outside lower center", ncols=columns, fontsize="small")
    return figure
