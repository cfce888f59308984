"""Several processes in one run, on one host or many: joining and agreeing.

All of them run the same command, see the same numbers and decide alike; the first one
alone prints and writes.
"""

import contextlib
import json
import os
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from .errors import HostsError
from .logbook import tell

PATIENCE_SECONDS = 10  # after which a process says that it waits for the others
HEARTBEAT_SECONDS = 30  # after which the others end, too
GRACE_SECONDS = 2  # by which the first process, which they depend on, ends later


def join() -> None:
    """Join the other processes of the run; before anything else is asked of JAX.

    Where they are is known from the cluster (Slurm, Open MPI, Kubernetes, TPU pods: see
    :func:`jax.distributed.initialize`), or from the variables JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    address, count, own = map(os.environ.get, names)
    text = "waiting for the other processes of the run"
    if address and count and own:
        text += (
            f" at {address}: each of {count} must have a JAX_PROCESS_ID of its own, "
            f"counted from 0, and this one has {own}"
        )
    alarm = threading.Timer(PATIENCE_SECONDS, tell, [f"{text}."])
    alarm.daemon = True
    alarm.start()
    try:
        jax.distributed.initialize(
            num_processes=None if count is None else int(count),
            process_id=None if own is None else int(own),
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        raise HostsError(
            f"cannot join the other processes: {str(error).splitlines()[0]} Outside of "
            "a cluster that JAX knows, set JAX_COORDINATOR_ADDRESS (host:port of the "
            "first process), JAX_NUM_PROCESSES and JAX_PROCESS_ID."
        ) from error
    finally:
        alarm.cancel()


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return bool(jax.process_index() == 0)


def leave(status: int) -> NoReturn:
    """End at once; an orderly end would wait for processes that wait for this one."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with contextlib.suppress(OSError):
            stream.flush()
    if is_first():
        time.sleep(GRACE_SECONDS)  # JAX ends the others with it, in the middle of words
    os._exit(status)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Let an error in one process be an error in all, at the end of the block."""
    try:
        yield
    except Exception:
        total(1)
        raise
    if total(0):
        raise HostsError("another process of the run cannot begin: see what it says.")


def of_first(value: Any) -> Any:
    """Return the value for JSON that the first process has."""
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    text = np.resize(text, size)  # the first one's has this size already
    return json.loads(bytes(multihost_utils.broadcast_one_to_all(text)))


def arrays_of_first(tree: Any) -> Any:
    """Return the arrays that the first process has; others have the same shapes."""
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(tree))


def total(value: int) -> int:
    """Return the sum over the processes."""
    if jax.process_count() == 1:
        return value
    return int(np.sum(multihost_utils.process_allgather(np.int32(value))))


def check_same(name: str, value: str) -> None:
    """Raise `HostsError` on all processes unless all have the same value."""
    if jax.process_count() == 1:
        return
    own = np.uint32(zlib.crc32(value.encode()))
    every = multihost_utils.process_allgather(own)
    others = np.flatnonzero(every != every[0])
    if others.size:
        raise HostsError(
            f"{name} of process {others[0]} differs from that of process 0: all "
            "processes must run the same command on the same data."
        )
