"""What goes into the package, and what is written about it, is all of one piece."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
BOUND_EXTRAS = ("files", "models", "curvature", "plot")


def test_citation_names_this_version_and_the_paper():
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["message"]
    assert citation["authors"]
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    paper = citation["preferred-citation"]
    assert paper["title"].startswith("HERO: Hessian-Enhanced Robust Optimization")
    assert "2111.11986" in paper["url"]
    assert paper["year"] == 2022
    names = [author["family-names"] for author in paper["authors"]]
    assert names == ["Yang", "Yang", "Gong", "Chen"]


def test_changelog_begins_with_this_version():
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == PROJECT["version"]


def test_license_is_the_one_that_is_named():
    text = (ROOT / "LICENSE").read_text()
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text


def test_every_folder_with_code_is_packaged():
    setuptools = pytest.importorskip("setuptools")
    include = PYPROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    packaged = {*setuptools.find_packages(str(ROOT), include=include)}
    folders = {path.parent for path in (ROOT / "hero_jax").rglob("*.py")}
    assert packaged == {".".join(x.relative_to(ROOT).parts) for x in folders}


def test_types_are_packaged():
    assert (ROOT / "hero_jax" / "py.typed").is_file()
    assert PYPROJECT["tool"]["setuptools"]["package-data"]["hero_jax"] == ["py.typed"]


def test_bounds_installs_the_lowest_versions_that_are_declared():
    extras = PROJECT["optional-dependencies"]
    declared = [
        Requirement(line)
        for line in sum(
            (extras[name] for name in BOUND_EXTRAS), PROJECT["dependencies"]
        )
    ]
    expected = set()
    for requirement in declared:
        (bound,) = requirement.specifier
        assert bound.operator == ">=", requirement
        expected.add(f"{requirement.name}=={bound.version}")
    done = subprocess.run(
        ["bash", ".ci/bounds", "--list"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert {*done.stdout.split()} == expected
