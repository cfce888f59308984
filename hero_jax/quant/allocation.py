r"""Mixed precision: which layer gets how many bits under a budget, as HAWQ-V2 asks.

Every layer i takes one of a few numbers of bits, b_i, at a sensitivity and a size that
are known for each; the least total sensitivity within the budget is a multiple-choice
knapsack,

.. math::

    \min_b \sum_i \Omega_i(b_i) + \sum_{i<j} I_{ij}(b_i, b_j)
    \quad \text{subject to} \quad \sum_i S_i(b_i) \le \mathrm{budget},

with interactions I if there are any. :mod:`hero_jax.sensitivity` measures Omega and I.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal, NamedTuple, Unpack

import chex
import jax
import numpy as np

from hero_jax import _checks, _tree
from hero_jax._typing import Mask, Params
from hero_jax.quant.options import GridOptions, check_choices
from hero_jax.quant.packing import packed_size
from hero_jax.quant.program import Solution, solve
from hero_jax.quant.tree import is_quantized, quantize, size_in_bytes

Unit = Literal["average_bits", "bytes"]
UNITS = ("average_bits", "bytes")


class LayerSize(NamedTuple):
    """Size of a layer.

    Attributes:
      weights: how many it has.
      bytes: number of bits per weight to bytes, with scales and zero points.
    """

    weights: int
    bytes: dict[int, int]


class Allocation(NamedTuple):
    """Numbers of bits for all layers; `bits` is what `quantize` takes.

    Attributes:
      bits: path of the layer to its number of bits.
      sensitivity: total.
      bytes: total of the layers, as they are in a file.
      average_bits: mean over the weights, without scales and zero points.
      gap: the least sensitivity may be lower by so much; 0 unless a time limit ended
        the search.
    """

    bits: dict[str, int]
    sensitivity: float
    bytes: int
    average_bits: float
    gap: float = 0.0


def layer_sizes(
    params: Params,
    choices: Sequence[int] = (2, 3, 4, 5, 6, 7, 8),
    *,
    mask: Mask | None = None,
    **options: Unpack[GridOptions],
) -> dict[str, LayerSize]:
    """Return the exact size of every layer for every number of bits.

    Args:
      params: weights, or anything with shapes and dtypes.
      choices: numbers of bits.
      mask: which leaves are quantized, as of :func:`quantize`.
      **options: see :class:`GridOptions`; finer grids take more scales.

    Returns:
      Path of the leaf to its size.

    Raises:
      TypeError: as :func:`quantize`.
      ValueError: as :func:`quantize`.

    Example:
      >>> import jax.numpy as jnp
      >>> from hero_jax import quant
      >>> params = {"kernel": jnp.ones((3, 5)), "bias": jnp.ones(5)}
      >>> quant.layer_sizes(params, choices=(3, 4))["kernel"]
      LayerSize(weights=15, bytes={3: 14, 4: 16})
      >>> quant.layer_sizes(params, (3, 4), axis=-1)["kernel"].bytes
      {3: 46, 4: 48}
    """
    choices = check_choices(choices)
    before = jax.tree.leaves(params, is_leaf=is_quantized)
    positions = jax.tree.unflatten(
        jax.tree.structure(params, is_leaf=is_quantized), range(len(before))
    )
    sizes: dict[str, LayerSize] = {}
    for bits in choices:
        tree = jax.eval_shape(
            lambda params, bits=bits: quantize(params, bits, mask=mask, **options),
            params,
        )
        after = jax.tree.leaves(tree, is_leaf=is_quantized)
        paths = _tree.unique_leaf_paths(positions)
        for path, old, new in zip(paths, before, after, strict=True):
            if is_quantized(new) and not is_quantized(old):
                size = sizes.setdefault(path, LayerSize(math.prod(new.shape), {}))
                size.bytes[bits] = size_in_bytes(new)
    return sizes


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
        the square of the layers: a dozen take seconds, two dozen too long, and a
        `time_limit` is wanted.
      time_limit: seconds, after which the best allocation found so far is returned,
        with its `gap`; none by default.

    Returns:
      The allocation; its `bits` go straight to :func:`hero_jax.quant.quantize`.

    Raises:
      TypeError: an argument has another type.
      ValueError: layers or lengths do not match, a sensitivity is not finite, or not
        even the smallest allocation is within the budget.
      TimeoutError: the time limit was reached before any allocation was found.

    Example:
      >>> from hero_jax import quant
      >>> sensitivity = {"first": [9.0, 1.0, 0.0], "last": [2.0, 0.5, 0.0]}
      >>> sizes = {"first": 100, "last": 300}
      >>> quant.allocate_bits(sensitivity, sizes, 3.5, choices=(2, 4, 8)).bits
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
    return table.allocation(solve(table.cost, table.size, limit, pairs, time_limit))


class Frontier(Sequence[Allocation]):
    """Allocations of many sizes, from the smallest to the largest.

    A sequence of :class:`Allocation`, which is made when it is asked for.

    Attributes:
      paths: of the layers.
      bits: `[n, layers]`.
      sensitivity: `[n]`; falling, if the allocations are the best of their sizes.
      bytes: `[n]`, as of :class:`Allocation`.
      average_bits: `[n]`.
    """

    def __init__(self, table: "Table", chosen: np.ndarray, cost: np.ndarray) -> None:
        self._table = table
        self.paths = tuple(table.paths)
        self.bits = np.asarray(table.choices)[chosen]
        self.sensitivity = cost
        layers = np.arange(len(table.paths))
        self.bytes = table.bytes[layers, chosen].sum(1)
        self.average_bits = (self.bits @ table.weights) / table.weights.sum()

    def __len__(self) -> int:
        return len(self.bits)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return Allocation(
            dict(zip(self.paths, map(int, self.bits[index]), strict=True)),
            float(self.sensitivity[index]),
            int(self.bytes[index]),
            float(self.average_bits[index]),
        )

    def __iter__(self) -> Iterator[Allocation]:
        return (self[i] for i in range(len(self)))

    def within(self, budget: float, *, unit: Unit = "average_bits") -> Allocation:
        """Return the least sensitive allocation of those within a budget.

        Args:
          budget: at most so much, in `unit`.
          unit: "average_bits" or "bytes", as of :func:`allocate_bits`.

        Raises:
          TypeError: `budget` is no number.
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
      sensitivity: as of :func:`allocate_bits`, like the other arguments.
      sizes: path of the layer to its number of weights or :class:`LayerSize`.
      choices: numbers of bits.
      unit: in which allocations are compared.

    Returns:
      The allocations that no other beats in both size and sensitivity, by size: each is
      less sensitive than all that are smaller. There may be many thousand.

    Raises:
      TypeError: an argument has another type.
      ValueError: layers or lengths do not match, or a sensitivity is not finite.

    Example:
      >>> from hero_jax import quant
      >>> sensitivity = {"first": [9.0, 1.0], "last": [2.0, 0.5]}
      >>> frontier = quant.pareto_frontier(sensitivity, {"first": 8, "last": 8}, (2, 4))
      >>> for best in frontier:
      ...     print(best.bytes, best.sensitivity, best.bits)
      4 11.0 {'first': 2, 'last': 2}
      6 3.0 {'first': 4, 'last': 2}
      8 1.5 {'first': 4, 'last': 4}

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


