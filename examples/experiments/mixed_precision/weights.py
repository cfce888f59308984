"""Sensitivity of a network's weights, allocations by it, and their accuracy."""

import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import numpy as np
from scipy.stats import spearmanr

from examples.experiments.common.networks import Network, make_loss
from examples.experiments.curvature_report.measure import bar
from hero_jax import mixed_precision, quant

MEASURES = (
    "HAWQ",
    "Q-BERT",
    "HAWQ-V2",
    "quadratic",
    "pairwise",
    "measured",
    "greedy",
)
"""Of sensitivity; "greedy" is no measure, but a way down of its own."""

SUBSETS = 5
"""Parts of the calibration images for Q-BERT's spread."""

MOST_EXACT_PAIRS = 12
"""Layers up to which the program with interactions is given all the time it needs."""

Bits = dict[str, int]


class Settings(NamedTuple):
    """What is measured, the same for all networks.

    Attributes:
      choices: numbers of bits of a layer.
      budgets: average bits for which allocations are made.
      target: average bits around which random allocations are drawn.
      images: calibration images, training images with the labels trained on.
      batch_size: images that go through the network at once.
      probes: of the traces.
      steps: of Lanczos, for the largest eigenvalue of a layer.
      allocations: random ones, for the rank correlation.
      time_limit: seconds for a program with interactions of a deep network.
      grid: options of the quantizer, :class:`hero_jax.quant.GridOptions`.
      activations: whether to look at activations, too.
      activation_images: of one batch, for the curvature in the activations.
      seed: of probes and allocations.
      quiet: whether to show no progress bars.
    """

    choices: tuple[int, ...]
    budgets: tuple[float, ...]
    target: float
    images: int
    batch_size: int
    probes: int
    steps: int
    allocations: int
    time_limit: float
    grid: dict[str, Any]
    activations: bool
    activation_images: int
    seed: int
    quiet: bool


class Measured(NamedTuple):
    """What was found of the weights of a network.

    Attributes:
      sizes: of every layer.
      found: measure to sensitivities.
      frontiers: measure to its allocations.
      record: numbers for JSON.
    """

    sizes: dict[str, mixed_precision.LayerSize]
    found: dict[str, mixed_precision.Sensitivity]
    frontiers: dict[str, mixed_precision.Frontier]
    record: dict[str, Any]


@functools.cache
def make_logits(model: Any) -> Callable[..., chex.Array]:
    """Return `(params, batch_stats, images) -> logits`, one object per model."""
    outputs = make_loss(model, "running").outputs_fn
    return lambda params, stats, images: outputs(params, stats, images, None)


def calibration(network: Network, settings: Settings) -> tuple[chex.Array, ...]:
    """Return the images and labels that sensitivities are measured on."""
    images, labels = network.train
    return images[: settings.images], labels[: settings.images]


def accuracy(
    network: Network,
    settings: Settings,
    bits: Sequence[int | Bits],
    images: chex.Array,
    labels: chex.Array,
) -> np.ndarray:
    """Return the accuracy with the weights quantized so, in %."""
    shares = quant.accuracy_against_bits(
        make_logits(network.model),
        network.params,
        images,
        labels,
        bits,
        batch_stats=network.batch_stats,
        batch_size=min(settings.batch_size, len(labels)),
        **settings.grid,
    )
    return 100.0 * np.asarray(shares, np.float64)


