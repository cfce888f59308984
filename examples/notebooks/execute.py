"""Run the notebooks of this folder and store their outputs in them.

    pip install -e ".[notebooks]"
    python examples/notebooks/execute.py                # all of them, in place
    python examples/notebooks/execute.py hero_in_ten_minutes.ipynb

Each runs by this Python, in an empty folder, from its first cell to its last. What
would differ from one machine to the next is left out of the file: times, and versions
of the kernel. It takes a minute or two on 2 cores.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import nbclient
import nbformat
from traitlets.config import Config

FOLDER = Path(__file__).parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(path: Path, timeout: int = 600) -> nbformat.NotebookNode:
    """Run a notebook, whatever outputs it has; return it with new ones.

    Args:
      path: of the notebook, which is not written to.
      timeout: seconds that a cell may take.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell raised.
    """
    notebook: nbformat.NotebookNode = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        kernel = Path(folder) / "kernels" / "python3"
        kernel.mkdir(parents=True)
        command = [
            sys.executable,
            "-m",
            "ipykernel_launcher",
            "-f",
            "{connection_file}",
        ]
        (kernel / "kernel.json").write_text(
            json.dumps({"argv": command, **METADATA["kernelspec"]})
        )
        empty = Path(folder) / "empty"
        empty.mkdir()
        config = Config({"KernelSpecManager": {"kernel_dirs": [str(kernel.parent)]}})
        client = nbclient.NotebookClient(
            notebook,
            timeout=timeout,
            kernel_name="python3",
            record_timing=False,
            coalesce_streams=True,
            config=config,
            resources={"metadata": {"path": str(empty)}},
        )
        client.execute()
    notebook.metadata.clear()
    notebook.metadata.update(METADATA)
    for cell in notebook.cells:
        cell.metadata.clear()
    return notebook


def main(arguments: Sequence[str] | None = None) -> None:
    """Execute notebooks in place."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", type=Path, help="all of the folder, if none"
    )
    options = parser.parse_args(arguments)
    for path in options.names or sorted(FOLDER.glob("*.ipynb")):
        where = path if path.exists() else FOLDER / path
        notebook = execute(where)
        nbformat.validate(notebook)
        nbformat.write(notebook, where)
        print(f"wrote {where}")


if __name__ == "__main__":
    main()
