"""Command lines, tables and JSON files of what measures speed."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from examples.experiments.common.command_line import at_least, make_parser
from examples.image_classification.results import environment, markdown, write_json


def speed_parser(doc: str | None, rounds: int | None = None) -> argparse.ArgumentParser:
    """Return a parser of a JSON file and, if there are any, the number of rounds."""
    parser = make_parser(doc)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    if rounds is not None:
        count = at_least(1)
        parser.add_argument("--rounds", type=count, default=rounds, help="of turns")
    return parser


def report(
    table: Sequence[Sequence[str]], out: Path | None = None, **record: Any
) -> dict[str, Any]:
    """Print a table; return the record with its origin, and write it if asked to."""
    print(markdown([[*row] for row in table]), flush=True)
    whole = {"environment": environment()} | record
    if out is not None:
        write_json(out, whole)
    return whole


def machine() -> str:
    """Return versions and hardware in a few words."""
    kind = jax.devices()[0].device_kind
    return f"{jax.device_count()} x {kind}, jax {jax.__version__}"
