"""The numbers of a report, for one network at a time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from examples.experiments.common.networks import (
    Network,
    Statistics,
    make_accuracy,
    make_loss,
)
from hero_jax import bounds, curvature, landscape, perturbation, quant

from .gap import generalization_gap

DIRECTIONS = ("random", "z", "top eigenvector", "quantization error")
"""Of one-dimensional slices."""

WITHOUT_SIGN = ("random", "top eigenvector")
"""Directions that could as well be their opposites."""

LONGEST_STEP = 4.0
"""In search of harm, over the length of the direction."""


class Settings(NamedTuple):
    """What is measured, the same for all networks.

    Attributes:
      statistics: of BatchNorm.
      h: step of the finite difference in `||Hz||`.
      bits: of the quantization that is looked at.
      loss_increase: c of Theorem 3 and of the contour.
      batch_size: images that go through the network at once.
      surface_images: how many the surfaces are averaged over.
      probes: of the trace.
      density_steps: of each of four probes of the spectrum.
      grid: points along each axis of the contours.
      seed: of probes and directions.
      gap_epochs: last epochs over which the generalization gap is averaged.
      quiet: whether to show no progress bars.
    """

    statistics: Statistics
    h: float
    bits: int
    loss_increase: float
    batch_size: int
    surface_images: int
    probes: int
    density_steps: int
    grid: int
    seed: int
    gap_epochs: int
    quiet: bool


class Measured(NamedTuple):
    """What was found of a network.

    Attributes:
      record: numbers for JSON.
      arrays: for npz.
      directions: of the slices, by name, as long as the weights.
      plane: the two random directions of the contour, filter-normalized.
      harmful: of the directions of slices, and of the plane's both ways, the smallest
        step that raises the loss by `loss_increase`, infinite if none does.
    """

    record: dict[str, Any]
    arrays: dict[str, np.ndarray]
    directions: dict[str, chex.ArrayTree]
    plane: tuple[chex.ArrayTree, chex.ArrayTree]
    harmful: dict[str, float]


@contextmanager
def bar(
    network: Network, what: str, unit: str, quiet: bool
) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar; give the function that moves it."""
    with tqdm(desc=f"{network.name}: {what}", unit=unit, disable=quiet) as shown:

        def progress(done: int, total: int) -> None:
            shown.total = total
            shown.update(done - shown.n)

        yield progress
        shown.total = shown.n  # a search may end before it has tried all
        shown.refresh()


