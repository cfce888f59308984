"""The notebooks run from the first cell to the last, and say what they find.

New outputs are compared with the stored ones as far as rounding, which differs among
machines, leaves them alone; and what the prose claims is asserted of the new ones.
"""

import ast
import base64
import re
import struct
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

from examples.notebooks import execute

ROOT = Path(__file__).parents[2]

FOLDER = ROOT / "examples" / "notebooks"

TEN_MINUTES = FOLDER / "hero_in_ten_minutes.ipynb"
CHOOSING = FOLDER / "choosing_h_and_gamma.ipynb"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
DISTRIBUTIONS = {"sklearn": "scikit-learn"}
PARTS = {"examples", "curvature", "files", "models", "plot"}
"""Extras that `[examples]` consists of."""


def read(path):
    return nbformat.read(path, as_version=nbformat.NO_CONVERT)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook, cell_id):
    """Return what a cell printed."""
    (cell,) = (cell for cell in notebook.cells if cell.id == cell_id)
    return "".join(x.text for x in cell.outputs if x.output_type == "stream")


def numbers(text):
    return [float(x) for x in re.findall(r"-?\d+\.?\d*(?:e[+-]?\d+)?", text)]


def rows(text):
    """Return the lines of a printed table by title, which two spaces end."""
    cells = (re.split(r"\s{2,}", line, maxsplit=1) for line in text.splitlines())
    return {row[0]: numbers(row[1]) for row in cells if len(row) == 2 and row[0]}


