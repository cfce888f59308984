"""Worker processes: signals, the end of one, the end of their parent."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import BrokenExecutor
from pathlib import Path

import psutil
import pytest

from examples.image_classification.workers import Workers

ROOT = Path(__file__).parents[3]


def test_items_come_from_the_source():
    workers = Workers([3, 1, 4], 2)
    assert [workers.make(k).result() for k in (2, 0, 1)] == [4, 3, 1]
    workers.shutdown()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_does_not_end_a_worker_that_is_just_starting(number):
    workers = Workers([3, 1, 4], 2)
    futures = [workers.make(k) for k in range(3)]
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, number)
    assert [future.result() for future in futures] == [3, 1, 4]
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, number)
    assert workers.make(0).result() == 3
    workers.shutdown()


def test_signals_reach_the_parent_as_before():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    workers = Workers([3, 1, 4], 1)
    workers.make(0).result()
    workers.shutdown()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def test_when_one_of_several_is_killed_the_others_end_too():
    workers = Workers([3, 1, 4], 2)
    futures = [workers.make(k) for k in range(3)]
    [future.result() for future in futures]
    multiprocessing.active_children()[0].kill()
    with pytest.raises(BrokenExecutor):  # noqa: PT012 - it may take a few
        while True:
            workers.make(0).result()
    workers.kill()
    workers.shutdown()  # would wait for ever
    assert not multiprocessing.active_children()


PARENT = """
import signal
from examples.image_classification.workers import Workers
if __name__ == "__main__":
    workers = Workers([3, 1, 4], 2)
    assert [workers.make(k).result() for k in range(3)] == [3, 1, 4]
    print("alive", flush=True)
    signal.pause()
"""


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    parent = subprocess.Popen(
        [sys.executable, str(script)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with parent:
        try:
            assert parent.stdout.readline() == "alive\n"
            assert running(parent.pid)
        finally:
            parent.kill()
    deadline = time.monotonic() + 20
    while running(parent.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not running(parent.pid)


def running(session):
    """The worker processes of a session."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(process.pid) == session:
                found.append(" ".join(process.info["cmdline"] or []))
    return [line for line in found if "spawn_main" in line]
