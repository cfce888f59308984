"""Pictures of what :mod:`~hero_jax.landscape` and :mod:`~hero_jax.curvature` return.

Each function draws on the axes that it is given, or on those of a new figure of pyplot,
and returns them for matplotlib to add to. Needs the extra `plot` (matplotlib).

>>> import jax.numpy as jnp
>>> from hero_jax import curvature, landscape, plot
>>> loss_fn = lambda w: jnp.sum(jnp.array([0.1, 0.2, 0.3, 4.0]) * w**2) / 2
>>> W, (d, e) = jnp.zeros(4), jnp.eye(4)[2:]
>>> axis = jnp.linspace(-1.0, 1.0, 21)
>>> losses = landscape.loss_surface(loss_fn, W, [d, e], (axis, axis))
>>> ax = plot.surface((axis, axis), losses)
>>> top = curvature.top_eigenvalues(loss_fn, W)
>>> ax = plot.spectrum(curvature.spectral_density(loss_fn, W), top.values)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import chex
import numpy as np

from hero_jax import _frameworks
from hero_jax.curvature import SpectralDensity

if TYPE_CHECKING:
    import matplotlib.axes

__all__ = ["line", "spectrum", "surface"]

_RISE = "loss above that of W"


def line(
    coordinates: chex.Array,
    losses: chex.Array,
    ax: matplotlib.axes.Axes | None = None,
    **style: Any,
) -> matplotlib.axes.Axes:
    """Draw how far the loss rises along one direction.

    Args:
      coordinates: where the loss was evaluated, `[A]`, with 0 among them.
      losses: `[A]`, of :func:`hero_jax.landscape.loss_surface`.
      ax: where to draw.
      **style: of the line, such as `label` or `color`; see `Axes.plot`.

    Returns:
      The axes, with the loss above that of W.
    """
    ax = _axes(ax)
    ax.plot(coordinates, _rises([coordinates], losses), **style)
    ax.set(xlabel="step along d (multiples of d)", ylabel=_RISE)
    return ax


def surface(
    coordinates: Sequence[chex.Array],
    losses: chex.Array,
    ax: matplotlib.axes.Axes | None = None,
    *,
    increase: float | None = 0.1,
    levels: Sequence[float] | None = None,
    colorbar: bool = True,
) -> matplotlib.axes.Axes:
    """Draw how far the loss rises in a plane, as contours (Figure 3).

    Args:
      coordinates: of the grid, `[A]` and `[B]`, with 0 among both.
      losses: `[A, B]`, of :func:`hero_jax.landscape.loss_surface`.
      ax: where to draw.
      increase: where to draw a red line, as in :func:`hero_jax.landscape.area_within`;
        None for no line.
      levels: of the colours; by default in equal ratios around `increase`, so that
        networks can be compared.
      colorbar: False where several pictures share one.

    Returns:
      The axes, with the loss above that of W, which is marked by a cross.
    """
    ax = _axes(ax)
    if levels is None:
        levels = [(increase or 0.1) * 2.0**k for k in range(-3, 7)]
    colors = _frameworks.needed("matplotlib.colors", "plot", "hero_jax.plot")
    norm = colors.BoundaryNorm(levels, 256, extend="both")
    grid = (*coordinates, _rises(coordinates, losses).T)
    filled = ax.contourf(*grid, levels=levels, cmap="Blues", norm=norm, extend="both")
    if increase is not None:
        ax.contour(*grid, levels=[increase], colors="red", linewidths=2.0)
    ax.plot(0.0, 0.0, "k+")
    x, y = (f"step along {d} (multiples of {d})" for d in "de")
    ax.set(xlabel=x, ylabel=y, aspect="equal")
    if colorbar:
        ax.figure.colorbar(filled, ax=ax, label=_RISE, format="%.3g")
    return ax


def spectrum(
    density: SpectralDensity,
    eigenvalues: chex.Array | Sequence[float] = (),
    ax: matplotlib.axes.Axes | None = None,
    *,
    width: float | None = None,
    **style: Any,
) -> matplotlib.axes.Axes:
    """Draw the density of eigenvalues: the bulk, and outliers as single bells.

    Args:
      density: of :func:`hero_jax.curvature.spectral_density`.
      eigenvalues: to mark by dotted lines, such as `values` of
        :func:`hero_jax.curvature.top_eigenvalues`.
      ax: where to draw.
      width: of the bells; by default a 300th of the range.
      **style: of the curve, such as `label` or `color`; see `Axes.plot`.

    Returns:
      The axes, with a logarithmic scale of the density.
    """
    ax = _axes(ax)
    nodes, weights = map(np.asarray, density)
    width = width or (np.ptp(nodes) or 1.0) / 300.0
    x = np.linspace(nodes.min() - 5.0 * width, nodes.max() + 5.0 * width, 2000)
    curve = np.asarray(density.on_grid(x, width).value)
    largest = np.where(weights > 0.0, nodes, -np.inf).argmax(-1)[..., None]
    lowest = np.take_along_axis(weights, largest, -1).mean() / (100.0 * width)
    (drawn,) = ax.plot(x, curve, **({"lw": 1.0} | style))
    ax.fill_between(x, curve, 1e-12, color=drawn.get_color(), alpha=0.4)
    for value in eigenvalues:
        ax.axvline(float(value), color="k", ls=":", lw=1.0)
    ax.set(xlabel="eigenvalue", ylabel="share of eigenvalues per unit", yscale="log")
    ax.set_ylim(lowest, 3.0 * curve.max())
    return ax


def _axes(ax: matplotlib.axes.Axes | None) -> matplotlib.axes.Axes:
    pyplot = _frameworks.needed("matplotlib.pyplot", "plot", "hero_jax.plot")
    return pyplot.subplots(layout="constrained")[1] if ax is None else ax


def _rises(coordinates: Sequence[chex.Array], losses: chex.Array) -> np.ndarray:
    """Return losses less that at the weights, where all coordinates are 0."""
    origin = tuple(int(np.argmin(np.abs(x))) for x in coordinates)
    for x, at in zip(coordinates, origin, strict=True):
        if abs(x[at]) > 1e-6 * np.abs(x).max():
            raise ValueError(f"coordinates must have 0 among them, for W, got {x}.")
    rises: np.ndarray = np.subtract(losses, losses[origin])
    return rises