def measure(network: Network, settings: Settings) -> Measured:
    """Measure sensitivities, allocate bits by each, and test all allocations."""
    sizes = mixed_precision.layer_sizes(
        network.params, settings.choices, **settings.grid
    )
    errors = mixed_precision.weight_errors(
        network.params, settings.choices, **settings.grid
    )
    found, greedy, seconds = _sensitivities(network, settings, errors, sizes)
    frontiers = {
        name: mixed_precision.pareto_frontier(
            s.layers, sizes, s.choices, unit="average_bits"
        )
        for name, s in found.items()
        if s.interactions is None
    }
    frontiers["greedy"] = greedy
    allocated = _allocate(found, frontiers, sizes, settings)
    random = _random_allocations(sizes, settings)
    singles = [
        {other: (b if other == path else 32) for other in sizes}
        for path in sizes
        for b in settings.choices
    ]
    wanted: list[int | Bits] = [32, *settings.choices, *singles, *random]
    wanted += [allocation.bits for row in allocated.values() for allocation in row]
    tested = dict(
        zip(
            map(_key, wanted),
            _tested(network, settings, wanted),
            strict=True,
        )
    )
    in_float = tested[_key(32)]
    lost = np.array([in_float - tested[_key(b)] for b in singles])
    lost_random = np.array([in_float - tested[_key(b)] for b in random])
    curvatures = _curvatures(found, errors)
    record = {
        "name": network.name,
        "weights": sum(size.weights for size in sizes.values()),
        "accuracy": {
            "float": in_float,
            "uniform": {b: tested[_key(b)] for b in settings.choices},
            **{
                name: [tested[_key(a.bits)] for a in row]
                for name, row in allocated.items()
            },
        },
        "allocations": {
            name: [as_json(a) for a in row] for name, row in allocated.items()
        },
        "uniform_bytes": {
            b: sum(size.bytes[b] for size in sizes.values()) for b in settings.choices
        },
        "layers": {
            path: {
                "size": size.weights,
                **curvatures[path],
                "accuracy_lost": lost.reshape(len(sizes), -1)[i].tolist(),
                "sensitivity": {
                    name: np.asarray(s.layers[path], np.float64).tolist()
                    for name, s in found.items()
                },
            }
            for i, (path, size) in enumerate(sizes.items())
        },
        "random": {
            "bits": [[*bits.values()] for bits in random],
            "accuracy_lost": lost_random.tolist(),
            "predicted": {
                name: [s.total(bits) for bits in random] for name, s in found.items()
            },
        },
        "rank_correlation": {
            name: {
                "layers": _correlation(
                    np.concatenate([np.asarray(x) for x in s.layers.values()]), lost
                ),
                "allocations": _correlation(
                    [s.total(bits) for bits in random], lost_random
                ),
            }
            for name, s in found.items()
        },
        "seconds": seconds,
    }
    return Measured(sizes, found, frontiers, record)