class Table(NamedTuple):
    """The problem in arrays: a row for every layer, a column for every choice."""

    paths: list[str]
    choices: tuple[int, ...]
    unit: Unit
    weights: np.ndarray
    cost: np.ndarray
    bytes: np.ndarray
    size: np.ndarray

    @classmethod
    def of(
        cls,
        sensitivity: Mapping[str, Any],
        sizes: Mapping[str, int | LayerSize],
        choices: Sequence[int],
        unit: Unit,
    ) -> "Table":
        """Check the arguments and put them into arrays."""
        _checks.check_choice("unit", unit, UNITS)
        ordered = check_choices(choices)
        column = [[*choices].index(bits) for bits in ordered]
        for name, mapping in (("sensitivity", sensitivity), ("sizes", sizes)):
            if not isinstance(mapping, Mapping) or not mapping:
                raise TypeError(
                    f"{name} must be a mapping from paths of layers, at least one, "
                    f"got {type(mapping).__name__}: {mapping!r}."
                )
        if sensitivity.keys() != sizes.keys():
            raise ValueError(
                "sensitivity and sizes must have the same layers: "
                f"{sorted(sensitivity.keys() ^ sizes.keys())} are in one of them only."
            )
        costs = [
            _costs(path, row, len(column))[column] for path, row in sensitivity.items()
        ]
        layers = [_layer_size(path, sizes[path], ordered) for path in sensitivity]
        weights = np.array([layer.weights for layer in layers], np.int64)
        num_bytes = np.array([[layer.bytes[b] for b in ordered] for layer in layers])
        size = num_bytes if unit == "bytes" else weights[:, None] * np.array(ordered)
        return cls(
            [*sensitivity], ordered, unit, weights, np.stack(costs), num_bytes, size
        )

    def limit(self, budget: float) -> int:
        """Return the budget as a whole number of bytes, or of bits of all weights."""
        _checks.check_nonnegative("budget", budget)
        exact = Fraction(str(budget))  # as written: 3.3 is 33/10
        return math.floor(exact * (1 if self.unit == "bytes" else self._num_weights))

    def in_unit(self, size: int) -> float:
        """Undo :meth:`limit`."""
        return size if self.unit == "bytes" else size / self._num_weights

    @property
    def _num_weights(self) -> int:
        return int(self.weights.sum())

    def allocation(self, solution: Solution) -> Allocation:
        """Return the allocation of the solution of the program."""
        cost = np.array([solution.cost])
        only: Allocation = Frontier(self, solution.chosen[None], cost)[0]
        return only._replace(gap=solution.gap)


def _costs(path: str, row: Any, length: int) -> np.ndarray:
    costs = np.asarray(row, np.float64)
    if costs.shape != (length,):
        raise ValueError(
            f"sensitivity must have one number for each of the {length} choices, got "
            f"shape {costs.shape} at {path!r}."
        )
    if not np.isfinite(costs).all():
        raise ValueError(f"sensitivity must be finite, got {row!r} at {path!r}.")
    return costs


def _layer_size(path: str, size: Any, choices: tuple[int, ...]) -> LayerSize:
    if isinstance(size, LayerSize):
        if missing := [b for b in choices if b not in size.bytes]:
            raise ValueError(
                f"sizes must know all choices, got none for {missing} bits at {path!r}."
            )
        return size
    try:
        _checks.check_positive_integer("sizes", size)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{str(error).rstrip('.')} (at {path!r}).") from None
    return LayerSize(int(size), {b: packed_size(int(size), b) for b in choices})


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
    if not np.isfinite(pairs).all():
        raise ValueError("interactions must be finite, got NaN or infinity.")
    return pairs
