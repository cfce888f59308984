"""Methods side by side on the digits: train, measure, search their settings, report."""

import argparse
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from examples.experiments.common import digits
from examples.experiments.common.command_line import check_seeds, training_parser
from examples.experiments.common.digits import BITS, Method, Program
from examples.experiments.common.statistics import cell, summary
from examples.experiments.common.turns import repeated, take_turns
from examples.image_classification.results import (
    environment,
    markdown,
    write_figure,
    write_json,
)

VALIDATION_SIZE = 250
ROUNDS, STEPS = 15, 4
"""Turns in which every method is timed, and steps in each."""

Trials = Mapping[str, Sequence[Method]]
Results = dict[str, dict[str, Any]]
MakeProgram = Callable[[Method, int], Program]


def parse(
    arguments: Sequence[str] | None,
    doc: str | None,
    methods: Mapping[str, Method],
    trials: Trials,
    out: str,
) -> argparse.Namespace:
    """Read and check the command line."""
    parser = training_parser(doc, out)
    add = parser.add_argument
    add("--methods", nargs="+", metavar="NAME", choices=methods, default=[*methods])
    add("--search", action="store_true", help="try settings, in place of the runs")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run for each")
    options = parser.parse_args(arguments)
    check_seeds(parser, options.seeds)
    if options.search and not trials.keys() & {*options.methods}:
        parser.error(f"--search must be of some of {', '.join(trials)}")
    return options


