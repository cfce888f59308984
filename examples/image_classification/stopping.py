"""How a command ends: a signal came, the time is up, or an error has a line to say."""

import contextlib
import functools
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.experimental import multihost_utils

from . import hosts
from .errors import RecipeError
from .logbook import prepare_streams, tell

STOPPED = os.EX_TEMPFAIL
"""Exit status of a command that has saved its state, and goes on if started again."""

WRONG_ARGUMENTS = 2
"""Exit status, as of argparse and tyro."""


class Stopped(Exception):  # noqa: N818 - no error
    """The run was asked to stop, and has saved its state."""


class ArgumentsError(RecipeError):
    """What the command line says cannot be."""


@contextlib.contextmanager
def checked_arguments() -> Iterator[None]:
    """Raise `ArgumentsError` where the block finds a value wrong, or no file."""
    try:
        yield
    except (FileNotFoundError, TypeError, ValueError) as error:
        raise ArgumentsError(str(error)) from None


def command(main: Callable[[Sequence[str]], int | None]) -> Callable[..., int]:
    """Let a function of arguments return an exit status, and errors be one line."""

    @functools.wraps(main)
    def run(arguments: Sequence[str] | None = None) -> int:
        prepare_streams()
        try:
            return main(sys.argv[1:] if arguments is None else arguments) or 0
        except Stopped as stopped:
            if hosts.is_first():
                tell(str(stopped))
            return STOPPED
        except ArgumentsError as error:
            tell(f"error: {error}")
            return WRONG_ARGUMENTS
        except KeyboardInterrupt:
            text, status = "interrupted; the same command goes on.", 128 + signal.SIGINT
        except (RecipeError, OSError) as error:
            text, status = f"error: {error}", 1
        except Exception as error:
            if jax.process_count() == 1:
                raise
            text, status = traceback.format_exc(), 1
            if isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error):
                text = (
                    "error: another process of the run has ended, or cannot be "
                    f"reached: {str(error).splitlines()[0]}"
                )
        tell(text)
        if jax.process_count() > 1:
            hosts.leave(status)
        return status

    return run


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
