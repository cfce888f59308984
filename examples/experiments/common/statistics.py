"""Means over seeds and their standard errors."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def standard_error(values: Sequence[float] | np.ndarray) -> Any:
    """Return the standard error of the mean over the first axis; NaN of one value."""
    if len(values) < 2:
        return np.full(np.shape(values)[1:], math.nan)[()]
    return np.std(values, axis=0, ddof=1) / math.sqrt(len(values))


def summary(values: Sequence[Any]) -> dict[str, Any]:
    """Return mean and standard error for JSON; one value has no standard error."""
    numbers = [float(x) for x in values]
    error = float(standard_error(numbers))
    return {
        "mean": float(np.mean(numbers)),
        "stderr": None if math.isnan(error) else error,
        "values": numbers,
    }


def cell(x: dict[str, Any], digits: int) -> str:
    """Format mean and standard error."""
    error = "" if x["stderr"] is None else f" ± {x['stderr']:.{digits}f}"
    return f"{x['mean']:.{digits}f}{error}"
