"""Checks of what a command line says, before anything is trained."""

import argparse
import tempfile
from pathlib import Path


def training_parser(doc: str | None, out: str) -> argparse.ArgumentParser:
    """Return a parser of what commands on the digits share; `out` is a folder."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--label-noise", type=float, default=0.4, help="in training, from 0 to 1")
    add("--epochs", type=int, default=40, help="of training")
    add("--out", type=Path, default=Path(out), help="folder to write")
    add("--quiet", action="store_true", help="show no progress bars")
    return parser


def check_training_options(
    parser: argparse.ArgumentParser, options: argparse.Namespace
) -> None:
    """Exit unless label noise and epochs are in range and the folder is writable."""
    if not 0.0 <= options.label_noise <= 1.0:
        parser.error(f"--label-noise must be from 0 to 1, got {options.label_noise}")
    check_at_least(parser, options, epochs=1)
    check_folder(parser, options.out)


def check_at_least(
    parser: argparse.ArgumentParser, options: argparse.Namespace, **least: int
) -> None:
    """Exit unless these options are at least so large, or None."""
    for name, number in least.items():
        value = getattr(options, name)
        if value is not None and value < number:
            option = name.replace("_", "-")
            parser.error(f"--{option} must be at least {number}, got {value}")


def check_folder(parser: argparse.ArgumentParser, out: Path) -> None:
    """Make the folder, or exit now rather than after the training."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        parser.error(f"--out must be a folder that can be written to: {error}")
