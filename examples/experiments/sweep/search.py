"""A search in settings: all runs of a grid, and the folder that keeps them."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from examples.image_classification import config as configs
from examples.image_classification import datasets, devices, input_pipeline, results
from examples.image_classification.array_pipeline import ArrayPipeline
from examples.image_classification.config import Config
from examples.image_classification.errors import RunError
from examples.image_classification.logbook import Progress, say, tell
from examples.image_classification.run import check_folder, locked, read
from examples.image_classification.stopping import Stop, Stopped

from . import grid as grids
from . import heat_maps
from .grid import Grid, Row, Run, percent
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
      at_once: runs that "vmap" computes at once; all if None.
      dataset_path: file or folder to read in place of the config's data set.
      minutes: stop before runs, other than the first, that would end later.
      quiet: print nothing and show no progress bar.
    """

    out: Path | None = None
    data_dir: Path | None = None
    download: bool = False
    together: Together | None = None
    at_once: int | None = None
    dataset_path: str | None = None
    minutes: float | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        """Raise `ValueError` where a field is out of range."""
        if self.at_once is not None and self.at_once < 1:
            raise ValueError(f"at_once must be at least 1, got {self.at_once}.")

    @property
    def way(self) -> Together:
        """How to run."""
        on_cpu = jax.default_backend() == "cpu"
        return self.together or ("one_by_one" if on_cpu else "vmap")


def search(
    config: Config,
    grid: Grid | Sequence[Run],
    options: Options | None = None,
    rows: Sequence[Row] = (),
    keep: Callable[[list[Row]], None] = lambda _: None,
    stop: Stop | None = None,
    pipeline: ArrayPipeline | None = None,
) -> list[Row]:
    """Train every run of a grid, and test it on training images that are held out.

    Direction, reduction and whatever else is no number are the config's: to compare
    several, call this once for each.

    Args:
      config: of all runs, but for settings and seed. Its `bits` count beside full
        precision; without `validation_size` a tenth of the images is held out.
      grid: what the method does not have is left out of it; or certain runs.
      options: how to run; `out` does not matter.
      rows: of runs that were trained before, and are not trained again.
      keep: called with all rows so far, after every run, or all that ran at once.
      stop: asked before the next runs, in place of the minutes of the options.
      pipeline: the data of the config, if they were loaded before.

    Returns:
      The rows: settings, seed, `accuracy_by_bits`, which is None of a run that
      diverged, losses and seconds. `grid.summarize` takes means over seeds.
    """
    options = options or Options(quiet=True)
    stop = stop or Stop(options.minutes)
    if isinstance(grid, Grid):
        grid = grid.of_method(config.method).runs()
    done = {grids.run_of(row) for row in rows}
    missing, rows = [run for run in grid if run not in done], [*rows]
    if not missing:
        return rows
    if pipeline is None:
        config, pipeline = load(config, options)
    most = 1 if options.way == "one_by_one" else options.at_once or len(missing)
    size = math.ceil(len(missing) / math.ceil(len(missing) / most))  # evenly
    many = ManyRuns(config, pipeline, size, options.way)
    images = config.epochs * pipeline.steps * config.micro_batch
    progress = Progress(len(missing) * images, 0, options.quiet)

    def look(losses: np.ndarray) -> None:
        text = f"run {len(rows) + 1}, loss {np.median(losses):.3f}"
        progress.show(len(losses) * config.micro_batch, text)

    longest = 0.0
    with contextlib.closing(progress):
        for k in range(0, len(missing), size):
            if k and stop.now(longest):
                text = f"stopped after {k} of {len(missing)} runs"
                raise Stopped(f"{text}; the same command goes on.")
            chunk = missing[k : k + size]
            begun = time.perf_counter()
            trained = many.train(chunk, look)
            longest = max(longest, time.perf_counter() - begun)
            seconds = round((time.perf_counter() - begun) / len(chunk), 2)
            how = {"together": options.way, "at_once": size, "seconds": seconds}
            rows += [
                run.settings._asdict() | {"seed": run.seed} | result._asdict() | how
                for run, result in zip(chunk, trained, strict=True)
            ]
            keep(rows)
    return rows


