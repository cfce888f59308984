"""How the runs of an entry are computed, and its result written."""

import csv
import dataclasses
import importlib.util
import json
import shutil
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

import hero_jax
from examples.experiments.sweep import search
from examples.experiments.sweep.grid import Run, settings_of
from examples.experiments.sweep.many_runs import ManyRuns, Together
from examples.image_classification import (
    datasets,
    devices,
    evaluate,
    input_pipeline,
    results,
)
from examples.image_classification.array_pipeline import ArrayPipeline
from examples.image_classification.config import Config
from examples.image_classification.logbook import say
from examples.image_classification.loop import NotFiniteError, RunError
from examples.image_classification.run import Options as RunOptions
from examples.image_classification.run import open_pipeline, read, run
from examples.image_classification.stopping import Stop, Stopped
from examples.image_classification.train import Settings, make_model

from . import records, surface, unfinished
from .entries import Entry, Finals, Row, Scale, Search
from .records import Record
from .training import CURVES, train

COMMAND = "python -m examples.experiments.reproduction"

MEASURED = ("test_loss", "test_accuracy", "hessian_norm", "penalty", "grad_norm")
"""Columns of a run's metrics that stand in its record, beside `CURVES`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Where and how to compute.

    Attributes:
      results: folder of the results that are kept.
      work: folder of checkpoints and of the final weights of the scale "budget".
      host_devices: parts of a CPU that share out the images of that scale.
      dataset: file or folder that stands for CIFAR-10.
      data_dir: where TensorFlow data sets lie.
      download: let TensorFlow Datasets fetch a data set that is not there.
      seeds: others than those of the row.
      together: how several seeds or settings are computed; by the device if None.
      at_once: runs of a search that "vmap" computes at once, the least that can be done
        in one piece; all if None.
      stop: when to stop.
      quiet: whether to print nothing.
    """

    results: Path
    work: Path
    host_devices: int | None = None
    dataset: str | None = None
    data_dir: Path | None = None
    download: bool = False
    seeds: tuple[int, ...] | None = None
    together: Together | None = None
    at_once: int | None = None
    stop: Stop = dataclasses.field(default_factory=Stop)
    quiet: bool = False

    @property
    def way(self) -> Together:
        """How several seeds are computed."""
        return search.Options(together=self.together).way

    def place_of(self, config: Config) -> str | None:
        """Return the file or folder that stands for a config's data set, if any."""
        return self.dataset if config.dataset == "cifar10" else None

    def located(self, config: Config) -> Config:
        """Return the config with the data set where it lies."""
        place = self.place_of(config)
        return config if place is None else dataclasses.replace(config, dataset=place)

    def command(self, entry: Entry) -> str:
        """Return the command that computes an entry."""
        words = [COMMAND, "--scale", entry.scale, "--only", entry.name]
        words += ["--dataset", "DATA"] if self.dataset else ["--data-dir", "DIR"]
        if entry.scale == "budget" and self.host_devices is not None:
            words += ["--host-devices", str(self.host_devices)]
        if self.seeds is not None:
            words += ["--seeds", *map(str, self.seeds)]
        return " ".join(words)


