"""The three floors of the examples: who imports whom, and that every command starts."""

import ast
import importlib
import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
RECIPE = EXAMPLES / "image_classification"
EXPERIMENTS = EXAMPLES / "experiments"
DEMO_LINES = 160
MAY_USE = {"reproduction": {"sweep"}, "directions": {"sweep"}}
"""Experiments, and those that they build on."""

FILES = sorted(EXAMPLES.rglob("*.py"))
DEMOS = [*EXAMPLES.glob("*.py"), *EXAMPLES.glob("notebooks/*.py")]
NOTEBOOKS = sorted(EXAMPLES.glob("notebooks/*.ipynb"))
COMMANDS = [p for p in FILES if '\nif __name__ == "__main__":\n' in p.read_text()]


def name_of(path):
    return str(path.relative_to(ROOT))


def imports(tree, package):
    """Dotted names of what is imported; those of relative imports start with a dot.

    A `from . import b` that leaves its package is resolved, and shows as absolute.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level == 1:
                base = f".{base}"
            elif node.level > 1:
                parts = package.split(".")[: 1 - node.level]
                base = ".".join([*parts, *([base] if base else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def of_file(path):
    package = ".".join(path.relative_to(ROOT).parts[:-1])
    return {*imports(ast.parse(path.read_text()), package)}


def of_examples(names):
    return {name for name in names if name.split(".")[0] == "examples"}


@pytest.mark.parametrize("path", DEMOS, ids=name_of)
def test_a_demo_is_one_short_file_by_itself(path):
    names = of_file(path)
    assert not of_examples(names)
    assert not {name for name in names if name.startswith(".")}
    assert len(path.read_text().splitlines()) <= DEMO_LINES


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_a_notebook_imports_no_example(path):
    cells = nbformat.read(path, as_version=4).cells
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    assert not of_examples(imports(ast.parse(code), ""))


@pytest.mark.parametrize("path", sorted(RECIPE.rglob("*.py")), ids=name_of)
def test_the_recipe_can_be_copied_under_another_name(path):
    assert not of_examples(of_file(path))


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.rglob("*.py")), ids=name_of)
def test_an_experiment_stands_on_the_recipe_and_what_is_common(path):
    own = path.relative_to(EXPERIMENTS).with_suffix("").parts[0]
    allowed = {"common", own} | MAY_USE.get(own, set())
    if own == "common":
        allowed = {"common"}
    for name in of_examples(of_file(path)):
        floor, *rest = name.split(".")[1:]
        assert floor in {"image_classification", "experiments"}, name
        assert floor == "image_classification" or rest[0] in allowed, name


def test_there_is_one_import_root():
    for path in [*FILES, *(ROOT / "tests").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr == "path":
                assert getattr(node.value, "id", None) != "sys", path


@pytest.mark.parametrize("path", COMMANDS, ids=name_of)
def test_a_command_says_what_it_is_for(path, capsys):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    if "torch" in of_file(path):
        pytest.importorskip("torch")  # in an environment of its own
    main = importlib.import_module(module).main
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    assert not done.value.code
    assert "usage: " in capsys.readouterr().out


TEXTS = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *FILES]


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_commands_that_are_named_exist(path):
    """As they are typed in documents and docstrings, `python` first."""
    named = re.findall(r"python (?:-m )?(examples[./][\w./]*\w)", path.read_text())
    for name in named:
        file = ROOT / name.removesuffix(".py").replace(".", "/")
        assert {file.with_suffix(".py"), file / "__main__.py"} & {*COMMANDS}, name


def test_nothing_escapes_these_tests():
    """A file that moves to another folder would be looked for in vain."""
    floors = {p.relative_to(EXAMPLES).parts[0] for p in FILES if p.parent != EXAMPLES}
    assert floors == {"experiments", "image_classification", "notebooks"}
    assert len(COMMANDS) > 10
