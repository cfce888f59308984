"""Reproduce the paper's tables and figures, as far as the machine allows.

    python -m examples.experiments.reproduction --list
    python -m examples.experiments.reproduction --scale cpu --all
    python -m examples.experiments.reproduction --scale budget --next --minutes 60
    python -m examples.experiments.reproduction --report

`--scale full` is the paper's; `--scale cpu` finishes on two cores in about two hours
(what it leaves out is told in `reproduction/entries.py`), and `--scale budget` has
ResNet20 and the whole of CIFAR-10, for 15 epochs: some hours for every row. If not
given, the scale is "cpu" or "full", by the machine. `--list` tells what there is in
`examples/results/reproduction` and what is missing, the most wanted first. `--next`
computes the first thing that is missing, `--only NAME` a certain one, and `--all` one
after another; what another process has in hand is left to it, so that the same command
may be started once for every core. All of them stop after `--minutes` (at an epoch's
end, if at least one is done; at the scale "budget" after any step), or by Ctrl-C or
SIGTERM, and go on from there the next time; the result does not depend on how often
that happened; the exit status is then 75. `--report` writes tables and figures into
`docs/reproduction.md` and `examples/results/reproduction` from what is there.

At the scale "budget" what a stopped row goes on from lies in `unfinished/` beside the
results, where another machine finds it; final weights lie in `--work`.

CIFAR-10 is read by TensorFlow Datasets (`--data-dir`, `--download`), or, with nothing
but NumPy and Pillow, from `--dataset`: an `.npz` file or a folder of mosaics.
"""

import argparse
import math
import os
import signal
import sys
import time
import typing
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from examples.image_classification.checkpoints import CheckpointError
from examples.image_classification.datasets import DatasetError
from examples.image_classification.devices import DevicesError, divide_host
from examples.image_classification.logbook import prepare_streams, say
from examples.image_classification.loop import RunError
from examples.image_classification.results import markdown
from examples.image_classification.stopping import STOPPED, Stop

from . import report
from .entries import Entry, Row, Scale, entries
from .records import NotReady, held, missing
from .work import Options, Worker, on_this_machine

ERRORS = (CheckpointError, DatasetError, DevicesError, RunError, OSError)
ROOT = Path(__file__).parents[2]
PAUSE = 10
"""Seconds before it looks again whether others have done what is waited for."""

PAGE = ROOT / "docs" / "reproduction.md"
RESULTS = ROOT / "examples" / "results" / "reproduction"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.experiments.reproduction",
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
    add("--check", action="store_true", help="with --report: only compare the page")
    add(
        "--scale",
        choices=typing.get_args(Scale),
        help="the paper's, for two cores, or ResNet20 for two cores and some nights",
    )
    add("--minutes", type=_at_least(0.0), default=math.inf, help="stop after so many")
    add("--seeds", type=_at_least(0), nargs="+", help="instead of those of the row")
    add("--together", choices=("vmap", "one_by_one"), help="how several seeds run")
    add(
        "--at-once",
        type=_at_least(1),
        help="runs of a search that vmap computes at once",
    )
    add(
        "--host-devices",
        type=_at_least(1),
        help="parts of a CPU that share out the images of the scale budget",
    )
    add("--dataset", help="CIFAR-10 as an .npz file or a folder of mosaics")
    add("--data-dir", type=Path, help="where TensorFlow data sets lie")
    add("--download", action="store_true", help="let TensorFlow Datasets fetch it")
    add("--page", type=Path, default=PAGE, help="for the report")
    add("--results", type=Path, default=RESULTS, help="folder (%(default)s)")
    add(
        "--work",
        type=Path,
        default=Path("runs/reproduce"),
        help="for checkpoints (%(default)s)",
    )
    add("--quiet", action="store_true", help="print nothing, show no progress bar")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    prepare_streams()
    given = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        divide_host(given.host_devices)
        if given.report:
            return report.write(given.results, given.page, given.check)
        if given.list:
            wanted = [x for x in entries() if given.scale in (None, x.scale)]
            print(table(wanted, given.results))
            return 0
        return compute(given)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on.", file=sys.stderr)
        return 128 + signal.SIGINT
    except ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def compute(given: argparse.Namespace) -> int:
    """Do what is missing, until it is done or the time is over."""
    scale = given.scale or on_this_machine()
    wanted = [x for x in entries() if x.scale == scale]
    if given.only is not None:
        wanted = [x for x in wanted if x.name == given.only]
        if not wanted:
            names = ", ".join(x.name for x in entries() if x.scale == scale)
            raise RunError(f"--only must be one of {names}, got {given.only!r}.")
    if given.dataset is not None and not Path(given.dataset).exists():
        raise RunError(
            "--dataset must be an .npz file, or a folder of mosaics or of images by "
            f"class, that exists, got {given.dataset!r}."
        )
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # every piece needs the programs
        jax.config.update("jax_compilation_cache_dir", str(given.work / "compiled"))
    with Stop(given.minutes) as stop:
        options = Options(
            results=given.results,
            work=given.work,
            host_devices=given.host_devices,
            dataset=given.dataset,
            data_dir=given.data_dir,
            download=given.download,
            seeds=None if given.seeds is None else (*dict.fromkeys(given.seeds),),
            together=given.together,
            at_once=given.at_once,
            stop=stop,
            quiet=given.quiet,
        )
        return work_on(wanted, options, given.next, given.only)


def work_on(
    wanted: Sequence[Entry], options: Options, only_next: bool, only: str | None
) -> int:
    """Do what is missing of some entries, or the next one; return the exit status.

    It is `STOPPED` if there was no time to look whether more is missing.
    """
    worker = Worker(options)
    told = None
    while left := [x for x in wanted if missing(x, options.results, options.seeds)]:
        outcomes: list[bool] = []
        waits = ""
        for entry in left:
            try:
                outcomes.append(attempt(worker, entry, options))
            except NotReady as reason:
                waits = waits or str(reason)
                continue
            if outcomes[-1] and only_next:
                return 0
            if options.stop.now() or not outcomes[-1]:
                return STOPPED
        if any(outcomes):
            continue
        if only_next or only is not None:
            print(f"error: {waits}", file=sys.stderr)
            return 1
        if waits != told:
            say(f"waits: {waits}", options.quiet)
            told = waits
        for _ in range(PAUSE):
            if options.stop.now():
                return STOPPED
            time.sleep(1.0)
    say("nothing is missing", options.quiet)
    return 0


def attempt(worker: Worker, entry: Entry, options: Options) -> bool:
    """Do an entry; return whether it is done, or was done by another process.

    Raises:
      NotReady: another process has it in hand, or what it needs is not there.
    """
    with held(entry, options.results) as ours:
        if not ours:
            raise NotReady(f"another process has {entry.name} in hand")
        if not missing(entry, options.results, options.seeds):
            return True
        say(entry.name, options.quiet)
        finished = worker.do(entry)
    end = "done" if finished else "stopped; the same command goes on"
    say(f"{entry.name}: {end}", options.quiet)
    return finished


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
