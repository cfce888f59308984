"""Imports point one way, and the core needs few packages."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hero_jax"

# What each module may import of the package itself.
ALLOWED = {
    "_typing": set(),
    "_checks": set(),
    "_frameworks": set(),
    "_tree": {"_typing", "_checks", "_frameworks"},
    "_programs": set(),
    "_batches": {"_checks"},
    "_autodiff": {"_typing", "_checks", "_tree"},
    "_axis": {"_typing"},
    "_loss": {"_typing", "_checks", "_tree", "_axis"},
    "parts": {"_typing", "_checks", "_tree", "_axis", "_batches"},
    "leaves": {"_typing", "_checks", "_tree"},
    "perturbation": {"_typing", "_checks", "_tree", "leaves", "quant"},
    "gradient": {
        *("_typing", "_checks", "_tree", "_autodiff", "_loss", "leaves"),
        "perturbation",
    },
    "family": {
        *("_typing", "_checks", "_tree", "_batches", "_autodiff", "_loss"),
        "perturbation",
    },
    "schedules": {"_checks"},
    "transform": {
        *("_typing", "_checks", "_tree", "_autodiff", "_axis", "leaves", "gradient"),
        "perturbation",
    },
    "nnx": {"_checks", "gradient"},
    "bounds": {"_checks"},
    "quant": {
        *("_typing", "_checks", "_frameworks", "_tree", "_programs", "_batches"),
        "leaves",
    },
    "models": {"_checks", "_axis"},
    "curvature": {
        *("_typing", "_checks", "_tree", "_programs", "_batches", "_autodiff"),
        *("leaves", "perturbation"),
    },
    "landscape": {
        *("_typing", "_checks", "_frameworks", "_tree", "_programs", "leaves"),
        "curvature",
    },
    "plot": {"_frameworks", "curvature"},
    "mixed_precision": {
        *("_typing", "_checks", "_tree", "_programs", "_batches", "curvature", "quant")
    },
}
CORE_PACKAGES = {"jax", "optax", "chex", "numpy", "hero_jax"}
OPTIONAL_PACKAGES = {
    "mixed_precision/_program.py": {"scipy"},
    "models": {"flax"},
    "nnx": {"flax"},
    "plot": {"matplotlib"},
}
"""By file or module: not imported with the package itself."""


def imports(path):
    """Dotted names imported by a file, `from a import b` giving `a.b`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in {path}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


FILES = sorted(p for p in PACKAGE.rglob("*.py") if module_of(p) != "__init__")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    own = [name.split(".")[1] for name in imports(path) if name.startswith("hero_jax.")]
    assert set(own) <= ALLOWED[module_of(path)] | {module_of(path)}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_core_needs_only_the_declared_packages(path):
    packages = {name.split(".")[0] for name in imports(path)}
    names = (path.relative_to(PACKAGE).as_posix(), module_of(path))
    optional = set().union(*(OPTIONAL_PACKAGES.get(name, set()) for name in names))
    assert packages - sys.stdlib_module_names <= CORE_PACKAGES | optional


def test_what_needs_flax_is_imported_when_asked_for():
    program = (
        "import sys, hero_jax\n"
        "sys.modules['flax'] = None\n"
        "for name in ('models', 'nnx'):\n"
        "    try: getattr(hero_jax, name)\n"
        "    except ImportError as error: assert 'needs flax: pip' in str(error)\n"
        "    else: sys.exit(name)\n"
        "del sys.modules['flax']\n"
        "hero_jax.models.create, hero_jax.nnx.hero_value_and_grad\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_import_is_silent_and_pulls_in_no_extras():
    program = (
        "import sys, hero_jax;"
        "extras = {'contourpy', 'flax', 'matplotlib', 'safetensors',"
        "          'scipy.optimize', 'sklearn', 'tqdm'};"
        "sys.exit(', '.join(extras & set(sys.modules)) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
