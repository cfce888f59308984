"""When to stop: a signal came, or the time is up."""

import math
import os
import signal
import threading
import time
from typing import Any

import jax
from jax.experimental import multihost_utils

STOPPED = os.EX_TEMPFAIL
"""Exit status of a command that has saved its state, and goes on if started again."""


class Stopped(Exception):  # noqa: N818 - no error
    """The run was asked to stop, and has saved its state."""


class Stop:
    """Notes that SIGTERM or SIGINT came, instead of ending the process at once.

    Of several processes, all learn of the SIGTERM that one of them got, at the same
    step; SIGINT ends the one that gets it, and the time does not count.

    Args:
      minutes: from now on, after which to stop; no limit if None.
    """

    def __init__(self, minutes: float | None = None) -> None:
        self._requested = False
        seconds = math.inf if minutes is None else 60.0 * minutes
        self._end = time.monotonic() + seconds
        self._calls = 0
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        """Take the signals over, if this is the main thread."""
        if jax.process_count() > 1:
            return self  # JAX has taken SIGTERM over
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._handlers[number] = signal.signal(number, self._note)
        return self

    def now(self, seconds: float = 0.0) -> bool:
        """Whether to stop rather than do what takes so long.

        Every process has to ask, at each step.
        """
        if jax.process_count() > 1:
            reached = multihost_utils.reached_preemption_sync_point(self._calls)
            self._requested |= reached
            self._calls += 1
            return self._requested
        return self._requested or time.monotonic() + seconds > self._end

    def _note(self, number: int, frame: object) -> None:
        del frame
        self._requested = True
        signal.signal(number, self._handlers[number])  # the second one ends it

    def __exit__(self, *exception: object) -> None:
        """Give the signals back."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
