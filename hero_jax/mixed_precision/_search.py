"""The smallest model that is accurate enough, by bisection on the frontier."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from hero_jax.mixed_precision._table import Allocation


class Found(NamedTuple):
    """What a bisection found.

    Attributes:
      allocation: the smallest one that was measured to be accurate enough.
      accuracy: of it.
      tried: position on the frontier to accuracy, of all that were measured.
    """

    allocation: Allocation
    accuracy: float
    tried: dict[int, float]


def smallest_accurate(
    frontier: Sequence[Allocation],
    accuracy_fn: Callable[[Mapping[str, int]], Any],
    least: float,
) -> Found:
    """Find the smallest allocation whose measured accuracy is at least so much.

    Bisection: about `log2(len(frontier))` measurements. It takes for granted that
    accuracy grows along the frontier; as far as it does not, what is found is accurate
    enough all the same, and its next smaller neighbour is not, but another that is
    smaller still may be.

    Args:
      frontier: allocations from the smallest to the largest, such as
        :func:`pareto_frontier`.
      accuracy_fn: `bits -> accuracy`, of the network quantized to these numbers of
        bits, on images that are not those of the final test; by
        :func:`hero_jax.quant.accuracy_against_bits`, say.
      least: the accuracy that is wanted, in its units.

    Returns:
      Allocation, its accuracy, and all measurements.

    Raises:
      ValueError: not even the largest allocation is accurate enough.

    Example:
      >>> from hero_jax import mixed_precision
      >>> rows = {"a": [9.0, 1.0, 0.0], "b": [2.0, 0.5, 0.0]}
      >>> frontier = mixed_precision.pareto_frontier(rows, {"a": 8, "b": 8}, (2, 4, 8))
      >>> accuracy_fn = lambda bits: 0.6 + 0.02 * bits["a"] + 0.03 * bits["b"]
      >>> found = mixed_precision.smallest_accurate(frontier, accuracy_fn, least=0.75)
      >>> found.allocation.bits, f"{found.accuracy:.2f}", len(frontier)
      ({'a': 4, 'b': 4}, '0.80', 5)
    """
    tried: dict[int, float] = {}

    def is_enough(position: int) -> bool:
        tried[position] = float(accuracy_fn(frontier[position].bits))
        return tried[position] >= least

    low, high = -1, len(frontier) - 1  # not enough, or nothing; enough
    if not is_enough(high):
        raise ValueError(
            "least must be in reach: the largest allocation of the frontier, "
            f"{frontier[high].bits}, has accuracy {tried[high]:g}, and {least!r} is "
            "wanted. Larger choices of bits may reach it."
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return Found(frontier[high], tried[high], tried)
