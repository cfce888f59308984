"""The problem of mixed precision in arrays, and its solutions in dicts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import numpy as np

from hero_jax import _checks
from hero_jax.mixed_precision._sizes import LayerSize
from hero_jax.quant._options import check_choices
from hero_jax.quant._packing import packed_size

Unit = Literal["average_bits", "bytes"]
UNITS = ("average_bits", "bytes")


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


class Table(NamedTuple):
    """The problem in arrays: a row for every layer, a column for every choice.

    Attributes:
      paths: of the layers.
      choices: numbers of bits, ascending.
      given: the same in the order in which they were given.
      unit: of `size`.
      weights: `[layers]`, how many.
      cost: `[layers, choices]`, sensitivities.
      bytes: `[layers, choices]`.
      size: `[layers, choices]`, bytes, or bits of all weights.
    """

    paths: list[str]
    choices: tuple[int, ...]
    given: tuple[int, ...]
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
    ) -> Table:
        """Check the arguments and put them into arrays."""
        _checks.check_choice("unit", unit, UNITS)
        given = check_choices(choices)
        ordered = tuple(sorted(given))
        column = [given.index(bits) for bits in ordered]
        check_same_layers("sensitivity and sizes", sensitivity, sizes)
        costs = [
            _costs(path, row, len(column))[column] for path, row in sensitivity.items()
        ]
        layers = [_layer_size(path, sizes[path], ordered) for path in sensitivity]
        weights = np.array([layer.weights for layer in layers], np.int64)
        num_bytes = np.array([[layer.bytes[b] for b in ordered] for layer in layers])
        size = num_bytes if unit == "bytes" else weights[:, None] * np.array(ordered)
        return cls(
            [*sensitivity],
            ordered,
            given,
            unit,
            weights,
            np.stack(costs),
            num_bytes,
            size,
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

    def allocation(self, chosen: np.ndarray, cost: float) -> Allocation:
        """Return the allocation of one column for every row."""
        bits = np.asarray(self.choices)[chosen]
        return Allocation(
            dict(zip(self.paths, map(int, bits), strict=True)),
            float(cost),
            int(self.bytes[np.arange(len(chosen)), chosen].sum()),
            float(bits @ self.weights / self._num_weights),
        )


def check_same_layers(names: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    """Raise `ValueError` unless two mappings have the same keys."""
    if a.keys() != b.keys():
        raise ValueError(
            f"{names} must have the same layers: {sorted(a.keys() ^ b.keys())} are in "
            "one of them only."
        )


def _costs(path: str, row: Any, length: int) -> np.ndarray:
    costs = np.asarray(row, np.float64)
    if costs.shape != (length,) or not np.isfinite(costs).all():
        raise ValueError(
            f"sensitivity must have a finite number for each of the {length} choices, "
            f"got {row!r} at {path!r}."
        )
    return costs


def _layer_size(path: str, size: Any, choices: tuple[int, ...]) -> LayerSize:
    if isinstance(size, LayerSize):
        if missing := [b for b in choices if b not in size.bytes]:
            raise ValueError(f"sizes must know {missing} bits, too (at {path!r}).")
        return size
    with _checks.at(repr(path)):
        _checks.check_integer("sizes", size)
    return LayerSize(int(size), {b: packed_size(int(size), b) for b in choices})
