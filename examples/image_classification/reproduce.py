"""Reproduce the paper's tables and figures, as far as the machine allows.

    python -m examples.image_classification.reproduce --list
    python -m examples.image_classification.reproduce --scale cpu --all
    python -m examples.image_classification.reproduce --next --minutes 8
    python -m examples.image_classification.reproduce --report

`--scale full` is the paper's; `--scale cpu` finishes on two cores in about two hours
(what it leaves out is told in `reproduction/entries.py`). If not given, the scale is
that of the machine. `--list` tells what there is in `examples/results/reproduction` and
what is missing, the most wanted first. `--next` computes the first thing that is
missing, `--only NAME` a certain one, and `--all` one after another; what another
process has in hand is left to it, so that the same command may be started once for
every core. All of them stop after `--minutes` (at an epoch's end, if at least one is
done), or by Ctrl-C or SIGTERM, and go on from there the next time; the result does not
depend on how often that happened. `--report` writes tables and figures into README.md
and `examples/results/reproduction` from the results that are there.

CIFAR-10 is read by TensorFlow Datasets (`--data-dir`, `--download`), or, with nothing
but NumPy and Pillow, from `--dataset`: an `.npz` file or a folder of mosaics.
"""

import argparse
import io
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from .checkpoints import CheckpointError
from .datasets import DatasetError
from .devices import DevicesError
from .logbook import say
from .loop import RunError
from .reproduction import report
from .reproduction.entries import Entry, Finals, Row, Search, entries
from .reproduction.training import Limits
from .reproduction.work import (
    NotReady,
    Options,
    Worker,
    chosen,
    held,
    missing,
    on_this_machine,
)
from .results import markdown

ERRORS = (CheckpointError, DatasetError, DevicesError, RunError, OSError)
ROOT = Path(__file__).parents[2]
PAUSE = 10.0
"""Seconds before it looks again whether others have done what is waited for."""

RESULTS = ROOT / "examples" / "results" / "reproduction"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.image_classification.reproduce",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--list", action="store_true", help="tell what there is")
    what.add_argument("--next", action="store_true", help="do what is wanted most")
    what.add_argument("--all", action="store_true", help="do all that is missing")
    what.add_argument("--only", metavar="NAME", help="do this one")
    what.add_argument("--report", action="store_true", help="write tables and figures")
    add = parser.add_argument
    add("--check", action="store_true", help="with --report: only compare the README")
    add("--scale", choices=("full", "cpu"), help="the paper's, or for two cores")
    add("--minutes", type=_at_least(0.0), default=math.inf, help="stop after so many")
    add("--seeds", type=_at_least(0), nargs="+", help="instead of those of the row")
    add("--together", choices=("vmap", "one_by_one"), help="how several seeds run")
    add(
        "--at-once",
        type=_at_least(1),
        help="runs of a search that vmap computes at once",
    )
    add("--dataset", help="an .npz file, or a folder of mosaics, with CIFAR-10")
    add("--data-dir", type=Path, help="where TensorFlow data sets lie")
    add("--download", action="store_true", help="let TensorFlow Datasets fetch it")
    add("--results", type=Path, default=RESULTS, help="folder of results")
    add("--work", type=Path, default=Path("runs/reproduce"), help="for checkpoints")
    add("--quiet", action="store_true", help="print nothing, show no progress bar")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    start = time.monotonic()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    given = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        if given.report:
            return report.write(given.results, ROOT / "README.md", given.check)
        if given.list:
            wanted = [x for x in entries() if given.scale in (None, x.scale)]
            print(table(wanted, given.results))
            return 0
        return compute(given, start)
    except ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def compute(given: argparse.Namespace, start: float) -> int:
    """Do what is missing, until it is done or the time is over."""
    scale = given.scale or on_this_machine()
    wanted = [x for x in entries() if x.scale == scale]
    if given.only is not None:
        wanted = [x for x in wanted if x.name == given.only]
        if not wanted:
            names = ", ".join(x.name for x in entries() if x.scale == scale)
            raise RunError(f"--only must be one of {names}, got {given.only!r}.")
    limits = Limits(deadline=start + 60.0 * given.minutes, quiet=given.quiet)
    options = Options(
        results=given.results,
        work=given.work,
        dataset=given.dataset,
        data_dir=given.data_dir,
        download=given.download,
        seeds=None if given.seeds is None else tuple(given.seeds),
        together=given.together,
        at_once=given.at_once,
        limits=limits,
    )
    worker = Worker(options)
    while left := [x for x in wanted if missing(x, options.results, options.seeds)]:
        outcomes = []
        for entry in left:
            outcomes.append(attempt(worker, entry, options))
            if outcomes[-1] is False or (outcomes[-1] and given.next):
                return 0
            if time.monotonic() > limits.deadline:
                return 0
        if not any(outcomes):  # others have it in hand, or what it needs
            if given.next or given.only:
                say(
                    "what is missing is in hand elsewhere, or waits for it", given.quiet
                )
                return 0
            time.sleep(PAUSE)
    say("nothing is missing", given.quiet)
    return 0


def attempt(worker: Worker, entry: Entry, options: Options) -> bool | None:
    """Do an entry; return whether it is done, None if it cannot be now."""
    quiet = options.limits.quiet
    with held(entry, options.work) as ours:
        if not ours or not missing(entry, options.results, options.seeds):
            return None
        try:
            finished = do(worker, entry, options.results)
        except NotReady:
            return None
    end = "done" if finished else "stopped; the same command goes on"
    say(f"{entry.name}: {end}", quiet)
    return finished


def do(worker: Worker, entry: Entry, results: Path) -> bool:
    """Compute an entry; return whether it is done."""
    if isinstance(entry, Search):
        return worker.search(entry)
    if isinstance(entry, Finals):
        return worker.finals(entry)
    return worker.row(entry, chosen(entry, results))


def table(wanted: Sequence[Entry], results: Path) -> str:
    """Tell what there is of every entry."""
    rows = [["scale", "name", "for", "runs missing"]]
    for entry in wanted:
        what = entry.shown_in if isinstance(entry, Row) else "choosing settings"
        left = missing(entry, results)
        rows.append([entry.scale, entry.name, what, str(left) if left else "-"])
    return markdown(rows)


def _at_least(least: float) -> Callable[[str], float]:
    """Return a reader of numbers of the same type, from the least one on."""

    def number(text: str) -> float:
        value = type(least)(text)
        if not value >= least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return value

    return number


if __name__ == "__main__":
    sys.exit(main())
