"""Train a small language model by five optimizers, with and without HERO; quantize it.

The text are the help topics of Python's standard library, character by character; the
model is a transformer of two blocks. AdamW, Lion, LAMB and Muon take HERO's gradient as
SGD does: `hero_jax.hero_value_and_grad` in place of `jax.value_and_grad`, and nothing
else. Weights are rounded to 8, 4 and 3 bits after training, embeddings included.
For each seed, all runs start from the same weights and see the same batches.

    python examples/language_model.py                 # one seed
    python examples/language_model.py --seeds 0 1 2   # the table of the documentation
    python examples/language_model.py --search        # the settings, anew

SETTINGS and PERTURBATION were chosen by the last command, on the validation text and
with another seed. The result is a table of bits per character of the test text, the
same numbers as JSON, and a picture.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from image_classification.results import (
    environment,
    markdown,
    replace_file,
    write_json,
)
from language import search
from language.corpus import Corpus, load_topics, split
from language.figures import plot
from language.model import Transformer, make_loss
from language.search import PRECISIONS
from language.training import (
    METHODS,
    OPTIMIZERS,
    Evaluation,
    Settings,
    make_program,
    train,
)
from quickstart import cell, summary
from tqdm import tqdm

PERTURBATION = "layerwise"
SETTINGS: dict[str, dict[str, Settings]] = {
    name: {method: Settings(0.01) for method in METHODS} for name in OPTIMIZERS
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
    for name in ("steps", "batch_size", "context", "width", "blocks"):
        if getattr(options, name) < 1:
            option = name.replace("_", "-")
            parser.error(f"--{option} must be at least 1, got {getattr(options, name)}")
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
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=options.out):
            pass  # better to fail now than after the training
    except OSError as error:
        parser.error(f"--out must be a folder that can be written to: {error}")
    return options


def run(
    corpus: Corpus, model: Transformer, options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Train by every optimizer and method; return numbers for JSON."""
    loss_fn = make_loss(model)
    evaluation = Evaluation(model, corpus.test)
    results: dict[str, dict[str, Any]] = {}
    for optimizer in options.optimizers:
        results[optimizer] = {}
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
            results[optimizer][method] = {
                "settings": settings._asdict(),
                "seconds": round(time.perf_counter() - start, 1),
                "bits_per_character": {
                    name: summary([x[name] for x in found]) for name in PRECISIONS
                },
            }
    return results


def table(results: dict[str, dict[str, Any]]) -> str:
    """Format the results as a Markdown table."""
    rows = [["optimizer", "gradient", *PRECISIONS]]
    for optimizer, methods in results.items():
        for method, result in methods.items():
            cells = [cell(x, 3) for x in result["bits_per_character"].values()]
            rows.append([optimizer, method, *cells])
    return markdown(rows)


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """Return what a run was made with: for the JSON file."""
    corpus = options.corpus
    names = ("steps", "batch_size", "context", "width", "blocks")
    return {
        "environment": environment(),
        "text": {
            "python": sys.version.split()[0],
            "characters": sum(map(len, corpus[1:])),
            "vocabulary": len(corpus.vocabulary),
            "train": len(corpus.train),
            "validation": len(corpus.validation),
            "test": len(corpus.test),
        },
        **{name: getattr(options, name) for name in names},
    }


def run_search(
    corpus: Corpus,
    model: Transformer,
    options: argparse.Namespace,
    described: dict[str, Any],
) -> dict[str, Any]:
    """Search, or go on with a search that was stopped; print and write what it found.

    An earlier file is gone on with if all but the environment is the same.
    """
    start = time.perf_counter()
    path = options.out / "search.json"
    described = described | {"seed": search.SEED}
    known, seconds = {}, 0.0
    if path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))
        same = all(known[name] == described[name] for name in _ASKED)
        seconds = known["wall_seconds"] if same else 0.0
        known = {name: known[name] for name in _FOUND} if same else {}

    def write(found: dict[str, Any]) -> None:
        spent = {"wall_seconds": round(seconds + time.perf_counter() - start, 1)}
        write_json(path, described | spent | found)

    found = search.search(
        corpus,
        model,
        options.optimizers,
        options.steps,
        options.batch_size,
        options.quiet,
        write,
        known,
    )
    print(f"perturbation: {found['perturbation']}")
    for optimizer in options.optimizers:
        for method in METHODS:
            print(f"{optimizer}, {method}:", search.winner(found, optimizer, method))
    print(f"Wrote search.json to {options.out}.")
    return described | found


_ASKED = ("text", "seed", "steps", "batch_size", "context", "width", "blocks")
_FOUND = ("rates", "directions", "perturbation", "trials")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the comparison or the search; write files, return the record."""
    options = parse(arguments)
    start = time.perf_counter()
    corpus: Corpus = options.corpus
    model = Transformer(
        len(corpus.vocabulary), options.context, options.width, options.blocks
    )
    described = describe(options)
    text = described["text"]
    print(
        f"Help topics of Python {text['python']}: {text['characters']:,} characters "
        f"of {text['vocabulary']} kinds, {text['train']:,} to train on, "
        f"{text['validation']:,} for validation, {text['test']:,} for the test."
    )

    if options.search:
        return run_search(corpus, model, options, described)
    results = run(corpus, model, options)
    record = described | {"seeds": options.seeds, "perturbation": PERTURBATION}
    record["wall_seconds"] = round(time.perf_counter() - start, 1)
    record["results"] = results
    figure = plot(results, len(options.seeds))
    write_json(options.out / "language_model.json", record)
    replace_file(
        options.out / "language_model.png", lambda path: figure.savefig(path, dpi=150)
    )
    print(table(results))
    print(
        "\nBits per character of the test text, mean ± standard error over seeds; "
        "rounded with a grid per output channel, or per tensor."
        f"\nWrote language_model.json and language_model.png to {options.out} "
        f"({record['wall_seconds']} s)."
    )
    return record


if __name__ == "__main__":
    main()