@pytest.fixture(autouse=True)
def own_settings(monkeypatch, tmp_path):
    """Keep kernels away from anybody's own settings, and give them this package."""
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.delenv("MPLBACKEND", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("PYTHONWARNINGS", raising=False)


def run(path):
    """Execute a notebook and check that nothing went wrong."""
    notebook = execute.execute(path)
    check_outputs(notebook)
    return notebook


def check_outputs(notebook):
    """Every cell ran, in order, and nothing went wrong or was warned of."""
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    for cell in cells:
        kinds = [(x.output_type, x.get("name")) for x in cell.outputs]
        assert set(kinds) <= {("stream", "stdout"), ("display_data", None)}, cell.id
        shown = re.search(r"^\s*print\(|^plt\.show", cell.source, re.MULTILINE)
        assert bool(kinds) == bool(shown), cell.id


@pytest.mark.slow
def test_hero_in_ten_minutes():
    """Tolerances: what other orders of summation have been seen to change, and more."""
    stored, new = read(TEN_MINUTES), run(TEN_MINUTES)
    tables = [rows(printed(notebook, "summary")) for notebook in (stored, new)]
    before, after = tables
    assert list(before) == list(after)
    for title in ("training accuracy, %", "test accuracy, %", "at 4 bits, %"):
        assert after[title] == pytest.approx(before[title], abs=6.0)

    sgd, hero = ({title: row[i] for title, row in after.items()} for i in (0, 1))
    assert hero["test accuracy, %"] > sgd["test accuracy, %"] + 12.0
    assert hero["at 3 bits, %"] > sgd["at 3 bits, %"] + 15.0
    assert hero["at 3 bits, %"] > hero["test accuracy, %"] - 3.0  # "next to nothing"
    assert sgd["training accuracy, %"] > 98.0  # "learns both"
    right = numbers(printed(new, "data"))[0]
    assert hero["training accuracy, %"] == pytest.approx(right, abs=6.0)
    for measure in ("largest eigenvalue", "trace", "‖Hz‖ with h = 5"):
        assert sgd[measure] > 2.0 * hero[measure]  # "several times as flat"
    assert hero["area within +0.1"] > 5.0 * sgd["area within +0.1"]

    for line in printed(new, "ablation").splitlines()[:3]:  # down to 3 bits
        _, first_order, with_hessian = numbers(line.replace("first-order", ""))
        assert first_order > with_hessian - 3.0  # the term "is not what does it"
    sizes = [re.findall(r"[\d,]+ bytes", printed(x, "quantize")) for x in (stored, new)]
    assert sizes[0] == sizes[1] != []


@pytest.mark.slow
def test_choosing_h_and_gamma():
    stored, new = read(CHOOSING), run(CHOOSING)

    assert "24 trainings by 1 compiled program" in printed(new, "search-h")
    assert printed(new, "search-gamma").endswith("compiled programs: 1\n")

    # h || z || is proportional to h, and the loss rises with it, from next to nothing.
    looks = [numbers(x) for x in printed(new, "metrics").splitlines()[1:]]
    steps = {h: step for h, step, *_ in looks}
    assert steps[160.0] == pytest.approx(32.0 * steps[5.0], rel=0.05)
    rises = [row[-1] for row in looks]
    assert rises == sorted(rises)
    assert rises[0] < 0.01 < 0.1 < rises[-2]

    # Half of rms / sqrt(n) over sqrt(n) rms; z is longer where the weights are uneven.
    for layer in printed(new, "units").splitlines()[1:]:
        _, size, expected, length, step, rounding = numbers(layer.replace("Dense_", ""))
        assert expected < length < 10.0 * expected
        assert step == pytest.approx(100 * 0.5 / size * length / expected, rel=0.05)
        assert step < rounding / 20.0

    directions = rows(printed(new, "directions"))
    assert directions["normalized"][0] == pytest.approx(1.0)
    for i in (1, 2, 3):
        assert directions["layerwise"][i] < directions["adaptive"][i] / 5.0
        assert directions["adaptive"][i] < directions["normalized"][i] / 2.0

    before, after = (rows(printed(x, "test")) for x in (stored, new))
    assert list(before) == list(after)
    for name in before:
        assert after[name][0] == pytest.approx(before[name][0], abs=6.0)
    sgd, paper, h_alone, both = after.values()
    assert abs(paper[0] - sgd[0]) < 4.0  # "does nothing"
    for row in (h_alone, both):
        assert row[0] > sgd[0] + 5.0
        assert row[2] > sgd[2] + 7.0  # 4 bits
        assert row[4] > sgd[4] + 12.0  # 3 bits

    for line in printed(new, "vmap").splitlines():
        _, one, other = numbers(line)
        assert one == pytest.approx(other, abs=4.0)  # of three seeds, 250 images


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_stored_outputs_are_those_of_one_clean_run(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata == execute.METADATA
    assert all(not cell.metadata for cell in notebook.cells)
    check_outputs(notebook)
    assert path.stat().st_size < 600_000
    assert not re.search(r"/tmp|/home|/Users|/root| at 0x[0-9a-f]", path.read_text())
    for cell in code_cells(notebook):
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                width, height = png_size(output.data["image/png"])
                assert 300 < width < 1200, cell.id
                assert 200 < height < 800, cell.id


def png_size(data):
    """Return width and height, which the header of a PNG file begins with."""
    header = base64.b64decode(data)
    assert header.startswith(b"\x89PNG")
    return struct.unpack(">II", header[16:24])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_imports_are_in_the_extra_for_examples(path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *(x for part in PARTS for x in extras[part])]
    declared = {re.split(r"[\[<>=]", requirement)[0] for requirement in needed}
    imported = set()
    for cell in code_cells(read(path)):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
    others = imported - sys.stdlib_module_names - {"hero_jax"}
    assert {DISTRIBUTIONS.get(name, name) for name in others} <= declared


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_links_lead_to_files(path):
    for cell in read(path).cells:
        if cell.cell_type == "markdown":
            for target in re.findall(r"\]\((?!http)([^)#]+)\)", cell.source):
                assert (path.parent / target).exists(), target


def test_execute_runs_in_an_empty_folder_and_writes_where_told(tmp_path, capsys):
    sources = ["import os, sys", "print(os.listdir(), sys.executable)", "print(2)"]
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    path = tmp_path / "small.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    before = path.read_bytes()
    execute.main([str(path), f"--out={tmp_path / 'out'}"])
    assert path.read_bytes() == before
    assert "small.ipynb" in capsys.readouterr().out
    path = tmp_path / "out" / "small.ipynb"
    first, *others = code_cells(read(path))
    assert (first.outputs, first.execution_count) == ([], 1)
    assert [x.outputs[0].text for x in others] == [f"[] {sys.executable}\n", "2\n"]
    assert read(path).metadata == execute.METADATA
    assert [cell.id for cell in cells] == [cell.id for cell in code_cells(read(path))]


def test_execute_leaves_a_notebook_that_fails_alone(tmp_path):
    path = tmp_path / "failing.ipynb"
    cells = [nbformat.v4.new_code_cell("raise KeyError('no such digit')")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    before = path.read_bytes()
    with pytest.raises(CellExecutionError, match="no such digit"):
        execute.main([str(path), "--in-place"])
    assert path.read_bytes() == before


def test_both_notebooks_are_tested():
    assert {*NOTEBOOKS} == {TEN_MINUTES, CHOOSING}
