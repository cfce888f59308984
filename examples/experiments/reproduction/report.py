"""The report: tables and figures of what there is, written into a page."""

import itertools
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from examples.experiments.sweep.search import percent
from examples.image_classification.config import Config
from examples.image_classification.loop import RunError
from examples.image_classification.results import write_figure, write_text
from examples.image_classification.run import read

from . import paper, tables
from .entries import BUDGET, CPU, FIFTEEN_EPOCHS, FINALISTS, Row, entries
from .records import chosen, differences, path_of
from .statistics import SIGNIFICANT
from .tables import Records
from .work import COMMAND

BEGIN = "<!-- written by reproduce --report: begin -->"
END = "<!-- written by reproduce --report: end -->"

STEP_TIMES = Path(__file__).parents[2] / "results" / "step_time"
"""Folder of measured steps."""

_OF_METHOD = {
    "hero": "HERO",
    "first_order": "first-order",
    "grad_l1": "GRAD-L1",
    "sgd": "SGD",
}
"""Names in the files of step times."""


def write(results: Path, page: Path, check: bool = False) -> int:
    """Write the report's section of a page, and its figures.

    Args:
      results: folder of records.
      page: has the two lines between which the section stands.
      check: write nothing, only compare.

    Returns:
      The exit status: 1 if the page is to be checked, and differs.

    Raises:
      RunError: the page has no such lines, or a result is of other settings than
        those that were found best.
    """
    text = page.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise RunError(f"{page} must have the lines {BEGIN!r} and {END!r} once.")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    new = f"{before}{BEGIN}\n\n{section(results)}\n\n{END}{after}"
    if check:
        if new != text:
            print(f"{page} is not what `{COMMAND} --report` writes", file=sys.stderr)
        return int(new != text)
    for name, figure in figures_of(results):
        write_figure(results / "cpu" / f"{name}.png", figure, 110)
    write_text(page, new)
    print(f"wrote {page} and figures in {results / 'cpu'}")
    return 0


def section(results: Path) -> str:
    """Return the whole section."""
    parts = _at_cpu_scale(results), _at_budget_scale(results), _at_full_scale(results)
    return "\n\n".join(itertools.chain(*parts))


def records_of(results: Path, scale: str) -> Records:
    """Return the records of rows by name."""
    found = {}
    for entry in entries():
        record = read(path_of(entry, results))
        if not isinstance(entry, Row) or entry.scale != scale or record is None:
            continue
        if different := differences(record, chosen(entry, results)):
            raise RunError(
                f"the result of {entry.name} is of another config "
                f"({'; '.join(different)}): delete it, and run it again."
            )
        found[entry.name] = record
    return found


def figures_of(results: Path) -> Iterable[tuple[str, Any]]:
    """Yield names and figures of what there is at the scale "cpu"."""
    from . import figures

    records = records_of(results, "cpu")
    if "hero" in records:
        yield "figure_1", figures.figure_1(records)
        yield "figure_2", figures.figure_2(records)
        if any("surface" in record for record in records.values()):
            yield "figure_3", figures.figure_3(records)
    found = {x.name: read(path_of(x, results)) for x in entries()}
    searches = {name: x["settings"] for name, x in found.items() if x and "grid" in x}
    if (figure := figures.tuning(searches)) is not None:
        yield "tuning", figure


def _at_cpu_scale(results: Path) -> Iterable[str]:
    records = records_of(results, "cpu")
    if not records:
        yield f"Nothing has been run yet: `{COMMAND} --list`."
        return
    one = next(iter(records.values()))
    seeds = sorted({run["seed"] for x in records.values() for run in x["runs"]})
    hours = (_seconds(records.values()) + _search_seconds(results)) / 3600.0
    dates = sorted({x["environment"]["date"] for x in records.values()})
    environment = one["environment"]
    yield (
        f"**Setting.** {one['train_images_per_epoch']} of "
        f"{CPU.train_size} training images in each of {CPU.epochs} epochs (batches of "
        f"{CPU.batch_size}), CIFAR-10 at 16x16 pixels, ResNet8 with "
        f"{one['parameters']:,} parameters, no augmentation, cosine from the learning "
        f"rate, momentum {CPU.momentum:g}; {one['test_images']:,} test images; means ± "
        f"standard errors over seeds {', '.join(map(str, seeds))}. "
        f"`{COMMAND} --scale cpu --all --data-dir DIR` runs all of it, which took "
        f"{hours:.1f} hours of one core; `--report` writes this section. "
        f"({environment['cores']} cores, {environment['device']}, "
        f"{environment['machine']}, jax {environment['jax']}, "
        f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}; all "
        "numbers are in `examples/results/reproduction/cpu`.)"
    )
    yield "**Table 1**: test accuracy in percent."
    yield tables.table_1(records)
    yield "**Table 2**: with label noise."
    yield tables.table_2(records)
    yield "**Table 3**: by bits of the weights, without label noise."
    yield tables.table_3(records)
    yield (
        "**Differences** of the same seeds, in points; bold where a two-sided paired "
        f"t-test says p < {SIGNIFICANT:g} (few seeds find little, and of so many "
        'comparisons one in twenty is bold by chance); "mean" is that of all five.'
    )
    yield tables.differences_table(records)
    yield "\n".join(tables.verdicts(records))
    folder = "../examples/results/reproduction/cpu"
    yield (
        "**Figure 1**: test accuracy against bits.\n\n"
        f"![Test accuracy against bits]({folder}/figure_1.png)"
    )
    yield (
        "**Figure 2**: Hessian norm, and train-test gap in the second half of "
        "training, without label noise; shaded from the lowest to the highest seed.\n\n"
        f"![Hessian norm and gap]({folder}/figure_2.png)"
    )
    yield (
        "**Figure 3**: loss along two filter-normalized random directions, seed "
        f"{seeds[0]}, at one scale.\n\n![Loss surface]({folder}/figure_3.png)"
    )
    finals = {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted((results / "cpu" / "tuning").glob("*_finals.json"))
    }
    if finals:
        yield (
            f"**Chosen settings**: the best of {BUDGET} for every method, on 2,000 "
            f"images held out, by the mean of float and 4 bits (the best {FINALISTS} "
            "from two seeds; the others from one)."
        )
        yield tables.settings(finals)
        yield from _released(results / "cpu" / "tuning")
        yield (
            "Accuracy held out over h and gamma, one seed (gamma 0 is first-order "
            f"only):\n\n![Accuracy over h and gamma]({folder}/tuning.png)"
        )


