"""Train the quick start's network by every method of HERO's family; then quantize.

SAM, ASAM, GNP, GSAM, GRAD-L1, HERO along five directions, CURE in the space of inputs,
and quantization-aware training at 4 bits, beside tuned SGD: the same digits, label
noise, network, batches and measurements as `examples/experiments/common/digits.py`. The result is a
table of the test accuracy with weights of 32 to 2 bits, the same numbers as JSON, and a
picture.

    python -m examples.experiments.family  # 6 minutes on 2 cores
    python -m examples.experiments.family --methods SAM "HERO, adaptive" --seeds 1
    python -m examples.experiments.family --search --out DIR  # settings; 13 minutes

The settings in METHODS are the winners of the search: 8 trials for each method, trained
on 750 of the training images from a seed that is not reported, and judged on the other
250 by the mean accuracy over 32 to 3 bits. Those of SGD, GRAD-L1, first-order-only and
HERO are the quick start's, of 12 trials from three seeds; four random z take those of
one.
A run whose loss is not finite is reported as such and does not end the others.
"""

import argparse
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from tqdm import tqdm

import hero_jax
from examples.experiments import quickstart_search
from examples.experiments.common import digits as quickstart
from examples.experiments.common.command_line import (
    check_at_least,
    check_training_options,
)
from examples.experiments.common.digits import Data, Method, Program, TrainState
from examples.experiments.common.statistics import cell, summary
from examples.image_classification.results import (
    environment,
    markdown,
    write_figure,
    write_json,
)

BITS = (*quickstart.BITS, 2)
SEARCH_SEEDS = quickstart_search.SEEDS[:1]
QAT_BITS = 4
ROOM = 4
"""Numbers of a method: learning rate, weight decay, and two settings at most."""


def loss_fn(
    params: chex.ArrayTree,
    batch_stats: chex.ArrayTree,
    images: chex.Array,
    labels: chex.Array,
    key: chex.PRNGKey,
) -> tuple[chex.Array, Any]:
    """Evaluate the quick start's loss; the step's key is for random directions."""
    del key
    found: tuple[chex.Array, Any] = quickstart.loss_fn(
        params, batch_stats, images, labels
    )
    return found


def random_z_value_and_grad(
    loss_fn: Callable[..., Any],
    *,
    h: chex.Numeric,
    gamma: chex.Numeric,
    probes: int,
    has_aux: bool = False,
) -> Callable[..., Any]:
    """Return HERO's gradient along random z (Eq. 9); the last argument is a key."""

    def value_and_grad(params: chex.ArrayTree, *args: Any) -> Any:
        keys = jax.random.split(args[-1], probes)
        gradient = hero_jax.hero_value_and_grad(
            loss_fn,
            h=h,
            gamma=gamma,
            perturbation=[hero_jax.perturbation.hutchinson(key) for key in keys],
            has_aux=has_aux,
        )
        return gradient(params, *args)

    return value_and_grad


def straight_through_value_and_grad(
    loss_fn: Callable[..., Any], *, bits: int, has_aux: bool = False
) -> Callable[..., Any]:
    """Return the gradient at the rounded weights, as if rounding were the identity.

    That is quantization-aware training: the loss sees weights of so many bits, the step
    rule moves the floats behind them.
    """

    def of_rounded(params: chex.ArrayTree, *args: Any) -> Any:
        rounded = hero_jax.quant.fake_quantize(params, bits)
        seen = jax.tree.map(
            lambda W, q: W + jax.lax.stop_gradient(q - W), params, rounded
        )
        return loss_fn(seen, *args)

    gradient: Callable[..., Any] = jax.value_and_grad(of_rounded, has_aux=has_aux)
    return gradient


def _hero(perturbation: str, **constants: Any) -> Callable[..., Any]:
    return functools.partial(
        hero_jax.hero_value_and_grad, perturbation=perturbation, **constants
    )


