"""Means over seeds, and differences between methods seed by seed."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from examples.experiments.common.statistics import standard_error

SIGNIFICANT = 0.05
"""Largest p of a two-sided paired t-test that counts as a difference."""


class Summary(NamedTuple):
    """A mean over seeds.

    Attributes:
      mean: of the values.
      error: its standard error; NaN of a single value.
    """

    mean: float
    error: float

    def __str__(self) -> str:
        if np.isnan(self.error):
            return f"{self.mean:.1f}"
        return f"{self.mean:.1f} ± {self.error:.1f}"


class Difference(NamedTuple):
    """A mean of paired differences.

    Attributes:
      mean: of the differences.
      error: its standard error; NaN of a single pair.
      p: of a two-sided paired t-test; NaN of a single pair.
    """

    mean: float
    error: float
    p: float

    @property
    def significant(self) -> bool:
        """Whether chance is an unlikely explanation."""
        return bool(self.p < SIGNIFICANT)

    def __str__(self) -> str:
        text = f"{self.mean:+.1f}"
        if not np.isnan(self.error):
            text += f" ± {self.error:.1f}"
        return f"**{text}**" if self.significant else text


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


def summary(values: Sequence[float]) -> Summary:
    """Return mean and standard error."""
    return Summary(float(np.mean(values)), float(standard_error(values)))


def difference(one: dict[int, float], other: dict[int, float]) -> Difference:
    """Compare two methods on the seeds that both have.

    Raises:
      ValueError: there are none.
    """
    seeds = sorted(one.keys() & other.keys())
    if not seeds:
        raise ValueError(
            f"one and other must share a seed, got {[*one]} and {[*other]}."
        )
    pairs = np.array([one[seed] - other[seed] for seed in seeds])
    mean, error = summary([*pairs])
    if np.isnan(error) or not error:
        return Difference(mean, error, float("nan"))
    p = 2.0 * stats.t.sf(abs(mean / error), len(pairs) - 1)
    return Difference(mean, error, float(p))


def mean_of(several: Sequence[dict[int, float]]) -> dict[int, float]:
    """Average over conditions, for every seed that all of them have."""
    seeds = set.intersection(*(set(x) for x in several))
    return {seed: float(np.mean([x[seed] for x in several])) for seed in sorted(seeds)}
