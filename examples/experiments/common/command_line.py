"""Command lines whose options are checked before anything is trained."""

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser that shows a module's docstring as it is.

    Usage and errors begin with the command as it was typed: `python -m` and a name.
    """
    formatter = argparse.RawDescriptionHelpFormatter
    spec = sys.modules["__main__"].__spec__
    name = None if spec is None else f"python -m {spec.name.removesuffix('.__main__')}"
    return argparse.ArgumentParser(name, description=doc, formatter_class=formatter)


def training_parser(doc: str | None, out: str) -> argparse.ArgumentParser:
    """Return a parser of what commands on the digits share; `out` is a folder."""
    parser = make_parser(doc)
    add = parser.add_argument
    add("--label-noise", type=share, default=0.4, help="in training, from 0 to 1")
    add("--epochs", type=at_least(1), default=40, help="of training")
    add("--out", type=folder, default=out, help="folder to write")
    add("--quiet", action="store_true", help="show no progress bars")
    return parser


def at_least(least: int) -> Callable[[str], int]:
    """Return what reads an integer that is so large."""

    def integer(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    return integer


def check_seeds(parser: argparse.ArgumentParser, seeds: Sequence[int]) -> None:
    """End with an error if a seed is negative, or there twice."""
    if min(seeds) < 0 or len({*seeds}) < len(seeds):
        parser.error(f"--seeds must be different and at least 0, got {[*seeds]}")


def share(text: str) -> float:
    """Read a number from 0 to 1."""
    value = float(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, got {value}")
    return value


def folder(text: str) -> Path:
    """Make the folder, or fail now rather than after the training."""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        message = f"must be a folder that can be written to: {error}"
        raise argparse.ArgumentTypeError(message) from None
    return path
