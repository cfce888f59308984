"""Every public name is documented, and every page and link leads somewhere."""

import dataclasses
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import hero_jax

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
COPIED = {"notebooks", "reports"}
"""Folders that the build fills."""

PAGES = sorted(
    path
    for path in (*DOCS.rglob("*.md"), *DOCS.rglob("*.rst"))
    if path.relative_to(DOCS).parts[0] not in COPIED
)


def public_modules():
    """The package and its modules without an underscore."""
    names = [x.name for x in pkgutil.iter_modules(hero_jax.__path__)]
    public = sorted(name for name in names if not name.startswith("_"))
    found = [importlib.import_module(f"hero_jax.{name}") for name in public]
    return [hero_jax, *(module for module in found if hasattr(module, "__all__"))]


def public():
    """Dotted names to objects; what the package itself exports goes by that name."""
    found = {}
    for module in public_modules():
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.ismodule(value):
                continue
            at_top = getattr(hero_jax, name, None) is value
            found[f"{'hero_jax' if at_top else module.__name__}.{name}"] = value
    return found


PUBLIC = public()


def on_pages():
    """Names that the pages of the reference document, and those in their tables."""
    documented, listed = [], []
    for path in (DOCS / "api").glob("*.rst"):
        module = None
        for line in path.read_text().splitlines():
            if found := re.match(r"\.\. currentmodule:: (\S+)", line):
                module = found[1]
            elif found := re.match(r"\.\. auto(?:function|class):: (\S+)", line):
                documented.append(f"{module}.{found[1]}")
            elif found := re.match(r"   (\w+)$", line):
                listed.append(f"{module}.{found[1]}")
    return documented, listed


def test_every_public_name_is_on_a_page_of_the_reference_once():
    documented, listed = on_pages()
    assert sorted(documented) == sorted(PUBLIC)
    assert listed == documented


def section(text, title):
    """Body of a section of a docstring, without its indentation."""
    found = re.search(rf"^{title}:\n((?:  .*\n|\n)+)", text + "\n", re.M)
    return "" if found is None else inspect.cleandoc("\n" + found[1])


def entries(text, title):
    """Names that a section of a docstring describes."""
    return [
        x.lstrip("*")
        for x in re.findall(r"^(\*{0,2}\w+): \S", section(text, title), re.M)
    ]


def fields(cls):
    """Names of what a class holds."""
    if hasattr(cls, "_fields"):
        return list(cls._fields)
    if dataclasses.is_dataclass(cls):
        names = [field.name for field in dataclasses.fields(cls) if field.init]
        return [name for name in names if name not in ("parent", "name")]  # of Flax
    if issubclass(cls, dict):
        return list(cls.__annotations__)
    return []


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_says_what_it_is(name):
    value = PUBLIC[name]
    text = inspect.getdoc(value) or ""
    summary, _, rest = text.partition("\n")
    assert summary.endswith(".")
    assert not rest or rest.startswith("\n")
    if inspect.isclass(value):
        assert entries(text, "Attributes")[: len(fields(value))] == fields(value)
        for attribute, member in vars(value).items():
            is_method = inspect.isfunction(member) or isinstance(member, property)
            if is_method and not attribute.startswith("_"):
                assert inspect.getdoc(member), attribute
        return
    signature = inspect.signature(value)
    assert entries(text, "Args") == list(signature.parameters)
    if signature.return_annotation != "None":
        returned = section(text, "Returns").partition("\n")[0]
        assert returned
        # Napoleon takes what stands before a colon for a type.
        assert ": " not in re.sub("(:[a-z]+:)?`.*?`", "", f"{returned} ")


def methods(cls):
    """Methods and properties that a class itself has, but for special ones."""
    own = [x for name, x in vars(cls).items() if not name.startswith("__")]
    found = [getattr(x, "fget", getattr(x, "__func__", x)) for x in own]
    return [x for x in found if inspect.isfunction(x)]


@pytest.mark.parametrize("name", PUBLIC)
def test_help_begins_with_types_as_the_source_names_them(name):
    """Evaluated, `chex.Numeric` alone is a union of six types."""
    value = PUBLIC[name]
    for function in methods(value) if inspect.isclass(value) else [value]:
        kinds = inspect.get_annotations(function).values()
        assert all(isinstance(kind, str) for kind in kinds), function


def toctrees(path):
    """Pages that the tables of contents of a page name."""
    for body in re.findall(r"```\{toctree\}\n(.*?)```", path.read_text(), re.S):
        for line in body.splitlines():
            if line and not line.startswith(":"):
                found = [
                    *path.parent.glob(f"{line}.md"),
                    *path.parent.glob(f"{line}.rst"),
                ]
                assert found or line == "notebooks/*", line
                yield from found


def test_every_page_is_reached_from_the_first():
    reached, left = set(), [DOCS / "index.md"]
    while left:
        page = left.pop()
        if page not in reached:
            reached.add(page)
            left.extend(toctrees(page))
    assert sorted(reached) == PAGES


def slug(heading):
    """The anchor that GitHub and MyST give to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *PAGES], ids=lambda p: str(p.relative_to(ROOT))
)
def test_links_lead_to_files_of_the_repository(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.is_relative_to(ROOT), target
        assert found.is_file(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", found.read_text(), re.M)
            assert anchor in map(slug, headings), target


def test_included_sections_are_there():
    included = 0
    for path in PAGES:
        blocks = re.findall(r"```\{include\} (\S+)\n(.*?)```", path.read_text(), re.S)
        for file, options in blocks:
            text = (path.parent / file).read_text()
            marks = re.findall(r':(?:start-after|end-before): "(.*)"', options)
            positions = [text.index(f"\n{mark}\n") for mark in marks]
            assert positions == sorted(positions)
            included += 1
    assert included


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *PAGES], ids=lambda p: str(p.relative_to(ROOT))
)
def test_code_fits_into_the_column_of_the_site(path):
    for block in re.findall(r"^```.*?^```", path.read_text(), re.M | re.S):
        assert [line for line in block.splitlines() if len(line) > 79] == []
