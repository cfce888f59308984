"""Programs take turns within one process; tables and JSON files of their times."""

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from examples.experiments.common.command_line import check_at_least
from examples.image_classification.results import environment, markdown, write_json

Program = Callable[[], Any]

TURN_SECONDS = 0.02
"""A turn has as many calls as fill so much time, unless their number is given."""


class Parser(argparse.ArgumentParser):
    """A command line with the number of rounds, if there are any, and a JSON file."""

    def __init__(self, description: str | None, rounds: int | None = None) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=formatter)
        self.add_argument("--out", type=Path, help="JSON file to write")
        if rounds is not None:
            self.add_argument(
                "--rounds", type=int, default=rounds, help="turns of each"
            )

    def read(self, arguments: Sequence[str] | None, **least: int) -> argparse.Namespace:
        """Read the options, and check which are at least so large."""
        options = self.parse_args(arguments)
        rounds = {"rounds": 1} if "rounds" in options else {}
        check_at_least(self, options, **rounds, **least)
        return options


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
    slow: float = math.inf,
) -> dict[str, list[float]]:
    """Time compiled programs by turns: ratios hold where the machine's speed drifts.

    The first call of a turn is not timed, since it pays for fresh memory; but if it
    takes longer than `slow` seconds it counts, and is not made again.

    Returns:
      The seconds of a call, in every round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in tqdm(range(rounds), desc="rounds", disable=None, leave=False):
        for name, program in programs.items():
            first, _ = clock(program)
            count = (calls or {}).get(name) or max(1, round(TURN_SECONDS / first))
            again = first <= slow
            seconds[name].append(clock(program, count)[0] if again else first)
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
