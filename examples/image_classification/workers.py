"""Processes that make batches, deaf to Ctrl-C, and gone when their parent is."""

import multiprocessing
import os
import signal
import threading
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Workers(ProcessPoolExecutor):
    """Processes that make items of a source, which is sent to every one once.

    Signals are left to the process that started them, which decides when to stop. They
    end when that closes the pipe that all of them hold, or is no more itself.
    """

    def __init__(self, source: Any, count: int) -> None:
        theirs, self._lifeline = multiprocessing.Pipe(duplex=False)
        context = multiprocessing.get_context("spawn")
        super().__init__(count, context, _start, (source, theirs))

    def make(self, number: int) -> Future[Any]:
        """Ask for an item.

        A process that is started meanwhile inherits the mask, so that no signal
        reaches it before it can say that it does not want them.
        """
        resource_tracker.ensure_running()  # to start it lets the signals through again
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            return self.submit(_make, number)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def kill(self) -> None:
        """End all processes at once; what they are at is lost."""
        self._lifeline.close()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Drop what has not begun, if so asked, and wait for the rest."""
        super().shutdown(wait, cancel_futures=cancel_futures)
        self.kill()


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
