"""What there is of an entry, what is missing, and what follows from it."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from examples.experiments.sweep.grid import Grid, run_of, settings_of
from examples.image_classification.config import Config
from examples.image_classification.loop import RunError
from examples.image_classification.run import locked, read

from .entries import Entry, Finals, Row, Search

Record = dict[str, Any]


class NotReady(RunError):  # noqa: N818 - no error
    """What an entry needs is not there yet; the message says what."""


def path_of(entry: Entry, folder: Path) -> Path:
    """Return the file of an entry's result."""
    if isinstance(entry, Search):
        return folder / entry.scale / "tuning" / entry.name / "sweep.json"
    if isinstance(entry, Finals):
        return folder / entry.scale / "tuning" / f"{entry.name}.json"
    return folder / entry.scale / f"{entry.name}.json"


@contextlib.contextmanager
def held(entry: Entry, folder: Path) -> Iterator[bool]:
    """Take an entry in hand, if no other process has it; tell whether it is ours."""
    place = folder / entry.scale / "locks" / entry.name
    place.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(place))
        except RunError:
            yield False
        else:
            yield True


def missing(entry: Entry, folder: Path, seeds: Sequence[int] | None = None) -> int:
    """Return how many of an entry's runs there are not; others do not count.

    Args:
      entry: which.
      folder: of the results.
      seeds: of a row, others than its own.
    """
    record = read(path_of(entry, folder))
    if isinstance(entry, Search):
        try:
            _, grid = settled(entry, folder)
        except NotReady:
            return len(_one_of_each(entry.grid).runs())
        done = {run_of(row) for row in record["runs"]} if record else set()
        return len({*grid.runs()} - done)
    if isinstance(entry, Finals):
        try:
            finalists = finalists_of(entry, folder)
        except NotReady:
            return entry.count * len(entry.seeds)
        wanted = [(x, seed) for x in finalists for seed in entry.seeds]
        return sum(run_of_final(record, *x) is None for x in wanted)
    wanted_seeds = {*(entry.seeds if seeds is None else seeds)}
    if record is None:
        return len(wanted_seeds)
    with contextlib.suppress(NotReady):
        if differences(record, chosen(entry, folder)):
            return len(wanted_seeds)
    return len(wanted_seeds - {run["seed"] for run in record["runs"]})


def settled(entry: Search, folder: Path) -> tuple[Config, Grid]:
    """Return config and grid of a search, with the best of those that it goes on from.

    Raises:
      NotReady: one of those is not finished.
      RunError: all of their settings diverged.
    """
    if not entry.after:
        return entry.config, entry.grid
    best = ranked(entry.after, entry, folder)[0]
    kept = {name: (best[name],) for name in ("h", "gamma", "strength")}
    config = dataclasses.replace(entry.config, perturbation=best["perturbation"])
    return config, dataclasses.replace(entry.grid, **kept)


def ranked(names: Sequence[str], entry: Entry, folder: Path) -> list[Record]:
    """Return the settings of searches that an entry needs, the best first.

    Raises:
      NotReady: a search is not finished.
      RunError: all settings diverged.
    """
    found: list[Record] = []
    for name in names:
        record = read(folder / entry.scale / "tuning" / name / "sweep.json")
        if record is None or (
            len(record["settings"]) < len(Grid(**record["grid"]).settings())
        ):
            raise NotReady(f"{entry.name} needs {name}, which is not finished")
        perturbation = record["config"]["perturbation"]
        found += [{"perturbation": perturbation, **x} for x in record["settings"]]
    found = [x for x in found if x["score"] is not None]
    if not found:
        raise RunError(f"every setting of {', '.join(names)} diverged")
    return sorted(found, key=lambda x: -float(x["score"]["mean"]))


def finalists_of(entry: Finals, folder: Path) -> list[Record]:
    """Return the best settings of its searches, the best first; errors as `ranked`."""
    return ranked(entry.searches, entry, folder)[: entry.count]


def run_of_final(record: Record | None, finalist: Record, seed: int) -> Record | None:
    """Return the run of a setting from a seed, if there is one."""
    key = finalist["perturbation"], settings_of(finalist), seed
    for run in record["runs"] if record else ():
        if (run["perturbation"], settings_of(run), run["seed"]) == key:
            found: Record = run
            return found
    return None


def best_of(
    finalists: Sequence[Record], record: Record, seeds: Sequence[int]
) -> Record | None:
    """Return the best by the mean over all seeds; None while some are missing."""
    best, highest = None, -math.inf
    for finalist in finalists:
        scores = [finalist["score"]["mean"]]
        for seed in seeds:
            run = run_of_final(record, finalist, seed)
            if run is None:
                return None
            accuracies = run["accuracy_by_bits"]
            scores.append(np.mean([*accuracies.values()]) if accuracies else 0.0)
        if np.mean(scores) > highest:
            highest = float(np.mean(scores))
            best = finalist | {"score_of_all_seeds": highest}
    return best


def chosen(row: Row, folder: Path) -> Config:
    """Return the config of a row with the best setting that was found for it.

    Raises:
      NotReady: the finals are not finished.
    """
    if row.finals is None:
        return row.config
    record = read(folder / row.scale / "tuning" / f"{row.finals}.json")
    if record is None or record["best"] is None:
        raise NotReady(f"{row.name} needs {row.finals}, which is not finished")
    best = record["best"]
    return dataclasses.replace(
        row.config, perturbation=best["perturbation"], **settings_of(best)._asdict()
    )


def differences(record: Record, config: Config) -> list[str]:
    """Tell in which fields a record is of another config; the seed does not count."""
    before = dataclasses.asdict(Config()) | record["config"]
    return [
        f"{name} was {before[name]!r}, now {value!r}"
        for name, value in dataclasses.asdict(config).items()
        if name != "seed" and _plain(before[name]) != _plain(value)
    ]


def joined(before: Record | None, new: Record) -> Record:
    """Add new runs to those that there are.

    Raises:
      RunError: they are of other images.
    """
    if before is None:
        return new
    if before.get("data") != new.get("data"):
        raise RunError(
            f"seeds {[run['seed'] for run in before['runs']]} were trained on other "
            "images: bring those back, or delete the result to begin again"
        )
    by_seed = {run["seed"]: run for run in (*before["runs"], *new["runs"])}
    seconds = round(before["seconds"] + new["seconds"], 1)
    runs = [by_seed[seed] for seed in sorted(by_seed)]
    return before | new | {"seconds": seconds, "runs": runs}


def _one_of_each(grid: Grid) -> Grid:
    """Return the grid with one h, gamma and strength."""
    first = {name: getattr(grid, name)[:1] for name in ("h", "gamma", "strength")}
    return dataclasses.replace(grid, **first)


def _plain(value: Any) -> Any:
    return [*value] if isinstance(value, tuple) else value
