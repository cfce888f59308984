"""The numbers of a report, for one network at a time."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from examples.experiments.common.networks import (
    Network,
    Statistics,
    bar,
    make_accuracy,
    make_loss,
)
from hero_jax import bounds, curvature, landscape, perturbation, quant

DIRECTIONS = ("random", "z", "top eigenvector", "quantization error")
WITHOUT_SIGN = ("random", "top eigenvector")  # could as well be their opposites
LONGEST_STEP = 4.0  # in search of harm, over the length of the direction


class Settings(NamedTuple):
    """What is measured, the same for all networks."""

    statistics: Statistics = "running"  # of BatchNorm
    h: float = 5.0  # step of the finite difference in `||Hz||`
    bits: int = 4  # of the quantization that is looked at
    loss_increase: float = 0.1  # c of Theorem 3 and of the contour
    batch_size: int = 250  # images that go through the network at once
    surface_images: int = 1000  # over which surfaces are averaged
    probes: int = 32  # of the trace
    grid: int = 31  # points along each axis of the contours, odd
    seed: int = 0  # of probes and directions
    gap_epochs: int = 10  # last ones over which the generalization gap is averaged
    quiet: bool = False  # whether to show no progress bars


class Measured(NamedTuple):
    """What a network is like, and where to look around it."""

    record: dict[str, Any]  # numbers for JSON
    plane: list[chex.ArrayTree]  # two random directions, filter-normalized
    reach: float  # how far the contour goes along these, and some more


class Surfaces(NamedTuple):
    """Losses on the plane: on a scale for all networks, and around the region."""

    axis: np.ndarray
    loss: np.ndarray
    near_axis: np.ndarray
    near_loss: np.ndarray


def measure(network: Network, settings: Settings) -> Measured:
    """Measure curvature, sensitivity to quantization and Theorem 3's bounds."""
    loss_fn = make_loss(network.model, settings.statistics)
    accuracy = make_accuracy(network.model, settings.statistics)
    W, args = network.params, (network.batch_stats, *network.train)
    in_batches: Any = {"batch_size": settings.batch_size, "batch_argnums": (2, 3)}
    key = jax.random.key(settings.seed)

    def of(what: str, function: Any, *more: Any, **options: Any) -> Any:
        with bar(f"{network.name}: {what}", "batches", settings.quiet) as progress:
            options |= in_batches | {"progress": progress}
            return function(loss_fn, W, *more, *args, **options)

    eigenvalues = curvature.top_eigenvalues
    top = of("top eigenvalue", eigenvalues)
    low = of("lowest eigenvalue", eigenvalues, which="smallest")
    gauss_newton = of("Gauss-Newton", eigenvalues, matrix="gauss_newton")
    probes = {"num_samples": settings.probes, "deflation": 20, "key": key}
    tr = of("trace", curvature.trace, **probes)
    Hz = of("Hz", curvature.hessian_norm)
    Hz_h = of("Hz, h", curvature.hessian_norm, h=settings.h)
    moved = quant.fake_quantize(W, settings.bits)
    change = of("quantization", curvature.loss_change, moved)
    loss, g = curvature.loss_and_gradient(loss_fn, W, *args, **in_batches)

    directions = {
        "random": landscape.random_direction(key, W),
        "z": perturbation.layerwise(W, g),
        "top eigenvector": jax.tree.map(lambda x: x[0], top.vectors),
        "quantization error": jax.tree.map(jnp.subtract, moved, W),
    }
    directions = {name: landscape.scaled(d, W) for name, d in directions.items()}
    plane_keys = jax.random.split(jax.random.fold_in(key, 1))
    plane = [landscape.random_direction(k, W) for k in plane_keys]
    ways = dict(zip("xy", plane, strict=True))
    ways |= {f"-{name}": jax.tree.map(jnp.negative, d) for name, d in ways.items()}
    harmful = {
        name: of(
            *(f"harmful step, {name}", curvature.smallest_harmful_step, d),
            loss_increase=settings.loss_increase,
            max_step=LONGEST_STEP,
            num_steps=60,
            both_ways=name in WITHOUT_SIGN,
        )
        for name, d in (directions | ways).items()
    }

    def at_weights(*data: chex.Array) -> float:
        """Return the accuracy in batches, as of a surface of one point."""
        point = ([W], [jnp.zeros(1)], network.batch_stats, *data)
        return float(landscape.loss_surface(accuracy, W, *point, **in_batches)[0])

    v, c = max(float(top.values[0]), 0.0), settings.loss_increase
    g_all, W_all = (
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]).astype(np.float64)
        for tree in (g, W)
    )
    norm, total = np.linalg.norm(g_all), np.abs(g_all).sum()
    nonzero = int(np.count_nonzero(W_all))
    record = {
        "name": network.name,
        "weights": W_all.size,
        "loss": float(loss),
        "train_accuracy": at_weights(*network.train),
        "test_accuracy": at_weights(*network.test),
        "gradient_norm": float(norm),
        "top_eigenvalue": float(top.values[0]),
        "top_residual": float(top.residuals[0]),
        "lowest_eigenvalue": float(low.values[0]),
        "gauss_newton_eigenvalue": float(gauss_newton.values[0]),
        "trace": _numbers(tr.whole),
        "hessian_norm": float(Hz),
        "hessian_norm_h": float(Hz_h),
        "quantization": _numbers(change.whole),
        "theorem_3": {
            "l2_bound": float(bounds.l2_bound(norm, v, c)),
            "linf_bound": float(bounds.linf_bound(total, v, c, nonzero)),
            "measured": {
                name: {
                    "l2": _or_none(harmful[name].l2_norm),
                    "linf": _or_none(harmful[name].linf_norm),
                }
                for name in directions
            },
        },
    }
    if network.metrics is not None:
        table = np.genfromtxt(network.metrics, delimiter=",", names=True, ndmin=1)
        logits = jax.eval_shape(loss_fn.outputs_fn, W, *args)
        gaps = generalization_gap(table, network.label_noise, logits.shape[-1])
        record["gap"] = {"mean": float(gaps[-settings.gap_epochs :].mean())}
    steps = [float(harmful[name].step) for name in ways]
    reach = 1.6 * max(step if np.isfinite(step) else 1.0 for step in steps)
    return Measured(record, plane, reach)


