"""The best allocations of all sizes at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import chex
import numpy as np

from hero_jax import _checks
from hero_jax.mixed_precision._sizes import LayerSize
from hero_jax.mixed_precision._table import UNITS, Allocation, Table, Unit


class Frontier(Sequence[Allocation]):
    """Allocations of many sizes, from the smallest to the largest.

    A sequence of :class:`Allocation`, which is made when it is asked for.

    Attributes:
      paths: of the layers.
      bits: `[n, layers]`.
      sensitivity: `[n]`; falling, if the allocations are the best of their sizes.
      bytes: `[n]`, as in :class:`Allocation`.
      average_bits: `[n]`.
    """

    def __init__(self, table: Table, chosen: np.ndarray, cost: np.ndarray) -> None:
        self._table, self._chosen = table, chosen
        self.paths = tuple(table.paths)
        self.bits = np.asarray(table.choices)[chosen]
        self.sensitivity = cost
        layers = np.arange(len(table.paths))
        self.bytes = table.bytes[layers, chosen].sum(1)
        self.average_bits = (self.bits @ table.weights) / table.weights.sum()

    def __repr__(self) -> str:
        sizes = f"{self.bytes[0]:,} to {self.bytes[-1]:,} bytes"
        return f"<Frontier of {len(self)} allocations, {sizes}>"

    def __len__(self) -> int:
        return len(self.bits)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._table.allocation(self._chosen[index], self.sensitivity[index])

    def __iter__(self) -> Iterator[Allocation]:
        return (self[i] for i in range(len(self)))

    def within(self, budget: float, *, unit: Unit = "average_bits") -> Allocation:
        """Return the least sensitive allocation of those within a budget.

        Args:
          budget: at most so much, in `unit`.
          unit: "average_bits" or "bytes", as in :func:`allocate_bits`.

        Raises:
          TypeError: `budget` is not a number.
          ValueError: nothing is within it.
        """
        _checks.check_choice("unit", unit, UNITS)
        limit = self._table._replace(unit=unit).limit(budget)
        size = self.bytes if unit == "bytes" else self.bits @ self._table.weights
        if not np.any(size <= limit):
            least = self._table._replace(unit=unit).in_unit(size.min())
            raise ValueError(f"budget must be at least {least:g}, got {budget!r}.")
        cost = np.where(size <= limit, self.sensitivity, np.inf)
        best: Allocation = self[int(np.argmin(cost))]
        return best


def pareto_frontier(
    sensitivity: Mapping[str, Sequence[float] | chex.Array],
    sizes: Mapping[str, int | LayerSize],
    choices: Sequence[int],
    *,
    unit: Unit = "bytes",
) -> Frontier:
    """Return the best allocation for every budget at once, as HAWQ-V2 draws it.

    Exact: layer by layer, all sums of sizes are formed, and those dropped that are no
    less sensitive than a smaller one.

    Args:
      sensitivity: as in :func:`allocate_bits`, like the other arguments.
      sizes: path of the layer to its number of weights or :class:`LayerSize`.
      choices: numbers of bits.
      unit: in which allocations are compared.

    Returns:
      The allocations that no other beats in both size and sensitivity, by size; each is
      less sensitive than all that are smaller. There may be many thousand.

    Raises:
      ValueError: layers or lengths do not match, or a sensitivity is not finite.

    Example:
      >>> from hero_jax import mixed_precision
      >>> rows, sizes = {"a": [9.0, 1.0], "b": [2.0, 0.5]}, {"a": 8, "b": 8}
      >>> frontier = mixed_precision.pareto_frontier(rows, sizes, choices=(2, 4))
      >>> for best in frontier:
      ...     print(best.bytes, best.sensitivity, best.bits)
      4 11.0 {'a': 2, 'b': 2}
      6 3.0 {'a': 4, 'b': 2}
      8 1.5 {'a': 4, 'b': 4}

    References:
      Nemhauser and Ullmann, `Discrete dynamic programming and capital allocation
      <https://doi.org/10.1287/mnsc.15.9.494>`_, 1969; Dong et al., `HAWQ-V2
      <https://arxiv.org/abs/1911.03852>`_, 2020.
    """
    table = Table.of(sensitivity, sizes, choices, unit)
    size, cost = np.zeros(1, np.int64), np.zeros(1)
    steps = []
    for layer_size, layer_cost in zip(table.size, table.cost, strict=True):
        sizes_, costs = size[:, None] + layer_size, cost[:, None] + layer_cost
        order = np.lexsort((costs.ravel(), sizes_.ravel()))
        best = np.minimum.accumulate(costs.ravel()[order])
        kept = order[np.concatenate([[True], best[1:] < best[:-1]])]
        size, cost = sizes_.ravel()[kept], costs.ravel()[kept]
        steps.append(np.divmod(kept, len(table.choices)))
    at = np.arange(len(size))
    chosen = np.empty((len(size), len(steps)), np.int64)
    for layer in reversed(range(len(steps))):
        before, choice = steps[layer]
        chosen[:, layer] = choice[at]
        at = before[at]
    return Frontier(table, chosen, cost)
