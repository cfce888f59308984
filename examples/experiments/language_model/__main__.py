"""Train a small language model by five optimizers, with and without HERO; quantize it.

The text are the help topics of Python's standard library, character by character; the
model is a transformer of two blocks. AdamW, Lion, LAMB and Muon take HERO's gradient as
SGD does: `hero_jax.hero_value_and_grad` in place of `jax.value_and_grad`, and nothing
else. Weights are rounded to 8, 4 and 3 bits after training, embeddings included.
For each seed, all runs start from the same weights and see the same batches.

    python -m examples.experiments.language_model  # one seed, minutes on 2 cores
    python -m examples.experiments.language_model --seeds 0 1 2  # table of docs/language_model.md
    python -m examples.experiments.language_model --search        # the settings, anew

Optimizers that the folder's file has by the same settings are taken from there: a run
that was stopped goes on.

SETTINGS and PERTURBATION were chosen by the last command, on the validation text and
with another seed. The result is a table of bits per character of the test text, the
same numbers as JSON, and a picture.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from examples.experiments.common.command_line import check_at_least, check_folder
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
from .model import Transformer, make_loss
from .search import PRECISIONS
from .training import METHODS, OPTIMIZERS, Evaluation, Settings, make_program, train

Results = dict[str, dict[str, Any]]
"""Of every optimizer and method."""

PERTURBATION = "adaptive"
SETTINGS: dict[str, dict[str, Settings]] = {
    "SGD": {
        "plain": Settings(0.3),
        "first-order": Settings(0.3, h=0.03),
        "HERO": Settings(0.3, h=0.03, gamma=0.01),
    },
    "AdamW": {
        "plain": Settings(0.01, weight_decay=0.075),
        "first-order": Settings(0.01, weight_decay=0.075, h=0.03),
        "HERO": Settings(0.01, weight_decay=0.075, h=0.03, gamma=0.1),
    },
    "Lion": {
        "plain": Settings(0.001, weight_decay=0.75),
        "first-order": Settings(0.001, weight_decay=0.75, h=0.03),
        "HERO": Settings(0.001, weight_decay=0.75, h=0.03, gamma=0.01),
    },
    "LAMB": {
        "plain": Settings(0.01, weight_decay=0.075),
        "first-order": Settings(0.01, weight_decay=0.075, h=0.03),
        "HERO": Settings(0.01, weight_decay=0.075, h=0.03, gamma=0.01),
    },
    "Muon": {
        "plain": Settings(0.02, weight_decay=0.12),
        "first-order": Settings(0.02, weight_decay=0.12, h=0.1),
        "HERO": Settings(0.02, weight_decay=0.12, h=0.1, gamma=0.01),
    },
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0], help="one run for each")
    add("--optimizers", nargs="+", choices=[*OPTIMIZERS], default=[*OPTIMIZERS])
    add("--steps", type=int, default=800, help="of training")
    add("--batch-size", type=int, default=8, help="windows of text in a step")
    add("--context", type=int, default=32, help="characters in a window")
    add("--width", type=int, default=48, help="of the transformer")
    add("--blocks", type=int, default=2, help="of the transformer")
    add("--search", action="store_true", help="choose settings on the validation text")
    add("--out", type=Path, default=Path("language_model_results"))
    add("--quiet", action="store_true", help="show no progress bars")
    options = parser.parse_args(arguments)
    check_at_least(parser, options, steps=1, batch_size=1, context=1, width=1, blocks=1)
    if options.width % Transformer.heads:
        parser.error(
            f"--width must be a multiple of {Transformer.heads}, the attention heads, "
            f"got {options.width}"
        )
    if min(options.seeds) < 0 or len({*options.seeds}) < len(options.seeds):
        parser.error(f"--seeds must be different and at least 0, got {options.seeds}")
    options.optimizers = [name for name in OPTIMIZERS if name in options.optimizers]
    try:
        options.corpus = split(load_topics())
    except ModuleNotFoundError as error:
        parser.error(str(error))
    longest = min(map(len, options.corpus[1:])) - 1
    if options.context > longest:
        parser.error(f"--context must be at most {longest}, got {options.context}")
    check_folder(parser, options.out)
    return options


def run(
    corpus: Corpus,
    model: Transformer,
    options: argparse.Namespace,
    known: Results,
    write: Callable[[Results], None],
) -> Results:
    """Train by every optimizer and method; return numbers for JSON.

    Those that are known by the present settings are kept; all are written after each
    optimizer.
    """
    loss_fn = make_loss(model)
    evaluation = Evaluation(model, corpus.test)
    results = {name: x for name, x in known.items() if _is_current(name, x)}
    for optimizer in options.optimizers:
        if optimizer in results:
            continue
        methods: dict[str, Any] = {}
        for method in METHODS:
            settings = SETTINGS[optimizer][method]
            program = make_program(
                loss_fn, optimizer, method, options.steps, PERTURBATION
            )
            start = time.perf_counter()
            found = []
            with tqdm(
                total=len(options.seeds)
                * options.steps
                * options.batch_size
                * options.context,
                desc=f"{optimizer + ', ' + method:<18}",
                unit="char",
                unit_scale=True,
                disable=options.quiet,
            ) as progress:
                for seed in options.seeds:
                    try:
                        params = train(
                            program,
                            model,
                            corpus.train,
                            settings,
                            num_steps=options.steps,
                            batch_size=options.batch_size,
                            seed=seed,
                            progress=progress,
                        )
                    except FloatingPointError as error:
                        raise FloatingPointError(
                            f"{optimizer}, {method}: {error}"
                        ) from None
                    found.append(
                        {k: evaluation(params, **v) for k, v in PRECISIONS.items()}
                    )
            methods[method] = {
                "settings": settings._asdict(),
                "seconds": round(time.perf_counter() - start, 1),
                "bits_per_character": {
                    name: summary([x[name] for x in found]) for name in PRECISIONS
                },
            }
        results[optimizer] = methods
        results = {name: results[name] for name in OPTIMIZERS if name in results}
        write(results)
    write(results)
    return results


def _is_current(optimizer: str, known: dict[str, Any]) -> bool:
    """Return whether results are of all methods with their present settings."""
    used = {method: SETTINGS[optimizer][method]._asdict() for method in METHODS}
    return used == {method: x["settings"] for method, x in known.items()}


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
            for name, found in result["bits_per_character"].items():
                base = plain[1]["bits_per_character"][name]
                pairs = zip(found["values"], base["values"], strict=True)
                change = cell(summary([x - y for x, y in pairs]), 3)
                cells.append(change if change.startswith("-") else f"+{change}")
            rows.append([optimizer, method, *cells])
    return markdown(rows)


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """Return what results depend on, beside the settings: for the JSON file."""
    corpus = options.corpus
    names = ("steps", "batch_size", "context", "width", "blocks")
    runs = {"seeds": options.seeds, "perturbation": PERTURBATION}
    return {
        "text": {
            "python": sys.version.split()[0],
            "characters": sum(map(len, corpus[1:])),
            "vocabulary": len(corpus.vocabulary),
            "train": len(corpus.train),
            "validation": len(corpus.validation),
            "test": len(corpus.test),
        },
        **{name: getattr(options, name) for name in names},
        **({"seed": search.SEED} if options.search else runs),
    }


def earlier(path: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Return what a file says, if it was made from the same; else no results.

    A run that was stopped goes on so, and optimizers may be run one after another.
    """
    if path.exists():
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if asked == {name: record.get(name) for name in asked}:
            return record
    return {"wall_seconds": 0.0, "found": {}}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the comparison or the search; write files, return the record."""
    options = parse(arguments)
    start = time.perf_counter()
    corpus: Corpus = options.corpus
    model = Transformer(
        len(corpus.vocabulary), options.context, options.width, options.blocks
    )
    asked = describe(options)
    text = asked["text"]
    print(
        f"Help topics of Python {text['python']}: {text['characters']:,} characters "
        f"of {text['vocabulary']} kinds, {text['train']:,} to train on, "
        f"{text['validation']:,} for validation, {text['test']:,} for the test."
    )
    name = "search" if options.search else "language_model"
    path = options.out / f"{name}.json"
    known = earlier(path, asked)
    record: dict[str, Any] = {"environment": environment()} | asked

    def write(found: dict[str, Any]) -> None:
        seconds = known["wall_seconds"] + time.perf_counter() - start
        record.update(wall_seconds=round(seconds, 1), found=found)
        write_json(path, record)

    if options.search:
        found = search.search(
            corpus,
            model,
            options.optimizers,
            options.steps,
            options.batch_size,
            options.quiet,
            write,
            known["found"],
        )
        print(f"perturbation: {found['perturbation']}")
        for optimizer in options.optimizers:
            for method in METHODS:
                best = search.winner(found, optimizer, method)
                print(f"{optimizer}, {method}: {best}")
    else:
        results = run(corpus, model, options, known["found"], write)
        figure = plot(results, len(options.seeds))
        write_figure(path.with_suffix(".png"), figure, 150)
        print(table(results))
        print(
            "\nBits per character of the test text, mean ± standard error over seeds; "
            "rounded with a grid per output channel, or per tensor. "
            "What the gradients change against plain, seed by seed:\n"
        )
        print(difference_table(results))
    print(f"Wrote {path} ({record['wall_seconds']} s).")
    return record


if __name__ == "__main__":
    main()
