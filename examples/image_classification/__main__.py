"""The command line; see the package's docstring, or `--help`."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from . import __doc__ as text
from . import hosts
from .config import Config
from .devices import divide_host
from .named import named
from .run import Options, run
from .stopping import checked_arguments, command

PROGRAM = f"python -m {__package__}"
DESCRIPTION = text.replace("examples.image_classification", __package__)


@dataclasses.dataclass(frozen=True)
class Command:
    """What the command line says."""

    config: Config
    options: Options


def parse(
    arguments: Sequence[str], program: str = PROGRAM, description: str = DESCRIPTION
) -> tuple[Config, Options]:
    """Read a config file and the options that override it.

    Raises `FileNotFoundError`, `TypeError` or `ValueError`.
    """
    name, base, rest = first(arguments)
    both = tyro.cli(
        Command,
        prog=f"{program} [CONFIG]",
        description=description,
        args=rest,
        default=Command(base, Options()),
        config=(tyro.conf.OmitArgPrefixes,),
    )
    out = both.options.out or Path("runs") / name / f"seed_{both.config.seed}"
    return both.config, dataclasses.replace(both.options, out=out)


def first(arguments: Sequence[str]) -> tuple[str, Config, list[str]]:
    """Return name and content of the config that comes first, and what follows it."""
    rest = [*arguments]
    if not rest or rest[0].startswith("-"):
        return "default", Config(), rest
    name = rest.pop(0)
    return Path(name).name.removesuffix(".toml"), named(name), rest


@command
def main(arguments: Sequence[str]) -> None:
    """Run the command; return the exit status, `STOPPED` if it was asked to stop."""
    with checked_arguments():
        config, options = parse(arguments)
    divide_host(options.host_devices)
    if options.distributed:
        hosts.join()
    run(config, options)


if __name__ == "__main__":
    sys.exit(main())
