"""Sensitivity of a network's layers, allocations by it, and their accuracy."""

import math
import time
from argparse import Namespace
from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import spearmanr

from examples.experiments.common.networks import Network, bar, make_logits, make_loss
from hero_jax import mixed_precision as mp
from hero_jax import quant

MEASURES = ("HAWQ", "Q-BERT", "HAWQ-V2", "quadratic", "pairwise", "measured", "greedy")
"""Of sensitivity; "greedy" is no measure, but a way down of its own."""

SUBSETS = 5  # of the calibration images, for Q-BERT's spread
MOST_EXACT_PAIRS = 12  # layers up to which their pairs get all the time they need
ACTIVATION_IMAGES = 250  # in the one batch of the curvature in the activations

Bits = dict[str, int]


class Measured(NamedTuple):
    """What the layers of a network are like."""

    frontiers: dict[str, mp.Frontier]  # by measure, but for "pairwise"
    chosen: dict[str, list[mp.Allocation]]  # by measure, one for every budget
    record: dict[str, Any]  # numbers for JSON


def accuracy(
    network: Network,
    options: Namespace,
    bits: Sequence[int | Bits],
    images: chex.Array,
    labels: chex.Array,
) -> np.ndarray:
    """Return the accuracy with the weights quantized so, in %."""
    shares = quant.accuracy_against_bits(
        *(make_logits(network.model), network.params, images, labels, bits),
        batch_stats=network.batch_stats,
        batch_size=min(options.batch_size, len(labels)),
        **options.grid,
    )
    return 100.0 * np.asarray(shares, np.float64)


