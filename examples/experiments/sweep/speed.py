"""How long runs of a sweep take at once, and one after another."""

import dataclasses
import time
from typing import Any, get_args

import jax
import numpy as np

from examples.image_classification import results
from examples.image_classification.config import Config
from examples.image_classification.errors import RunError
from examples.image_classification.logbook import say

from .grid import Grid
from .many_runs import ManyRuns, Together
from .search import Options, load

STEPS = 5
"""Of each run, beside the first one, which is compiled before."""

FEW = 4
"""Runs that are timed, if `at_once` does not say how many."""


def measure(config: Config, grid: Grid, options: Options) -> dict[str, dict[str, Any]]:
    """Time both ways to take the steps of the first runs of a grid.

    Prints a table, and writes `speed.json`. Arguments and errors are those of
    :func:`search.sweep`. Returns the time of a step, and runs in an hour, by way.
    """
    assert options.out is not None
    config, pipeline = load(config, options)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"out must be a folder: {error}") from None
    runs = grid.of_method(config.method).runs()[: options.at_once or FEW]
    ways = {}
    for together in get_args(Together):
        many = ManyRuns(config, pipeline, len(runs), together)
        begun, seconds = time.perf_counter(), []
        for k in range(0, len(runs), many.size):
            state, item, settings = many.begin(runs[k : k + many.size])
            for _ in range(STEPS + 1):
                state, outputs = many.step(state, item, settings)
                jax.block_until_ready(outputs)
                seconds.append(time.perf_counter() - begun)
                begun = time.perf_counter()
        step = float(np.median(seconds))
        run = step * config.epochs * pipeline.steps / many.size
        ways[together] = {
            "at_once": many.size,
            "compile_seconds": round(max(0.0, seconds[0] - step), 2),
            "step_ms": round(1e3 * step, 2),
            "step_ms_per_run": round(1e3 * step / many.size, 2),
            "runs_per_hour": round(3600 / run, 1),
        }
    environment = results.environment()
    record = {"environment": environment, "config": dataclasses.asdict(config)}
    results.write_json(options.out / "speed.json", record | {"ways": ways})
    titles = ["way", "runs at once", "compile s", "ms / step", "per run", "runs / hour"]
    rows = [[name, *map(str, way.values())] for name, way in ways.items()]
    say(results.markdown([titles, *rows]), options.quiet)
    return ways