def measure(network: Network, settings: Settings) -> Measured:
    """Measure curvature, sensitivity to quantization and Theorem 3's bounds."""
    loss_fn = make_loss(network.model, settings.statistics)
    accuracy = make_accuracy(network.model, settings.statistics)
    W, args = network.params, (network.batch_stats, *network.train)
    options: dict[str, Any] = {
        "batch_size": settings.batch_size,
        "batch_argnums": (2, 3),
    }
    key = jax.random.key(settings.seed)

    def told(what: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with bar(network, what, "batches", settings.quiet) as progress:
            return function(*args, **kwargs, **options, progress=progress)

    top = told("top eigenvalue", curvature.top_eigenvalues, loss_fn, W, *args)
    low = told(
        "lowest eigenvalue",
        curvature.top_eigenvalues,
        loss_fn,
        W,
        *args,
        which="smallest",
    )
    tr = told(
        "trace",
        curvature.trace,
        loss_fn,
        W,
        *args,
        num_samples=settings.probes,
        deflation=20,
        key=key,
    )
    density = told(
        "spectrum",
        curvature.spectral_density,
        loss_fn,
        W,
        *args,
        steps=settings.density_steps,
        key=key,
    )
    gauss_newton = told(
        "Gauss-Newton",
        curvature.top_eigenvalues,
        loss_fn,
        W,
        *args,
        matrix="gauss_newton",
    )
    layers = told("layers", curvature.layer_eigenvalues, loss_fn, W, *args)
    Hz = told("Hz", curvature.hessian_norm, loss_fn, W, *args)
    Hz_h = told("Hz, h", curvature.hessian_norm, loss_fn, W, *args, h=settings.h)
    moved = quant.fake_quantize(W, settings.bits)
    change = told("quantization", curvature.loss_change, loss_fn, W, moved, *args)

    loss, g = curvature.loss_and_gradient(loss_fn, W, *args, **options)
    directions = _directions(W, g, top, moved, key)
    plane_keys = jax.random.split(jax.random.fold_in(key, 1))
    plane = tuple(landscape.random_direction(k, W) for k in plane_keys)
    harmful = {
        name: told(
            f"harmful step, {name}",
            curvature.smallest_harmful_step,
            loss_fn,
            W,
            d,
            *args,
            loss_increase=settings.loss_increase,
            max_step=LONGEST_STEP,
            num_steps=60,
            both_ways=name in WITHOUT_SIGN,
        )
        for name, d in (directions | _both_ways(plane)).items()
    }

    def at_weights(*data: chex.Array) -> float:
        """Return the accuracy in batches, as of a surface of one point."""
        args = (network.batch_stats, *data)
        return float(
            landscape.loss_surface(accuracy, W, [W], [jnp.zeros(1)], *args, **options)[
                0
            ]
        )

    v = float(jnp.maximum(top.values[0], 0.0))
    leaves = [np.ravel(x) for x in jax.tree.leaves(W)]
    nonzero = int(sum(np.count_nonzero(x) for x in leaves))
    g_all = np.concatenate([np.ravel(x) for x in jax.tree.leaves(g)]).astype(np.float64)
    c = settings.loss_increase
    record = {
        "name": network.name,
        "weights": sum(x.size for x in leaves),
        "loss": float(loss),
        "train_accuracy": at_weights(*network.train),
        "test_accuracy": at_weights(*network.test),
        "gradient_norm": float(np.linalg.norm(g_all)),
        "top_eigenvalue": float(top.values[0]),
        "top_residual": float(top.residuals[0]),
        "lowest_eigenvalue": float(low.values[0]),
        "gauss_newton_eigenvalue": float(gauss_newton.values[0]),
        "trace": _estimate(tr.whole),
        "hessian_norm": float(Hz),
        "hessian_norm_h": float(Hz_h),
        "layers": {
            path: {
                "size": tr.sizes[path],
                "trace": _estimate(tr.layers[path]),
                "average_trace": _estimate(tr.averages[path]),
                "top_eigenvalue": float(layers[path]),
                "quantization": _change(change.layers[path]),
            }
            for path in layers
        },
        "quantization": _change(change.whole),
        "theorem_3": {
            "l2_bound": float(bounds.l2_bound(np.linalg.norm(g_all), v, c)),
            "linf_bound": float(bounds.linf_bound(np.abs(g_all).sum(), v, c, nonzero)),
            "measured": {
                name: {
                    "l2": _or_none(found.l2_norm),
                    "linf": _or_none(found.linf_norm),
                }
                for name, found in harmful.items()
                if name in directions
            },
        },
    }
    arrays = {
        "density_nodes": np.asarray(density.nodes),
        "density_weights": np.asarray(density.weights),
    }
    if network.metrics is not None:
        gap = generalization_gap(
            network.metrics,
            settings.gap_epochs,
            label_noise=network.label_noise,
            num_classes=_num_classes(network, loss_fn),
        )
        record["gap"] = {"mean": gap.mean, "deviation": gap.deviation}
        arrays["gap"] = np.array(gap.by_epoch)
        arrays["hessian_norm"] = _column(network.metrics, "hessian_norm")
    steps = {name: float(found.step) for name, found in harmful.items()}
    return Measured(record, arrays, directions, (plane[0], plane[1]), steps)


def surfaces(
    network: Network, found: Measured, scale: dict[str, float], settings: Settings
) -> tuple[dict[str, np.ndarray], landscape.Area]:
    """Evaluate slices, contour and accuracy under perturbation, at a common scale.

    Args:
      network: whose surroundings are looked at.
      found: its directions.
      scale: largest step along every direction, and "plane" of the contour.
      settings: of the report.

    Returns:
      Arrays for npz, and the area within the contour.
    """
    loss_fn = make_loss(network.model, settings.statistics)
    accuracy = make_accuracy(network.model, settings.statistics)
    some = slice(None, settings.surface_images)
    args = (network.batch_stats, *(x[some] for x in network.train))
    tests = (network.batch_stats, *(x[some] for x in network.test))
    options: dict[str, Any] = {
        "batch_size": settings.batch_size,
        "batch_argnums": (2, 3),
    }

    def surface(
        what: str, function: Any, directions: Any, axes: Any, *args: Any
    ) -> Any:
        with bar(network, what, "points", settings.quiet) as progress:
            result = landscape.loss_surface(
                function,
                network.params,
                directions,
                axes,
                *args,
                **options,
                progress=progress,
            )
        return np.asarray(result)

    arrays = {}
    for name, direction in found.directions.items():
        axis = np.linspace(-scale[name], scale[name], 41)
        arrays[f"slice {name} axis"] = axis
        values = surface(f"slice, {name}", loss_fn, [direction], [axis], *args)
        arrays[f"slice {name}"] = values
    axis = np.linspace(-scale["plane"], scale["plane"], settings.grid)
    contour = surface("contour", loss_fn, found.plane, (axis, axis), *args)
    area, near, around = (
        landscape.area_within((axis, axis), contour, settings.loss_increase),
        axis,
        contour,
    )
    if _reach(found) < 0.7 * scale["plane"]:  # few points of the common grid are within
        for factor in (1.0, 1.5, 2.0):
            near = factor * np.linspace(-_reach(found), _reach(found), settings.grid)
            around = surface("area", loss_fn, found.plane, (near, near), *args)
            area = landscape.area_within((near, near), around, settings.loss_increase)
            if area.is_closed:
                break
    sizes = np.linspace(0.0, scale["plane"], 21)
    key = jax.random.fold_in(jax.random.key(settings.seed), 2)
    arrays |= {
        "contour axis": axis,
        "contour": contour,
        "area axis": near,
        "area": around,
        "perturbation axis": sizes,
        "perturbation accuracy": np.stack(
            [
                surface(
                    f"accuracy, direction {i}",
                    accuracy,
                    [landscape.random_direction(k, network.params)],
                    [sizes],
                    *tests,
                )
                for i, k in enumerate(jax.random.split(key, 5), start=1)
            ]
        ),
    }
    return arrays, area


def common_scale(found: list[Measured]) -> dict[str, float]:
    """Return how far to go along every direction, so that all networks are in view."""
    scale = {
        name: 1.6 * max(_finite(m.harmful[name]) for m in found) for name in DIRECTIONS
    }
    scale["plane"] = max(_reach(m) for m in found)
    return scale


def _reach(found: Measured) -> float:
    """Return how far the contour goes along its axes, and some more."""
    return 1.6 * max(_finite(found.harmful[name]) for name in ("x", "-x", "y", "-y"))


def _both_ways(plane: tuple[chex.ArrayTree, ...]) -> dict[str, chex.ArrayTree]:
    ways = dict(zip("xy", plane, strict=True))
    back = {f"-{name}": jax.tree.map(jnp.negative, d) for name, d in ways.items()}
    return ways | back


def _finite(step: float) -> float:
    return step if np.isfinite(step) else 1.0


def _directions(
    W: Any, g: Any, top: curvature.Eigenpairs, moved: Any, key: chex.PRNGKey
) -> dict[str, Any]:
    """Return the directions of the slices, each as long as the weights."""
    raw = (
        landscape.random_direction(key, W),
        perturbation.layerwise(W, g),
        jax.tree.map(lambda x: x[0], top.vectors),
        jax.tree.map(jnp.subtract, moved, W),
    )
    each = zip(DIRECTIONS, raw, strict=True)
    return {name: landscape.scaled(d, W) for name, d in each}


def _num_classes(network: Network, loss_fn: curvature.ComposedLoss[Any]) -> int:
    args = (network.batch_stats, *network.train)
    shape = jax.eval_shape(loss_fn.outputs_fn, network.params, *args)
    return int(shape.shape[-1])


def _or_none(x: chex.Array) -> float | None:
    """Return a number that JSON has: infinity is none."""
    return float(x) if np.isfinite(x) else None


def _estimate(x: curvature.Estimate) -> dict[str, float]:
    return {"value": float(x.value), "stderr": float(x.stderr)}


def _change(x: curvature.Change) -> dict[str, float]:
    return {name: float(value) for name, value in x._asdict().items()}


def _column(path: Any, name: str) -> np.ndarray:
    table = np.genfromtxt(path, delimiter=",", names=True, ndmin=1)
    return np.asarray(table[name])