def measure(network: Network, options: Namespace) -> Measured:
    """Measure sensitivities, allocate bits by each, and test all allocations."""
    of_weights = (network.params, options.choices)
    sizes = mp.layer_sizes(*of_weights, **options.grid)
    errors = mp.weight_errors(*of_weights, **options.grid)
    key, seconds = jax.random.key(options.seed), {}

    def of(name: str, function: Any, *more: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        with bar(f"{network.name}: {name}", "steps", options.quiet) as progress:
            result = function(
                *(make_loss(network.model, "running"), network.params, errors, *more),
                *(network.batch_stats, *network.train),
                batch_size=options.batch_size,
                batch_argnums=(2, 3),
                progress=progress,
                **kwargs,
            )
        seconds[name] = round(time.perf_counter() - start, 1)
        return result

    lanczos = {"steps": options.steps, "key": key}
    hutchinson = {"num_samples": options.probes, "key": key}
    pairwise = of("pairwise", mp.quadratic, first_order=True, pairwise=True)
    sensitivities = {
        "HAWQ": of("HAWQ", mp.eigenvalue, **lanczos),
        "Q-BERT": of("Q-BERT", mp.eigenvalue_spread, subsets=SUBSETS, **lanczos),
        "HAWQ-V2": of("HAWQ-V2", mp.average_trace, **hutchinson),
        "quadratic": _own_forms(pairwise),
        "pairwise": pairwise,
        "measured": of("measured", mp.measured),
    }
    frontiers = {
        name: mp.pareto_frontier(s.layers, sizes, s.choices, unit="average_bits")
        for name, s in sensitivities.items()
        if s.interactions is None
    }
    frontiers["greedy"] = of("greedy", mp.greedy_frontier, sizes)
    chosen = {
        name: [
            frontiers[name].within(budget)
            if name in frontiers
            else _jointly(pairwise, sizes, budget, options)
            for budget in options.budgets
        ]
        for name in MEASURES
    }
    random = _random_allocations(sizes, options)
    wanted: list[int | Bits] = [32, *options.choices, *random]
    wanted += [a.bits for row in chosen.values() for a in row]
    tested = iter(accuracy(network, options, wanted, *network.test).tolist())
    in_float = next(tested)
    uniform = {str(b): next(tested) for b in options.choices}
    lost = [in_float - next(tested) for _ in random]
    accuracies = {name: [next(tested) for _ in row] for name, row in chosen.items()}
    predicted = {
        name: [s.total(bits) for bits in random] for name, s in sensitivities.items()
    }
    curvatures = _curvatures(sensitivities, errors)
    record = {
        "name": network.name,
        "weights": sum(size.weights for size in sizes.values()),
        "accuracy": {"float": in_float, "uniform": uniform, **accuracies},
        "allocations": {n: [as_json(a) for a in row] for n, row in chosen.items()},
        "uniform_bytes": {
            str(b): sum(x.bytes[b] for x in sizes.values()) for b in options.choices
        },
        "layers": {
            path: {"size": size.weights, **curvatures[path]}
            | {"sensitivity": _rows(sensitivities, path)}
            for path, size in sizes.items()
        },
        "random": {
            "bits": [[*bits.values()] for bits in random],
            "accuracy_lost": lost,
            "predicted": predicted,
        },
        "rank_correlation": {
            name: {"allocations": _correlation(row, lost)}
            for name, row in predicted.items()
        },
        "seconds": seconds,
    }
    return Measured(frontiers, chosen, record)


def _own_forms(pairwise: mp.Sensitivity) -> mp.Sensitivity:
    """Return `d'Hd / 2` of every layer by itself, from the products of all pairs."""
    matrix = np.asarray(pairwise.interactions, np.float64)
    own = np.einsum("lclc->lc", matrix) / 2.0
    layers = dict(zip(pairwise.layers, own, strict=True))
    return mp.Sensitivity(pairwise.choices, layers)


def _jointly(
    pairwise: mp.Sensitivity,
    sizes: dict[str, mp.LayerSize],
    budget: float,
    options: Namespace,
) -> mp.Allocation:
    """Return the best allocation with interactions, or that without if time is out."""
    problem = (pairwise.layers, sizes, budget, pairwise.choices)
    limit = None if len(sizes) <= MOST_EXACT_PAIRS else options.time_limit
    try:
        return mp.allocate_bits(
            *problem, interactions=pairwise.interactions, time_limit=limit
        )
    except TimeoutError:
        alone = mp.allocate_bits(*problem)
        return alone._replace(sensitivity=pairwise.total(alone.bits), gap=math.inf)


def as_json(a: mp.Allocation) -> dict[str, Any]:
    """Return an allocation for JSON, with the bits in the order of the layers."""
    gap = a.gap if math.isfinite(a.gap) else None
    return {**a._asdict(), "bits": [*a.bits.values()], "gap": gap}


def _rows(sensitivities: dict[str, mp.Sensitivity], path: str) -> dict[str, Any]:
    return {
        name: np.asarray(s.layers[path], np.float64).tolist()
        for name, s in sensitivities.items()
    }


def _random_allocations(
    sizes: dict[str, mp.LayerSize], options: Namespace
) -> list[Bits]:
    """Draw allocations of about the same size, so that the size tells nothing."""
    rng = np.random.default_rng(options.seed)
    weights = np.array([size.weights for size in sizes.values()])
    choices = np.array(options.choices)
    kept: list[np.ndarray] = []
    tolerance = 0.1
    while len(kept) < options.allocations:
        # Each candidate leans to few or to many bits by an amount of its own.
        leaning = rng.uniform(-1.0, 1.0, (2000, 1, 1))
        scores = leaning * choices + rng.gumbel(size=(2000, len(sizes), len(choices)))
        drawn = choices[scores.argmax(-1)]
        average = drawn @ weights / weights.sum()
        kept += [*drawn[np.abs(average - options.average_bits) < tolerance]]
        tolerance *= 1.1
    chosen = kept[: options.allocations]
    return [dict(zip(sizes, map(int, row), strict=True)) for row in chosen]


def _correlation(predicted: list[float], lost: list[float]) -> float | None:
    """Return Spearman's rank correlation; None where one of them is constant."""
    if np.ptp(predicted) == 0.0 or np.ptp(lost) == 0.0:
        return None
    return float(spearmanr(predicted, lost).statistic)


def _curvatures(
    sensitivities: dict[str, mp.Sensitivity], errors: mp.Errors
) -> dict[str, dict[str, Any]]:
    """Return eigenvalue and average trace of every layer: without the `||d||^2 / 2`."""
    hawq, trace = sensitivities["HAWQ"], sensitivities["HAWQ-V2"]
    rows = {
        "eigenvalue": hawq.layers,
        "average_trace": trace.layers,
        "average_trace_stderr": trace.stderr or {},
    }
    return {
        path: {
            name: float(row[path][0]) / (float(x[0]) / 2.0) if x[0] > 0.0 else None
            for name, row in rows.items()
        }
        for path, x in errors.squared_norms().items()
    }


def measure_activations(
    network: Network, options: Namespace, weights: Bits
) -> dict[str, Any]:
    """Test activations of a few bits, alike and mixed, with weights float and rounded.

    `weights` are the bits of the layers for the latter. Returns numbers for JSON.
    """
    logits_fn, stats = make_logits(network.model), network.batch_stats
    ranges = quant.activation_ranges(
        *(logits_fn, network.params, stats, network.train[0]),
        batch_size=options.batch_size,
    )
    batch = (x[:ACTIVATION_IMAGES] for x in network.train)
    args = (network.params, stats, *batch)
    loss_fn = make_loss(network.model, "running")
    problem = mp.activation_problem(loss_fn, ranges, *args, choices=options.choices)

    def of(name: str, function: Any, **kwargs: Any) -> Any:
        bar_name = f"{network.name}: activations, {name}"
        with bar(bar_name, "steps", options.quiet) as progress:
            return function(*problem, *args, progress=progress, **kwargs)

    key = jax.random.key(options.seed)
    hutchinson = {"num_samples": options.probes, "key": key}
    sensitivities = {
        "HAWQ-V2": of("HAWQ-V2", mp.average_trace, **hutchinson),
        "quadratic": of("quadratic", mp.quadratic),
        "measured": of("measured", mp.measured),
    }
    sizes = {path: r.size for path, r in ranges.items()}
    chosen = {}
    for name, s in sensitivities.items():
        frontier = mp.pareto_frontier(s.layers, sizes, s.choices, unit="average_bits")
        chosen[name] = [frontier.within(budget) for budget in options.budgets]

    @jax.jit
    def right(params: Any, images: Any, labels: Any, bits: Bits | None) -> jax.Array:
        run = logits_fn
        if bits is not None:
            run = quant.quantize_activations(logits_fn, ranges, bits)
        return jnp.sum(run(params, stats, images).argmax(-1) == labels)

    def tested(params: Any, bits: Bits | None) -> float:
        images, labels = network.test
        starts = range(0, len(labels), options.batch_size)
        parts = [slice(i, i + options.batch_size) for i in starts]
        total = sum(int(right(params, images[p], labels[p], bits)) for p in parts)
        return 100.0 * total / len(labels)

    record: dict[str, Any] = {
        "layers": {
            path: {"low": float(r.low), "high": float(r.high), "size": r.size}
            | {"sensitivity": _rows(sensitivities, path)}
            for path, r in ranges.items()
        },
        "allocations": {n: [as_json(a) for a in row] for n, row in chosen.items()},
    }
    rounded = quant.fake_quantize(network.params, weights, **options.grid)
    for kind, params in (("float", network.params), ("mixed", rounded)):
        alike = {b: tested(params, dict.fromkeys(sizes, b)) for b in options.choices}
        record[f"accuracy, {kind} weights"] = {
            "float": tested(params, None),
            "uniform": {str(b): percent for b, percent in alike.items()},
            **{n: [tested(params, a.bits) for a in r] for n, r in chosen.items()},
        }
    return record
