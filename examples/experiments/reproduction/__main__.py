"""Reproduce the paper's tables and figures, as far as the machine allows.

    python -m examples.experiments.reproduction --list
    python -m examples.experiments.reproduction --scale cpu --all
    python -m examples.experiments.reproduction --scale budget --all --minutes 60
    python -m examples.experiments.reproduction --report

`--scale full` is the paper's; `--scale cpu` finishes on two cores in some hours, and
`--scale budget` has ResNet20 and the whole of CIFAR-10, for 15 epochs: some hours for
every row (see `entries.py`). If not given, it is "cpu" or "full", by the machine.
`--all` computes what `--list` shows to be missing, `--only NAME` one row of it. Both
stop after `--minutes`, or by Ctrl-C or SIGTERM, in the middle of a row, with exit
status 75, and go on from there the next time; the result does not depend on how often
that happened. What a stopped row goes on from lies in `unfinished/` beside the results,
where another machine finds it; final weights lie in `--work`. CIFAR-10 is read by
TensorFlow Datasets, or from `--dataset`, an `.npz` file or a folder of mosaics.
`--report` writes tables and figures into `docs/reproduction.md` and `--results`.
"""

import argparse
import os
import sys
import typing
from collections.abc import Sequence
from pathlib import Path

import jax

from examples.image_classification.devices import divide_host
from examples.image_classification.errors import RunError
from examples.image_classification.logbook import say
from examples.image_classification.results import markdown
from examples.image_classification.stopping import Stop, Stopped, command

from . import report
from .entries import COMMAND, Scale, rows
from .work import compute, missing

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "reproduction.md"
RESULTS = ROOT / "examples" / "results" / "reproduction"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog=COMMAND,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--list", action="store_true", help="show what is missing")
    what.add_argument("--all", action="store_true", help="do all that is missing")
    what.add_argument("--only", metavar="NAME", help="do this row")
    what.add_argument("--report", action="store_true", help="write tables and figures")
    add, work = parser.add_argument, Path("runs/reproduce")
    add("--check", action="store_true", help="with --report: only compare the page")
    add("--scale", choices=typing.get_args(Scale), help="of the rows")
    add("--minutes", type=float, help="stop after so many")
    add("--host-devices", type=int, help="parts of a CPU that share out images")
    add("--dataset", help="CIFAR-10 as an .npz file or a folder of mosaics")
    add("--data-dir", type=Path, help="where TensorFlow data sets lie")
    add("--download", action="store_true", help="let TensorFlow Datasets fetch it")
    add("--results", type=Path, default=RESULTS, help="folder (%(default)s)")
    add("--work", type=Path, default=work, help="for checkpoints (%(default)s)")
    add("--quiet", action="store_true", help="print nothing, show no progress bar")
    return parser.parse_args(arguments)


@command
def main(arguments: Sequence[str]) -> int:
    """Run the command; return the exit status."""
    options = parse(arguments)
    divide_host(options.host_devices)
    if options.report:
        return report.write(options.results, PAGE, options.check)
    if options.list:
        cells = [["scale", "name", "runs missing"]]
        for x in rows():
            if options.scale in (None, x.scale):
                count = len(missing(x, options.results))
                cells.append([x.scale, x.name, str(count)])
        print(markdown(cells))
    else:
        compute_all(options)
    return 0


def compute_all(options: argparse.Namespace) -> None:
    """Do what is missing, one after another."""
    on_cpu = jax.default_backend() == "cpu"
    scale = options.scale or ("cpu" if on_cpu else "full")
    wanted = [x for x in rows() if x.scale == scale]
    names = [x.name for x in wanted]
    if options.only is not None:
        wanted = [x for x in wanted if x.name == options.only]
        if not wanted:
            raise RunError(f"--only must be one of {', '.join(names)}.")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # every piece needs the programs
        jax.config.update("jax_compilation_cache_dir", str(options.work / "compiled"))
    with Stop(options.minutes) as options.stop:
        wanted = [x for x in wanted if missing(x, options.results)]
        for k, row in enumerate(wanted):
            if k and options.stop.now():
                raise Stopped(f"stopped before {row.name}; the same command goes on.")
            say(row.name, options.quiet)
            compute(row, options)
            say(f"{row.name}: done", options.quiet)
    say("nothing is missing", options.quiet)


if __name__ == "__main__":
    sys.exit(main())
