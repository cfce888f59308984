"""What there is of an entry, and how more of it is computed."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .. import devices, input_pipeline, results, search
from ..array_pipeline import ArrayPipeline
from ..config import Config
from ..grid import Grid, Run, settings_of
from ..logbook import say
from ..loop import RunError, Stopped
from ..many_runs import ManyRuns, Together
from ..run import Options as RunOptions
from ..run import locked, read, run
from ..train import Settings
from . import surface
from .entries import Entry, Finals, Row, Scale, Search
from .training import CURVES, Limits, train

Record = dict[str, Any]

COMMAND = "python -m examples.image_classification.reproduce"

MEASURED = ("test_loss", "test_accuracy", "hessian_norm", "penalty", "grad_norm")
"""Columns of a run's metrics that stand in its record, beside `CURVES`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Where and how to compute.

    Attributes:
      results: folder of the results that are kept.
      work: folder of checkpoints, which may be deleted when all is done.
      dataset: file or folder that stands for the data set of that name.
      data_dir: where TensorFlow data sets lie.
      download: let TensorFlow Datasets fetch a data set that is not there.
      seeds: others than those of the row.
      together: how several seeds or settings are computed; by the device if None.
      at_once: runs of a search that "vmap" computes at once, the least that can be done
        in one piece; all if None.
      limits: when to stop.
    """

    results: Path
    work: Path
    dataset: str | None = None
    data_dir: Path | None = None
    download: bool = False
    seeds: tuple[int, ...] | None = None
    together: Together | None = None
    at_once: int | None = None
    limits: Limits = dataclasses.field(default_factory=Limits)

    def way(self) -> Together:
        """How several seeds are computed."""
        return search.Options(together=self.together).way

    def located(self, config: Config) -> Config:
        """Return the config with the data set where it lies."""
        if self.dataset is None:
            return config
        return dataclasses.replace(config, dataset=self.dataset)


def path_of(entry: Entry, folder: Path) -> Path:
    """Return the file of an entry's result."""
    if isinstance(entry, Search):
        return folder / entry.scale / "tuning" / entry.name / "sweep.json"
    if isinstance(entry, Finals):
        return folder / entry.scale / "tuning" / f"{entry.name}.json"
    return folder / entry.scale / f"{entry.name}.json"


def missing(entry: Entry, folder: Path, seeds: Sequence[int] | None = None) -> int:
    """Return how many of an entry's runs there are not."""
    record = read(path_of(entry, folder)) or {"runs": []}
    if isinstance(entry, Search):
        if entry.after:
            first = {x: getattr(entry.grid, x)[:1] for x in ("h", "gamma", "strength")}
            total = len(dataclasses.replace(entry.grid, **first).runs())
            return total - len(record["runs"])
        done = {(*settings_of(run), run["seed"]) for run in record["runs"]}
        return len({(*run.settings, run.seed) for run in entry.grid.runs()} - done)
    if isinstance(entry, Finals):
        if record.get("best") is not None:
            return 0
        return entry.count * len(entry.seeds) - len(record["runs"])
    wanted = entry.seeds if seeds is None else seeds
    return len({*wanted} - {run["seed"] for run in record["runs"]})


def settled(entry: Search, folder: Path) -> tuple[Config, Grid]:
    """Return config and grid of a search, with the best of those that it goes on from.

    Raises:
      NotReady: one of those is not finished.
    """
    if not entry.after:
        return entry.config, entry.grid
    best = ranked(entry.after, entry, folder)[0]
    kept = {name: (best[name],) for name in ("h", "gamma", "strength")}
    config = dataclasses.replace(entry.config, perturbation=best["perturbation"])
    return config, dataclasses.replace(entry.grid, **kept)


def chosen(row: Row, folder: Path) -> Config:
    """Return the config of a row with the best setting that was found for it.

    Raises:
      RunError: the finals are not finished.
    """
    if row.finals is None:
        return row.config
    path = folder / row.scale / "tuning" / f"{row.finals}.json"
    record = read(path)
    if record is None or record["best"] is None:
        raise NotReady(f"{row.name} needs {row.finals}, which are not finished.")
    best = record["best"]
    return dataclasses.replace(
        row.config, perturbation=best["perturbation"], **settings_of(best)._asdict()
    )


def ranked(names: Sequence[str], entry: Entry, folder: Path) -> list[Record]:
    """Return the settings of searches that an entry needs, the best first.

    Raises:
      NotReady: a search is not finished.
    """
    found: list[Record] = []
    for name in names:
        record = read(folder / entry.scale / "tuning" / name / "sweep.json")
        grid = None if record is None else Grid(**record["grid"])
        if (
            record is None
            or grid is None
            or (len(record["settings"]) < len(grid.settings()))
        ):
            raise NotReady(f"{entry.name} needs {name}, which is not finished.")
        perturbation = record["config"]["perturbation"]
        found += [{"perturbation": perturbation, **x} for x in record["settings"]]
    found = [x for x in found if x["score"] is not None]
    found.sort(key=lambda x: float(x["score"]["mean"]), reverse=True)
    return found


