"""Sensitivity of a network's activations, and its accuracy with them rounded."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from examples.experiments.common.networks import Network, make_loss
from examples.experiments.curvature_report.measure import bar
from hero_jax import mixed_precision, quant

from .weights import Bits, Settings, as_json, calibration, make_logits


def measure(network: Network, settings: Settings, weights: Bits) -> dict[str, Any]:
    """Round activations to a few bits, alike and mixed, with float weights and without.

    Args:
      network: with its data.
      settings: of the whole report.
      weights: numbers of bits of the layers for the last column.

    Returns:
      Numbers for JSON: ranges, sensitivities, accuracies in %.
    """
    images, _ = calibration(network, settings)
    ranges = quant.activation_ranges(
        make_logits(network.model),
        network.params,
        network.batch_stats,
        images,
        batch_size=settings.batch_size,
    )
    found = _sensitivities(network, settings, ranges)
    sizes = {path: r.size for path, r in ranges.items()}
    frontiers = {
        name: mixed_precision.pareto_frontier(
            s.layers, sizes, s.choices, unit="average_bits"
        )
        for name, s in found.items()
    }
    mixed = {
        name: [frontier.within(budget) for budget in settings.budgets]
        for name, frontier in frontiers.items()
    }
    rounded = quant.fake_quantize(network.params, weights, **settings.grid)
    record: dict[str, Any] = {
        "layers": {
            path: {
                "low": float(r.low),
                "high": float(r.high),
                "size": r.size,
                "sensitivity": {
                    name: np.asarray(s.layers[path], np.float64).tolist()
                    for name, s in found.items()
                },
            }
            for path, r in ranges.items()
        },
        "allocations": {name: [as_json(a) for a in row] for name, row in mixed.items()},
    }
    total = 2 * (1 + len(settings.choices) + len(settings.budgets) * len(mixed))
    with bar(network, "activations", "networks", settings.quiet) as progress:
        tested = _Tested(network, settings, ranges, lambda k: progress(k, total))
        for name, params in (("float", network.params), ("mixed", rounded)):
            record[f"accuracy, {name} weights"] = {
                "float": tested(params, None),
                "uniform": {
                    b: tested(params, dict.fromkeys(sizes, b)) for b in settings.choices
                },
                **{
                    measure: [tested(params, a.bits) for a in row]
                    for measure, row in mixed.items()
                },
            }
    return record


def _sensitivities(
    network: Network, settings: Settings, ranges: dict[str, quant.ActivationRange]
) -> dict[str, mixed_precision.Sensitivity]:
    images, labels = calibration(network, settings)
    batch = slice(None, settings.activation_images)
    args = (network.params, network.batch_stats, images[batch], labels[batch])
    problem = mixed_precision.activation_problem(
        make_loss(network.model, "running"), ranges, *args, choices=settings.choices
    )
    key = jax.random.key(settings.seed)

    def of(name: str, function: Callable[..., Any], **options: Any) -> Any:
        with bar(network, f"activations, {name}", "steps", settings.quiet) as progress:
            return function(*problem, *args, progress=progress, **options)

    return {
        "HAWQ-V2": of(
            "HAWQ-V2",
            mixed_precision.average_trace,
            num_samples=settings.probes,
            key=key,
        ),
        "quadratic": of("quadratic", mixed_precision.quadratic),
        "measured": of("measured", mixed_precision.measured),
    }


class _Tested:
    """Test accuracy in % with activations rounded, by one program for all bits."""

    def __init__(
        self,
        network: Network,
        settings: Settings,
        ranges: dict[str, quant.ActivationRange],
        progress: Callable[[int], None],
    ) -> None:
        self.network, self.progress, self.done = network, progress, 0
        self.batch_size = settings.batch_size
        logits_fn = make_logits(network.model)

        @jax.jit
        def right(
            params: Any, stats: Any, images: Any, labels: Any, bits: Any
        ) -> jax.Array:
            run = logits_fn
            if bits is not None:
                run = quant.quantize_activations(logits_fn, ranges, bits)
            logits = run(params, stats, images)
            return jnp.sum(logits.argmax(-1) == labels)

        self.right = right

    def __call__(self, params: Any, bits: Bits | None) -> float:
        images, labels = self.network.test
        total = 0
        for start in range(0, len(labels), self.batch_size):
            part = slice(start, start + self.batch_size)
            stats = self.network.batch_stats
            total += int(self.right(params, stats, images[part], labels[part], bits))
        self.done += 1
        self.progress(self.done)
        return 100.0 * total / len(labels)
