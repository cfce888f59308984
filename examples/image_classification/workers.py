"""Processes that make batches, deaf to Ctrl-C, and gone when their parent is."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Workers:
    """Processes that take items of a source.

    Signals are left to the process that started them, which decides when to stop. They
    end when that closes the pipe that all of them hold, or is no more itself.

    Args:
      source: `source[number]` makes an item; it is sent to every process once.
      count: number of processes, which start as they are needed.
    """

    def __init__(self, source: Any, count: int) -> None:
        theirs, self._lifeline = multiprocessing.Pipe(duplex=False)
        self._pool = ProcessPoolExecutor(
            count,
            multiprocessing.get_context("spawn"),
            initializer=_start,
            initargs=(source, theirs),
        )

    def submit(self, number: int) -> Future[Any]:
        """Ask for an item."""
        with _held_back():
            return self._pool.submit(_make, number)

    def kill(self) -> None:
        """End all processes at once; what they are at is lost."""
        self._lifeline.close()

    def close(self) -> None:
        """Drop what has not begun, and wait for the rest."""
        self._pool.shutdown(cancel_futures=True)
        self._lifeline.close()


@contextlib.contextmanager
def _held_back() -> Iterator[None]:
    """Hold signals back from this thread, and from processes that it starts meanwhile.

    A process inherits the mask, so that none reaches it before it can say that it does
    not want them.
    """
    resource_tracker.ensure_running()  # to start it lets the signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_source: Any = None
"""What a worker process makes items of."""


def _start(source: Any, lifeline: Connection) -> None:
    """Ignore signals from now on, and end when nobody holds the other end."""
    global _source
    _source = source
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)

    def wait() -> None:
        lifeline.poll(None)  # nothing is ever sent: it returns when the pipe is closed
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _make(number: int) -> Any:
    return _source[number]
