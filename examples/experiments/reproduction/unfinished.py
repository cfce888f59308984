"""Runs that were stopped, beside the results: to be committed, and resumed anywhere.

Such a folder has what a run goes on from, and no more: its config, the revisions of the
code that worked on it, and its latest checkpoint.
"""

import shutil
from pathlib import Path

from examples.image_classification import results

REVISIONS = "revisions.txt"


def copy(run: Path, target: Path) -> None:
    """Copy what a run goes on from, whole or not at all, if it came further there."""
    step = _latest(run)
    if step <= _latest(target):
        return
    partial = _partial(target)
    shutil.rmtree(partial, ignore_errors=True)
    checkpoint = Path("checkpoints") / str(step)
    shutil.copytree(run / checkpoint, partial / checkpoint)
    for marker in partial.rglob("commit_success.txt"):  # of Orbax; names this machine
        marker.write_text("")
    for name in ("config.toml", REVISIONS):
        shutil.copy(run / name, partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


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


def _partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def _latest(run: Path) -> int:
    steps = (path.name for path in (run / "checkpoints").glob("*"))
    return max((int(step) for step in steps if step.isdigit()), default=0)
