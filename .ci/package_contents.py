"""Compare the sdist, the wheel made of it, and the wheel made of the repository."""

import re
import sys
import tarfile
import zipfile
from pathlib import Path

MEGABYTE = 1_000_000


def contents(wheel: Path) -> dict[str, bytes]:
    """Return the files of a wheel by name."""
    with zipfile.ZipFile(wheel) as file:
        return {name: file.read(name) for name in file.namelist()}


def main(dist: Path, direct: Path) -> None:
    """Exit with what is wrong, or say how large they are."""
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    files = contents(wheel)
    assert files == contents(direct), (
        "the sdist makes another wheel than the repository"
    )
    root = Path(__file__).parents[1]
    package = {
        path.relative_to(root).as_posix()
        for path in (root / "hero_jax").rglob("*")
        if path.suffix in {".py", ".typed"}
    }
    extra = {
        name for name in files if not re.match(r"hero_jax-[^/]*\.dist-info/", name)
    }
    assert extra == package, f"in one of package and wheel only: {extra ^ package}"

    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    names = {member.name.partition("/")[2] for member in members if member.isfile()}
    expected = {
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "CITATION.cff",
        "pyproject.toml",
    }
    expected |= {
        path.relative_to(root).as_posix()
        for folder in ("hero_jax", "tests", "examples", ".ci")
        for path in (root / folder).rglob("*")
        if path.suffix in {".py", ".toml"} and "unfinished" not in path.parts
    }
    assert expected <= names, f"not in the sdist: {sorted(expected - names)}"
    for path, limit in ((wheel, 1), (sdist, 6)):
        size = path.stat().st_size / MEGABYTE
        assert size < limit, f"{path.name} has {size:.1f} MB, more than {limit}"
        print(f"{path.name}: {size:.2f} MB")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
