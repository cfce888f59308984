"""How a row is computed, and its result written."""

import argparse
import dataclasses
import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import jax

import hero_jax
from examples.image_classification import config as configs
from examples.image_classification import datasets, evaluate, input_pipeline, results
from examples.image_classification.config import Config
from examples.image_classification.errors import NotFiniteError, RunError
from examples.image_classification.run import Options, open_pipeline, read, run
from examples.image_classification.stopping import Stopped
from examples.image_classification.train import make_model

from . import surface, tuning, unfinished
from .entries import Row

Record = dict[str, Any]

CURVES = (
    *("train_loss", "train_accuracy", "train_accuracy_clean"),
    *("test_loss", "test_accuracy", "hessian_norm", "penalty", "grad_norm"),
)
"""Columns of a run's metrics that stand in its record."""


def missing(row: Row, folder: Path) -> list[int]:
    """Return the seeds of which there is no run."""
    record = read(row.path(folder)) or {"runs": []}
    done = {run["seed"] for run in record["runs"]}
    return [seed for seed in row.seeds if seed not in done]


def differences(record: Record, config: Config) -> list[str]:
    """Tell in which fields a record is of another config; the seed does not count."""
    before = dataclasses.asdict(Config()) | record["config"]
    before |= {"bits": tuple(before["bits"]), "seed": config.seed}
    return configs.differences(before, config)


def compute(row: Row, options: argparse.Namespace) -> None:
    """Compute what is missing of a row, until `options.stop` says to stop.

    `RunError` if its result is of another config or other images, or all settings that
    were tried diverged; `Stopped` when what is there is kept.
    """
    _check_data(row, options)
    if tuning.chosen(row, options.results) is None:
        tuning.tune(row, options)
    config = tuning.chosen(row, options.results)
    assert config is not None
    path = row.path(options.results)
    for seed in missing(row, options.results):
        before = read(path)
        if before is not None and (different := differences(before, config)):
            raise RunError(
                f"{path} has runs of another config ({'; '.join(different)}): delete "
                "it to begin again"
            )
        name = name_of(config, seed)
        folder = options.work / row.scale / row.name / name
        kept = options.results / row.scale / "unfinished" / row.name / name
        folder.mkdir(parents=True, exist_ok=True)
        unfinished.copy(kept, folder)
        try:
            new = _trained(row, dataclasses.replace(config, seed=seed), folder, options)
        except Stopped:
            unfinished.copy(folder, kept)
            raise
        new |= row.described(options, config)
        if before is not None:
            if before["data"] != new["data"]:
                raise RunError(f"{path} has runs of other images: delete it")
            new["seconds"] = round(before["seconds"] + new["seconds"], 1)
            new["runs"] += before["runs"]
            new["runs"].sort(key=lambda run: int(run["seed"]))
        path.parent.mkdir(parents=True, exist_ok=True)
        results.write_json(path, (before or {}) | new)
        unfinished.forget(kept)
        shutil.rmtree(folder)
        if options.stop.now() and missing(row, options.results):
            raise Stopped(f"stopped after seed {seed}; the same command goes on.")


def name_of(config: Config, seed: int) -> str:
    """Return the name of a run's folder, another one for every config.

    A field that is added to `Config` later leaves the name as it was.
    """
    defaults = dataclasses.asdict(Config())
    fields = dataclasses.asdict(config).items()
    changed = {x: value for x, value in fields if value != defaults[x] and x != "seed"}
    text = json.dumps(changed, sort_keys=True)
    return f"seed_{seed}-{zlib.crc32(text.encode()):08x}"


def _trained(
    row: Row, config: Config, folder: Path, options: argparse.Namespace
) -> Record:
    """Train and measure one seed; return what the record of the row says of it."""
    run_options = Options(out=folder, keep=1, **row.where(options))
    revisions = unfinished.note_revision(folder, jax.device_count())
    of_run: Record = {"seed": config.seed, "revisions": revisions}
    try:
        record = run(config, run_options, options.stop)
    except NotFiniteError as error:
        with open_pipeline(config, run_options) as pipeline:
            data = pipeline.checksum
        of_run |= {"accuracy_by_bits": None, "diverged": str(error).split(". ")[0]}
        return {"data": data, "seconds": 0.0, "runs": [of_run]}
    if options.stop.now():  # what follows takes some minutes
        raise Stopped("stopped before the measurements; the same command resumes.")
    epochs = {x: [float(row[x]) for row in record["epochs"]] for x in CURVES}
    of_run |= {x: record[x] for x in ("test_loss", "accuracy_by_bits")}
    of_run |= {"epochs": epochs, "seconds": record["seconds"]}
    names = ("parameters", "train_images_per_epoch", "test_images", "seconds")
    of_row = {name: record[name] for name in names} | {"together": "one_by_one"}
    weights = folder / "weights.safetensors"
    variables = hero_jax.quant.load(weights)
    with open_pipeline(config, run_options) as pipeline:
        of_row["data"] = pipeline.checksum
        tested = evaluate.make_evaluate(make_model(config, pipeline, True), pipeline)
        networks = [evaluate.quantized(variables, x, axis=-1) for x in config.bits]
        accuracies = (x.accuracy for x in tested(networks))
        of_run["accuracy_by_bits_per_channel"] = {
            str(bits): x for bits, x in zip(config.bits, accuracies, strict=True)
        }
        if pipeline.on_device:
            wanted = row.surface and config.seed == row.seeds[0]
            eigenvalue, losses = surface.measure(config, pipeline, variables, wanted)
            of_run["largest_eigenvalue"] = eigenvalue
            of_row |= losses
    shutil.copy(weights, folder.parent / f"{row.name}_seed_{config.seed}.safetensors")
    return of_row | {"runs": [of_run]}


def _check_data(row: Row, options: argparse.Namespace) -> None:
    """Raise `RunError` if CIFAR-10 is another data set, before hours are spent."""
    if (place := row.where(options)["dataset_path"]) is not None:
        data = datasets.load(place)
        facts = data.num_classes, input_pipeline.len_of(data.train)
        if facts != (10, 50_000):
            raise RunError(
                "--dataset must be CIFAR-10, which has 10 classes and 50000 training "
                f"images, got {place!r} with {facts[0]} and {facts[1]}"
            )
