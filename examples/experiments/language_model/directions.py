"""Compare directions of the perturbation on the language model, trained by AdamW.

    python -m examples.experiments.language_model.directions  # 25 minutes

Learning rate and weight decay are those that the search of the comparison of optimizers
found for the plain gradient. Every method tries six values of h, an octave apart, on
the validation text from one seed; the best is tested on the test text from three
others. So are the settings that were best on the digits (`examples.experiments.
directions`), untouched. h grows from zero over the first tenth of the steps, but with
a share it follows the loss; that is not searched.
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

from examples.experiments.common.command_line import at_least, folder, make_parser
from examples.experiments.common.statistics import cell, summary
from examples.image_classification.results import environment, markdown, write_json
from examples.image_classification.stopping import command

from . import search
from .__main__ import SEARCH, make_task
from .corpus import load_topics, split
from .training import PRECISIONS, Direction, Settings, Task

CARRIED = SEARCH.parents[1] / "directions" / "mlp_breast_cancer_noise40.json"
"""A task on which the settings of the digits were tested."""
SEEDS = (0, 1, 2)
METHODS = {
    "first-order, layerwise": (Direction("layerwise", warmup=0.1), 0.1, 0.0),
    "first-order, relative": (Direction("relative", warmup=0.1), 0.005, 0.0),
    "HERO, relative": (Direction("relative", "norm", warmup=0.1), 0.005, 0.5),
}
"""With the least h, and gamma."""
FOLLOWING = "first-order, share 0.3"
DIRECTIONS = {name: direction for name, (direction, *_) in METHODS.items()}
DIRECTIONS |= {
    "plain": Direction("layerwise"),
    FOLLOWING: Direction("relative", share=0.3),
}


def run(task: Task, method: str, cases: Sequence[tuple[Settings, int]]) -> list[Any]:
    """Return settings, seed and bits per character of every run."""
    kind = method.split(",")[0]
    bits = task.attempts("AdamW", kind, DIRECTIONS[method], cases)
    return [
        {"settings": settings._asdict(), "seed": seed, "bits_per_character": x}
        for (settings, seed), x in zip(cases, bits, strict=True)
    ]


def compare(validation: Task, test: Task) -> dict[str, dict[str, list[Any]]]:
    """Search and test every method; return all runs."""
    plain = search.winner(json.loads(SEARCH.read_text())["found"], "AdamW", "plain")
    of_digits = json.loads(CARRIED.read_text())["transfer"]
    record: dict[str, dict[str, list[Any]]] = {"search": {}, "test": {}, "transfer": {}}
    for method, h in (("plain", 0.0), (FOLLOWING, 0.001)):
        cases = [(plain._replace(h=h), seed) for seed in SEEDS]
        record["test"][method] = run(test, method, cases)
    for method, (_, least, gamma) in METHODS.items():
        tries = [plain._replace(h=least * 2**k, gamma=gamma) for k in range(6)]
        rows = run(validation, method, [(x, search.SEED) for x in tries])
        for row in rows:
            bits = row["bits_per_character"]
            row["score"] = None if bits is None else search.score(bits)
        carried = {x: of_digits[method][0][x] for x in ("h", "gamma")}
        chosen = [search.best(rows), plain._replace(**carried)]
        tested = run(test, method, [(x, seed) for x in chosen for seed in SEEDS])
        record["search"][method] = rows
        record["test"][method] = tested[: len(SEEDS)]
        record["transfer"][method] = tested[len(SEEDS) :]
    return record


def table(record: dict[str, dict[str, list[Any]]]) -> str:
    """Return bits per character of the test text."""
    lines = [["gradient", "h", "gamma", *PRECISIONS]]
    for part, note in (("test", ""), ("transfer", ", as on the digits")):
        for method, rows in record[part].items():
            settings = Settings(**rows[0]["settings"])
            h = "" if method == FOLLOWING else f"{settings.h:g}"
            numbers = [h, f"{settings.gamma:g}"]
            tested = [row["bits_per_character"] for row in rows]
            cells = ["diverged"] * len(PRECISIONS)
            if None not in tested:
                of_bits = [summary([x[k] for x in tested]) for k in PRECISIONS]
                cells = [cell(x, 3) for x in of_bits]
            lines.append([method + note, *numbers, *cells])
    return markdown(lines)


@command
def main(arguments: Sequence[str]) -> None:
    """Run the command; return the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=at_least(1), default=800, help="of training")
    parser.add_argument("--out", type=folder, default="language_model_results")
    options = parser.parse_args(arguments)
    corpus = split(load_topics())
    tasks = [make_task(corpus, options.steps, test=x) for x in (False, True)]
    record: dict[str, Any] = {"environment": environment(), "steps": options.steps}
    record |= compare(*tasks)
    write_json(options.out / "directions.json", record)
    print(table(record))


if __name__ == "__main__":
    sys.exit(main())