_first_order = {
    name: _hero(name, gamma=0.0) for name in ("normalized", "adaptive", "layerwise")
}
_hero_adaptive, _hero_gradient = _hero("adaptive"), _hero("gradient")
_random_z = functools.partial(random_z_value_and_grad, probes=1)
_random_4z = functools.partial(random_z_value_and_grad, probes=4)
_cure = functools.partial(hero_jax.family.cure_value_and_grad, input_argnum=2)
_qat = functools.partial(straight_through_value_and_grad, bits=QAT_BITS)


def _grid(gradient: Callable[..., Any], **choices: Sequence[float]) -> list[Method]:
    """Return a trial for every combination of the settings."""
    return [
        Method(gradient, dict(zip(choices, values, strict=True)))
        for values in itertools.product(*choices.values())
    ]


TRIALS: dict[str, list[Method]] = {
    "SAM": _grid(
        _first_order["normalized"], h=(0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 3.0, 5.0)
    ),
    "ASAM": _grid(
        _first_order["adaptive"], h=(0.2, 0.5, 1.0, 2.0, 3.0, 5.0, 7.0, 10.0)
    ),
    "GNP": _grid(
        hero_jax.family.gnp_value_and_grad,
        strength=(0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0),
    ),
    "GNP, by radius": [
        Method(
            hero_jax.family.gnp_value_and_grad,
            {"strength": round(share * r, 4), "radius": r},
        )
        for r, share in itertools.product((0.2, 0.5, 1.0, 2.0), (0.75, 1.5))
    ],
    "GSAM": _grid(
        hero_jax.family.gsam_value_and_grad, h=(0.2, 0.5, 1.0, 2.0), alpha=(0.1, 0.4)
    ),
    "HERO, adaptive": _grid(_hero_adaptive, h=(1.0, 2.0, 3.0, 5.0), gamma=(0.1, 0.5)),
    "HERO, z = g": _grid(_hero_gradient, h=(0.2, 0.5, 1.0, 2.0), gamma=(0.1, 0.5)),
    "HERO, random z": _grid(_random_z, h=(0.003, 0.01, 0.02, 0.05), gamma=(0.1, 1.0)),
    "CURE": _grid(_cure, h=(0.5, 1.0, 2.0, 4.0), gamma=(0.3, 3.0)),
    "QAT, 4 bits": [
        Method(_qat, {}, rate, decay)
        for rate, decay in itertools.product((0.03, 0.1), (1e-4, 1e-3, 1e-2, 3e-2))
    ],
}

_found = quickstart.METHODS
METHODS: dict[str, Method] = {
    "SGD, tuned": _found["SGD, tuned"],
    "SAM": Method(_first_order["normalized"], {"h": 1.0}),
    "ASAM": Method(_first_order["adaptive"], {"h": 5.0}),
    "first-order": Method(
        _first_order["layerwise"], {"h": _found["first-order"].settings["h"]}
    ),
    "GNP": Method(hero_jax.family.gnp_value_and_grad, {"strength": 1.0}),
    "GNP, by radius": Method(
        hero_jax.family.gnp_value_and_grad, {"strength": 0.75, "radius": 0.5}
    ),
    "GSAM": Method(hero_jax.family.gsam_value_and_grad, {"h": 0.5, "alpha": 0.4}),
    "GRAD-L1": _found["GRAD-L1"],
    "HERO": _found["HERO"],
    "HERO, adaptive": Method(_hero_adaptive, {"h": 3.0, "gamma": 0.5}),
    "HERO, z = g": Method(_hero_gradient, {"h": 2.0, "gamma": 0.1}),
    "HERO, random z": Method(_random_z, {"h": 0.05, "gamma": 1.0}),
    "HERO, 4 random z": Method(_random_4z, {"h": 0.05, "gamma": 1.0}),
    "CURE": Method(_cure, {"h": 2.0, "gamma": 3.0}),
    "QAT, 4 bits": Method(_qat, {}, 0.03, 1e-4),
}


