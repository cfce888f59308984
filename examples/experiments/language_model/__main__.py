"""Train a small language model by five optimizers, with and without HERO; quantize it.

    python -m examples.experiments.language_model  # one seed, 8 minutes on 2 cores
    python -m examples.experiments.language_model --seeds 0 1 2
    python -m examples.experiments.language_model --search  # 40 minutes

The text is the help topics of Python's standard library, character by character; the
model is a transformer of two blocks. AdamW, Lion, LAMB and Muon take HERO's gradient as
SGD does: `hero_jax.hero_value_and_grad` in place of `jax.value_and_grad`, and nothing
else. Weights are rounded to 8, 4 and 3 bits after training, embeddings included.
For each seed, all runs start from the same weights and see the same batches.

The result is a table of bits per character of the test text, the same numbers as JSON,
and a picture. The settings are those of examples/results/language_model/search.json,
which the search chose on the validation text and with another seed.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.experiments.common.command_line import (
    at_least,
    check_seeds,
    folder,
    make_parser,
)
from examples.experiments.common.statistics import cell, summary
from examples.image_classification.results import (
    environment,
    markdown,
    write_figure,
    write_json,
)

from . import search
from .corpus import Corpus, load_topics, split
from .figures import plot
from .model import Transformer
from .training import METHODS, OPTIMIZERS, PRECISIONS, Direction, Task

Results = dict[str, dict[str, Any]]
"""Of every optimizer and method."""

SEARCH = Path(__file__).parents[2] / "results" / "language_model" / "search.json"
SIZES = {"batch_size": 8, "context": 32, "width": 48, "blocks": 2}
"""Windows of text in a step, characters in a window, and the transformer's sizes."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0], help="one run for each")
    add("--optimizers", nargs="+", choices=OPTIMIZERS, default=[*OPTIMIZERS])
    add("--steps", type=at_least(1), default=800, help="of training")
    add("--search", action="store_true", help="choose settings on the validation text")
    add("--out", type=folder, default="language_model_results")
    options = parser.parse_args(arguments)
    check_seeds(parser, options.seeds)
    try:
        options.corpus = split(load_topics())
    except ModuleNotFoundError as error:
        parser.error(str(error))
    return options


def make_task(corpus: Corpus, steps: int, *, test: bool) -> Task:
    """Return what is trained, judged on the test or the validation text."""
    batch_size, *sizes = SIZES.values()
    model = Transformer(len(corpus.vocabulary), *sizes)
    held_out = corpus.test if test else corpus.validation
    return Task(model, corpus.train, held_out, steps, batch_size)


def run(task: Task, optimizers: Sequence[str], seeds: Sequence[int]) -> Results:
    """Train by every optimizer and method; return numbers for JSON.

    Raises:
      FloatingPointError: a loss is not finite.
    """
    trials = json.loads(SEARCH.read_text())["found"]
    results: Results = {}
    for optimizer in optimizers:
        results[optimizer] = {}
        for method in METHODS:
            settings = search.winner(trials, optimizer, method)
            start = time.perf_counter()
            cases = [(settings, seed) for seed in seeds]
            direction = Direction(trials["perturbation"])
            runs = [*task.attempts(optimizer, method, direction, cases)]
            if None in runs:
                raise FloatingPointError(
                    f"{optimizer}, {method}: the loss of seed "
                    f"{seeds[runs.index(None)]} is not finite."
                )
            results[optimizer][method] = {
                "settings": settings._asdict(),
                "seconds": round(time.perf_counter() - start, 1),
                "bits_per_character": {
                    name: summary([x[name] for x in runs if x]) for name in PRECISIONS
                },
            }
    return results


def table(results: Results) -> str:
    """Format the results as a Markdown table."""
    rows = [["optimizer", "gradient", *PRECISIONS]]
    for optimizer, methods in results.items():
        for method, result in methods.items():
            cells = [cell(x, 3) for x in result["bits_per_character"].values()]
            rows.append([optimizer, method, *cells])
    return markdown(rows)


def difference_table(results: Results) -> str:
    """Format what each gradient changes against plain, from the same seeds."""
    rows = [["optimizer", "gradient", *PRECISIONS]]
    for optimizer, methods in results.items():
        plain, *others = methods.items()
        for method, result in others:
            cells = []
            for name, bits in result["bits_per_character"].items():
                base = plain[1]["bits_per_character"][name]
                pairs = zip(bits["values"], base["values"], strict=True)
                change = cell(summary([x - y for x, y in pairs]), 3)
                cells.append(change if change.startswith("-") else f"+{change}")
            rows.append([optimizer, method, *cells])
    return markdown(rows)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the comparison or the search; write files, return the record."""
    options = parse(arguments)
    start = time.perf_counter()
    corpus: Corpus = options.corpus
    parts = {part: len(getattr(corpus, part)) for part in Corpus._fields[1:]}
    text: dict[str, Any] = {"python": sys.version.split()[0]}
    text["characters"] = sum(parts.values())
    text |= {"vocabulary": len(corpus.vocabulary)} | parts
    print(f"Python's help topics: {text}")
    task = make_task(corpus, options.steps, test=not options.search)
    record = {"environment": environment(), "text": text, "steps": options.steps}
    record |= SIZES
    if options.search:
        path = options.out / "search.json"
        results = search.search(task, options.optimizers)
        record["seed"] = search.SEED
        for optimizer in options.optimizers:
            for method in METHODS:
                best = search.winner(results, optimizer, method)
                print(f"{optimizer}, {method}, {results['perturbation']}: {best}")
    else:
        path = options.out / "language_model.json"
        results = run(task, options.optimizers, options.seeds)
        record["seeds"] = options.seeds
        trials = json.loads(SEARCH.read_text())["found"]
        record["perturbation"] = trials["perturbation"]
        figure = plot(results, len(options.seeds))
        write_figure(path.with_suffix(".png"), figure, 150)
        print(
            f"{table(results)}\n\nBits per character of the test text, mean ± standard "
            "error over seeds; rounded with a grid per output channel, or per tensor. "
            "What the gradients change against plain, seed by seed:\n\n"
            f"{difference_table(results)}"
        )
    seconds = round(time.perf_counter() - start, 1)
    write_json(path, record | {"wall_seconds": seconds, "found": results})
    print(f"Wrote {path} ({seconds} s).")
    return record | {"found": results}


if __name__ == "__main__":
    main()