def generalization_gap(metrics: Any, label_noise: float, num_classes: int) -> Any:
    """Return training minus test accuracy of every epoch (Figure 2b).

    Test labels with the same noise, a share p redrawn from all K classes, would agree
    with the network on `(1 - p) accuracy + p / K` of the images, which takes the place
    of the test accuracy: both ends of the gap are of one distribution.
    """
    expected = (1.0 - label_noise) * metrics["test_accuracy"]
    return metrics["train_accuracy"] - expected - label_noise / num_classes


def surfaces(
    network: Network, measured: Measured, scale: float, settings: Settings
) -> tuple[Surfaces, landscape.Area]:
    """Evaluate the plane up to a common scale; return the area within, too."""
    loss_fn, c = make_loss(network.model, settings.statistics), settings.loss_increase
    data = (network.batch_stats, *(x[: settings.surface_images] for x in network.train))

    def surface(what: str, axis: np.ndarray) -> np.ndarray:
        with bar(f"{network.name}: {what}", "points", settings.quiet) as progress:
            result = landscape.loss_surface(
                *(loss_fn, network.params, measured.plane, (axis, axis), *data),
                batch_size=settings.batch_size,
                batch_argnums=(2, 3),
                progress=progress,
            )
        return np.asarray(result)

    axis = near = np.linspace(-scale, scale, settings.grid)
    contour = around = surface("contour", axis)
    area = landscape.area_within((axis, axis), contour, c)
    if measured.reach < 0.7 * scale:  # few points of the common grid are within
        for factor in (1.0, 1.5, 2.0):
            near = np.linspace(-measured.reach, measured.reach, settings.grid) * factor
            around = surface("area", near)
            area = landscape.area_within((near, near), around, c)
            if area.is_closed:
                break
    return Surfaces(axis, contour, near, around), area


def _or_none(x: chex.Array) -> float | None:
    """Return a number that JSON has: infinity is none."""
    return float(x) if np.isfinite(x) else None


def _numbers(x: curvature.Estimate | curvature.Change) -> dict[str, float]:
    return {name: float(value) for name, value in x._asdict().items()}
