"""Runs that were stopped, beside the results: to be committed, and resumed anywhere.

Such a folder has what a run goes on from, and no more: its config, the revisions of the
code that worked on it, and its latest checkpoint.
"""

import shutil
from pathlib import Path

from examples.image_classification import results

REVISIONS = "revisions.txt"


def keep(run: Path, kept: Path) -> None:
    """Copy what a stopped run goes on from, in place of an earlier copy."""
    latest = _latest(run)
    if latest is not None and latest > (_latest(kept) or 0):
        _copy(run, kept, latest)


def bring_back(kept: Path, run: Path) -> None:
    """Copy a stopped run to where it goes on, unless it came further there."""
    latest = _latest(kept)
    if latest is not None and latest > (_latest(run) or 0):
        _copy(kept, run, latest)


def forget(kept: Path) -> None:
    """Delete the copy of a run that is finished."""
    for path in (kept, _partial(kept)):
        shutil.rmtree(path, ignore_errors=True)


def note_revision(run: Path, devices: int) -> list[str]:
    """Note which code works on a run, on how many devices; return all that did so."""
    path = run / REVISIONS
    noted = path.read_text().splitlines() if path.exists() else []
    here = f"{results.revision()} on {devices} device(s)"
    if here not in noted[-1:]:
        noted.append(here)
        results.write_text(path, "".join(f"{line}\n" for line in noted))
    return noted


def _copy(source: Path, target: Path, step: int) -> None:
    """Replace a folder, whole or not at all."""
    partial = _partial(target)
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(_checkpoint(source, step), _checkpoint(partial, step))
    for marker in partial.rglob("commit_success.txt"):  # of Orbax; names this machine
        marker.write_text("")
    for name in ("config.toml", REVISIONS):
        shutil.copy(source / name, partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def _partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def _checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / str(step)


def _latest(run: Path) -> int | None:
    steps = (path.name for path in (run / "checkpoints").glob("*"))
    return max((int(step) for step in steps if step.isdigit()), default=None)