class Rest(NamedTuple):
    """What a step needs beside the network, where the optimizer's state would be.

    Attributes:
      sgd: state of the optax chain.
      numbers: learning rate, weight decay and settings, `[ROOM]`. No constants of the
        program: all trials of a method share one, and all methods the evaluation.
      key: of the random numbers of the steps to come.
    """

    sgd: optax.OptState
    numbers: chex.Array
    key: chex.PRNGKey


def _optimizer(
    learning_rate: chex.Numeric, weight_decay: chex.Numeric, num_steps: int
) -> optax.GradientTransformation:
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.sgd(optax.cosine_decay_schedule(learning_rate, num_steps), momentum=0.9),
    )


@functools.cache
def _step(
    gradient: Callable[..., Any], names: tuple[str, ...], num_steps: int
) -> Callable[..., tuple[TrainState, chex.Array, chex.Array]]:
    """Return the jitted step of all methods that differ in their numbers alone."""

    @functools.partial(jax.jit, donate_argnums=0)
    def step(
        state: TrainState, data: Data, indices: chex.Array
    ) -> tuple[TrainState, chex.Array, chex.Array]:
        rest = state.opt_state
        learning_rate, weight_decay, *settings = rest.numbers[: 2 + len(names)]
        tx = _optimizer(learning_rate, weight_decay, num_steps)
        value_and_grad = gradient(
            loss_fn, has_aux=True, **dict(zip(names, settings, strict=True))
        )
        key, key_now = jax.random.split(rest.key)
        images, labels = data.train_images[indices], data.train_labels[indices]
        (loss, (batch_stats, logits)), grads = value_and_grad(
            state.params, state.batch_stats, images, labels, key_now
        )
        updates, sgd = tx.update(grads, rest.sgd, state.params)
        params = optax.apply_updates(state.params, updates)
        accuracy = jnp.mean(logits.argmax(-1) == labels)
        rest = Rest(sgd, rest.numbers, key)
        return TrainState(params, batch_stats, rest), loss, accuracy

    return step


def make_program(method: Method, num_steps: int) -> Program:
    """Build what `quickstart.train` runs, as `quickstart.make_program` does.

    Every step has a key of its own besides.
    """
    rate, decay = method.learning_rate, method.weight_decay
    numbers = [rate, decay, *method.settings.values()]
    numbers += [0.0] * (ROOM - len(numbers))
    start = quickstart.make_program(quickstart.METHODS["SGD"], num_steps).init

    def init(seed: int) -> TrainState:
        params, batch_stats, _ = start(seed)
        sgd = _optimizer(rate, decay, num_steps).init(params)
        rest = Rest(sgd, jnp.array(numbers), jax.random.key(seed))
        return TrainState(params, batch_stats, rest)

    return Program(init, _step(method.gradient, tuple(method.settings), num_steps))


def run(
    methods: dict[str, Method],
    seeds: Sequence[int],
    epochs: int,
    label_noise: float,
    quiet: bool = False,
) -> dict[str, dict[str, Any]]:
    """Train every method from every seed and measure; return numbers for JSON."""
    data = {seed: quickstart.load_data(label_noise, seed) for seed in seeds}
    steps = quickstart.TRAIN_SIZE // quickstart.BATCH_SIZE
    images = len(seeds) * epochs * steps * quickstart.BATCH_SIZE
    programs = {n: make_program(m, epochs * steps) for n, m in methods.items()}
    results = {}
    for name, method in methods.items():
        with tqdm(
            total=images,
            desc=f"{name:<16}",
            unit="images",
            unit_scale=True,
            disable=quiet,
        ) as progress:
            results[name] = {
                "settings": method.settings,
                "learning_rate": method.learning_rate,
                "weight_decay": method.weight_decay,
                **train_and_measure(programs[name], data, epochs, progress),
            }
    base = {"": make_program(METHODS["SGD, tuned"], epochs * steps)}
    times = quickstart.relative_step_times(base | programs, data[seeds[0]])
    for name, result in results.items():
        result["relative_step_time"] = times[name]
    return results


