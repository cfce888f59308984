"""The steps of an epoch, dispatched before the outputs of earlier ones are read."""

import collections
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

AHEAD = 2
"""Steps that are dispatched before the outputs of an earlier one are read."""

State = TypeVar("State")


def take_steps(
    step: Callable[[State, Any], tuple[State, Any]],
    state: State,
    items: Iterable[Any],
    look: Callable[[Any], None],
    stop: Callable[[], bool] = lambda: False,
) -> State:
    """Take a step for every item, unless asked to stop.

    Args:
      step: `(state, item) -> (state, outputs)`, compiled; it may use the state up.
      state: to begin with.
      items: what the steps are taken for.
      look: called with the outputs of every step, in order, on the device.
      stop: asked after every step.

    Returns:
      The state after the last step.
    """
    waiting: collections.deque[Any] = collections.deque()
    for item in items:
        state, outputs = step(state, item)
        waiting.append(outputs)
        if len(waiting) > AHEAD:
            look(waiting.popleft())
        if stop():
            break
    for outputs in waiting:
        look(outputs)
    return state
