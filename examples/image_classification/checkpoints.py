"""Checkpoints of a run: atomic, checked when read, the latest and the best kept."""

import contextlib
import json
import logging
import math
import os
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from .errors import CheckpointError
from .logbook import tell

for name in ("absl", "asyncio"):  # orbax tells every step, and what its threads raise
    logging.getLogger(name).setLevel(logging.CRITICAL)
_hook = sys.unraisablehook


def _tell_unraisable(what: Any) -> None:
    """Leave out what orbax's threads raise when another one could not write."""
    if str(what.exc_value) != "Event loop is closed":
        _hook(what)


sys.unraisablehook = _tell_unraisable


class Checkpoints:
    """The checkpoints in a folder, by the number of steps.

    Each has the training state, a record of plain values, and a checksum of both.

    Args:
      folder: made if it is missing; checkpoints that a killed run left half written
        are removed, and so are accuracies that cannot be read.
      keep: number of the latest checkpoints that stay, beside the best one.

    Raises:
      CheckpointError: the folder cannot be used.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder.absolute()
        keep_best = preservation_policy.BestN(
            get_metric_fn=_accuracy, n=1, keep_checkpoints_without_metrics=False
        )
        own = jax.process_index()  # whichever process asks for it writes alone
        options = ocp.CheckpointManagerOptions(
            create=False,
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                primary_host=own, active_processes={own}
            ),
            preservation_policy=preservation_policy.AnyPreservationPolicy(
                [preservation_policy.LatestN(keep), keep_best]
            ),
            best_fn=_accuracy,
            cleanup_tmp_directories=True,
        )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.glob("*/metrics/metrics"):
                _remove_if_damaged(path)
            self._manager = ocp.CheckpointManager(self.folder, options=options)
            self._there = os.open(self.folder, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"cannot use {self.folder}: {error}") from error

    def save(
        self, step: int, state: Any, record: dict[str, Any], accuracy: float | None
    ) -> None:
        """Copy the state and write it in the background.

        Args:
          step: name of the checkpoint.
          state: pytree of arrays.
          record: values for JSON.
          accuracy: by which the best is chosen; `None` if unknown.

        Raises:
          CheckpointError: it, or the one before, cannot be written, or the folder is
            not where it was.
        """
        if step in self._manager.all_steps():
            return
        both = {CHECKSUM: checksum(state, record)}
        copied = json.loads(json.dumps(record | both))  # its lists grow meanwhile
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(copied)
        )
        metrics = None if accuracy is None else {"accuracy": accuracy}
        with self._explained():
            self._manager.save(step, args=items, metrics=metrics)

    def wait(self) -> None:
        """Wait until all is written; errors are those of `save`."""
        with self._explained():
            self._manager.wait_until_finished()

    def latest(self) -> Path | None:
        """Return the path of the latest complete checkpoint."""
        step = self._manager.latest_step()
        return None if step is None else self.folder / str(step)

    def best(self) -> int | None:
        """Return the step of the checkpoint with the best accuracy."""
        step: int | None = self._manager.best_step()
        return step

    def restore(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
        """Read state, to the host, and record of the latest checkpoint, if any.

        Args:
          like: pytree with shapes and dtypes of the state.

        Raises:
          CheckpointError: it is damaged, or of another network.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        # To the host first: the devices may be others than those that it came from.
        on_host = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(on_host), record=ocp.args.JsonRestore()
        )
        try:
            restored = self._manager.restore(step, args=items)
            state, record = restored["state"], dict(restored["record"])
            if record.pop(CHECKSUM, None) != checksum(state, record):
                raise ValueError("its checksum does not match")
            pairs = zip(*map(jax.tree.leaves, (state, like)), strict=True)
            if any((a.shape, a.dtype) != (b.shape, b.dtype) for a, b in pairs):
                raise ValueError("it is of another network")
        except Exception as error:  # whatever damaged files make orbax raise
            raise CheckpointError(
                f"checkpoint {self.folder / str(step)} cannot be read: "
                f"{_reason(error)}. Delete that folder to resume from the one before, "
                "or the whole run to begin again."
            ) from error
        return state, record

    def close(self) -> None:
        """Wait and release threads."""
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception):  # what `wait` has raised
                self._manager.close()
            os.close(self._there)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Name the folder if the block cannot write to it."""
        self.check_there()
        try:
            yield
        except Exception as error:  # of the file system or of orbax's thread
            self.check_there()
            raise CheckpointError(
                f"cannot write a checkpoint to {self.folder}: {_reason(error)}. The "
                f"last complete one is {self.latest()}."
            ) from error
        self.check_there()

    def check_there(self) -> None:
        """Raise `CheckpointError` if another folder, or none, is where this one was."""
        with contextlib.suppress(OSError):
            if os.path.samestat(self.folder.stat(), os.fstat(self._there)):
                return
        raise CheckpointError(
            f"{self.folder} was deleted or moved while this run wrote to it: put it "
            "back to go on from its latest checkpoint, or begin again."
        )


def _reason(error: Exception) -> str:
    """Return what an error of orbax says, in a line that is not too long."""
    text = (str(error).splitlines() or [type(error).__name__])[0]
    if len(text) <= 300:
        return text
    code = re.search(r"os_error_code='(\d+)'", text)  # behind long names of files
    return f"{text[:60]} ... {os.strerror(int(code[1])) if code else text[-200:]}"


CHECKSUM = "checksum_of_all"
"""Name of the checksum in a record."""


def checksum(tree: Any, record: dict[str, Any]) -> int:
    """Return a CRC-32 over names, dtypes, shapes and bytes of leaves, and a record."""
    crc = zlib.crc32(json.dumps(record, sort_keys=True).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.ascontiguousarray(leaf)
        name = f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}"
        crc = zlib.crc32(name.encode(), crc)
        crc = zlib.crc32(array.tobytes(), crc)
    return crc


def _remove_if_damaged(path: Path) -> None:
    """Let a checkpoint be none of the best if it cannot be read how good it is."""
    try:
        finite = math.isfinite(_accuracy(json.loads(path.read_bytes())))
    except (KeyError, TypeError, ValueError):
        finite = False
    if not finite:
        tell(f"{path} is damaged, and removed; its checkpoint may be whole.")
        path.unlink()


def _accuracy(metrics: dict[str, float]) -> float:
    return metrics["accuracy"]
