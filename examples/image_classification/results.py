"""What results say about their origin, tables of them, and writing them safely."""

import contextlib
import datetime as dt
import io
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import flax
import jax
import optax

import hero_jax


def environment() -> dict[str, Any]:
    """Describe the command, the versions and the machine."""
    return {
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "optax": optax.__version__,
        "hero_jax": hero_jax.__version__,
        "revision": revision(),
        "device": jax.devices()[0].device_kind,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
    }


def revision() -> str | None:
    """Return the last commit that changed code, with "+" if it was changed since.

    None outside of a repository.
    """
    code = ("--", ":(top,glob)**/*.py", ":(top)pyproject.toml")

    def git(*words: str) -> str:
        here = str(Path(__file__).parent)
        command = ["git", "--no-optional-locks", "-C", here, *words]
        return subprocess.run(
            command, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # or another's
        changed = git("status", "--porcelain", "--untracked-files=no", *code)
        return git("log", "-1", "--format=%h", *code) + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def remove_partial(folder: Path) -> None:
    """Remove what processes that were killed have left half written in a folder."""
    for path in folder.iterdir():
        if _PARTIAL.fullmatch(path.name):
            with contextlib.suppress(OSError):
                path.unlink()


_PARTIAL = re.compile(r"\.[0-9a-f]{16}\.partial")
"""Names of such files, of `hero_jax.quant.write_file`."""


def write_text(path: Path, text: str) -> None:
    """Write text, whole or not at all; names that are not UTF-8 become escapes."""
    hero_jax.quant.write_file(path, text.encode(errors="backslashreplace"))


def write_figure(path: Path, figure: Any, dpi: int = 120) -> None:
    """Write a figure of matplotlib as PNG, whole or not at all."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=dpi, format="png")
    hero_jax.quant.write_file(path, drawn.getvalue())


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a record as JSON, whole or not at all; a row of numbers is one line."""
    text = json.dumps(record, indent=1, ensure_ascii=False)
    text = _NUMBERS.sub(lambda row: f"[{' '.join(row[1].split())}]", text)
    write_text(path, text + "\n")


_NUMBERS = re.compile(r"\[\n((?:\s*(?:null|[-+.\deE]+),?\n)+)\s*\]")


def markdown(rows: list[list[str]]) -> str:
    """Format rows of text, the first with the titles, as a Markdown table."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])