def train_and_measure(
    program: Program, data: dict[int, Data], epochs: int, progress: tqdm
) -> dict[str, Any]:
    """Return accuracy and curvature over the seeds that end, and which diverge."""
    pairs, diverged = [], []
    for seed, digits in data.items():
        try:
            state = quickstart.train(program, digits, epochs, seed, progress)
        except FloatingPointError:
            diverged.append(seed)
            continue
        pairs.append((state, digits))
    found: dict[str, Any] = {"diverged_seeds": diverged}
    if pairs:
        norms = [quickstart.measure_curvature(*pair) for pair in pairs]
        found["hessian_norm"] = summary([x.finite_difference for x in norms])
        found["hessian_norm_exact"] = summary([x.exact for x in norms])
        found["accuracy"] = {
            str(bits): summary(
                [100 * quickstart.evaluate(*pair, bits) for pair in pairs]
            )
            for bits in BITS
        }
    return found


def table(results: dict[str, dict[str, Any]]) -> str:
    """Format the results as a Markdown table."""
    titles = ["float" if bits == 32 else f"{bits} bit" for bits in BITS]
    rows = [["method", *titles, f"‖Hz‖, h={quickstart.MEASURED_STEP:g}", "time"]]
    for name, result in results.items():
        cells = ["diverged"] * (len(BITS) + 1)
        if "accuracy" in result:
            accuracy = result["accuracy"]
            cells = [cell(accuracy[str(bits)], 1) for bits in BITS]
            cells.append(cell(result["hessian_norm"], 3))
            if lost := result["diverged_seeds"]:
                name += f" (without seed {', '.join(map(str, lost))}: diverged)"
        rows.append([name, *cells, f"{result['relative_step_time']:.2f}"])
    return markdown(rows)


STYLES = {2: ("#D55E00", "v"), 3: ("#E69F00", "s"), 4: ("#0072B2", "D"), 32: ("k", "o")}
"""Colour, told apart by the colour-blind, and marker of the precisions drawn."""


