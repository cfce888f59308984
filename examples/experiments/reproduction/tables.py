"""The tables of the report, from the records of the runs."""

from collections.abc import Iterable, Sequence
from typing import Any

from examples.experiments.sweep.grid import OF_METHOD, settings_of
from examples.image_classification.results import markdown

from . import paper
from .entries import FIFTEEN_EPOCHS
from .statistics import (
    SIGNIFICANT,
    Difference,
    accuracies,
    difference,
    mean_of,
    summary,
)

Records = dict[str, dict[str, Any]]
"""Records of rows by name."""

METHODS = paper.METHODS | {"sgd_recipe": "SGD, not tuned"}
MISSING = "–"  # noqa: RUF001
PAIRS = (
    ("hero", "sgd"),
    ("hero", "first_order"),
    ("first_order", "sgd"),
    ("grad_l1", "sgd"),
)
PRECISIONS = ("32", "4")


def name_of(method: str, noise: int) -> str:
    """Return the name of a row at the scale "cpu"."""
    return f"{method}_noise{noise}" if noise else method


def found(records: Records, name: str, bits: str) -> str:
    """Return mean and standard error, or that there is nothing."""
    if name not in records:
        return MISSING
    return str(summary([*accuracies(records[name], bits).values()]))


def table_1(records: Records) -> str:
    """Return test accuracy without label noise."""
    rows = [["", "paper, ResNet20", "here"]]
    for method, title in METHODS.items():
        number = paper.accuracy("cifar10", "resnet20", method.split("_recipe")[0], 0.0)
        told = MISSING if number is None else f"{number:.2f}"
        rows.append([title, told, found(records, method, "32")])
    return markdown(rows)


def table_2(records: Records) -> str:
    """Return test accuracy under label noise."""
    rows = [["label noise", *(f"{noise} %" for noise in paper.NOISES)]]
    for method, title in METHODS.items():
        values = (found(records, name_of(method, n), "32") for n in paper.NOISES)
        rows.append([title, *values])
    for method, numbers in paper.TABLE_2["resnet20"].items():
        title = f"paper, ResNet20: {METHODS[method]}"
        rows.append([title, *(f"{x:.2f}" for x in numbers)])
    return markdown(rows)


def table_3(records: Records) -> str:
    """Return test accuracy by bits of the weights."""
    precisions = ("3", "4", "5", "6", "8", "32")
    titles = ("float" if bits == "32" else bits for bits in precisions)
    rows = [["bits", *titles]]
    for method, title in METHODS.items():
        rows.append([title, *(found(records, method, bits) for bits in precisions)])
    for method, numbers in paper.TABLE_3.items():
        values = (f"{numbers[x]:.2f}" if x in numbers else MISSING for x in precisions)
        rows.append([f"paper, MobileNetV2: {METHODS[method]}", *values])
    return markdown(rows)


def differences(records: Records) -> dict[tuple[str, str, str, str], Difference]:
    """Return paired differences by method, method, condition and bits."""
    all_found = {}
    for one, other in PAIRS:
        for bits in PRECISIONS:
            sides: tuple[list[dict[int, float]], list[dict[int, float]]] = ([], [])
            for noise in (0, *paper.NOISES):
                names = [name_of(method, noise) for method in (one, other)]
                if not all(name in records for name in names):
                    continue
                pair = [accuracies(records[name], bits) for name in names]
                for side, values in zip(sides, pair, strict=True):
                    side.append(values)
                all_found[one, other, f"{noise} %", bits] = difference(*pair)
            if len(sides[0]) > 1:
                means = map(mean_of, sides)
                all_found[one, other, "mean", bits] = difference(*means)
    return all_found


def differences_table(records: Records) -> str:
    """Return paired differences, those that are significant in bold."""
    all_found = differences(records)
    conditions = (*(f"{noise} %" for noise in (0, *paper.NOISES)), "mean")
    rows = [["label noise", *conditions]]
    for one, other in PAIRS:
        for bits in PRECISIONS:
            precision = "float" if bits == "32" else "4 bits"
            cells = (
                str(all_found.get((one, other, condition, bits), MISSING))
                for condition in conditions
            )
            title = f"{METHODS[one]} minus {METHODS[other]}, {precision}"
            rows.append([title, *cells])
    return markdown(rows)


