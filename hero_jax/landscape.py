"""The loss around trained weights, along one or two directions (Figure 3).

A direction is a tree like the weights: random and filter-normalized, HERO's z from
:mod:`hero_jax.perturbation`, an eigenvector from :mod:`hero_jax.curvature`, or the
error of a quantization, `quant.fake_quantize(params, 4)` minus `params`.

>>> import jax, jax.numpy as jnp
>>> from hero_jax import landscape
>>> params = {"kernel": jnp.eye(3), "bias": jnp.zeros(3)}
>>> x = jax.random.normal(jax.random.key(0), (20, 3))
>>> loss_fn = lambda w, x: jnp.mean((x @ w["kernel"] + w["bias"] - x) ** 2)
>>> keys = jax.random.split(jax.random.key(1))
>>> directions = [landscape.random_direction(key, params) for key in keys]
>>> axis = jnp.linspace(-1.0, 1.0, 21)
>>> surface = landscape.loss_surface(loss_fn, params, directions, (axis, axis), x)
>>> surface.shape, f"{surface[10, 10]:.3f}"
((21, 21), '0.000')
>>> area = landscape.area_within((axis, axis), surface, increase=0.1)
>>> area.is_closed
True
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Unpack

import chex
import jax
import jax.numpy as jnp
import numpy as np

from hero_jax import _checks, _frameworks, _programs, _tree
from hero_jax._typing import Params
from hero_jax.curvature import Options, _problem, _progress
from hero_jax.curvature._problem import Problem
from hero_jax.leaves import Leaf, Overrides, are_weights, describe, per_layer

__all__ = [
    "Area",
    "area_within",
    "filter_normalized",
    "loss_surface",
    "random_direction",
    "scaled",
]


class Area(NamedTuple):
    """A region of the plane around the weights.

    Attributes:
      area: in units of the coordinates, squared.
      is_closed: False if the region reaches the edge of the grid, so that it may go on
        and the area is a lower bound.
    """

    area: float
    is_closed: bool


def loss_surface(
    loss_fn: Callable[..., Any],
    params: Params,
    directions: Sequence[Params],
    coordinates: Sequence[chex.Array],
    *args: Any,
    stats_fn: Callable[..., chex.ArrayTree] | None = None,
    points_at_once: int | None = None,
    **options: Unpack[Options],
) -> Any:
    r"""Evaluate a loss at `W + a d` or `W + a d + b e`, on a grid of a and b.

    Args:
      loss_fn: `(params, *args) -> loss`, a mean over examples; or a tree of such means,
        such as loss and accuracy.
      params: weights W.
      directions: one or two trees with the structure and shapes of `params`.
      coordinates: for each direction, where to go along it, `[A]` and `[B]`.
      *args: further arguments of `loss_fn`.
      stats_fn: `(params, *args) -> batch_stats`; if given, the BatchNorm statistics are
        estimated anew at every point and take the place of the first of `args`, which
        holds those of W. A training pass of Flax moves running statistics by a share
        `1 - momentum` only: start it from zeros, and divide by that share.
      points_at_once: points that go through the network together by `jax.vmap`; 1 on
        CPUs by default, where convolutions with several weights are slow, otherwise 4.
      **options: see :class:`hero_jax.curvature.Options`. `batch_size` bounds the memory
        of every point; `progress` counts points.

    Returns:
      What `loss_fn` returns, with leading axes `[A]` or `[A, B]`, float32 or wider.

    Raises:
      ValueError: a direction has another structure.

    Example:
      >>> import jax.numpy as jnp
      >>> from hero_jax import landscape
      >>> loss_fn = lambda w: jnp.sum(w**2)
      >>> W, d = jnp.array([1.0, 0.0]), jnp.array([0.0, 2.0])
      >>> landscape.loss_surface(loss_fn, W, [d], [jnp.array([0.0, 0.5, 1.0])])
      Array([1., 2., 5.], dtype=float32)

    References:
      Yang et al., `HERO <https://arxiv.org/abs/2111.11986>`_, 2021, Figure 3.
    """
    problem = _problem.make(loss_fn, params, args, options)
    for i, direction in enumerate(directions):
        _tree.check_vector(f"directions[{i}]", direction, params)
    axes = [jnp.asarray(x) for x in coordinates]
    if points_at_once is None:
        points_at_once = 1 if jax.default_backend() == "cpu" else 4
    _checks.check_integer("points_at_once", points_at_once)
    compiled = _programs.compiled(_loss_surface, problem, stats_fn, points_at_once)
    total = int(np.prod([x.size for x in axes]))
    return _progress.listen(
        options.get("progress"), total, compiled, params, tuple(directions), axes, args
    )


def _loss_surface(
    problem: Problem,
    stats_fn: Callable[..., chex.ArrayTree] | None,
    points_at_once: int,
    params: Params,
    directions: tuple[Params, ...],
    axes: list[chex.Array],
    args: tuple[Any, ...],
) -> Any:
    W = _tree.widen(params)
    directions = tuple(_tree.cast_like(d, W) for d in directions)
    grid = jnp.stack(jnp.meshgrid(*axes, indexing="ij"), axis=-1)

    def at(point: chex.Array) -> Any:
        U = W
        for t, d in zip(point, directions, strict=True):
            U = jax.tree.map(lambda w, x, t=t: w + t.astype(w.dtype) * x, U, d)
        there = args if stats_fn is None else (stats_fn(U, *args), *args[1:])

        def of_batch(batch: Sequence[Any]) -> Any:
            value = problem.loss_fn(U, *batch)
            if problem.has_aux:
                value, _ = _checks.pair("loss_fn", value)
            _check_means(value)
            return jax.tree.map(_floating, value)

        result = problem.mean(of_batch, there)
        if problem.reports:
            _progress.tick_after(result)
        return result

    points = grid.reshape(-1, len(axes))
    batch_size = min(points_at_once, len(points))
    values = jax.lax.map(at, points, batch_size=None if batch_size == 1 else batch_size)
    return jax.tree.map(lambda x: x.reshape(grid.shape[:-1] + x.shape[1:]), values)


def _check_means(value: Any) -> None:
    if jax.tree_util.all_leaves([value]) and np.ndim(value):
        raise TypeError(
            "loss_fn must return a scalar, the mean over the examples, or a tree of "
            f"means, got an array of shape {np.shape(value)}."
        )


def _floating(x: chex.Array) -> chex.Array:
    """Return a number to average: of float32 or wider, also if it counts something."""
    dtype = jnp.result_type(x)
    is_float = jnp.issubdtype(dtype, jnp.floating)
    return jnp.asarray(x, _tree.wide_dtype(dtype) if is_float else jnp.float32)


def random_direction(
    key: chex.PRNGKey,
    params: Params,
    axis: int | Literal["output"] = "output",
    leaves: Overrides | None = None,
) -> Params:
    """Draw a random direction and normalize its filters.

    Args:
      key: random key.
      params: weights W.
      axis: of output channels, see :func:`filter_normalized`.
      leaves: likewise.

    Returns:
      A tree like `params`, float32 or wider.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from hero_jax import landscape
      >>> params = {"kernel": jnp.array([[3.0, 0.0], [4.0, 1.0]]), "bias": jnp.ones(2)}
      >>> d = landscape.random_direction(jax.random.key(0), params)
      >>> print(jnp.linalg.norm(d["kernel"], axis=0), d["bias"])
      [5. 1.] [0. 0.]

    References:
      Li et al., `Visualizing the loss landscape of neural nets
      <https://arxiv.org/abs/1712.09913>`_, 2018, Section 4.
    """
    _tree.check_params("params", params)
    arrays, structure = jax.tree.flatten(_tree.widen(params))
    keys = jax.random.split(key, len(arrays))
    draws = [
        jax.random.normal(k, x.shape, x.dtype)
        for k, x in zip(keys, arrays, strict=True)
    ]
    direction = jax.tree.unflatten(structure, draws)
    return filter_normalized(direction, params, axis, leaves)


def filter_normalized(
    direction: Params,
    params: Params,
    axis: int | Literal["output"] = "output",
    leaves: Overrides | None = None,
) -> Params:
    r"""Scale every filter of a direction to the norm of the same filter of the weights.

    .. math::

        d_{i,j} \leftarrow \frac{d_{i,j}}{\|d_{i,j}\|} \, \|W_{i,j}\|

    for filter j of layer i: the weights of one output channel (and layer of a stack).
    Biases and BatchNorm's scales do not move: kernels and embeddings do. Networks that
    BatchNorm makes indifferent to the scale of filters then have comparable axes.

    Args:
      direction: tree with the structure and shapes of `params`.
      params: weights W.
      axis: of the output channels in one layer: "output", the axes that these are in
        each leaf, or a number for all leaves alike.
      leaves: what :mod:`hero_jax.leaves` does not see in paths and shapes.

    Returns:
      A tree like `params`, float32 or wider; zero where a filter of the direction is.

    Raises:
      TypeError: a leaf is not a real floating-point array.
      ValueError: the direction has another structure or shape, or a leaf has no such
        axis.

    References:
      Li et al., `Visualizing the loss landscape of neural nets
      <https://arxiv.org/abs/1712.09913>`_, 2018, Section 4.
    """
    _tree.check_vector("direction", direction, params)

    def of_leaf(moves: bool, leaf: Leaf, d: chex.Array, w: chex.Array) -> chex.Array:
        if not moves:
            return jnp.zeros_like(d)
        axes = leaf.output_axes if axis == "output" else (axis,)
        return per_layer(functools.partial(_normalized, axes=axes), leaf)(d, w)

    W = _tree.widen(params)
    described = describe(params, leaves)
    moves = are_weights(described)
    return jax.tree.map(of_leaf, moves, described, _tree.cast_like(direction, W), W)


def _normalized(d: chex.Array, w: chex.Array, axes: tuple[int, ...]) -> chex.Array:
    """Scale what each index of the axes has to the norm that it has in w."""
    if not all(-w.ndim <= a < w.ndim for a in axes):
        raise ValueError(f"axis must be one of every leaf {w.shape}, got {axes[0]}.")
    axes = tuple(sorted(a % w.ndim for a in axes))
    of_filter = _tree.norm
    for a in reversed(axes):
        of_filter = jax.vmap(of_filter, in_axes=a - w.ndim)
    lengths, wanted = of_filter(d), of_filter(w)
    factor = wanted / jnp.where(lengths > 0.0, lengths, 1.0)
    shape = [n if i in axes else 1 for i, n in enumerate(w.shape)]
    return d * factor.reshape(shape).astype(d.dtype)


def scaled(direction: Params, params: Params) -> Params:
    """Scale a whole direction to the norm of the weights.

    A coordinate along it is then the relative size of the perturbation.

    Args:
      direction: tree with the structure and shapes of `params`.
      params: weights W.

    Returns:
      `d ||W|| / ||d||`, float32 or wider; zero if d is.
    """
    _tree.check_vector("direction", direction, params)
    W = _tree.widen(params)
    d = _tree.cast_like(direction, W)
    length = _tree.global_norm(d)
    factor = _tree.global_norm(W) / jnp.where(length > 0.0, length, 1.0)
    return jax.tree.map(lambda x: x * factor.astype(x.dtype), d)


def area_within(
    coordinates: Sequence[chex.Array], surface: chex.Array, increase: float = 0.1
) -> Area:
    """Measure the region around the weights where the loss rises by less than a bound.

    It is the connected region that contains (0, 0), without its holes, bounded by
    straight lines between the points of the grid.

    Args:
      coordinates: of the grid, ascending `[A]` and `[B]`, with 0 among both.
      surface: loss `[A, B]`, of :func:`loss_surface`. What is not finite counts as
        outside.
      increase: over the loss at (0, 0), above 0.

    Returns:
      Area, and whether the region ends within the grid.

    Raises:
      ImportError: contourpy is not installed.
      ValueError: the loss at (0, 0) is not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> from hero_jax import landscape
      >>> axis = jnp.linspace(-1.0, 1.0, 101)
      >>> bowl = axis[:, None] ** 2 + axis[None, :] ** 2
      >>> area = landscape.area_within((axis, axis), bowl, increase=0.25)
      >>> print(f"{area.area:.3f}, of a circle {jnp.pi / 4:.3f}")
      0.785, of a circle 0.785
    """
    x, y = (np.asarray(axis, np.float64) for axis in coordinates)
    z = np.asarray(surface, np.float64)
    _checks.check_positive("increase", increase)
    origin = _origin(x), _origin(y)
    level = z[origin] + increase
    if not np.isfinite(level):
        raise ValueError(f"the loss at (0, 0) must be finite, got {z[origin]}.")
    # Far outside, but near enough for straight lines to it to end near the grid point.
    z = np.where(np.isfinite(z), z, level + 10.0 * increase)
    at = np.array([x[origin[0]], y[origin[1]]])
    outer, *holes = next(
        (outer, *holes)
        for outer, *holes in _regions(x, y, z, level)
        if _contains(outer, at) and not any(_contains(hole, at) for hole in holes)
    )
    area = _polygon_area(outer) - sum(map(_polygon_area, holes))
    low, high = (x[0], y[0]), (x[-1], y[-1])
    is_closed = bool(np.all((outer > low) & (outer < high)))
    return Area(float(area), is_closed)


def _origin(axis: np.ndarray) -> int:
    """Return where the 0 of a grid is, checked."""
    nearest = int(np.argmin(np.abs(axis)))
    inside = 0 < nearest < len(axis) - 1
    is_zero = abs(axis[nearest]) <= 1e-6 * np.abs(axis).max()
    if not (inside and is_zero and np.all(np.diff(axis) > 0.0)):
        raise ValueError(
            f"coordinates must ascend and have 0 among them, not at an end, got {axis}."
        )
    return nearest


def _regions(
    x: np.ndarray, y: np.ndarray, z: np.ndarray, level: float
) -> list[list[np.ndarray]]:
    """Return the regions below a level: each its outer polygon `[P, 2]`, then holes."""
    contourpy = _frameworks.needed("contourpy", "curvature", "area_within")
    generator = contourpy.contour_generator(
        x, y, z.T, name="serial", fill_type=contourpy.FillType.OuterOffset
    )
    regions = zip(*generator.filled(min(z.min(), level) - 1.0, level), strict=True)
    return [
        [points[i:j] for i, j in itertools.pairwise(offsets)]
        for points, offsets in regions
    ]


def _polygon_area(polygon: np.ndarray) -> float:
    """Area of a closed polygon `[P, 2]`, by the shoelace formula."""
    x, y = polygon.T
    return abs(float(np.sum(x[:-1] * y[1:] - x[1:] * y[:-1]))) / 2.0


def _contains(polygon: np.ndarray, point: np.ndarray) -> bool:
    """Whether a ray from the point crosses a closed polygon an odd number of times."""
    (x0, y0), (x1, y1) = polygon[:-1].T, polygon[1:].T
    straddles = (y0 > point[1]) != (y1 > point[1])
    rise = np.where(straddles, y1 - y0, 1.0)
    crossing = x0 + (point[1] - y0) / rise * (x1 - x0)
    return bool(np.sum(straddles & (crossing > point[0])) % 2)
