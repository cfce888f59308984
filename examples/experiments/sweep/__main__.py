"""Search the settings of a method on images held out, by one compiled program.

    python -m examples.experiments.sweep CONFIG [the options of a run]
        --h 0.02 0.04 0.08 --gamma 0 0.5 --seeds 0 1 2 --validation-size 5000

The settings are h, --share and gamma of hero, h and --share of first_order, --strength
of grad_l1, and --learning-rate and --weight-decay of all methods. They are arguments of
one program, which is compiled once. h = 0 and strength = 0 are SGD; gamma = 0 is
first_order; of a share, h is only where it begins (--h 0.001 --share 0.3 0.6). Every
setting is judged by its accuracy on `--validation-size` training images (a tenth of
them if not given), averaged over the seeds, full precision and `--bits`; the test
images are not used. The folder (`runs/CONFIG/sweep`, or `--out`) gets

    config.toml  all that the runs have in common
    sweep.json   every run, means with standard errors, the best setting; written after
                 every run, so that the same command, also with more values in the grid,
                 does what is missing
    sweep.png    accuracy over h and gamma at every precision
    best.toml    the config of a run with the best setting on all training images

and the command of that run is printed.
"""

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from examples.image_classification import config as configs
from examples.image_classification import results
from examples.image_classification.__main__ import first
from examples.image_classification.config import Config
from examples.image_classification.logbook import say
from examples.image_classification.stopping import checked_arguments, command

from .grid import OF_METHOD, Grid, percent, plain
from .search import Options, in_words, sweep

T = TypeVar("T")
Hidden = Annotated[T, tyro.conf.Fixed, tyro.conf.Suppress]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command(Config):
    """What the command line says: a config without what grid and sweep decide.

    Attributes:
      bits: precisions of the weights that count, beside the full one.
      validation_size: hold out so many training images and judge by them; a tenth of
        the training images if None.
      grid: of the sweep.
      options: of the sweep.
    """

    h: Hidden[float] = Config.h
    gamma: Hidden[float] = Config.gamma
    learning_rate: Hidden[float] = Config.learning_rate
    weight_decay: Hidden[float] = Config.weight_decay
    seed: Hidden[int] = Config.seed
    strength: Hidden[float] = Config.strength
    share: Hidden[float] = Config.share
    curvature_h: Hidden[float] = Config.curvature_h
    curvature_batches: Hidden[int] = Config.curvature_batches
    epoch_on_device: Hidden[bool | None] = Config.epoch_on_device
    grid: Grid
    options: Options

    def __post_init__(self) -> None:
        """Leave to the grid what may not suit the rest of the config."""
        object.__setattr__(self, "share", 0.0)
        if self.optimizer == "adamw":
            object.__setattr__(self, "learning_rate", 0.0)
        super().__post_init__()


def parse(arguments: Sequence[str]) -> tuple[Config, Config, Grid, Options]:
    """Return the config that is named, that of the runs, the grid, and the options.

    Raises `FileNotFoundError`, `TypeError` or `ValueError`.
    """
    name, base, rest = first(arguments)
    of_share: dict[str, Any] = {"h": (0.0, base.h), "share": (0.15, 0.3, 0.45, 0.6)}
    grid = Grid(
        learning_rate=(base.learning_rate,),
        weight_decay=(base.weight_decay,),
        **of_share if base.share else {},
    )
    options = Options(out=Path("runs") / name / "sweep")
    fields = dataclasses.asdict(base) | {"bits": (4,)}
    both = tyro.cli(
        Command,
        prog="python -m examples.experiments.sweep [CONFIG]",
        description=__doc__,
        args=rest,
        default=Command(**fields, grid=grid, options=options),
        config=(tyro.conf.OmitArgPrefixes,),
    )
    config = Config(**{name: getattr(both, name) for name in fields})
    for rate in both.grid.learning_rate:  # it may not suit the optimizer
        dataclasses.replace(config, learning_rate=rate)
    for share in both.grid.share:
        dataclasses.replace(config, share=share, h=max(both.grid.h))
    return base, config, both.grid, both.options


def last_words(
    base: Config, config: Config, record: dict[str, Any], options: Options
) -> list[str]:
    """Say what is best; write the config of the final run, and say its command."""
    best, out = record["best"], options.out
    assert out is not None
    axes = Grid(**record["grid"]).axes(config.method)
    setting = ", ".join(f"{name} {best[name]:g}" for name in axes)
    lines = [
        f"best of {in_words(config)}: {setting}, with {percent(best['score'])} % on "
        f"{record['validation_images']} images held out."
    ]
    sgd = plain(config.method, record["settings"])
    if sgd not in (None, best):
        lines.append(f"SGD reaches {percent(sgd['score'])} %.")
    for name, end in record["at_edge"].items():
        further = {"largest": "larger", "smallest": "smaller"}[end]
        lines.append(
            f"{name} {best[name]:g} is the {end} that was tried: the best one may be "
            f"{further}, so run the sweep again with more values."
        )
    names = (*OF_METHOD[config.method], "learning_rate", "weight_decay")
    fields: dict[str, Any] = {name: best[name] for name in names}
    fields |= {"validation_size": None, "bits": base.bits}
    final = dataclasses.replace(config, **fields)
    results.write_text(out / "best.toml", configs.dumps(final))
    words = ["python", "-m", "examples.image_classification", str(out / "best.toml")]
    for name in ("data_dir", "dataset_path"):
        if (value := getattr(options, name)) is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    folder = "_".join(f"{name}_{best[name]:g}" for name in axes) or config.method
    words += ["--out", str(out / folder)]
    return [*lines, "The run on all training images:", shlex.join(words)]


@command
def main(arguments: Sequence[str]) -> None:
    """Run the command; return the exit status."""
    with checked_arguments():
        base, config, grid, options = parse(arguments)
    record = sweep(config, grid, options)
    if record["best"] is None:
        say("every setting diverged: try smaller h, gamma or learning_rate.")
    else:
        say("\n".join(last_words(base, config, record, options)), options.quiet)


if __name__ == "__main__":
    sys.exit(main())
