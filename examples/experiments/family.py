"""Every method of HERO's family on the quick start's task.

SAM, ASAM, GNP, GSAM, GRAD-L1, HERO along five directions, CURE in the space of inputs,
and quantization-aware training at 4 bits, beside tuned SGD: data, network, batches and
measurements are those of `examples.experiments.digits`.

    python -m examples.experiments.family  # 6 minutes on 2 cores
    python -m examples.experiments.family --methods SAM "HERO, adaptive" --seeds 0
    python -m examples.experiments.family --search --out DIR  # settings; 13 minutes

The settings in METHODS are the winners of the search: 8 trials for each method, from a
seed that is not reported. Those of SGD, GRAD-L1, the first-order part and HERO are the
quick start's, of 12 trials from three seeds; four random z take those of one.
"""

import functools
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import hero_jax
from examples.experiments.common import comparison
from examples.experiments.common import digits as quickstart
from examples.experiments.common.digits import Data, Method, Program, TrainState

BITS = (*quickstart.BITS, 2)
SEARCH_SEEDS = (100,)
QAT_BITS = 4
ROOM = 4
"""Numbers of a method: learning rate, weight decay, and two settings at most."""


def loss_fn(params: Any, stats: Any, images: Any, labels: Any, key: Any) -> Any:
    """Evaluate the quick start's loss; the step's key is for random directions."""
    del key
    return quickstart.loss_fn(params, stats, images, labels)


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
        gradient = quickstart.hero_value_and_grad(
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
        quickstart.hero_value_and_grad, perturbation=perturbation, **constants
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

_known = quickstart.METHODS
METHODS: dict[str, Method] = {
    "SGD, tuned": _known["SGD, tuned"],
    "SAM": Method(_first_order["normalized"], {"h": 1.0}),
    "ASAM": Method(_first_order["adaptive"], {"h": 5.0}),
    "first-order": Method(
        _first_order["layerwise"], {"h": _known["first-order"].settings["h"]}
    ),
    "GNP": Method(hero_jax.family.gnp_value_and_grad, {"strength": 1.0}),
    "GNP, by radius": Method(
        hero_jax.family.gnp_value_and_grad, {"strength": 0.75, "radius": 0.5}
    ),
    "GSAM": Method(hero_jax.family.gsam_value_and_grad, {"h": 0.5, "alpha": 0.4}),
    "GRAD-L1": _known["GRAD-L1"],
    "HERO": _known["HERO"],
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


@functools.cache
def _step(
    gradient: Callable[..., Any], names: tuple[str, ...], num_steps: int
) -> Callable[..., Any]:
    """Return the jitted step of all methods that differ in their numbers alone."""

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, data: Data, indices: chex.Array) -> Any:
        rest = state.opt_state
        learning_rate, weight_decay, *settings = rest.numbers[: 2 + len(names)]
        tx = quickstart.make_optimizer(learning_rate, weight_decay, num_steps)
        value_and_grad = gradient(
            loss_fn, has_aux=True, **dict(zip(names, settings, strict=True))
        )
        key, key_now = jax.random.split(rest.key)
        state, outputs = quickstart.advance(
            *(value_and_grad, tx, state._replace(opt_state=rest.sgd)),
            *(data, indices, key_now),
        )
        rest = Rest(state.opt_state, rest.numbers, key)
        return state._replace(opt_state=rest), outputs

    return step


def make_program(method: Method, num_steps: int) -> Program:
    """Build what `quickstart.train` runs, as `quickstart.make_program` does.

    Every step has a key of its own besides.
    """
    rate, decay = method.learning_rate, method.weight_decay
    numbers = [rate, decay, *method.settings.values()]
    numbers += [0.0] * (ROOM - len(numbers))

    def init(seed: int) -> TrainState:
        params, batch_stats = quickstart.init_network(seed)
        sgd = quickstart.make_optimizer(rate, decay, num_steps).init(params)
        rest = Rest(sgd, jnp.array(numbers), jax.random.key(seed))
        return TrainState(params, batch_stats, rest)

    return Program(init, _step(method.gradient, tuple(method.settings), num_steps))


STYLES = {2: ("#D55E00", "v"), 3: ("#E69F00", "s"), 4: ("#0072B2", "D"), 32: ("k", "o")}
"""Colour, told apart by the colour-blind, and marker of the precisions drawn."""


def plot(results: comparison.Results) -> Figure:
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
    figure.legend(
        *(x[::-1] for x in axes.get_legend_handles_labels()),
        loc="outside lower center",
        ncols=4,
        fontsize=11,
        handletextpad=0.2,
        columnspacing=1.2,
    )
    return figure


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Compare, or search; write the files and return the record."""
    start = time.perf_counter()
    options = comparison.parse(arguments, __doc__, METHODS, TRIALS, "family_results")
    if options.search:
        return comparison.search(
            *(options, "search", METHODS, TRIALS, SEARCH_SEEDS, make_program)
        )
    results = comparison.compare(options, METHODS, make_program, BITS)
    text = comparison.table(results, BITS)
    return comparison.report(options, "family", results, text, plot(results), start)


if __name__ == "__main__":
    main()