class Worker:
    """Computes entries; keeps the compiled program for the next one.

    Args:
      options: where and how.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self._program: tuple[Config, int, ManyRuns, ArrayPipeline] | None = None

    def do(self, entry: Entry) -> bool:
        """Compute what is missing of an entry.

        Returns:
          Whether all is there; if not, it was stopped.

        Raises:
          NotReady: what it needs is not there.
          RunError: its result is of another config or other images, or nothing came
            out of what it needs.
        """
        if isinstance(entry, Search):
            return self._search(entry)
        if isinstance(entry, Finals):
            return self._finals(entry)
        return self._row(entry)

    def _search(self, entry: Search) -> bool:
        options = self._options
        config, grid = records.settled(entry, options.results)
        path = records.path_of(entry, options.results)
        given = search.Options(
            out=path.parent,
            data_dir=options.data_dir,
            download=options.download,
            together=options.together,
            at_once=options.at_once,
            quiet=options.quiet,
            dataset_path=options.place_of(config),
        )
        try:
            search.sweep(config, grid, given, options.stop)
        except Stopped:
            return False
        finally:
            if record := read(path):
                told = record["environment"] | {"command": options.command(entry)}
                results.write_json(path, record | {"environment": told})
        return True

    def _finals(self, entry: Finals) -> bool:
        options = self._options
        path = records.path_of(entry, options.results)
        finalists = records.finalists_of(entry, options.results)
        record = read(path) or {"runs": [], "seconds": 0.0}
        longest = 0.0
        for finalist in sorted(finalists, key=lambda x: str(x["perturbation"])):
            direction, settings = finalist["perturbation"], settings_of(finalist)
            config = dataclasses.replace(entry.config, perturbation=direction)
            seeds = [
                seed
                for seed in entry.seeds
                if records.run_of_final(record, finalist, seed) is None
            ]
            size = max(1, len(seeds)) if options.way == "vmap" else 1
            for k in range(0, len(seeds), size):
                start = time.monotonic()
                if longest and options.stop.now(longest):
                    return False
                chunk = seeds[k : k + size]
                many, pipeline = self._many(config, size)
                runs = [Run(settings, seed, config.label_noise) for seed in chunk]
                trained = many.train(runs, lambda _: None)
                new = [
                    {
                        "perturbation": direction,
                        **settings._asdict(),
                        "seed": seed,
                        "accuracy_by_bits": result and result.accuracy_by_bits,
                    }
                    for seed, result in zip(chunk, trained, strict=True)
                ]
                longest = max(longest, time.monotonic() - start)
                seconds = round(time.monotonic() - start, 1)
                described = self._described(entry, config) | {
                    "data": pipeline.checksum,
                    "seconds": seconds,
                    "candidates": finalists,
                    "runs": [*record["runs"], *new],
                }
                if record.get("data", pipeline.checksum) != pipeline.checksum:
                    raise RunError(f"{path} is of other images: delete it")
                described["seconds"] += record.get("seconds", 0.0)
                record = described
                self._write(path, record, finalists, entry)
                say(f"{entry.name}: {len(record['runs'])} runs", options.quiet)
        self._write(path, record, finalists, entry)
        return True

    def _write(
        self, path: Path, record: Record, finalists: list[Record], entry: Finals
    ) -> None:
        best = records.best_of(finalists, record, entry.seeds)
        results.write_json(path, record | {"candidates": finalists, "best": best})

    def _row(self, row: Row) -> bool:
        options = self._options
        config = records.chosen(row, options.results)
        path = records.path_of(row, options.results)
        record = read(path)
        if record is not None and (different := records.differences(record, config)):
            raise RunError(
                f"{path} has runs of another config ({'; '.join(different)}): delete "
                "it to begin again"
            )
        done = {run["seed"] for run in record["runs"]} if record else set()
        seeds = [seed for seed in options.seeds or row.seeds if seed not in done]
        ordinary = config.augmentation == "resized_crop" or row.scale == "budget"
        at_once = len(seeds) if options.way == "vmap" and not ordinary else 1
        for k in range(0, len(seeds), max(1, at_once)):
            if k and options.stop.now():
                return False
            chunk = seeds[k : k + at_once]
            folder = self._folder(row, config, chunk)
            of_chunk = self._ordinary if ordinary else self._at_once
            new = of_chunk(row, config, chunk, folder)
            if new is None:
                return False
            path.parent.mkdir(parents=True, exist_ok=True)
            new = self._described(row, config) | new
            joined = records.joined(read(path), new)
            unfinished.forget(self._unfinished(folder))
            results.write_json(path, joined)
            shutil.rmtree(folder)
        return True

    def _at_once(
        self, row: Row, config: Config, seeds: Sequence[int], folder: Path
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
            folder,
            self._options.stop,
            self._options.quiet,
        )
        if trained is None:
            return None
        record: Record = {
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
        """Return the program for such runs, the last one if it will do.

        Raises:
          RunError: the data are not what they stand for.
        """
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
            if config.dataset == "cifar10" and pipeline.num_classes != 10:
                raise RunError(
                    "--dataset must be CIFAR-10, which has 10 classes, got "
                    f"{self._options.dataset!r} with {pipeline.num_classes}"
                )
            many = ManyRuns(common, pipeline, size, self._options.way)
            self._program = common, size, many, pipeline
        return self._program[2:]

    def _ordinary(
        self, row: Row, config: Config, seeds: Sequence[int], folder: Path
    ) -> Record | None:
        """Train one seed by an ordinary run; None if it was stopped."""
        if row.scale == "budget":
            if importlib.util.find_spec("safetensors") is None:  # now, not hours later
                raise RunError('the scale "budget" needs the package safetensors.')
            self._check_cifar10(config)
        (seed,) = seeds
        config = dataclasses.replace(config, seed=seed)
        stop, kept = self._options.stop, self._unfinished(folder)
        options = RunOptions(
            out=folder,
            data_dir=self._options.data_dir,
            dataset_path=self._options.place_of(config),
            download=self._options.download,
            keep=1,
            quiet=self._options.quiet,
        )
        unfinished.bring_back(kept, folder)
        noted = unfinished.note_revision(folder, jax.device_count())
        found: Record = {"seed": seed, "revisions": noted}
        try:
            record = run(config, options, stop)
        except Stopped:
            unfinished.keep(folder, kept)
            return None
        except NotFiniteError as error:
            with open_pipeline(config, options) as pipeline:
                data = pipeline.checksum
            found |= {"accuracy_by_bits": None, "diverged": str(error).split(". ")[0]}
            return {"data": data, "seconds": 0.0, "runs": [found | _so_far(folder)]}
        found |= {
            "test_loss": record["test_loss"],
            "accuracy_by_bits": record["accuracy_by_bits"],
            "epochs": _curves(record["epochs"]),
            "seconds": record["seconds"],
        }
        names = ("parameters", "train_images_per_epoch", "test_images", "seconds")
        told = {name: record[name] for name in names} | {"together": "one_by_one"}
        if row.scale == "budget":
            unfinished.keep(folder, kept)
            if stop.now():  # what follows takes some minutes
                return None
            weights = hero_jax.quant.load(folder / "weights.safetensors")
            more, of_row = _around(row, config, weights, options)
            found, told = found | more, told | of_row
            name = f"{row.name}_seed_{seed}.safetensors"
            shutil.copy(folder / "weights.safetensors", folder.parent / name)
        return told | {"runs": [found]}

    def _check_cifar10(self, config: Config) -> None:
        """Raise `RunError` if the file that stands for CIFAR-10 is another data set."""
        place = self._options.place_of(config)
        if place is None:
            return
        given = datasets.load(place)
        facts = given.num_classes, input_pipeline.len_of(given.train)
        if facts != (10, 50_000):
            raise RunError(
                "--dataset must be CIFAR-10, which has 10 classes and 50000 training "
                f"images, got {place!r} with {facts[0]} and {facts[1]}"
            )

    def _unfinished(self, folder: Path) -> Path:
        """Return the folder beside the results that holds what was stopped in one."""
        scale, *rest = folder.relative_to(self._options.work).parts
        return self._options.results.joinpath(scale, "unfinished", *rest)

    def _folder(self, row: Row, config: Config, seeds: Sequence[int]) -> Path:
        """Return the folder of checkpoints, another one for every config."""
        # A field that is added later leaves the name as it was.
        defaults = dataclasses.asdict(Config())
        changed = {
            name: value
            for name, value in dataclasses.asdict(config).items()
            if value != defaults[name]
        }
        fields = json.dumps(changed, sort_keys=True)
        name = f"seed_{'_'.join(map(str, seeds))}-{zlib.crc32(fields.encode()):08x}"
        folder = self._options.work / row.scale / row.name / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _described(self, entry: Entry, config: Config) -> Record:
        command = self._options.command(entry)
        return {
            "environment": results.environment() | {"command": command},
            "config": dataclasses.asdict(config),
        }


def _curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Return columns of metrics by epoch."""
    names = (*CURVES, *MEASURED)
    return {name: [float(row[name]) for row in rows] for name in names}


