"""Programs take turns within one process; tables and JSON files of their times."""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from examples.experiments.common.command_line import at_least, make_parser
from examples.image_classification.results import environment, markdown, write_json

Program = Callable[[], Any]

TURN_SECONDS = 0.02
"""A turn has as many calls as fill so much time, unless their number is given."""


def speed_parser(doc: str | None, rounds: int | None = None) -> argparse.ArgumentParser:
    """Return a parser of a JSON file and, if there are any, the number of rounds."""
    parser = make_parser(doc)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    if rounds is not None:
        count = at_least(1)
        parser.add_argument("--rounds", type=count, default=rounds, help="of turns")
    return parser


def clock(program: Program, calls: int = 1) -> tuple[float, Any]:
    """Return the seconds of a call, and what the last one returns."""
    result = None
    start = time.perf_counter()
    for _ in range(calls):
        result = program()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls, result


def take_turns(
    programs: Mapping[str, Program],
    rounds: int,
    calls: Mapping[str, int] | None = None,
) -> dict[str, list[float]]:
    """Time compiled programs by turns: ratios hold where the machine's speed drifts.

    The first call of a turn is not timed, since it pays for fresh memory.

    Returns:
      The seconds of a call, in every round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in tqdm(range(rounds), desc="rounds", disable=None, leave=False):
        for name, program in programs.items():
            first, _ = clock(program)
            count = (calls or {}).get(name) or max(1, round(TURN_SECONDS / first))
            seconds[name].append(clock(program, count)[0])
    return seconds


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
