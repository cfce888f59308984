"""Try an installed hero_jax with the core's dependencies: `THIS README.md`."""

import doctest
import importlib.metadata
import importlib.util
import re
import sys
from pathlib import Path

import hero_jax


def section(readme: str, title: str) -> str:
    """Return a section of the README, up to the next heading of its level."""
    match = re.search(rf"^## {title}\n(.*?)^## ", readme, re.MULTILINE | re.DOTALL)
    assert match, f"README has no section {title!r}"
    return match[1]


def run(text: str, name: str) -> None:
    """Run the examples of a text, or exit with those that fail."""
    test = doctest.DocTestParser().get_doctest(text, {}, name, name, 0)
    assert test.examples, f"{name} has no examples"
    failed = doctest.DocTestRunner().run(test).failed
    assert not failed, f"{failed} examples of {name} failed"
    print(f"{name}: {len(test.examples)} examples ran")


def main(readme: Path) -> None:
    """Exit with what is wrong."""
    folder = Path(hero_jax.__file__).parent
    assert folder.is_relative_to(sys.prefix), f"imported from {folder}"
    assert (folder / "py.typed").is_file(), f"no py.typed in {folder}"
    version = importlib.metadata.version("hero_jax")
    assert hero_jax.__version__ == version, (hero_jax.__version__, version)
    installed = [
        name
        for name in ("contourpy", "flax", "safetensors", "sklearn")
        if importlib.util.find_spec(name) is not None
    ]
    assert not installed, f"the core has pulled in {installed}"
    run(hero_jax.__doc__ or "", "hero_jax.__doc__")
    run(section(readme.read_text(encoding="utf-8"), "Use it"), "README.md")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
