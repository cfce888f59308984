"""Run the notebooks of this folder and store their outputs.

    pip install -e ".[notebooks]"
    python examples/notebooks/execute.py --out executed   # copies, in that folder
    python examples/notebooks/execute.py --in-place hero_in_ten_minutes.ipynb

Each runs by this Python, in an empty folder, from its first cell to its last. What
would differ from one machine to the next is left out of the file: times, and versions
of the kernel. It takes a minute or two on 2 cores.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import nbclient
import nbformat
from traitlets.config import Config

FOLDER = Path(__file__).parent
SPEC = {"display_name": "Python 3", "language": "python", "name": "python3"}
METADATA = {"kernelspec": SPEC, "language_info": {"name": "python"}}
COMMAND = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]


def execute(path: Path, timeout: int = 600) -> nbformat.NotebookNode:
    """Run a notebook, at most so many seconds a cell; return it with new outputs."""
    notebook: nbformat.NotebookNode = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        kernels, empty = Path(folder) / "kernels", Path(folder) / "empty"
        (kernels / "python3").mkdir(parents=True)
        empty.mkdir()
        kernel = json.dumps({"argv": COMMAND, **SPEC})
        (kernels / "python3" / "kernel.json").write_text(kernel)
        nbclient.NotebookClient(
            notebook,
            timeout=timeout,
            kernel_name="python3",
            record_timing=False,
            coalesce_streams=True,
            config=Config({"KernelSpecManager": {"kernel_dirs": [str(kernels)]}}),
            resources={"metadata": {"path": str(empty)}},
        ).execute()
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata.clear()
    nbformat.validate(notebook)
    return notebook


def main(arguments: list[str] | None = None) -> None:
    """Execute notebooks, and write them elsewhere unless told otherwise."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", type=Path, help="all, if none")
    parser.add_argument("--out", type=Path, default=Path("executed"), help="folder")
    parser.add_argument("--in-place", action="store_true", help="overwrite them")
    options = parser.parse_args(arguments)
    for name in options.names or sorted(FOLDER.glob("*.ipynb")):
        source = name if name.exists() else FOLDER / name
        target = source if options.in_place else options.out / source.name
        notebook = execute(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, target)
        print(f"wrote {target}")


if __name__ == "__main__":
    main()