def plot(results: dict[str, dict[str, Any]], title: str) -> Figure:
    """Draw the accuracy of each method in float and at 4, 3 and 2 bits, best on top."""
    ended = {n: r["accuracy"] for n, r in results.items() if "accuracy" in r}
    names = sorted(
        ended, key=lambda n: np.mean([ended[n][str(b)]["mean"] for b in STYLES])
    )
    lost = [name for name in results if name not in ended]
    figure = Figure(figsize=(5.4, 1.7 + 0.4 * len(results)), layout="constrained")
    axes = figure.subplots()
    for k, (bits, (color, marker)) in enumerate(STYLES.items()):
        shown = [ended[name][str(bits)] for name in names]
        axes.errorbar(
            [x["mean"] for x in shown],
            np.arange(len(lost), len(results)) - 0.24 + 0.16 * k,
            xerr=[x["stderr"] or 0.0 for x in shown],
            fmt=marker,
            color=color,
            markersize=6,
            elinewidth=1.5,
            label="float" if bits == 32 else f"{bits} bits",
        )
    for y in range(len(results) - 1):
        axes.axhline(y + 0.5, color="0.88", lw=0.8, zorder=0)
    for y in range(len(lost)):
        axes.text(
            *(0.5, y, "diverged"),
            ha="center",
            va="center",
            transform=axes.get_yaxis_transform(),
        )
    axes.set_yticks(range(len(results)), [*lost, *names], fontsize=11)
    axes.set_ylim(-0.6, len(results) - 0.4)
    axes.set_xlim(10 * (axes.get_xlim()[0] // 10), 100)
    axes.set_xlabel("test accuracy (%)", fontsize=11)
    axes.grid(axis="x", alpha=0.3)
    figure.suptitle(title, fontsize=12)
    figure.legend(
        *(x[::-1] for x in axes.get_legend_handles_labels()),
        loc="outside lower center",
        ncols=4,
        fontsize=11,
        handletextpad=0.2,
        columnspacing=1.2,
    )
    return figure


def search(options: argparse.Namespace) -> dict[str, Any]:
    """Try the settings; print the best ones and those in use, and write all."""
    start = time.perf_counter()
    datasets = [
        quickstart.load_data(
            options.label_noise, seed, quickstart_search.VALIDATION_SIZE
        )
        for seed in SEARCH_SEEDS
    ]
    images = len(datasets[0].train_labels) // quickstart.BATCH_SIZE
    images *= quickstart.BATCH_SIZE * options.epochs * len(SEARCH_SEEDS)
    trials: dict[str, list[dict[str, Any]]] = {}
    record: dict[str, Any] = {
        "environment": environment(),
        "label_noise": options.label_noise,
        "epochs": options.epochs,
        "seeds": SEARCH_SEEDS,
        "validation_size": quickstart_search.VALIDATION_SIZE,
    }
    for name in [name for name in options.methods if name in TRIALS]:
        with tqdm(
            total=images * len(TRIALS[name]),
            desc=f"{name:<16}",
            unit="images",
            unit_scale=True,
            disable=options.quiet,
        ) as progress:
            trials[name] = [
                quickstart_search.try_one(
                    method,
                    datasets,
                    options.epochs,
                    progress,
                    make_program=make_program,
                    seeds=SEARCH_SEEDS,
                )
                for method in TRIALS[name]
            ]
        best = max(trials[name], key=lambda trial: trial["score"]["mean"])
        print(
            f"{name}: {best['score']['mean']:.1f} % by {best['settings']}, learning "
            f"rate {best['learning_rate']}, weight decay {best['weight_decay']}; in "
            f"use: {(used := METHODS[name]).settings}, {used.learning_rate}, "
            f"{used.weight_decay}.",
            flush=True,
        )
    record["wall_seconds"] = round(time.perf_counter() - start, 1)
    record["trials"] = trials
    write_json(options.out / "search.json", record)
    return record


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--methods", nargs="+", metavar="NAME", choices=METHODS, default=[*METHODS])
    add("--search", action="store_true", help="try settings, in place of the runs")
    add("--label-noise", type=float, default=0.4, help="share of labels redrawn, 0-1")
    add("--seeds", type=int, default=3, help="number of seeds (0, 1, ...)")
    add("--epochs", type=int, default=40)
    add("--out", type=Path, default=Path("family_results"), help="folder to write")
    add("--quiet", action="store_true", help="show no progress bars")
    options = parser.parse_args(arguments)
    check_at_least(parser, options, seeds=1)
    if options.search and not TRIALS.keys() & {*options.methods}:
        parser.error(f"--search must be of some of {', '.join(TRIALS)}")
    check_training_options(parser, options)
    return options


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the comparison, or the search; write the files and return the record."""
    options = parse(arguments)
    if options.search:
        return search(options)
    start = time.perf_counter()
    results = run(
        {name: METHODS[name] for name in METHODS if name in options.methods},
        range(options.seeds),
        options.epochs,
        options.label_noise,
        options.quiet,
    )
    record = {
        "environment": environment(),
        "label_noise": options.label_noise,
        "seeds": options.seeds,
        "epochs": options.epochs,
        "batch_size": quickstart.BATCH_SIZE,
        "wall_seconds": round(time.perf_counter() - start, 1),
        "results": results,
    }
    noise = f"{options.label_noise:.0%} label noise"
    figure = plot(results, f"Digits, {noise}, {options.seeds} seed(s)")
    write_json(options.out / "family.json", record)
    write_figure(options.out / "family.png", figure, 150)
    print(table(results))
    print(
        "\nTest accuracy in %, mean ± standard error over seeds; time per step "
        f"relative to SGD.\nWrote family.json and family.png to {options.out} "
        f"({record['wall_seconds']} s)."
    )
    return record


if __name__ == "__main__":
    main()
