"""How long runs of a sweep take at once, and one after another."""

import dataclasses
import itertools
import time
from collections.abc import Sequence
from typing import Any, get_args

import jax
import numpy as np

from examples.image_classification.array_pipeline import ArrayPipeline
from examples.image_classification.config import Config
from examples.image_classification.results import markdown

from .grid import Run
from .many_runs import ManyRuns, Together

STEPS = 5
"""Timed of each run, after a first one."""


def measure(
    config: Config, pipeline: ArrayPipeline, runs: Sequence[Run], at_once: int
) -> dict[str, dict[str, Any]]:
    """Return the time of a step, and how many runs that makes in an hour, for each way.

    Args:
      config: of the runs.
      pipeline: their data.
      runs: of which the first are timed.
      at_once: how many.
    """
    timed = runs[:at_once]
    steps = config.epochs * pipeline.steps
    long = dataclasses.replace(config, epochs=max(config.epochs, STEPS + 1))
    ways = {}
    for together in get_args(Together):
        many = ManyRuns(long, pipeline, len(timed), together)
        first, later = [], []
        for k in range(0, len(timed), many.size):
            seconds = _seconds(many, timed[k : k + many.size])
            first.append(seconds[0])
            later += seconds[1:]
        step = float(np.median(later))
        ways[together] = {
            "at_once": many.size,
            "compile_seconds": round(max(0.0, first[0] - step), 2),
            "step_ms": round(1e3 * step, 2),
            "step_ms_per_run": round(1e3 * step / many.size, 2),
            "runs_per_hour": round(3600 * many.size / (step * steps), 1),
        }
    return ways


def table(ways: dict[str, dict[str, Any]]) -> str:
    """Return the measurements as a Markdown table."""
    titles = ["way", "runs at once", "compile s", "ms / step", "per run", "runs / hour"]
    rows = [[name, *map(str, way.values())] for name, way in ways.items()]
    return markdown([titles, *rows])


def _seconds(many: ManyRuns, runs: Sequence[Run]) -> list[float]:
    """Return the time of every step, of the first one with all that goes before."""
    seconds = []
    start = time.perf_counter()
    for _, outputs in itertools.islice(many.steps(runs), STEPS + 1):
        jax.block_until_ready(outputs)
        seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
    return seconds