def compare(
    options: argparse.Namespace,
    methods: Mapping[str, Method],
    make_program: MakeProgram = digits.make_program,
    bits: Sequence[int] = BITS,
) -> Results:
    """Train every chosen method from every seed and measure; return numbers for JSON.

    A seed whose loss is not finite is noted, and the others go on.
    """
    data = {s: digits.load_data(options.label_noise, s) for s in options.seeds}
    steps = options.epochs * (digits.TRAIN_SIZE // digits.BATCH_SIZE)
    chosen = {name: methods[name] for name in methods if name in options.methods}
    programs = {name: make_program(method, steps) for name, method in chosen.items()}
    results: Results = {}
    for name, method in chosen.items():
        pairs, diverged = [], []
        with digits.progress_bar(name, len(data) * steps, options.quiet) as progress:
            for seed, one in data.items():
                run = (programs[name], one, options.epochs, seed, progress)
                try:
                    pairs.append((digits.train(*run), one))
                except FloatingPointError:
                    diverged.append(seed)
        results[name] = method.numbers() | {"diverged_seeds": diverged}
        if pairs:
            norms = [digits.measure_curvature(*pair) for pair in pairs]
            results[name] |= {
                "accuracy": {
                    str(b): summary([100 * digits.evaluate(*pair, b) for pair in pairs])
                    for b in bits
                },
                "hessian_norm": summary([x for x, _ in norms]),
                "hessian_norm_exact": summary([x for _, x in norms]),
            }
    sgd = programs.get("SGD") or make_program(digits.METHODS["SGD"], steps)
    batch = (data[options.seeds[0]], np.arange(digits.BATCH_SIZE))
    timed = {
        name: repeated(program.step, program.init(0), *batch)
        for name, program in ({"SGD": sgd} | programs).items()
    }
    calls = dict.fromkeys(timed, STEPS)
    times = take_turns(timed, ROUNDS, calls, options.quiet)
    for name, result in results.items():
        ratio = np.median(times[name]) / np.median(times["SGD"])
        result["relative_step_time"] = float(ratio)
    return results


def table(results: Results, bits: Sequence[int] = BITS, exact: bool = False) -> str:
    """Format the results as a Markdown table."""
    norms = {"hessian_norm": f"‖Hz‖, h={digits.MEASURED_STEP:g}"}
    if exact:
        norms["hessian_norm_exact"] = "‖Hz‖ exact"
    titles = ["float" if b == 32 else f"{b} bit" for b in bits]
    rows = [["method", *titles, *norms.values(), "time"]]
    for name, result in results.items():
        cells = ["diverged"] * (len(bits) + len(norms))
        if "accuracy" in result:
            cells = [cell(result["accuracy"][str(b)], 1) for b in bits]
            cells += [cell(result[norm], 3) for norm in norms]
            if lost := result.get("diverged_seeds"):
                name += f" (without seed {', '.join(map(str, lost))}: diverged)"
        rows.append([name, *cells, f"{result['relative_step_time']:.2f}"])
    return markdown(rows)


def describe(options: argparse.Namespace, seeds: Any, start: float) -> dict[str, Any]:
    """Return what all records say of their runs."""
    return {
        "environment": environment(),
        "label_noise": options.label_noise,
        "seeds": seeds,
        "epochs": options.epochs,
        "wall_seconds": round(time.perf_counter() - start, 1),
    }


def report(
    options: argparse.Namespace,
    name: str,
    results: Results,
    text: str,
    figure: Figure,
    start: float,
) -> dict[str, Any]:
    """Print the table, write JSON and picture; return the record."""
    rest = {"batch_size": digits.BATCH_SIZE, "results": results}
    count = len(options.seeds)
    record = describe(options, count, start) | rest
    noise = f"{options.label_noise:.0%} label noise"
    figure.suptitle(f"Digits, {noise}, {count} seed(s)", fontsize=12)
    write_json(options.out / f"{name}.json", record)
    write_figure(options.out / f"{name}.png", figure, 150)
    print(
        f"{text}\n\nTest accuracy in %, mean ± standard error over seeds; time per "
        f"step relative to SGD.\nWrote {name}.json and {name}.png to {options.out} "
        f"({record['wall_seconds']} s)."
    )
    return record


def search(
    options: argparse.Namespace,
    name: str,
    methods: Mapping[str, Method],
    trials: Trials,
    seeds: Sequence[int],
    make_program: MakeProgram = digits.make_program,
) -> dict[str, Any]:
    """Try the settings; print the best ones and those in use, and write all.

    Each is trained on 750 of the training images and judged on the other 250, with
    their true labels, by the mean of the accuracies with weights of BITS.
    """
    start = time.perf_counter()
    data = [digits.load_data(options.label_noise, s, VALIDATION_SIZE) for s in seeds]
    steps = options.epochs * (len(data[0].train_labels) // digits.BATCH_SIZE)
    tried: dict[str, list[dict[str, Any]]] = {}
    for title in [title for title in trials if title in options.methods]:
        total = steps * len(seeds) * len(trials[title])
        tried[title] = []
        with digits.progress_bar(title, total, options.quiet) as progress:
            for method in trials[title]:
                rows = np.zeros((len(seeds), len(BITS)))  # stays so where it diverges
                program = make_program(method, steps)
                for row, seed, one in zip(rows, seeds, data, strict=True):
                    run = (program, one, options.epochs, seed, progress)
                    with contextlib.suppress(FloatingPointError):
                        state = digits.train(*run)
                        row[:] = [float(digits.evaluate(state, one, b)) for b in BITS]
                rows *= 100.0
                accuracy = dict(zip(BITS, rows.mean(0).tolist(), strict=True))
                trial = {"accuracy": accuracy, "score": summary(rows.mean(1))}
                tried[title].append(method.numbers() | trial)
        best = max(tried[title], key=lambda trial: trial["score"]["mean"])
        settings = {key: best[key] for key in methods[title].numbers()}
        print(
            f"{title}: {best['score']['mean']:.1f} % by {settings}; in use: "
            f"{methods[title].numbers()}.",
            flush=True,
        )
    rest = {"validation_size": VALIDATION_SIZE, "trials": tried}
    record = describe(options, seeds, start) | rest
    write_json(options.out / f"{name}.json", record)
    return record


def plot_against_bits(
    axes: Any, networks: Mapping[str, Sequence[dict[str, Any]]], bits: Sequence[int]
) -> None:
    """Draw accuracies, a summary for each number of bits, a line per network."""
    styles = ("o-", "D-", "s-", "^-", "v-", "x-")
    for i, (name, accuracies) in enumerate(networks.items()):
        axes.errorbar(
            range(len(bits)),
            [x["mean"] for x in accuracies],
            [x["stderr"] or 0.0 for x in accuracies],
            fmt=styles[i % len(styles)],
            markersize=4,
            capsize=2,
            label=name,
        )
    axes.set_xticks(range(len(bits)), ["float" if b == 32 else str(b) for b in bits])
    axes.grid(alpha=0.3)