def _released(tuning: Path) -> Iterable[str]:
    """Tell what the released code's setting gives on the images held out, if known."""
    for kind, noise in (("clean", "without noise"), ("noise40", "with 40 % noise")):
        record = read(tuning / f"released_{kind}" / "sweep.json")
        if record is None or record["best"] is None:
            continue
        found = record["best"]["accuracy_by_bits"]
        yield (
            "Not chosen from: HERO with the setting of the released code (adaptive, "
            f"mean, h = 0.5, gamma = 5) reaches {percent(found['32'])} on held-out "
            f"images {noise}, and {percent(found['4'])} at 4 bits "
            f"({len(record['grid']['seeds'])} seeds)."
        )


def _search_seconds(results: Path) -> float:
    tuning = results / "cpu" / "tuning"
    paths = [*tuning.glob("*/sweep.json"), *tuning.glob("*_finals.json")]
    return _seconds(read(path) for path in paths)


def _seconds(records: Iterable[dict[str, Any] | None]) -> float:
    return sum(float(record["seconds"]) for record in records if record)


def _at_budget_scale(results: Path) -> Iterable[str]:
    records = records_of(results, "budget")
    names = {x.name for x in entries() if x.scale == "budget"}
    yield (
        f"**ResNet20, the whole of CIFAR-10 at 32x32 pixels, {FIFTEEN_EPOCHS.epochs} "
        f"epochs** in place of 200, otherwise the paper's recipe: {len(records)} of "
        f"{len(names)} rows have been run. The settings come from smaller tasks; none "
        f"was tuned here. `{COMMAND} --scale budget --only NAME --dataset DATA "
        "--host-devices 2`."
    )
    if records:
        yield tables.budget_scale(records)


def _at_full_scale(results: Path) -> Iterable[str]:
    records = records_of(results, "full")
    rows = []
    for entry in entries():
        if not isinstance(entry, Row) or entry.scale != "full":
            continue
        config = entry.config
        number = paper.accuracy(
            config.dataset, config.model, config.method, config.label_noise
        )
        ours = [tables.found(records, entry.name, bits) for bits in ("32", "4")]
        hours = _hours(config)
        told = tables.MISSING
        if hours is not None:
            told = f"{hours * len(entry.seeds):,.0f}"
        rows.append((entry.name, number, ours[0], ours[1], told))
    done = sum(row[2] != tables.MISSING for row in rows)
    yield (
        f"**At full scale** {done} of {len(rows)} rows have been run. Each of them is "
        f"`{COMMAND} --scale full --only NAME --data-dir DIR`. The hours are those of "
        "the steps of three seeds as [measured](cost.md) on two cores "
        "(ImageNet: one seed, at 64x64 pixels, so about twelve times as many at "
        "224x224). They are for accelerators, on which nothing has been measured yet: "
        "there `--next --minutes 8` takes the first that is missing, in pieces of "
        "eight minutes. The least piece is an epoch, for which HERO takes two cores 11 "
        "minutes or more."
    )
    yield (
        "<details><summary>All rows</summary>\n\n"
        f"{tables.full_scale(rows)}\n\n</details>"
    )


def _hours(config: Config) -> float | None:
    """Return the expected time of a run's steps; None if no step was measured."""
    record = read(STEP_TIMES / f"{config.model}.json")
    if record is None:
        return None
    measured = record["networks"][config.model]
    times = measured["methods"].get(_OF_METHOD[config.method])
    if times is None:
        return None
    images = {"imagenet2012": 1_281_167}.get(config.dataset, 50_000)
    seconds = sorted(times["seconds"])[len(times["seconds"]) // 2]
    return float(images * config.epochs * seconds / measured["batch"] / 3600.0)
