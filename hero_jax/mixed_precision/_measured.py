"""Sensitivity as it is: the loss, with layers quantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Unpack

import chex
import jax
import jax.numpy as jnp
import numpy as np

from hero_jax import _programs, _tree
from hero_jax._typing import Params
from hero_jax.curvature import _problem, _progress
from hero_jax.curvature._problem import Options, Problem
from hero_jax.mixed_precision._errors import Errors, positions
from hero_jax.mixed_precision._frontier import Frontier
from hero_jax.mixed_precision._result import Sensitivity
from hero_jax.mixed_precision._sizes import LayerSize
from hero_jax.mixed_precision._table import Table, Unit

FLOAT = -1
"""Stands for a layer that is not quantized, among positions of choices."""


def measured(
    loss_fn: Callable[..., Any],
    params: Params,
    errors: Errors,
    *args: Any,
    **options: Unpack[Options],
) -> Sensitivity:
    r"""The measured loss increase, `L(W + d_i) - L(W)`, one layer at a time.

    One pass over the data for every layer and choice, without any derivative: cheaper
    than a product with the Hessian. What it does not see is what layers do together,
    and a network that has learnt its data by heart.

    Args:
      loss_fn: `(params, *args) -> loss`, a mean over examples; any real number will do,
        such as the share of wrong answers.
      params: float weights W.
      errors: of :func:`hero_jax.mixed_precision.weight_errors` at these weights.
      *args: further arguments of `loss_fn`.
      **options: see :class:`hero_jax.curvature.Options`.

    Returns:
      Sensitivities, exact for the data at hand.

    Raises:
      TypeError: the loss is not a scalar.
      ValueError: the errors are of other weights.

    Example:
      >>> import jax.numpy as jnp
      >>> from hero_jax import mixed_precision
      >>> params = {"kernel": jnp.array([[-1.0, 0.3, 2.0]])}
      >>> loss_fn = lambda w: jnp.sum(w["kernel"] ** 2)
      >>> errors = mixed_precision.weight_errors(params, choices=(2,))  # 0.3 becomes 0
      >>> found = mixed_precision.measured(loss_fn, params, errors)
      >>> print(f"{found.layers['kernel'][0]:.2f}")
      -0.09
    """
    problem = _problem.make(loss_fn, params, args, options)
    where = positions(errors, params)
    layers, choices = len(where), len(errors.choices)
    alone = np.full((layers, choices, layers), FLOAT, np.int32)
    for i in range(layers):
        alone[i, :, i] = range(choices)
    columns = np.concatenate([[[FLOAT] * layers], alone.reshape(-1, layers)])
    compiled = _programs.compiled(_losses, problem, where)
    losses = _progress.listen(
        options.get("progress"),
        len(columns),
        compiled,
        params,
        [*errors.layers.values()],
        columns.astype(np.int32),
        len(columns),
        args,
    )
    rows = (losses[1:] - losses[0]).reshape(layers, choices)
    return Sensitivity(errors.choices, dict(zip(errors.layers, rows, strict=True)))


def greedy_frontier(
    loss_fn: Callable[..., Any],
    params: Params,
    errors: Errors,
    sizes: Mapping[str, int | LayerSize],
    *args: Any,
    unit: Unit = "bytes",
    **options: Unpack[Options],
) -> Frontier:
    r"""Lower one layer at a time, whichever costs least measured loss per byte saved.

    From all layers at the largest choice down to all at the smallest, the loss is
    measured with all layers as they are by then, so it sees what they do together.
    Nothing makes the way down the best, and it takes up to `layers^2 * choices` passes
    over the data. `progress` counts steps.

    Args:
      loss_fn: `(params, *args) -> loss`, a mean over examples.
      params: float weights W.
      errors: of :func:`hero_jax.mixed_precision.weight_errors` at these weights.
      sizes: path of the layer to its number of weights or
        :class:`LayerSize`.
      *args: further arguments of `loss_fn`.
      unit: "bytes" or "average_bits".
      **options: see :class:`hero_jax.curvature.Options`.

    Returns:
      All steps of the way, the smallest first; `sensitivity` is the measured loss
      increase, and need not fall with size.

    Raises:
      TypeError: the loss is not a scalar.
      ValueError: the errors are of other weights.

    Example:
      >>> import jax.numpy as jnp
      >>> from hero_jax import mixed_precision, quant
      >>> a, b = jnp.array([[-1.0, 0.3, 2.0]]), jnp.array([[0.0, 4.4, 9.0]])
      >>> loss_fn = lambda w: jnp.sum((w["a"] - a) ** 2) + jnp.sum((w["b"] - b) ** 2)
      >>> params = {"a": a, "b": b}
      >>> errors = mixed_precision.weight_errors(params, choices=(2, 4))
      >>> sizes = mixed_precision.layer_sizes(params, (2, 4))
      >>> for step in mixed_precision.greedy_frontier(loss_fn, params, errors, sizes):
      ...     print(step.bytes, step.bits, f"{step.sensitivity:.2f}")
      18 {'a': 2, 'b': 2} 2.05
      19 {'a': 2, 'b': 4} 0.13
      20 {'a': 4, 'b': 4} 0.05

    References:
      The rivals of HAWQ-V2 that need no Hessian; see also Cai et al., `ZeroQ
      <https://arxiv.org/abs/2001.00281>`_, 2020, whose frontier measures layers alone.
    """
    problem = _problem.make(loss_fn, params, args, options)
    where = positions(errors, params)
    layers, choices = len(where), len(errors.choices)
    ascending = np.argsort(errors.choices)
    zeros = {path: np.zeros(choices) for path in errors.layers}
    table = Table.of(zeros, sizes, errors.choices, unit)
    moves = [*errors.layers.values()]
    report = options.get("progress")
    # Progress counts steps, not batches.
    compiled = _programs.compiled(_losses, problem._replace(reports=False), where)

    def measure(rows: np.ndarray) -> np.ndarray:
        """Return the losses of some allocations, at most one per layer."""
        padded = np.full((layers, layers), FLOAT, np.int32)
        padded[: len(rows)] = rows
        losses = compiled(params, moves, padded, len(rows), args)
        return np.asarray(losses, np.float64)[: len(rows)]

    start = measure(np.full((1, layers), FLOAT))[0]
    now = np.full(layers, choices - 1)
    loss = measure(ascending[now][None])[0]
    way, costs = [now], [loss - start]
    while now.any():
        lower = np.flatnonzero(now)
        candidates = now - np.eye(layers, dtype=now.dtype)[lower]
        losses = measure(ascending[candidates])
        saved = table.size[lower, now[lower]] - table.size[lower, now[lower] - 1]
        # A step that lowers the loss is taken first, the one that lowers it most.
        risen = np.where(np.isfinite(losses), losses - loss, np.inf)
        price = np.where(risen > 0.0, risen / np.maximum(saved, 1), risen)
        best = int(np.lexsort((price, risen > 0.0))[0])
        now, loss = candidates[best], losses[best]
        way.append(now)
        costs.append(loss - start)
        if report is not None:
            report(len(way) - 1, layers * (choices - 1))
    return Frontier(table, np.stack(way[::-1]), np.array(costs[::-1]))


def _losses(
    problem: Problem,
    where: tuple[int, ...],
    params: Params,
    errors: list[chex.Array],
    columns: chex.Array,
    count: chex.Numeric,
    args: Sequence[Any],
) -> chex.Array:
    """Return the losses of the first rows of `columns`, `[allocations, layers]`."""
    W = _tree.widen(params)
    leaves, structure = jax.tree.flatten(W)

    def body(k: chex.Numeric, losses: chex.Array) -> chex.Array:
        return losses.at[k].set(loss_of(columns[k]))

    def loss_of(row: chex.Array) -> chex.Array:
        moved = list(leaves)
        for k, (i, d) in enumerate(zip(where, errors, strict=True)):
            error = jnp.where(row[k] == FLOAT, 0.0, d[row[k]])
            moved[i] = leaves[i] + error.astype(leaves[i].dtype)
        loss = problem.mean_loss(jax.tree.unflatten(structure, moved), args)
        if problem.reports:
            _progress.tick_after(loss)
        return loss

    shape = jax.eval_shape(loss_of, columns[0])
    return jax.lax.fori_loop(0, count, body, jnp.zeros(len(columns), shape.dtype))
