"""The report: tables and figures of what there is, written into a page."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from examples.image_classification.config import Config
from examples.image_classification.errors import RunError
from examples.image_classification.results import markdown, write_figure, write_text
from examples.image_classification.run import read

from . import paper, tables
from .entries import COMMAND, Scale, rows
from .tables import Records
from .tuning import chosen
from .work import differences

END = "<!-- end -->"


def write(results: Path, page: Path, check: bool = False) -> int:
    """Write the tables of a page, and its figures; return the exit status.

    The page has `<!-- --report writes NAME -->` and `<!-- end -->` around every table.
    With `check` nothing is written, and the status is 1 if the page differs.
    """
    text = before = page.read_text(encoding="utf-8")
    for name, content in contents(results):
        begin = f"<!-- --report writes {name} -->"
        if text.count(begin) != 1:
            raise RunError(f"{page} must have the line {begin!r} once.")
        head, rest = text.split(begin)
        tail = rest.partition(END)[2]
        text = f"{head}{begin}\n\n{content}\n\n{END}{tail}"
    if check:
        if text != before:
            print(f"{page} is not what `{COMMAND} --report` writes", file=sys.stderr)
        return int(text != before)
    for name, figure in figures_of(results):
        write_figure(results / "cpu" / f"{name}.png", figure, 110)
    write_text(page, text)
    print(f"wrote {page} and figures in {results / 'cpu'}")
    return 0


def records_of(results: Path, scale: Scale) -> Records:
    """Return the records of rows by name; `RunError` if one is of another config."""
    records = {}
    for row in rows():
        if row.scale != scale or (record := read(row.path(results))) is None:
            continue
        config = chosen(row, results)
        if different := differences(record, config or Config()):
            raise RunError(
                f"the result of {row.name} is of another config "
                f"({'; '.join(different)}): delete it, and run it again."
            )
        records[row.name] = record
    return records


def tuning_of(results: Path, pattern: str) -> Records:
    """Return finished searches or finals, by the paths of their files."""
    paths = sorted((results / "cpu" / "tuning").glob(pattern))
    records = {str(path): read(path) for path in paths}
    return {name: x for name, x in records.items() if x and x["best"]}


def contents(results: Path) -> Iterator[tuple[str, str]]:
    """Yield names and contents of the tables."""
    records = records_of(results, "cpu")
    yield "table 1", tables.table_1(records)
    yield "table 2", tables.table_2(records)
    yield "table 3", tables.table_3(records)
    yield "differences", tables.differences(records)
    finals = tuning_of(results, "*_finals.json")
    released = tuning_of(results, "released_*/*.json")
    yield "settings", tables.settings(finals, released)
    yield "15 epochs", tables.budget_scale(records_of(results, "budget"))
    yield "full scale", _full_scale(records_of(results, "full"))


def figures_of(results: Path) -> Iterator[tuple[str, Any]]:
    """Yield names and figures of what there is at the scale "cpu"."""
    from . import figures

    records = records_of(results, "cpu")
    if "hero" in records:
        yield "figure_1", figures.figure_1(records)
        yield "figure_2", figures.figure_2(records)
        if any("surface" in record for record in records.values()):
            yield "figure_3", figures.figure_3(records)


def _full_scale(records: Records) -> str:
    """Return the rows that have run: the paper's number, and ours."""
    if not records:
        return "No row has run yet."
    cells = [["name", "paper", "here", "here, 4 bits"]]
    for row in rows():
        if row.name in records and row.scale == "full":
            x = row.config
            number = paper.accuracy(x.dataset, x.model, x.method, x.label_noise)
            ours = [tables.mean(records, row.name, bits) for bits in ("32", "4")]
            cells.append([row.name, tables.number(number), *ours])
    return markdown(cells)
