r"""Which layer gets how many bits under a budget, as HAWQ-V2 asks.

Every layer i takes one of a few numbers of bits, b_i, at a sensitivity and a size that
are known for each; the least total sensitivity within the budget is a multiple-choice
knapsack,

.. math::

    \min_b \sum_i \Omega_i(b_i) + \sum_{i<j} I_{ij}(b_i, b_j)
    \quad \text{subject to} \quad \sum_i S_i(b_i) \le \mathrm{budget},

with interactions I if there are any: Omega and I are what the sensitivities measure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import chex
import numpy as np

from hero_jax import _checks
from hero_jax.mixed_precision._program import solve
from hero_jax.mixed_precision._sizes import LayerSize
from hero_jax.mixed_precision._table import Allocation, Table, Unit


def allocate_bits(
    sensitivity: Mapping[str, Sequence[float] | chex.Array],
    sizes: Mapping[str, int | LayerSize],
    budget: float,
    choices: Sequence[int],
    *,
    unit: Unit = "average_bits",
    interactions: chex.Array | None = None,
    time_limit: float | None = None,
) -> Allocation:
    """Choose the bits of every layer: the least total sensitivity within a budget.

    Exact, by integer programming, unless a time limit ends it.

    Args:
      sensitivity: path of the layer to what each choice costs, `[len(choices)]`, in the
        order of `choices`, finite; negative numbers are fine.
      sizes: path of the layer to its number of weights, or its :class:`LayerSize`,
        which knows of scales and zero points.
      budget: at most so much, in `unit`.
      choices: numbers of bits.
      unit: "average_bits" over all weights, or "bytes" of all layers together. The rest
        of a file, such as biases, statistics and header, comes on top: see
        :func:`hero_jax.quant.file_size`.
      interactions: what pairs of choices cost on top, `[layers, choices, layers,
        choices]` in the order of `sensitivity` and `choices`; symmetric, and only the
        part between different layers counts, each pair once. The program grows with
        the square of the layers. Weak interactions, as networks have them, take
        seconds for dozens of layers; strong ones too long, and want a `time_limit`.
      time_limit: seconds, after which the best allocation found so far is returned,
        with its `gap`; none by default.

    Returns:
      The allocation; its `bits` go straight to :func:`hero_jax.quant.quantize`.

    Raises:
      ValueError: layers or lengths do not match, a sensitivity is not finite, or not
        even the smallest allocation is within the budget.
      TimeoutError: the time limit was reached before any allocation was found.

    Example:
      >>> from hero_jax import mixed_precision
      >>> sensitivity = {"first": [9.0, 1.0, 0.0], "last": [2.0, 0.5, 0.0]}
      >>> sizes = {"first": 100, "last": 300}
      >>> mixed_precision.allocate_bits(sensitivity, sizes, 3.5, choices=(2, 4, 8)).bits
      {'first': 8, 'last': 2}

    References:
      Dong et al., `HAWQ-V2 <https://arxiv.org/abs/1911.03852>`_, 2020; Yao et al.,
      `HAWQ-V3 <https://arxiv.org/abs/2011.10680>`_, 2021, for the integer program.
    """
    table = Table.of(sensitivity, sizes, choices, unit)
    pairs = _pairs(interactions, table)
    limit = table.limit(budget)
    least = table.size.min(1).sum()
    if least > limit:
        raise ValueError(
            f"budget must be at least {table.in_unit(least):g} with choices "
            f"{[*table.choices]}, unit={unit!r}: that is the smallest allocation. "
            f"Got {budget!r}."
        )
    if time_limit is not None:
        _checks.check_positive("time_limit", time_limit)
    found = solve(table.cost, table.size, limit, pairs, time_limit)
    return table.allocation(found.chosen, found.cost)._replace(gap=found.gap)


def _pairs(interactions: chex.Array | None, table: Table) -> np.ndarray | None:
    """Return the interactions in the order of the table, checked."""
    if interactions is None:
        return None
    pairs = np.asarray(interactions, np.float64)
    layers, choices = table.cost.shape
    if pairs.shape != (layers, choices, layers, choices):
        raise ValueError(
            "interactions must have shape [layers, choices, layers, choices] = "
            f"{(layers, choices, layers, choices)}, got {pairs.shape}."
        )
    rounding = 1e-4 * np.abs(pairs).max()
    if not np.isfinite(rounding) or np.any(
        np.abs(pairs - pairs.transpose(2, 3, 0, 1)) > rounding
    ):
        raise ValueError(
            "interactions must be finite, and symmetric: [i, b, j, c] and [j, c, i, b] "
            "are the same pair, which counts once."
        )
    column = [table.given.index(bits) for bits in table.choices]
    return pairs[:, column][..., column]
