"""A whole sweep: what is missing, in chunks; what it comes to."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from examples.image_classification import config as configs
from examples.image_classification import datasets, devices, input_pipeline, results
from examples.image_classification.array_pipeline import ArrayPipeline
from examples.image_classification.config import Config
from examples.image_classification.logbook import Progress, say, tell
from examples.image_classification.loop import RunError
from examples.image_classification.run import check_folder, locked, read
from examples.image_classification.stopping import Stop, Stopped

from . import grid, heat_maps
from . import speed as sweep_speed
from .grid import Grid, Row, Run
from .many_runs import ManyRuns, Together


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Where and how to run; none of it changes the numbers, but for rounding.

    Attributes:
      out: folder to write; the command line makes it `runs/CONFIG/sweep` if None.
      data_dir: where TensorFlow data sets lie; their own default if None.
      download: let TensorFlow Datasets fetch a data set that is not there.
      together: "vmap" computes several runs at once, "one_by_one" lets them take
        turns; turns on CPUs and "vmap" elsewhere if None.
      at_once: runs that "vmap" computes at once; all if None, for which the device
        must have the memory.
      measure: only measure both ways, for a few steps.
      dataset_path: file or folder to read in place of the data set that the config
        names.
      minutes: stop before a chunk of runs, other than the first, that would end later;
        no limit if None.
      quiet: print nothing and show no progress bar.
    """

    out: Path | None = None
    data_dir: Path | None = None
    download: bool = False
    together: Together | None = None
    at_once: int | None = None
    measure: bool = False
    dataset_path: str | None = None
    minutes: float | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        """Raise `ValueError` where a field is out of range."""
        if self.minutes is not None and self.minutes < 0:
            raise ValueError(f"minutes must be at least 0, got {self.minutes}.")
        if self.at_once is None:
            return
        if self.at_once < 1:
            raise ValueError(f"at_once must be at least 1, got {self.at_once}.")
        if self.way == "one_by_one" and not self.measure:
            raise ValueError(
                "at_once must be None where runs take turns, got "
                f"{self.at_once}: use --together vmap."
            )

    @property
    def way(self) -> Together:
        """How to run."""
        on_cpu = jax.default_backend() == "cpu"
        return self.together or ("one_by_one" if on_cpu else "vmap")

    def located(self, config: Config) -> Config:
        """Return the config with the data set where it lies."""
        return dataclasses.replace(config, dataset=self.dataset_path or config.dataset)


FEW = 4
"""Runs that are measured, if it is not said how many."""


def sweep(
    config: Config,
    tried: Grid,
    options: Options,
    stop: Stop | None = None,
) -> dict[str, Any]:
    """Train and judge all runs of a grid; go on where an earlier attempt ended.

    Args:
      config: of all runs; h, gamma, learning rate, weight decay, strength and seed are
        those of the grid. Its `bits` are the precisions that count.
      tried: the grid; what the method has not is left out of it.
      options: where and how to run.
      stop: asked before the next chunk of runs; by default, whether the minutes of
        the options are up.

    Returns:
      The record that is written to `sweep.json`.

    Raises:
      RunError: the config cannot be swept, or the folder cannot be written or belongs
        to another config.
      DatasetError: the data set is missing or malformed.
      Stopped: the time was up, or it was asked for; the runs so far are kept.
    """
    out = _folder(options)
    config, tried = _checked(config, tried, options)
    check_folder(out, config)
    with locked(out):
        return _search(config, tried, out, options, stop or Stop(options.minutes))


def measure(config: Config, tried: Grid, options: Options) -> dict[str, Any]:
    """Time both ways to run a grid; print a table, and write it to `speed.json`.

    Arguments and errors are those of :func:`sweep`.
    """
    out = _folder(options)
    config, tried = _checked(config, tried, options)
    runs = tried.runs()
    pipeline = _open(config, options)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"out must be a folder: {error}") from None
    rates = sweep_speed.measure(config, pipeline, runs, options.at_once or FEW)
    record = {
        "environment": results.environment(),
        "config": dataclasses.asdict(config),
        "ways": rates,
    }
    results.write_json(out / "speed.json", record)
    say(sweep_speed.table(rates), options.quiet)
    return record


def _folder(options: Options) -> Path:
    if options.out is None:
        raise RunError("out must be a folder, got None.")
    return options.out


