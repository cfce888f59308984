"""The words and tables on mixed precision, in Markdown."""

from typing import Any

from examples.experiments.common.statistics import cell, summary
from examples.image_classification.results import markdown

from .weights import MEASURES, Settings

Record = dict[str, Any]
Groups = dict[str, list[Record]]


def report(
    groups: Groups, settings: Settings, environment: Record, pictures: list[str]
) -> str:
    """Return the report; `pictures` are the names of those that were drawn."""
    counts = {len(records) for records in groups.values()}
    parts = [
        "# Mixed precision",
        f"Test accuracy in %, mean and standard error over {max(counts)} "
        f"network{'s' if max(counts) > 1 else ''} each. Sensitivities over "
        f"{settings.images} training images at most, with the labels trained on. "
        f"Quantizer: {_grid(settings)}; choices of "
        f"{[*settings.choices]} bits. `{environment['command']}`, jax "
        f"{environment['jax']}, {environment['device']}, {environment['date']}.",
        "![Accuracy against bytes](pareto.png)",
        *(_accuracies(name, records, settings) for name, records in groups.items()),
        "## Which sensitivity foretells the loss of accuracy?",
        "Spearman's rank correlation with the measured loss of test accuracy: over all "
        "layers and choices one at a time, and over "
        f"{settings.allocations} random allocations of about {settings.target:g} bits "
        "on average, all layers at once; mean and standard error over networks.",
        _correlations(groups),
        "![Predicted and measured](predictions.png)",
        "## Layers",
        "![Bits of every layer](allocations.png)",
        *(_layers(records[0]) for records in groups.values()),
        "## Files",
        _files(groups),
        *(_activations(groups, settings) if "activations" in pictures else ()),
        "## Seconds",
        _seconds(groups),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _grid(settings: Settings) -> str:
    """Say what is not the default of the quantizer."""
    said = [f"{name} {value}" for name, value in settings.grid.items()]
    return ", ".join(said) or "one affine grid per tensor, over all its weights"


def _pm(values: Any, digits: int = 1) -> str:
    """Format mean and standard error over networks."""
    known = [v for v in values if v is not None]
    return cell(summary(known), digits) if known else "none"


def _accuracies(name: str, records: list[Record], settings: Settings) -> str:
    each = [r["accuracy"] for r in records]
    in_float = _pm([row["float"] for row in each])
    return f"## {name}: {in_float} with float weights\n\n{_by_budget(each, settings)}"


def _by_budget(each: list[Record], settings: Settings) -> str:
    """Return a table of accuracies, a row for each way to choose bits.

    Args:
      each: of every network, "float" and "uniform", and a row for every measure.
      settings: with the budgets.
    """
    budgets = [f"{budget:g}" for budget in settings.budgets]
    uniform = [row["uniform"] for row in each]
    rows = [
        ["average bits", *budgets],
        [
            "uniform",
            *(_pm([u[b] for u in uniform]) if b in uniform[0] else "" for b in budgets),
        ],
    ]
    for measure in [name for name in each[0] if name in MEASURES]:
        columns = zip(*(row[measure] for row in each), strict=True)
        rows.append([measure, *map(_pm, columns)])
    return markdown(rows)


def _correlations(groups: Groups) -> str:
    rows = [["", *(f"{name}, {kind}" for name in groups for kind in _KINDS)]]
    rows += [
        [
            measure,
            *(
                _pm([r["rank_correlation"][measure][kind] for r in records], 2)
                for records in groups.values()
                for kind in _KINDS
            ),
        ]
        for measure in next(iter(groups.values()))[0]["rank_correlation"]
    ]
    return markdown(rows)


_KINDS = ("layers", "allocations")


def _layers(record: Record) -> str:
    chosen = record["file"]["bits"]
    rows = [["layer", "weights", "eigenvalue", "trace", "± error", "bits"]]
    for path, layer in record["layers"].items():
        size = layer["size"]

        def number(value: float | None, times: int = 1) -> str:
            return "none" if value is None else f"{times * value:.3g}"

        rows.append(
            [
                path,
                f"{size:,}",
                number(layer["eigenvalue"]),
                number(layer["average_trace"], size),
                number(layer["average_trace_stderr"], size),
                str(chosen[path]),
            ]
        )
    return f"### {record['name']}: bits by {record['file']['measure']}\n\n" + markdown(
        rows
    )


def _files(groups: Groups) -> str:
    rows = [
        ["network", "file", "bytes", "of which layers", "bits", "accuracy", "float"]
    ]
    for records in groups.values():
        for r in records:
            file = r["file"]
            rows.append(
                [
                    r["name"],
                    file["name"],
                    f"{file['bytes']:,}",
                    f"{file['layer_bytes']:,}",
                    f"{file['average_bits']:.3f}",
                    f"{file['accuracy']:.1f}",
                    f"{r['accuracy']['float']:.1f}",
                ]
            )
    return markdown(rows)


def _activations(groups: Groups, settings: Settings) -> list[str]:
    parts = [
        "## Activations",
        "The inputs of all layers, rounded to static grids over the range of the "
        "calibration images; BatchNorm's statistics as they are. Mixed weights are "
        "those of the file.",
        "![Accuracy against bits of activations](activations.png)",
    ]
    for name, records in groups.items():
        for weights in ("float", "mixed"):
            each = [r["activations"][f"accuracy, {weights} weights"] for r in records]
            in_float = _pm([row["float"] for row in each])
            parts.append(
                f"### {name}, {weights} weights: {in_float} with float activations\n\n"
                + _by_budget(each, settings)
            )
    return parts


def _seconds(groups: Groups) -> str:
    records = [r for records in groups.values() for r in records]
    rows = [["", *records[0]["seconds"]]]
    rows += [[r["name"], *(f"{s:g}" for s in r["seconds"].values())] for r in records]
    return markdown(rows)
