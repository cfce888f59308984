"""The tables of the report, from the records of the runs."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from examples.experiments.common.statistics import cell, standard_error, summary
from examples.experiments.sweep.grid import OF_METHOD, percent, settings_of
from examples.image_classification.results import markdown

from . import paper
from .entries import FIFTEEN_EPOCHS

Records = dict[str, dict[str, Any]]
"""Records of rows by name."""

METHODS = paper.METHODS | {"sgd_recipe": "SGD, not tuned"}
MISSING = "–"  # noqa: RUF001
NOISES = (0, *paper.NOISES)
PAIRS = (
    ("hero", "sgd"),
    ("hero", "first_order"),
    ("first_order", "sgd"),
    ("grad_l1", "sgd"),
)
PRECISIONS = {"32": "float", "4": "4 bits"}
SIGNIFICANT = 0.05
"""Largest p of a two-sided paired t-test that counts as a difference."""


def difference(one: dict[int, float], other: dict[int, float]) -> str:
    """Return the mean difference of seeds that both methods have, its standard error.

    It is bold if a two-sided paired t-test finds chance unlikely.
    """
    pairs = np.array([one[seed] - other[seed] for seed in one.keys() & other.keys()])
    mean, error = float(pairs.mean()), float(standard_error(pairs))
    if math.isnan(error):
        return f"{mean:+.1f}"
    text = f"{mean:+.1f} ± {error:.1f}"
    p = 2.0 * stats.t.sf(abs(mean / error), len(pairs) - 1) if error else 1.0
    return f"**{text}**" if p < SIGNIFICANT else text


def mean_of(several: Sequence[dict[int, float]]) -> dict[int, float]:
    """Average over conditions, for every seed that all of them have."""
    seeds = set.intersection(*(set(x) for x in several))
    return {seed: float(np.mean([x[seed] for x in several])) for seed in sorted(seeds)}


def accuracies(record: dict[str, Any], bits: str) -> dict[int, float]:
    """Return percent by seed; a run that diverged counts as a guess."""
    classes = {"cifar100": 100, "imagenet2012": 1000}.get(
        record["config"]["dataset"], 10
    )
    guess = {bits: 1.0 / classes}
    return {
        run["seed"]: 100.0 * (run["accuracy_by_bits"] or guess)[bits]
        for run in record["runs"]
    }


def name_of(method: str, noise: int) -> str:
    """Return the name of a row at the scale "cpu"."""
    return f"{method}_noise{noise}" if noise else method


def mean(records: Records, name: str, bits: str) -> str:
    """Return mean and standard error, or that there is nothing."""
    if name not in records:
        return MISSING
    return cell(summary([*accuracies(records[name], bits).values()]), 1)


def number(value: float | None) -> str:
    """Return a number of the paper, or that there is none."""
    return MISSING if value is None else f"{value:.2f}"


def table_1(records: Records) -> str:
    """Return test accuracy without label noise."""
    rows = [["", "paper, ResNet20", "here"]]
    for method, title in METHODS.items():
        published = paper.accuracy(
            "cifar10", "resnet20", method.split("_recipe")[0], 0.0
        )
        rows.append([title, number(published), mean(records, method, "32")])
    return markdown(rows)


def table_2(records: Records) -> str:
    """Return test accuracy under label noise."""
    rows = [["label noise", *(f"{noise} %" for noise in paper.NOISES)]]
    for method, title in METHODS.items():
        values = (mean(records, name_of(method, n), "32") for n in paper.NOISES)
        rows.append([title, *values])
    for method, numbers in paper.TABLE_2["resnet20"].items():
        rows.append([f"paper, ResNet20: {METHODS[method]}", *map(number, numbers)])
    return markdown(rows)


def table_3(records: Records) -> str:
    """Return test accuracy by bits of the weights."""
    precisions = ("3", "4", "5", "6", "8", "32")
    rows = [["bits", *("float" if bits == "32" else bits for bits in precisions)]]
    for method, title in METHODS.items():
        rows.append([title, *(mean(records, method, bits) for bits in precisions)])
    for method, numbers in paper.TABLE_3.items():
        title = f"paper, MobileNetV2: {METHODS[method]}"
        rows.append([title, *(number(numbers.get(bits)) for bits in precisions)])
    return markdown(rows)


def differences(records: Records) -> str:
    """Return paired differences, those that are significant in bold."""
    rows = [["label noise", *(f"{noise} %" for noise in NOISES), "mean"]]
    for one, other in PAIRS:
        for bits, precision in PRECISIONS.items():
            pairs, cells = [], []
            for noise in NOISES:
                names = [name_of(method, noise) for method in (one, other)]
                if all(name in records for name in names):
                    pairs.append([accuracies(records[name], bits) for name in names])
                    cells.append(difference(*pairs[-1]))
                else:
                    cells.append(MISSING)
            whole = MISSING
            if len(pairs) > 1:
                whole = difference(*map(mean_of, zip(*pairs, strict=True)))
            title = f"{METHODS[one]} minus {METHODS[other]}, {precision}"
            rows.append([title, *cells, whole])
    return markdown(rows)


def settings(finals: Records, released: Records) -> str:
    """Return what was chosen for each method, and how well it did when chosen.

    The released code's setting was searched as well; names only have to differ.
    """
    rows = [["", "rows", "direction", "settings", "held out: float", "4 bit"]]
    order = [*METHODS]
    named = sorted(
        finals.items(), key=lambda x: (order.index(x[1]["config"]["method"]), x[0])
    )
    for name, record in (*named, *released.items()):
        best, method = record["config"] | record["best"], record["config"]["method"]
        key = best["perturbation"], settings_of(best)
        runs = record["runs"] if name in finals else []
        chosen = [x for x in runs if (x["perturbation"], settings_of(x)) == key]
        means = []
        for bits in PRECISIONS:
            searched = best["accuracy_by_bits"][bits]
            both = [searched["mean"], *(x["accuracy_by_bits"][bits] for x in chosen)]
            averaged = cell(summary([100.0 * x for x in both]), 1)
            means.append(averaged if chosen else percent(searched))
        names = [x for x in OF_METHOD[method] if x != "share"]
        names += ["learning_rate", "weight_decay"]
        values = ", ".join(f"{x.replace('_', ' ')} {best[x]:g}" for x in names)
        title = METHODS[method] if name in finals else "released code's (mean)"
        noise = "with noise" if record["config"]["label_noise"] else "without noise"
        direction = best["perturbation"] if "h" in names else MISSING
        rows.append([title, noise, direction, values, *means])
    return markdown(rows)


def budget_scale(records: Records) -> str:
    """Return test accuracy at every precision, per tensor and per channel."""
    precisions = [str(bits) for bits in FIFTEEN_EPOCHS.bits]
    titles = ["name", "seed", "grids", "float", *(f"{x} bit" for x in precisions)]
    rows = [[*titles, "hours"]]
    for name, record in records.items():
        for run in record["runs"]:
            start, per_tensor = [name, str(run["seed"])], run["accuracy_by_bits"]
            if per_tensor is None:
                rows.append([*start, "diverged", *[MISSING] * (len(precisions) + 2)])
                continue
            per_channel = run["accuracy_by_bits_per_channel"]
            cells = [f"{100 * per_tensor[x]:.1f}" for x in ("32", *precisions)]
            hours = f"{run['seconds'] / 3600.0:.1f}"
            rows.append([*start, "tensor", *cells, hours])
            cells = [f"{100 * per_channel[x]:.1f}" for x in precisions]
            rows.append([*start, "channel", "", *cells, ""])
    return markdown(rows)