def _sensitivities(
    network: Network,
    settings: Settings,
    errors: mixed_precision.Errors,
    sizes: dict[str, mixed_precision.LayerSize],
) -> tuple[
    dict[str, mixed_precision.Sensitivity], mixed_precision.Frontier, dict[str, float]
]:
    loss_fn = make_loss(network.model, "running")
    args = (network.batch_stats, *calibration(network, settings))
    options: dict[str, Any] = {
        "batch_size": settings.batch_size,
        "batch_argnums": (2, 3),
    }
    key = jax.random.key(settings.seed)
    seconds: dict[str, float] = {}

    def timed(name: str, function: Any, *more: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        with bar(network, name, "steps", settings.quiet) as progress:
            result = function(
                loss_fn,
                network.params,
                errors,
                *more,
                *args,
                progress=progress,
                **options,
                **kwargs,
            )
        seconds[name] = round(time.perf_counter() - start, 1)
        return result

    steps = {"steps": settings.steps, "key": key}
    pairwise = timed(
        "pairwise", mixed_precision.quadratic, first_order=True, pairwise=True
    )
    found = {
        "HAWQ": timed("HAWQ", mixed_precision.eigenvalue, **steps),
        "Q-BERT": timed(
            "Q-BERT", mixed_precision.eigenvalue_spread, subsets=SUBSETS, **steps
        ),
        "HAWQ-V2": timed(
            "HAWQ-V2",
            mixed_precision.average_trace,
            num_samples=settings.probes,
            key=key,
        ),
        "quadratic": _own_forms(pairwise),
        "pairwise": pairwise,
        "measured": timed("measured", mixed_precision.measured),
    }
    greedy = timed("greedy", mixed_precision.greedy_frontier, sizes)
    return found, greedy, seconds


def _own_forms(pairwise: mixed_precision.Sensitivity) -> mixed_precision.Sensitivity:
    """Return `d'Hd / 2` of every layer by itself, from the products of all pairs."""
    matrix = np.asarray(pairwise.interactions, np.float64)
    own = np.einsum("lclc->lc", matrix) / 2.0
    layers = dict(zip(pairwise.layers, own, strict=True))
    return mixed_precision.Sensitivity(pairwise.choices, layers)


def _allocate(
    found: dict[str, mixed_precision.Sensitivity],
    frontiers: dict[str, mixed_precision.Frontier],
    sizes: dict[str, mixed_precision.LayerSize],
    settings: Settings,
) -> dict[str, list[mixed_precision.Allocation]]:
    """Return an allocation for every measure and budget."""
    limit = None if len(sizes) <= MOST_EXACT_PAIRS else settings.time_limit
    pairwise = found["pairwise"]

    def jointly(budget: float) -> mixed_precision.Allocation:
        problem = (pairwise.layers, sizes, budget, pairwise.choices)
        try:
            return mixed_precision.allocate_bits(
                *problem, interactions=pairwise.interactions, time_limit=limit
            )
        except TimeoutError:
            alone = mixed_precision.allocate_bits(*problem)
            return alone._replace(sensitivity=pairwise.total(alone.bits), gap=math.inf)

    return {
        name: [
            frontiers[name].within(budget) if name in frontiers else jointly(budget)
            for budget in settings.budgets
        ]
        for name in MEASURES
    }


def as_json(a: mixed_precision.Allocation) -> dict[str, Any]:
    """Return an allocation for JSON, with the bits in the order of the layers."""
    return {
        **a._asdict(),
        "bits": [*a.bits.values()],
        "gap": a.gap if math.isfinite(a.gap) else None,
    }


def _random_allocations(
    sizes: dict[str, mixed_precision.LayerSize], settings: Settings
) -> list[Bits]:
    """Draw allocations of about the same size, with which bits alone tell nothing."""
    rng = np.random.default_rng(settings.seed)
    weights = np.array([size.weights for size in sizes.values()])
    choices = np.array(settings.choices)
    kept: list[np.ndarray] = []
    tolerance = 0.1
    while len(kept) < settings.allocations:
        # Each candidate leans to few or to many bits by an amount of its own.
        leaning = rng.uniform(-1.0, 1.0, (2000, 1, 1))
        scores = leaning * choices + rng.gumbel(size=(2000, len(sizes), len(choices)))
        drawn = choices[scores.argmax(-1)]
        average = drawn @ weights / weights.sum()
        kept += [*drawn[np.abs(average - settings.target) < tolerance]]
        tolerance *= 1.1
    chosen = kept[: settings.allocations]
    return [dict(zip(sizes, map(int, row), strict=True)) for row in chosen]


def _tested(
    network: Network, settings: Settings, wanted: Sequence[int | Bits]
) -> list[float]:
    """Return the test accuracy of many quantizations, some at a time."""
    at_once, found = 10, []
    with bar(network, "test accuracy", "networks", settings.quiet) as progress:
        for start in range(0, len(wanted), at_once):
            part = [*wanted[start : start + at_once]]
            padded = part + [part[-1]] * (at_once - len(part))  # one program for all
            each = accuracy(network, settings, padded, *network.test)
            found += each[: len(part)].tolist()
            progress(len(found), len(wanted))
    return found


def _key(bits: int | Bits) -> Any:
    return bits if isinstance(bits, int) else tuple(bits.items())


def _correlation(predicted: Any, lost: np.ndarray) -> float | None:
    """Return Spearman's rank correlation; None where one of them is constant."""
    if np.ptp(predicted) == 0.0 or np.ptp(lost) == 0.0:
        return None
    return float(spearmanr(np.ravel(predicted), np.ravel(lost)).statistic)


def _curvatures(
    found: dict[str, mixed_precision.Sensitivity], errors: mixed_precision.Errors
) -> dict[str, dict[str, Any]]:
    """Return eigenvalue and average trace of every layer: without the `||d||^2 / 2`."""
    squares = {path: float(x[0]) / 2.0 for path, x in errors.squared_norms().items()}

    def over(rows: dict[str, chex.Array] | None, path: str) -> float | None:
        half = squares[path]
        return float(rows[path][0]) / half if rows and half > 0.0 else None

    hawq, hawq_v2 = found["HAWQ"], found["HAWQ-V2"]
    return {
        path: {
            "eigenvalue": over(hawq.layers, path),
            "average_trace": over(hawq_v2.layers, path),
            "average_trace_stderr": over(hawq_v2.stderr, path),
        }
        for path in squares
    }