def _checked(config: Config, tried: Grid, options: Options) -> tuple[Config, Grid]:
    """Check that it can be swept; settle the grid and the images held out."""
    if config.augmentation == "resized_crop":
        raise RunError(
            "augmentation must be 'none' or 'crop_flip' in a sweep, which holds all "
            "images on the device, got 'resized_crop'."
        )
    tried = tried.of_method(config.method)
    if config.validation_size is None:
        data = datasets.load(
            options.located(config).dataset,
            data_dir=options.data_dir,
            download=options.download,
        )
        size = config.train_size or input_pipeline.len_of(data.train)
        config = dataclasses.replace(config, validation_size=max(1, size // 10))
    return config, tried


def _open(config: Config, options: Options) -> ArrayPipeline:
    pipeline = input_pipeline.create(
        options.located(config),
        data_dir=options.data_dir,
        download=options.download,
        devices=devices.choose(),
    )
    assert isinstance(pipeline, ArrayPipeline)
    return pipeline


def _search(
    config: Config,
    tried: Grid,
    out: Path,
    options: Options,
    stop: Stop,
) -> dict[str, Any]:
    """Do the runs that are missing, then draw and tell."""
    path = out / "sweep.json"
    earlier = read(path) or {"runs": []}
    pipeline = _open(config, options)
    if earlier.get("data", pipeline.checksum) != pipeline.checksum:
        raise RunError(
            f"the data are not those of {path}: bring them back, or begin again with "
            "another --out."
        )
    try:
        runs, rows = tried.runs(), [*earlier["runs"]]
        done = {grid.run_of(row) for row in rows}
    except (KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged ({error!r}): delete it.") from None
    size, chunks = _chunks(runs, done, options)
    record = {
        "environment": results.environment() if chunks else earlier["environment"],
        "config": dataclasses.asdict(config),
        "grid": dataclasses.asdict(tried),
        "data": pipeline.checksum,
        "train_images_per_epoch": pipeline.steps * config.micro_batch,
        "validation_images": pipeline.num_test,
    }
    if chunks:
        many = ManyRuns(config, pipeline, size, options.way)
        results.write_text(out / "config.toml", configs.dumps(config))
        for new in _train(many, chunks, config, pipeline, options, stop):
            rows.extend(new)
            results.write_json(path, _summarized(record, tried, rows))
    record = _summarized(record, tried, rows)
    results.write_json(path, record)
    title = f"{config.model} on {Path(config.dataset).name}, {in_words(config)}"
    say(table(record), options.quiet)
    say(f"wrote {path}", options.quiet)
    if results.installed("matplotlib", "sweep.png", options.quiet):
        picture = out / "sweep.png"
        try:
            heat_maps.plot(tried, record["settings"], record["best"], title, picture)
        except OSError as error:
            tell(f"the picture is not written: {error}")
    return record


def _chunks(
    runs: Sequence[Run], done: set[Run], options: Options
) -> tuple[int, list[list[Run]]]:
    """Share out as evenly as can be the runs that are missing.

    Returns:
      The most runs that a chunk has, and the chunks.
    """
    missing = [run for run in runs if run not in done]
    if not missing:
        return 1, []
    most = 1 if options.way == "one_by_one" else options.at_once or len(missing)
    size = math.ceil(len(missing) / math.ceil(len(missing) / most))
    return size, [missing[k : k + size] for k in range(0, len(missing), size)]


def _train(
    many: ManyRuns,
    chunks: Sequence[Sequence[Run]],
    config: Config,
    pipeline: ArrayPipeline,
    options: Options,
    stop: Stop,
) -> Iterator[list[Row]]:
    """Yield the rows of one chunk after another."""
    images = config.epochs * pipeline.steps * config.micro_batch
    total = sum(map(len, chunks))
    done, seen = 0, 0
    progress = Progress(total * images, 0, options.quiet)
    longest = 0.0

    def look(losses: np.ndarray) -> None:
        nonlocal seen
        seen += len(losses) * config.micro_batch
        text = f"{done} of {total} runs, loss {np.median(losses):.3f}"
        progress.show(len(losses) * config.micro_batch, text)

    with contextlib.closing(progress):
        for chunk in chunks:
            start = time.perf_counter()
            if done and stop.now(longest):
                raise Stopped(f"stopped after {done} of {total} runs")
            trained = many.train(chunk, look)
            longest = max(longest, time.perf_counter() - start)
            seconds = (time.perf_counter() - start) / len(chunk)
            done += len(chunk)
            # A run that diverges has fewer steps.
            progress.show(done * images - seen, f"{done} of {total} runs")
            seen = done * images
            yield [
                {
                    **run.settings._asdict(),
                    "seed": run.seed,
                    "accuracy_by_bits": result and result.accuracy_by_bits,
                    "validation_loss": result and result.test_loss,
                    "train_loss": result and result.train_loss,
                    "together": many.together,
                    "at_once": many.size,
                    "seconds": round(seconds, 2),
                }
                for run, result in zip(chunk, trained, strict=True)
            ]


def _summarized(
    record: dict[str, Any], tried: Grid, rows: Sequence[Row]
) -> dict[str, Any]:
    """Return the record with means, the best setting and the speed so far."""
    settings = grid.summarize(tried, rows)
    best = grid.best(settings)
    seconds = sum(row["seconds"] for row in rows)
    return record | {
        "seconds": round(seconds, 1),
        "runs_per_hour": round(3600 * len(rows) / seconds, 1) if seconds else None,
        "best": best,
        "at_edge": grid.at_edge(tried, best) if best else {},
        "settings": settings,
        "runs": [*rows],
    }


def table(record: dict[str, Any]) -> str:
    """Return means and standard errors in percent, and the score."""
    names = Grid(**record["grid"]).told(record["config"]["method"])
    precisions = ["32", *map(str, record["config"]["bits"])]
    titles = ["float" if bits == "32" else f"{bits} bit" for bits in precisions]
    rows = [[*names, *titles, "mean"]]
    for x in record["settings"]:
        cells = ["diverged"] * (len(precisions) + 1)
        if x["score"] is not None:
            of_bits = x["accuracy_by_bits"]
            cells = [*(percent(of_bits[bits]) for bits in precisions)]
            cells.append(percent(x["score"]))
        rows.append([*(f"{x[name]:g}" for name in names), *cells])
    return results.markdown(rows)


def in_words(config: Config) -> str:
    """Return the method, and what its h and gamma belong to."""
    names = {"hero": ("perturbation", "reduction"), "first_order": ("perturbation",)}
    of_method = (f"{x} {getattr(config, x)}" for x in names.get(config.method, ()))
    return ", ".join([config.method, *of_method])


def percent(value: dict[str, Any]) -> str:
    """Return mean and standard error."""
    mean, error = value["mean"], value["standard_error"]
    text = f"{100 * mean:.1f}"
    return text if error is None else f"{text} ± {100 * error:.1f}"