def best_of(
    finalists: Sequence[Record], rows: Sequence[Record], seeds: Sequence[int]
) -> Record | None:
    """Return the best by the mean over all seeds; None while some are missing."""
    best, highest = None, -math.inf
    for finalist in finalists:
        runs = [x for x in rows if x["rank"] == finalist["rank"]]
        if {x["seed"] for x in runs} != {*seeds}:
            return None
        scores = [finalist["score"]["mean"]]
        for x in runs:
            accuracies = x["accuracy_by_bits"]
            scores.append(np.mean([*accuracies.values()]) if accuracies else -math.inf)
        if np.mean(scores) > highest:
            highest = float(np.mean(scores))
            best = finalist | {"score_of_all_seeds": highest}
    return best


class NotReady(RunError):  # noqa: N818 - no error
    """What an entry needs is not there yet; the message says what."""


class Worker:
    """Computes entries; keeps the compiled program for the next one.

    Args:
      options: where and how.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self._program: tuple[Config, int, ManyRuns, ArrayPipeline] | None = None

    def search(self, entry: Search) -> bool:
        """Do the runs of a search that are missing; return whether all are there."""
        options = self._options
        out = path_of(entry, options.results).parent
        minutes = (options.limits.deadline - time.monotonic()) / 60.0
        with contextlib.suppress(Stopped):
            search.sweep(
                *settled(entry, options.results),
                search.Options(
                    out=out,
                    data_dir=options.data_dir,
                    download=options.download,
                    together=options.together,
                    at_once=options.at_once,
                    minutes=None if math.isinf(minutes) else max(minutes, 0.0),
                    quiet=options.limits.quiet,
                    dataset_path=options.dataset,
                ),
            )
        path = path_of(entry, options.results)
        if record := read(path):
            environment = record["environment"] | {"command": _command(entry)}
            results.write_json(path, record | {"environment": environment})
        return not missing(entry, options.results)

    def finals(self, entry: Finals) -> bool:
        """Try the best settings of searches from more seeds; return whether all are.

        Raises:
          RunError: a search is not finished.
        """
        options = self._options
        path = path_of(entry, options.results)
        found = ranked(entry.searches, entry, options.results)[: entry.count]
        finalists = [{"rank": k, **x} for k, x in enumerate(found, 1)]
        record = read(path) or {"runs": []}
        rows: list[Record] = record["runs"]
        way, longest = options.way(), 0.0
        for finalist in finalists:
            config = dataclasses.replace(
                entry.config, perturbation=finalist["perturbation"]
            )
            settings = settings_of(finalist)
            done = {x["seed"] for x in rows if x["rank"] == finalist["rank"]}
            seeds = [seed for seed in entry.seeds if seed not in done]
            size = max(1, len(seeds)) if way == "vmap" else 1
            for k in range(0, len(seeds), size):
                start = time.monotonic()
                if longest and start + longest > options.limits.deadline:
                    return False
                chunk = seeds[k : k + size]
                many, pipeline = self._many(config, size)
                runs = [Run(settings, seed, config.label_noise) for seed in chunk]
                trained = many.train(runs, lambda _: None)
                rows += [
                    {
                        "rank": finalist["rank"],
                        "perturbation": finalist["perturbation"],
                        **settings._asdict(),
                        "seed": seed,
                        "accuracy_by_bits": result and result.accuracy_by_bits,
                    }
                    for seed, result in zip(chunk, trained, strict=True)
                ]
                longest = max(longest, time.monotonic() - start)
                say(f"{entry.name}: {len(rows)} runs", options.limits.quiet)
                record = {
                    "environment": results.environment() | {"command": _command(entry)},
                    "config": dataclasses.asdict(config),
                    "data": pipeline.checksum,
                    "candidates": finalists,
                    "best": best_of(finalists, rows, entry.seeds),
                    "runs": rows,
                }
                results.write_json(path, record)
        return True

    def row(self, row: Row, config: Config) -> bool:
        """Train the seeds of a row that are missing; return whether all are there.

        Args:
          row: which.
          config: with its settings.

        Raises:
          RunError: there is a result of another config.
        """
        path = path_of(row, self._options.results)
        wanted = self._options.seeds or row.seeds
        record = read(path)
        if record is not None:
            _check_same(path, record, config)
        done = [] if record is None else [run["seed"] for run in record["runs"]]
        seeds = [seed for seed in wanted if seed not in done]
        at_once = 1
        if self._options.way() == "vmap" and config.augmentation != "resized_crop":
            at_once = max(1, len(seeds))
        for k in range(0, len(seeds), at_once):
            if k and time.monotonic() > self._options.limits.deadline:
                return False
            chunk = seeds[k : k + at_once]
            new = (
                self._from_files(row, config, chunk)
                if (config.augmentation == "resized_crop")
                else self._from_arrays(row, config, chunk)
            )
            if new is None:
                return False
            record = _joined(read(path), new)
            path.parent.mkdir(parents=True, exist_ok=True)
            results.write_json(path, record)
        return True

    def _from_arrays(
        self, row: Row, config: Config, seeds: Sequence[int]
    ) -> Record | None:
        """Train some seeds at once; None if it was stopped."""
        many, pipeline = self._many(config, len(seeds))
        runs = [Run(Settings.of(config), seed, config.label_noise) for seed in seeds]
        trained = train(
            many,
            config,
            pipeline.checksum,
            pipeline.steps,
            runs,
            self._folder(row, seeds),
            self._options.limits,
        )
        if trained is None:
            return None
        record = _described(row, config) | {
            "data": pipeline.checksum,
            "parameters": many.parameters,
            "train_images_per_epoch": pipeline.steps * config.micro_batch,
            "test_images": pipeline.num_test,
            "together": many.together,
            "seconds": round(trained.seconds, 1),
            "runs": trained.records,
        }
        if row.surface and row.seeds[0] in seeds:
            of_seed = pipeline.drawn(row.seeds[0], config.label_noise)
            variables = trained.networks[seeds.index(row.seeds[0])]
            record["surface"] = surface.measure(config, of_seed, variables)
        return record

    def _many(self, config: Config, size: int) -> tuple[ManyRuns, ArrayPipeline]:
        """Return the program for such runs, the last one if it will do."""
        common = dataclasses.replace(
            config, seed=0, label_noise=0.0, **Settings.of(Config())._asdict()
        )
        if self._program is None or self._program[:2] != (common, size):
            pipeline = input_pipeline.create(
                self._options.located(common),
                data_dir=self._options.data_dir,
                download=self._options.download,
                devices=devices.choose(),
            )
            assert isinstance(pipeline, ArrayPipeline)
            many = ManyRuns(common, pipeline, size, self._options.way())
            self._program = common, size, many, pipeline
        return self._program[2:]

    def _from_files(
        self, row: Row, config: Config, seeds: Sequence[int]
    ) -> Record | None:
        """Train one seed by an ordinary run; None if it was stopped."""
        (seed,) = seeds
        left = (self._options.limits.deadline - time.monotonic()) / 60.0
        options = RunOptions(
            out=self._folder(row, seeds),
            data_dir=self._options.data_dir,
            download=self._options.download,
            minutes=None if math.isinf(left) else max(left, 0.0),
            quiet=self._options.limits.quiet,
        )
        located = dataclasses.replace(self._options.located(config), seed=seed)
        try:
            record = run(located, options)
        except Stopped:
            return None
        names = (*CURVES, *MEASURED)
        found = {
            "seed": seed,
            "test_loss": record["test_loss"],
            "accuracy_by_bits": record["accuracy_by_bits"],
            "epochs": {x: [epoch[x] for epoch in record["epochs"]] for x in names},
        }
        kept = ("parameters", "train_images_per_epoch", "test_images", "seconds")
        described = _described(row, config) | {name: record[name] for name in kept}
        return described | {"together": "one_by_one", "runs": [found]}

    def _folder(self, row: Row, seeds: Sequence[int]) -> Path:
        name = "seed_" + "_".join(map(str, seeds))
        folder = self._options.work / row.scale / row.name / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def on_this_machine() -> Scale:
    """Return the scale at which results can be expected here."""
    return "cpu" if jax.default_backend() == "cpu" else "full"


@contextlib.contextmanager
def held(entry: Entry, work: Path) -> Iterator[bool]:
    """Take an entry in hand, if no other process has it; tell whether it is ours."""
    folder = work / entry.scale / entry.name
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(folder))
        except RunError:
            yield False
        else:
            yield True


def _command(entry: Entry) -> str:
    return f"{COMMAND} --scale {entry.scale} --only {entry.name}"


def _described(row: Row, config: Config) -> Record:
    return {
        "environment": results.environment() | {"command": _command(row)},
        "config": dataclasses.asdict(config),
    }


def _check_same(path: Path, record: Record, config: Config) -> None:
    fields = dataclasses.asdict(config)
    different = [
        f"{name} was {record['config'].get(name)!r}, now {value!r}"
        for name, value in fields.items()
        if name != "seed" and _plain(record["config"].get(name)) != _plain(value)
    ]
    if different:
        raise RunError(
            f"{path} has runs of another config ({'; '.join(different)}): delete it to "
            "begin again."
        )


def _plain(value: Any) -> Any:
    return [*value] if isinstance(value, tuple) else value


def _joined(before: Record | None, new: Record) -> Record:
    """Add new runs to those that there are."""
    if before is None:
        return new
    runs = sorted([*before["runs"], *new["runs"]], key=lambda run: int(run["seed"]))
    return before | new | {"seconds": before["seconds"] + new["seconds"], "runs": runs}
