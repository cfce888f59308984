"""Search the settings of a method on images held out, by one compiled program.

    python -m examples.experiments.sweep CONFIG [the options of a run]
        --h 0.5 1 2 5 --gamma 0.01 0.1 1 --seeds 0 1 2 --validation-size 5000

The settings are h and gamma of hero, h of first_order, --strength of grad_l1, and
--learning-rate and --weight-decay of all methods. They are arguments of one program,
which is compiled once. h = 0 and strength = 0 are SGD; gamma = 0 is first_order. Every
setting is judged by its accuracy on `--validation-size` training images (a tenth of
them if not given), averaged over the seeds, full precision and `--bits`; the test
images are not used. The folder (`runs/CONFIG/sweep`, or `--out`) gets

    config.toml  all that the runs have in common
    sweep.json   every run, means with standard errors, the best setting, and which of
                 its values are at an end of the grid; written after every run (or
                 `--at-once` runs), so that the same command goes on after a kill; with
                 more values in the grid, it does what is missing
    sweep.png    accuracy over h and gamma at every precision

and the command of the final run with the best setting is printed. `--measure` compares
the two ways to run it instead, and writes speed.json.
"""

import dataclasses
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from examples.image_classification.__main__ import ERRORS, first
from examples.image_classification.config import Config
from examples.image_classification.logbook import prepare_streams, say
from examples.image_classification.stopping import STOPPED, Stopped

from .grid import OF_METHOD, Grid, plain, settings_of
from .search import Options, in_words, measure, percent, sweep

T = TypeVar("T")
Hidden = Annotated[T, tyro.conf.Fixed, tyro.conf.Suppress]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Common(Config):
    """What all runs have in common: a config less what the grid and the sweep decide.

    Attributes:
      bits: precisions of the weights that count, beside the full one.
      validation_size: hold out so many training images and judge by them; a tenth of
        the training images if None.
    """

    bits: tuple[int, ...] = (4,)
    validation_size: int | None = None
    h: Hidden[float] = Config.h
    gamma: Hidden[float] = Config.gamma
    learning_rate: Hidden[float] = Config.learning_rate
    weight_decay: Hidden[float] = Config.weight_decay
    seed: Hidden[int] = Config.seed
    strength: Hidden[float] = Config.strength
    curvature_h: Hidden[float] = Config.curvature_h
    curvature_batches: Hidden[int] = Config.curvature_batches
    epoch_on_device: Hidden[bool | None] = Config.epoch_on_device

    def config(self) -> Config:
        """Return it as an ordinary config."""
        return Config(**dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class Command:
    """What the command line says."""

    common: Common
    grid: Grid
    options: Options


def final_command(
    arguments: Sequence[str], base: Config, record: dict[str, Any], options: Options
) -> str:
    """Return the command line of a run with the best setting on all training images.

    Args:
      arguments: of the sweep's command line.
      base: the config that they name.
      record: of the sweep.
      options: of the sweep.
    """
    best = record["best"]
    kept = ("bits", "seed")
    wanted = record["config"] | {name: getattr(base, name) for name in kept}
    wanted |= settings_of(best)._asdict() | {"validation_size": None}
    words = ["python", "-m", "examples.image_classification"]
    if arguments and not arguments[0].startswith("-"):
        words.append(arguments[0])
    has = OF_METHOD[wanted["method"]]
    lacks = {name for names in OF_METHOD.values() for name in names} - {*has}
    for name, value in wanted.items():
        if name in lacks or (name not in has and value == getattr(base, name)):
            continue
        option = name.replace("_", "-")
        if isinstance(value, bool) and name != "epoch_on_device":
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", str(value)]
    for name in ("data_dir", "dataset_path"):
        if (value := getattr(options, name)) is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    assert options.out is not None
    tried = Grid(**record["grid"]).told(wanted["method"])
    folder = "_".join(f"{name}_{best[name]:g}" for name in tried)
    words += ["--out", str(options.out / (folder or wanted["method"]))]
    return shlex.join(words)


def parse(arguments: Sequence[str]) -> tuple[Config, Grid, Options]:
    """Read a config file, the options that override it, and the grid.

    Raises:
      FileNotFoundError: no such config.
      TypeError: a value has the wrong type.
      ValueError: a value is out of range, or a file is no config.
    """
    name, base, rest = first(arguments)
    command = tyro.cli(
        Command,
        prog="python -m examples.experiments.sweep [CONFIG]",
        description=__doc__,
        args=rest,
        default=Command(
            Common(**dataclasses.asdict(base) | {"bits": Common.bits}),
            Grid(
                learning_rate=(base.learning_rate,), weight_decay=(base.weight_decay,)
            ),
            Options(),
        ),
        config=(tyro.conf.OmitArgPrefixes,),
    )
    options = command.options
    out = options.out or Path("runs") / name / "sweep"
    options = dataclasses.replace(options, out=out)
    return command.common.config(), command.grid, options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    prepare_streams()
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        config, given, options = parse(arguments)
    except (FileNotFoundError, TypeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        if options.measure:
            measure(config, given, options)
            return 0
        record = sweep(config, given, options)
    except Stopped as stopped:
        say(f"{stopped}; the same command goes on with the others.")
        return STOPPED
    except KeyboardInterrupt:
        print(
            "interrupted; the same command goes on with the runs that are missing.",
            file=sys.stderr,
        )
        return 128 + signal.SIGINT
    except (*ERRORS, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    best = record["best"]
    if best is None:
        say("every setting diverged: try smaller h, gamma or learning_rate.")
        return 0
    _, base, _ = first(arguments)
    tried = Grid(**record["grid"])
    setting = ", ".join(f"{x} {best[x]:g}" for x in tried.told(config.method))
    lines = [
        f"best of {in_words(config)}: {setting}, with {percent(best['score'])} % on "
        f"{record['validation_images']} images held out."
    ]
    sgd = plain(config.method, record["settings"])
    if sgd not in (None, best):
        lines.append(f"SGD has {percent(sgd['score'])} %.")
    for name, end in record["at_edge"].items():
        further = {"largest": "larger", "smallest": "smaller"}[end]
        lines.append(
            f"{name} {best[name]:g} is the {end} that was tried: the best one may be "
            f"{further}, so run the sweep again with more values."
        )
    lines.append("The run on all training images:")
    lines.append(final_command(arguments, base, record, options))
    say("\n".join(lines), options.quiet)
    return 0


if __name__ == "__main__":
    sys.exit(main())