def sweep(
    config: Config,
    grid: Grid,
    options: Options,
    stop: Stop | None = None,
    environment: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Search, and keep all in the folder `out`; go on where an earlier attempt ended.

    Arguments and errors are those of :func:`search`, and an environment to be noted in
    place of this one; `RunError` also if the folder cannot be written, or belongs to
    another config. Returns the record that is written to `sweep.json`.
    """
    assert options.out is not None
    grid, path = grid.of_method(config.method), options.out / "sweep.json"
    config, pipeline = load(config, options)
    check_folder(options.out, config)
    with locked(options.out):
        earlier = read(path) or {"runs": []}
        if earlier.get("data", pipeline.checksum) != pipeline.checksum:
            raise RunError(f"the data are not those of {path}: choose another --out.")
        try:
            missing = {*grid.runs()} - {grids.run_of(row) for row in earlier["runs"]}
        except (KeyError, TypeError) as error:
            raise RunError(f"{path} is damaged ({error!r}): delete it.") from None
        if missing:
            environment = environment or results.environment()
            results.write_text(options.out / "config.toml", configs.dumps(config))
        record: dict[str, Any] = {
            "environment": environment if missing else earlier["environment"],
            "config": dataclasses.asdict(config),
            "grid": dataclasses.asdict(grid),
            "data": pipeline.checksum,
            "train_images_per_epoch": pipeline.steps * config.micro_batch,
            "validation_images": pipeline.num_test,
        }

        def keep(rows: list[Row]) -> None:
            seconds = sum(row["seconds"] for row in rows)
            record["seconds"] = round(seconds, 1)
            record["runs_per_hour"] = round(3600 * len(rows) / max(seconds, 0.01), 1)
            record["settings"] = grids.summarize(grid, rows)
            record["best"] = best = grids.best(record["settings"])
            record["at_edge"] = grids.at_edge(grid, best) if best else {}
            results.write_json(path, record | {"runs": rows})

        old = earlier["runs"]
        rows = search(config, grid, options, old, keep, stop, pipeline)
        keep(rows)
        record["runs"] = rows
        say(table(record), options.quiet)
        say(f"wrote {path}", options.quiet)
        title = f"{config.model} on {Path(config.dataset).name}, {in_words(config)}"
        summaries, best = record["settings"], record["best"]
        try:
            heat_maps.plot(grid, summaries, best, title, path.with_suffix(".png"))
        except OSError as error:
            tell(f"the picture is not written: {error}")
    return record


def load(config: Config, options: Options) -> tuple[Config, ArrayPipeline]:
    """Return the config with images held out, and its data; errors as of `search`."""
    if config.augmentation == "resized_crop":
        raise RunError(
            "augmentation must be 'none' or 'crop_flip' in a sweep, which holds all "
            "images on the device, got 'resized_crop'."
        )
    dataset = options.dataset_path or config.dataset
    where: dict[str, Any] = {x: getattr(options, x) for x in ("data_dir", "download")}
    if config.validation_size is None:
        data = datasets.load(dataset, **where)
        size = config.train_size or input_pipeline.len_of(data.train)
        config = dataclasses.replace(config, validation_size=max(1, size // 10))
    pipeline = input_pipeline.create(
        dataclasses.replace(config, dataset=dataset), **where, devices=devices.choose()
    )
    assert isinstance(pipeline, ArrayPipeline)
    return config, pipeline


def table(record: dict[str, Any]) -> str:
    """Return means and standard errors in percent, and the score."""
    names = Grid(**record["grid"]).axes(record["config"]["method"])
    precisions = ["32", *map(str, record["config"]["bits"])]
    titles = ["float" if bits == "32" else f"{bits} bit" for bits in precisions]
    rows = [[*names, *titles, "mean"]]
    for x in record["settings"]:
        cells = ["diverged"] * (len(precisions) + 1)
        if x["score"] is not None:
            cells = [percent(x["accuracy_by_bits"][bits]) for bits in precisions]
            cells.append(percent(x["score"]))
        rows.append([*(f"{x[name]:g}" for name in names), *cells])
    return results.markdown(rows)


def in_words(config: Config) -> str:
    """Return the method, and what its h and gamma belong to."""
    names = {"hero": ("perturbation", "reduction"), "first_order": ("perturbation",)}
    of_method = (f"{x} {getattr(config, x)}" for x in names.get(config.method, ()))
    return ", ".join([config.method, *of_method])
