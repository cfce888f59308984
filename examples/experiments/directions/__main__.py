"""Compare directions of the perturbation on several tasks, with equal searches.

    python -m examples.experiments.directions --task digits digits_noise40
    python -m examples.experiments.directions --task cifar --dataset CIFAR10
    python -m examples.experiments.directions --report

Every method searches 12 settings of its own on training images that are held out, from
one seed, judged by the mean accuracy in float and at 8, 4, 3 and 2 bits. The learning
rate and weight decay of all are those that suit SGD on clean labels; only "SGD, tuned"
searches its own. The best setting is trained from three other seeds and tested on the
test images. The settings that were best on the digits with label noise are tested on
every other task as well, untouched: that is whether they carry over. All runs of a task
are in `TASK.json` in the folder of results; the same command goes on with what is
missing.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from examples.experiments.common.command_line import folder, make_parser
from examples.experiments.common.statistics import cell, summary
from examples.experiments.sweep import grid as grids
from examples.experiments.sweep.grid import Row, Run, settings_of
from examples.experiments.sweep.search import Options, search
from examples.image_classification import devices, input_pipeline, results
from examples.image_classification.config import Config
from examples.image_classification.stopping import Stop, command
from examples.image_classification.train import Settings

from .tasks import BITS, FOLDER, METHODS, SEEDS, TASKS

FROM = "digits_noise40"
"""The task whose settings are tried on all others."""
PRECISIONS = ("32", *map(str, BITS))


def read(folder: Path, task: str) -> dict[str, Any]:
    """Return the record of a task, empty if there is none."""
    path = folder / f"{task}.json"
    if not path.exists():
        return {"search": {}, "test": {}, "transfer": {}}
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def best(record: dict[str, Any], name: str) -> Row | None:
    """Return the setting of a method that was best on the images held out."""
    grid = METHODS[name].grid
    assert grid is not None
    return grids.best(grids.summarize(grid, record["search"].get(name, [])))


def compute(task: str, options: argparse.Namespace, stop: Stop) -> None:
    """Do what is missing of a task."""
    record, of_digits = read(options.results, task), read(options.results, FROM)
    place = options.dataset if TASKS[task].dataset == "cifar10" else None
    how = Options(quiet=options.quiet, dataset_path=place)

    def do(part: str, name: str, config: Config, runs: Any, pipeline: Any) -> None:
        def keep(rows: Sequence[Row]) -> None:
            record[part][name] = [*rows]
            whole = {"environment": results.environment(), **record}
            whole["config"] = dataclasses.asdict(TASKS[task])
            results.write_json(options.results / f"{task}.json", whole)

        if not options.quiet:
            print(f"{task}: {part}, {name}", flush=True)
        search(config, runs, how, record[part].get(name, []), keep, stop, pipeline)

    for name in options.methods:
        method = METHODS[name]
        config = method.config(TASKS[task])
        whole = dataclasses.replace(config, validation_size=None)
        settings: dict[str, Row | None] = {"test": Settings.of(config)._asdict()}
        if method.grid:
            do("search", name, config, method.grid, None)
        if method.grid or method.like:
            settings["test"] = best(record, method.like or name)
            if task != FROM:
                settings["transfer"] = best(of_digits, method.like or name)
        for part, setting in settings.items():
            if setting is None:
                continue
            runs = [Run(settings_of(setting), seed) for seed in SEEDS]
            tested = {grids.run_of(row) for row in record[part].get(name, [])}
            if not {*runs} <= tested:
                pipeline = input_pipeline.create(
                    dataclasses.replace(whole, dataset=place or whole.dataset),
                    devices=devices.choose(),
                )
                do(part, name, whole, runs, pipeline)


def table(record: dict[str, Any], part: str) -> str:
    """Return the test accuracies of a task in percent, and the settings."""
    titles = ["float", *(f"{bits} bit" for bits in BITS)]
    lines = [["method", "h", "gamma", *titles]]
    for name, rows in record[part].items():
        settings = settings_of(rows[0])
        accuracies = [row["accuracy_by_bits"] for row in rows]
        cells = ["diverged"] * len(titles)
        if None not in accuracies:
            of_bits = [summary([100 * x[b] for x in accuracies]) for b in PRECISIONS]
            cells = [cell(x, 1) for x in of_bits]
        lines.append([name, f"{settings.h:g}", f"{settings.gamma:g}", *cells])
    return results.markdown(lines)


def width(rows: Sequence[Row], gamma: float, within: float = 0.01) -> float | None:
    """Return over how many octaves h is within a point of the best, at one gamma."""
    scores = {
        row["h"]: float(np.mean([*(row["accuracy_by_bits"] or {"": 0.0}).values()]))
        for row in rows
        if row["gamma"] == gamma and row["h"]
    }
    if not scores:
        return None
    good = [h for h, score in scores.items() if score >= max(scores.values()) - within]
    return float(np.log2(max(good) / min(good)))


@command
def main(arguments: Sequence[str]) -> None:
    """Run the command; return the exit status."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--task", nargs="+", choices=TASKS, default=["digits_noise40", "digits"])
    add("--methods", nargs="+", choices=METHODS, default=[*METHODS], metavar="NAME")
    add("--dataset", help="CIFAR-10 as an .npz file or a folder of mosaics")
    add("--minutes", type=float, help="stop after so many")
    add("--results", type=folder, default=str(FOLDER))
    add("--report", action="store_true", help="only print the tables")
    add("--quiet", action="store_true")
    options = parser.parse_args(arguments)
    if not options.report:
        with Stop(options.minutes) as stop:
            for task in options.task:
                compute(task, options, stop)
    for task in TASKS if options.report else options.task:
        record = read(options.results, task)
        for part in ("test", "transfer"):
            if record[part]:
                print(f"\n{task}, {part}\n\n{table(record, part)}")
        for name, rows in record["search"].items():
            gammas = sorted({row["gamma"] for row in rows})
            widths = {gamma: width(rows, gamma) for gamma in gammas}
            if any(widths.values()):
                print(f"{name}: octaves of h within a point of the best: {widths}")


if __name__ == "__main__":
    sys.exit(main())
