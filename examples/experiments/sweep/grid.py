"""Which settings a sweep tries, and which of them is best."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from examples.experiments.common.statistics import standard_error
from examples.image_classification.config import Config, Method
from examples.image_classification.train import Settings

Row = dict[str, Any]

OF_METHOD: dict[Method, tuple[str, ...]] = {
    "hero": ("h", "gamma", "share"),
    "first_order": ("h", "share"),
    "grad_l1": ("strength",),
    "sgd": (),
}
"""Settings that a method has, beside those of the optimizer."""


class Run(NamedTuple):
    """Settings of method and optimizer, and the seed of all that is random."""

    settings: Settings
    seed: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """What a sweep tries: all combinations, each from every seed.

    Attributes:
      h: lengths of HERO's and first_order's step, in units of z, or where they begin if
        they follow the loss; 0 is SGD.
      gamma: strengths of HERO's penalty; 0 is first_order.
      learning_rate: at the start; on the command line, the config's if not given.
      weight_decay: added to the gradient, times the weights; likewise.
      strength: of GRAD-L1's penalty; 0 is SGD.
      share: of the lead that a step may cost; 0 leaves h as it is.
      seeds: of weights, order, augmentation and label noise.
    """

    h: tuple[float, ...] = (0.0, 0.0125, 0.025, 0.05, 0.1, 0.2)
    gamma: tuple[float, ...] = (0.0, 0.25, 0.5, 1.0)
    learning_rate: tuple[float, ...] = (Config.learning_rate,)
    weight_decay: tuple[float, ...] = (Config.weight_decay,)
    strength: tuple[float, ...] = (0.0, 0.0001, 0.001, 0.01)
    share: tuple[float, ...] = (0.0,)
    seeds: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self) -> None:
        """Raise `ValueError` or `TypeError` where a value is out of range."""
        for name, values in dataclasses.asdict(self).items():
            if not values or len(set(values)) < len(values):
                raise ValueError(
                    f"{name} must be one or more values that differ, got {values}."
                )
            field = "seed" if name == "seeds" else name
            checked = [getattr(Config(**{"h": 0.0, field: x}), field) for x in values]
            object.__setattr__(self, name, tuple(checked))

    def of_method(self, method: Method) -> "Grid":
        """Return the grid with zeros for the settings that a method does not have."""
        names = {name for names in OF_METHOD.values() for name in names}
        zeros: dict[str, Any] = dict.fromkeys(names - {*OF_METHOD[method]}, (0.0,))
        return dataclasses.replace(self, **zeros)

    def axes(self, method: Method) -> list[str]:
        """Return the settings that the method has, and those with several values."""
        has = {*OF_METHOD[method]} - ({"share"} if self.share == (0.0,) else set())
        return [
            name
            for name in Settings._fields
            if name in has or len(getattr(self, name)) > 1
        ]

    def settings(self) -> list[Settings]:
        """Return all combinations, h the slowest to change.

        With h = 0 gamma and share do nothing: their least values stand for all.
        """
        values = (getattr(self, name) for name in Settings._fields)
        combined = (Settings(*x) for x in itertools.product(*values))
        least = min(self.gamma), min(self.share)
        return [x for x in combined if x.h or (x.gamma, x.share) == least]

    def runs(self) -> list[Run]:
        """Return all runs: those of the first seed, then those of the next."""
        return [Run(x, seed) for seed in self.seeds for x in self.settings()]


def summarize(grid: Grid, rows: Sequence[Row]) -> list[Row]:
    """Return means over the seeds, of every setting that has a run from each.

    For each the number of runs that diverged, `accuracy_by_bits` and `score`, the mean
    of these accuracies, with standard errors; None if any diverged.
    """
    by_run = {run_of(row): row["accuracy_by_bits"] for row in rows}
    summaries = []
    for settings in grid.settings():
        runs = [Run(settings, seed) for seed in grid.seeds]
        if not by_run.keys() >= set(runs):
            continue
        accuracies = [by_run[run] for run in runs]
        diverged = accuracies.count(None)
        of_bits = score = None
        if not diverged:
            of_bits = {x: _mean([y[x] for y in accuracies]) for x in accuracies[0]}
            score = _mean([float(np.mean([*x.values()])) for x in accuracies])
        results = {"diverged": diverged, "accuracy_by_bits": of_bits, "score": score}
        summaries.append(settings._asdict() | results)
    return summaries


def best(summaries: Sequence[Row]) -> Row | None:
    """Return the setting of the highest score; None if there is none."""
    scored = [x for x in summaries if x["score"] is not None]
    return max(scored, key=lambda x: float(x["score"]["mean"]), default=None)


def at_edge(grid: Grid, row: Row) -> dict[str, str]:
    """Return which settings have an end of the grid, other than zero, and which end."""
    ends = {}
    for name in Settings._fields:
        if name in ("gamma", "share") and not row["h"]:
            continue
        if name == "h" and row["share"]:  # where it begins
            continue
        values, value = getattr(grid, name), row[name]
        if len(values) > 1 and value and value in (min(values), max(values)):
            ends[name] = "largest" if value == max(values) else "smallest"
    return ends


def plain(method: Method, summaries: Sequence[Row]) -> Row | None:
    """Return the best of the settings with which a method is SGD; None if none is."""
    first = OF_METHOD[method][:1]
    return best([x for x in summaries if first and not x[first[0]]])


def run_of(row: Row) -> Run:
    """Return which run a row is of."""
    return Run(settings_of(row), row["seed"])


def settings_of(row: Row) -> Settings:
    """Return the settings of a row; what it lacks has its default."""
    return Settings(**{x: row[x] for x in Settings._fields if x in row})


def percent(value: dict[str, Any]) -> str:
    """Return a mean and its standard error, if it has one."""
    error = value["standard_error"]
    text = f"{100 * value['mean']:.1f}"
    return text if error is None else f"{text} ± {100 * error:.1f}"


def _mean(values: Sequence[float]) -> dict[str, float | None]:
    error = float(standard_error(values))
    return {
        "mean": float(np.mean(values)),
        "standard_error": None if math.isnan(error) else error,
    }
