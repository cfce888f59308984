"""Checkpoints of a run: atomic, checked when read, the latest and the best kept."""

import logging
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

# Orbax tells every step it takes, and its threads what they raise here as well.
logging.getLogger("absl").setLevel(logging.CRITICAL)


class CheckpointError(Exception):
    """A checkpoint cannot be written or read; the message says which and why."""


class Checkpoints:
    """The checkpoints in a folder, by the number of steps.

    Each has the training state, a record of plain values, and a checksum.

    Args:
      folder: made if it is missing; checkpoints that a killed run left half written
        are removed.
      keep: number of the latest checkpoints that stay, beside the best one.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder.absolute()
        keep_best = preservation_policy.BestN(
            get_metric_fn=_accuracy, n=1, keep_checkpoints_without_metrics=False
        )
        own = jax.process_index()  # whichever process asks for it writes alone
        alone = ocp.options.MultiprocessingOptions(
            primary_host=own, active_processes={own}
        )
        options = ocp.CheckpointManagerOptions(
            create=False,
            multiprocessing_options=alone,
            preservation_policy=preservation_policy.AnyPreservationPolicy(
                [preservation_policy.LatestN(keep), keep_best]
            ),
            best_fn=_accuracy,
            cleanup_tmp_directories=True,
        )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(self.folder, options=options)
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
          CheckpointError: it, or the one before, cannot be written.
        """
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            record=ocp.args.JsonSave(record | {"checksum": checksum(state)}),
        )
        metrics = None if accuracy is None else {"accuracy": accuracy}
        try:
            self._manager.save(step, args=items, metrics=metrics)
        except Exception as error:  # of the file system or of orbax's thread
            raise self._cannot_write(error) from error

    def wait(self) -> None:
        """Wait until all is written."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._cannot_write(error) from error

    def latest(self) -> Path | None:
        """Return the path of the latest complete checkpoint."""
        step = self._manager.latest_step()
        return None if step is None else self.folder / str(step)

    def best(self) -> int | None:
        """Return the step of the checkpoint with the best accuracy."""
        step: int | None = self._manager.best_step()
        return step

    def restore(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
        """Read the latest checkpoint.

        Args:
          like: pytree with shapes and dtypes of the state.

        Returns:
          State, on the host, and record; `None` if there is no checkpoint.

        Raises:
          CheckpointError: it is damaged, or of another network.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        path = self.folder / str(step)
        # To the host first: the devices may be others than those that it came from.
        on_host = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(on_host), record=ocp.args.JsonRestore()
        )
        try:
            restored = self._manager.restore(step, args=items)
            state, record = restored["state"], dict(restored["record"])
            if record.pop("checksum") != checksum(state):
                raise ValueError("its checksum does not match")
            if any(
                a.shape != b.shape or a.dtype != b.dtype
                for a, b in zip(
                    jax.tree.leaves(state), jax.tree.leaves(like), strict=True
                )
            ):
                raise ValueError("it is of another network")
        except Exception as error:  # whatever damaged files make orbax raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CheckpointError(
                f"checkpoint {path} cannot be read: {reason[:300]}. Delete that folder "
                "to resume from the one before, or the whole run to begin again."
            ) from error
        return state, record

    def close(self) -> None:
        """Wait and release threads."""
        self.wait()
        self._manager.close()

    def _cannot_write(self, error: Exception) -> CheckpointError:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return CheckpointError(
            f"cannot write a checkpoint to {self.folder}: {reason[:300]}. The last "
            f"complete one is {self.latest()}."
        )


def checksum(tree: Any) -> int:
    """Return a CRC-32 over names, dtypes, shapes and bytes of all leaves."""
    crc = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.ascontiguousarray(leaf)
        name = f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}"
        crc = zlib.crc32(name.encode(), crc)
        crc = zlib.crc32(array.tobytes(), crc)
    return crc


def _accuracy(metrics: dict[str, float]) -> float:
    return metrics["accuracy"]
