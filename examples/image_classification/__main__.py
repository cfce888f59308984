"""The command line; see the package's docstring, or `--help`."""

import dataclasses
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import jax
import tyro

from . import __doc__ as description
from . import hosts
from .checkpoints import CheckpointError
from .config import Config
from .datasets import DatasetError
from .devices import DevicesError, divide_host
from .logbook import prepare_streams, tell
from .loop import RunError
from .named import named
from .run import Options, run
from .stopping import STOPPED, Stopped

ERRORS = (CheckpointError, DatasetError, DevicesError, hosts.HostsError, RunError)


@dataclasses.dataclass(frozen=True)
class Command:
    """What the command line says."""

    config: Config
    options: Options


def parse(arguments: Sequence[str]) -> tuple[Config, Options]:
    """Read a config file and the options that override it.

    Raises:
      FileNotFoundError: no such config.
      TypeError: a value has the wrong type.
      ValueError: a value is out of range, or a file is no config.
    """
    name, base, rest = first(arguments)
    command = tyro.cli(
        Command,
        prog=f"python -m {__package__} [CONFIG]",
        description=description.replace("examples.image_classification", __package__),
        args=rest,
        default=Command(base, Options()),
        config=(tyro.conf.OmitArgPrefixes,),
    )
    config, options = command.config, command.options
    out = options.out or Path("runs") / name / f"seed_{config.seed}"
    return config, dataclasses.replace(options, out=out)


def first(arguments: Sequence[str]) -> tuple[str, Config, list[str]]:
    """Return name and content of the config that comes first, and what follows it."""
    rest = [*arguments]
    if not rest or rest[0].startswith("-"):
        return "default", Config(), rest
    name = rest.pop(0)
    return Path(name).name.removesuffix(".toml"), named(name), rest


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status, `STOPPED` if it was asked to stop."""
    prepare_streams()
    try:
        config, options = parse(sys.argv[1:] if arguments is None else arguments)
    except (FileNotFoundError, TypeError, ValueError) as error:
        tell(f"error: {error}")
        return 2
    try:
        divide_host(options.host_devices)
        if options.distributed:
            hosts.join()
        run(config, options)
    except Stopped as stopped:
        if hosts.is_first():
            tell(str(stopped))
        return STOPPED
    except KeyboardInterrupt:
        tell(
            "interrupted; the same command goes on from the latest checkpoint, if any."
        )
        return _failed(128 + signal.SIGINT)
    except (*ERRORS, OSError) as error:
        tell(f"error: {error}")
        return _failed(1)
    except Exception as error:
        if jax.process_count() == 1:
            raise
        if isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error):
            tell(
                "error: another process of the run has ended, or cannot be reached: "
                f"{str(error).splitlines()[0]}"
            )
        else:
            traceback.print_exc()
        return _failed(1)
    return 0


def _failed(status: int) -> int:
    """Return the exit status, or end at once if other processes wait for this one."""
    if jax.process_count() > 1:
        hosts.leave(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