def _so_far(folder: Path) -> Record:
    """Return what the files of a run tell of its epochs."""
    rows: dict[str, list[dict[str, str]]] = {"metrics": [], "times": []}
    for name in rows:
        if (file := folder / f"{name}.csv").exists():
            rows[name] = [*csv.DictReader(file.read_text().splitlines())]
    seconds = sum(float(row["seconds"]) for row in rows["times"])
    return {"epochs": _curves(rows["metrics"]), "seconds": seconds}


def on_this_machine() -> Scale:
    """Return the scale at which results can be expected here."""
    return "cpu" if jax.default_backend() == "cpu" else "full"


def _around(
    row: Row, config: Config, variables: evaluate.Variables, options: RunOptions
) -> tuple[Record, Record]:
    """Return what else is measured of final weights: of the run, and of its row."""
    with open_pipeline(config, options) as pipeline:
        assert isinstance(pipeline, ArrayPipeline)
        tested = evaluate.make_evaluate(make_model(config, pipeline, True), pipeline)
        networks = [evaluate.quantized(variables, x, axis=-1) for x in config.bits]
        accuracies = [result.accuracy for result in tested(networks)]
        of_run: Record = {
            "accuracy_by_bits_per_channel": dict(
                zip(map(str, config.bits), accuracies, strict=True)
            ),
            "largest_eigenvalue": surface.largest_eigenvalue(
                config, pipeline, variables
            ),
        }
        if not row.surface or config.seed != row.seeds[0]:
            return of_run, {"data": pipeline.checksum}
        measured = surface.measure(config, pipeline, variables)
        return of_run, {"data": pipeline.checksum, "surface": measured}
