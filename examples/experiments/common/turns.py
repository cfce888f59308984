"""Programs take turns within one process, and are timed."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from tqdm import tqdm

Program = Callable[[], Any]

TURN_SECONDS = 0.02
"""A turn has as many calls as fill so much time, unless their number is given."""


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
    quiet: bool = False,
) -> dict[str, list[float]]:
    """Time compiled programs by turns: ratios hold where the machine's speed drifts.

    The first call of a turn is not timed, since it pays for fresh memory.

    Returns:
      The seconds of a call, in every round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in tqdm(range(rounds), desc="rounds", disable=quiet or None, leave=False):
        for name, program in programs.items():
            first, _ = clock(program)
            count = (calls or {}).get(name) or max(1, round(TURN_SECONDS / first))
            seconds[name].append(clock(program, count)[0])
    return seconds


def repeated(step: Callable[..., Any], state: Any, *args: Any) -> Program:
    """Return a call that takes the next step, and returns the new state."""

    def take() -> Any:
        nonlocal state
        state, _ = step(state, *args)
        return state

    return take
