"""Compare directions of the perturbation on several tasks, with equal searches.

    python -m examples.experiments.directions --task digits digits_noise40
    python -m examples.experiments.directions --task cifar --dataset CIFAR10
    python -m examples.experiments.directions --report

Every method searches 12 settings of its own (on CIFAR-10 and by MobileNetV2 six, SGD
12) on training images that are held out, from one seed (of tables five), judged by the
mean accuracy in float and at 8, 4, 3 and 2 bits. The learning rate and weight decay of
all are those that suit SGD on clean labels; only "SGD, tuned" searches its own. The
best setting is trained from three other seeds (of tables ten) and tested on the test
images. The settings that were best on the digits, with and without label noise
together, are tested on every other task as well, untouched: that is whether they carry
over. All runs of a task are in `TASK.json` in the folder of results; the same command
goes on with what is missing.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from examples.experiments.common.command_line import folder, make_parser
from examples.experiments.sweep import grid as grids
from examples.experiments.sweep.grid import Row, Run, settings_of
from examples.experiments.sweep.search import Options, search
from examples.image_classification import devices, input_pipeline, results
from examples.image_classification.array_pipeline import ArrayPipeline
from examples.image_classification.config import Config
from examples.image_classification.logbook import say
from examples.image_classification.stopping import Stop, command
from examples.image_classification.train import Settings

from . import report, tabular
from .tasks import DIGITS_TASKS, FOLDER, METHODS, TASKS, best, read, seeds_of


def compute(task: str, options: argparse.Namespace, stop: Stop) -> None:
    """Do what is missing of a task."""
    record = read(options.results, task)
    of_digits = [read(options.results, name) for name in DIGITS_TASKS]
    record["environment"] = results.environment()
    record["config"] = dataclasses.asdict(TASKS[task])

    def do(part: str, name: str, config: Config, runs: Sequence[Run]) -> None:
        def keep(rows: Sequence[Row]) -> None:
            record[part][name] = [*rows]
            results.write_json(options.results / f"{task}.json", record)

        rows = [x for x in record[part].get(name, []) if grids.run_of(x) in runs]
        if not rows and part == "transfer":  # the same settings need no second run
            rows = [x for x in record["test"].get(name, []) if grids.run_of(x) in runs]
        done = {grids.run_of(row) for row in rows}
        missing = [run for run in runs if run not in done]
        if not missing:
            if record[part].get(name) != rows:
                keep(rows)
            return
        say(f"{task}: {part}, {name}", options.quiet)
        if isinstance(config, tabular.Table):
            keep([*rows, *tabular.train(config, missing)])
            return
        place = options.dataset if config.dataset == "cifar10" else None
        pipeline = input_pipeline.create(
            dataclasses.replace(config, dataset=place or config.dataset),
            devices=devices.choose(),
        )
        assert isinstance(pipeline, ArrayPipeline)
        how = Options(quiet=options.quiet)
        search(config, missing, how, rows, keep, stop, pipeline)

    for name in options.methods:
        method = METHODS[name]
        config = method.config(TASKS[task])
        whole = dataclasses.replace(config, validation_size=None)
        settings: dict[str, Row | None] = {"test": Settings.of(config)._asdict()}
        if method.grid:
            held_out = dataclasses.replace(config, test_size=None)
            do("search", name, held_out, method.search(config).runs())
        if method.grid or method.like:
            settings["test"] = best(method.like or name, task, record)
        if method.grid and task not in DIGITS_TASKS:
            settings["transfer"] = best(name, DIGITS_TASKS[0], *of_digits)
        for part, setting in settings.items():
            if setting is None:
                continue
            if not method.tuned:
                names = ("learning_rate", "weight_decay")
                setting |= {x: getattr(config, x) for x in names}
            runs = [Run(settings_of(setting), seed) for seed in seeds_of(config)[1]]
            do(part, name, whole, runs)


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
    add("--report", action="store_true", help="only write the tables")
    add("--quiet", action="store_true")
    options = parser.parse_args(arguments)
    if not options.report:
        with Stop(options.minutes) as stop:
            for task in options.task:
                compute(task, options, stop)
    report.write(options.results)


if __name__ == "__main__":
    sys.exit(main())
