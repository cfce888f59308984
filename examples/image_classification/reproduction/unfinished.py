"""Runs that were stopped, beside the results: to be committed, and resumed anywhere.

Such a folder has what a run goes on from, and no more: its config, the revisions of the
code that worked on it, and its latest checkpoint.
"""

import shutil
from pathlib import Path

from .. import results

REVISIONS = "revisions.txt"


def keep(run: Path, kept: Path) -> None:
    """Copy what a stopped run goes on from, in place of an earlier copy."""
    latest = _latest(run)
    if latest is None or latest <= (_latest(kept) or 0):
        return
    partial = kept.with_name(f".{kept.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(_checkpoint(run, latest), _checkpoint(partial, latest))
    for name in ("config.toml", REVISIONS):
        shutil.copy(run / name, partial)
    shutil.rmtree(kept, ignore_errors=True)
    partial.rename(kept)


def bring_back(kept: Path, run: Path) -> None:
    """Copy a stopped run to where it goes on, unless it came further there."""
    latest = _latest(kept)
    if latest is None or latest <= (_latest(run) or 0):
        return
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(kept, run)


def note_revision(run: Path) -> list[str | None]:
    """Note which code works on a run; return all that have done so."""
    path = run / REVISIONS
    noted = path.read_text().split() if path.exists() else []
    revision = str(results.revision())
    if revision not in noted[-1:]:
        noted.append(revision)
        results.write_text(path, "".join(f"{x}\n" for x in noted))
    return [None if x == "None" else x for x in noted]


def _checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / str(step)


def _latest(run: Path) -> int | None:
    steps = (path.name for path in (run / "checkpoints").glob("*"))
    return max((int(step) for step in steps if step.isdigit()), default=None)
