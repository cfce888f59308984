"""How the settings of the scale "cpu" are searched.

Every method has the same budget of settings (`BUDGET`), which are judged at full
precision and at 4 bits on 2,000 training images that are held out: each from one seed,
and the best `FINALISTS` of a method from another one, since settings differ by less
than seeds do. The last four settings are the best one of the others with more decay and
a higher learning rate, which help against noise as flatness does.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from examples.experiments.sweep.grid import Grid, Run, settings_of
from examples.experiments.sweep.search import Options, search, sweep
from examples.image_classification import results
from examples.image_classification.config import Config, Direction, Method
from examples.image_classification.errors import RunError
from examples.image_classification.run import read
from examples.image_classification.stopping import Stopped

from .entries import CPU, RELEASED, Row

Record = dict[str, Any]

CONDITIONS = {"clean": 0.0, "noise40": 0.4}
BUDGET, FINALISTS = 20, 3
FIRST_SEED, SECOND_SEED = 3, 4

TUNING = dataclasses.replace(CPU, test_size=None, validation_size=2000, bits=(4,))

_HERO = Grid(h=(1, 2), gamma=(0.01, 0.1, 0.5, 1))
GRIDS: dict[Method, dict[Direction, Grid]] = {
    "hero": {"layerwise": _HERO, "adaptive": _HERO},
    "first_order": {
        "layerwise": Grid(h=(0.5, 1, 1.5, 2, 3, 5, 10, 20)),
        "adaptive": Grid(h=(0.2, 0.5, 1, 1.5, 2, 3, 4, 8)),
    },
    "grad_l1": {
        "layerwise": Grid(
            learning_rate=(0.1, 0.2),
            strength=(1e-4, 3e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2, 3e-2),
        )
    },
    "sgd": {
        "layerwise": Grid(
            learning_rate=(0.05, 0.1, 0.2, 0.4), weight_decay=(1e-4, 5e-4, 2e-3, 5e-3)
        )
    },
}
"""16 settings for each method."""

MORE: dict[Method, Grid] = {
    method: Grid(learning_rate=(0.1, 0.2), weight_decay=(2e-3, 5e-3))
    for method in GRIDS
} | {"sgd": Grid(learning_rate=(0.2, 0.4), weight_decay=(1e-2, 2e-2))}
"""Four more, from the best of those on."""


def path_of(row: Row, folder: Path) -> Path:
    """Return the file of the best setting of a row."""
    name = f"{row.tuned}_{row.config.method}_finals.json"
    return folder / row.scale / "tuning" / name


def chosen(row: Row, folder: Path) -> Config | None:
    """Return the config of a row with the best setting; None while it is unknown."""
    if row.tuned is None:
        return row.config
    record = read(path_of(row, folder))
    if record is None or record["best"] is None:
        return None
    best = record["best"]
    return dataclasses.replace(
        row.config, perturbation=best["perturbation"], **settings_of(best)._asdict()
    )


def tune(row: Row, options: argparse.Namespace) -> None:
    """Find the best setting of a row; go on where an earlier attempt ended."""
    assert row.tuned is not None
    method, path = row.config.method, path_of(row, options.results)
    noise = CONDITIONS[row.tuned]
    config = dataclasses.replace(TUNING, method=method, label_noise=noise)
    environment = row.described(options, config)["environment"]

    def searched(name: str, grid: Grid, **fields: Any) -> list[Record]:
        sweep_options = Options(out=path.parent / name, **row.where(options))
        fixed = dataclasses.replace(config, **fields)
        record = sweep(fixed, grid, sweep_options, options.stop, environment)
        return [{"perturbation": fixed.perturbation} | x for x in record["settings"]]

    settings = []
    name = f"{row.tuned}_{method}"
    for direction, grid in GRIDS[method].items():
        end = f"_{direction}" if len(GRIDS[method]) > 1 else ""
        grid = dataclasses.replace(grid, seeds=(FIRST_SEED,))
        settings += searched(name + end, grid, perturbation=direction)
    best = ranked(settings)[0]
    kept = {x: (best[x],) for x in ("h", "gamma", "strength")}
    grid = dataclasses.replace(MORE[method], seeds=(FIRST_SEED,), **kept)
    settings += searched(f"{name}_more", grid, perturbation=best["perturbation"])
    if method == "hero":  # to compare with; nothing is chosen from it
        grid = Grid(h=(0.5,), gamma=(5.0,), seeds=(FIRST_SEED, SECOND_SEED))
        searched(f"released_{row.tuned}", grid, **RELEASED)
    record = read(path) or {"runs": [], "seconds": 0.0}
    record["candidates"] = candidates = ranked(settings)[:FINALISTS]
    for x in candidates:
        if score(x, record["runs"]) is not None:
            continue
        fixed = dataclasses.replace(config, perturbation=x["perturbation"])
        final = [Run(settings_of(x), SECOND_SEED)]
        (trained,) = search(fixed, final, Options(**row.where(options)))
        record["runs"].append({"perturbation": x["perturbation"]} | trained)
        record["seconds"] += trained["seconds"]
        record |= row.described(options, config) | {"best": None}
        results.write_json(path, record)
        if options.stop.now():
            raise Stopped(f"stopped in {path.stem}; the same command goes on.")
    scores = [score(x, record["runs"]) for x in candidates]
    k = int(np.argmax(np.array(scores, float)))
    record["best"] = candidates[k] | {"score_of_all_seeds": scores[k]}
    results.write_json(path, record)


def ranked(settings: Sequence[Record]) -> list[Record]:
    """Return the settings that did not diverge, the best first."""
    scored = [x for x in settings if x["score"] is not None]
    if not scored:
        raise RunError("every setting diverged")
    return sorted(scored, key=lambda x: -float(x["score"]["mean"]))


def score(candidate: Record, finals: Sequence[Record]) -> float | None:
    """Return the mean over both seeds; None while the second one is missing."""
    key = candidate["perturbation"], settings_of(candidate)
    for run in finals:
        if (run["perturbation"], settings_of(run)) == key:
            accuracies = [*(run["accuracy_by_bits"] or {"32": 0.0}).values()]
            return float(np.mean([candidate["score"]["mean"], np.mean(accuracies)]))
    return None