def verdicts(records: Records) -> Iterable[str]:
    """Say of every pair of methods what the differences allow to say."""
    all_found = differences(records)
    for one, other in PAIRS:
        for bits in PRECISIONS:
            each = [
                x
                for (a, b, condition, n), x in all_found.items()
                if (a, b, n) == (one, other, bits) and condition != "mean"
            ]
            whole = all_found.get((one, other, "mean", bits))
            if whole is None:
                continue
            better = sum(x.mean > 0 for x in each)
            yield (
                f"- {METHODS[one]} against {METHODS[other]}, "
                f"{'float' if bits == '32' else '4 bits'}: better in {better} of "
                f"{len(each)} conditions, on average by {whole.mean:+.1f} ± "
                f"{whole.error:.1f} points (p = {whole.p:.2g}"
                + (")." if whole.p < SIGNIFICANT else ", not significant).")
            )


def settings(finals: Records) -> str:
    """Return what was chosen for each method, and how well it did when chosen."""
    rows = [["", "rows", "direction", "settings", "held out: float", "4 bit"]]
    order = [*METHODS]
    by_method = sorted(
        finals.items(),
        key=lambda item: (order.index(item[1]["config"]["method"]), item[0]),
    )
    for name, record in by_method:
        best = record["best"]
        if best is None:  # not finished
            continue
        method = record["config"]["method"]
        has = OF_METHOD[method]
        names = [*has, "learning_rate", "weight_decay"]
        told = ", ".join(f"{x.replace('_', ' ')} {best[x]:g}" for x in names)
        key = best["perturbation"], settings_of(best)
        runs = [x for x in record["runs"] if (x["perturbation"], settings_of(x)) == key]
        means = []
        for bits in PRECISIONS:
            values = [100.0 * best["accuracy_by_bits"][bits]["mean"]]
            values += [100.0 * x["accuracy_by_bits"][bits] for x in runs]
            means.append(str(summary(values)))
        kind = "with noise" if name.startswith("noise") else "without noise"
        direction = best["perturbation"] if "h" in has else MISSING
        rows.append([METHODS[method], kind, direction, told, *means])
    return markdown(rows)


def full_scale(rows: Sequence[tuple[str, float | None, str, str, str]]) -> str:
    """Return the rows of the paper: its number, ours, and what it would take."""
    titles = ["name", "paper", "here", "here, 4 bits", "hours on two cores"]
    cells = [
        [name, MISSING if number is None else f"{number:.2f}", *others]
        for name, number, *others in rows
    ]
    return markdown([titles, *cells])


def budget_scale(records: Records) -> str:
    """Return test accuracy at every precision, per tensor and per channel."""
    precisions = [str(bits) for bits in FIFTEEN_EPOCHS.bits]
    titles = ["name", "seed", "grids", "float", *(f"{x} bit" for x in precisions)]
    rows = [[*titles, "hours"]]
    for name, record in records.items():
        for run in record["runs"]:
            told = [name, str(run["seed"])]
            if run["accuracy_by_bits"] is None:
                rows.append([*told, "diverged", *[MISSING] * (len(precisions) + 2)])
                continue
            per_tensor = run["accuracy_by_bits"]
            per_channel = run["accuracy_by_bits_per_channel"]
            for kind, found, whole, hours in (
                ("tensor", per_tensor, per_tensor["32"], run["seconds"] / 3600.0),
                ("channel", per_channel, None, None),
            ):
                cells = [whole, *(found[x] for x in precisions)]
                percents = ("" if x is None else f"{100 * x:.1f}" for x in cells)
                end = "" if hours is None else f"{hours:.1f}"
                rows.append([*told, kind, *percents, end])
    return markdown(rows)
