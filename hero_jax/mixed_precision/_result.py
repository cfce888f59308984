"""Sensitivity of layers to their precision, as every measure reports it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import chex
import numpy as np

from hero_jax.mixed_precision._errors import Errors
from hero_jax.mixed_precision._program import total_cost


class Sensitivity(NamedTuple):
    r"""What every number of bits costs in every layer, in units of the loss.

    :func:`allocate_bits` and :func:`pareto_frontier` take `layers`, `choices` and, if
    there are any, `interactions`.

    Attributes:
      choices: numbers of bits.
      layers: path of the layer to one number per choice, `[len(choices)]`.
      stderr: likewise their standard errors, where the numbers are estimates; None
        where they are exact for the data at hand.
      interactions: what two layers cost on top of what each costs alone, `d_i' H d_j`,
        `[layers, choices, layers, choices]`; None where that is not known.
    """

    choices: tuple[int, ...]
    layers: dict[str, chex.Array]
    stderr: dict[str, chex.Array] | None = None
    interactions: chex.Array | None = None

    def total(self, bits: Mapping[str, int]) -> float:
        """Return the predicted loss increase of an allocation.

        Args:
          bits: path of every layer to one of the choices.

        Returns:
          Sum over layers, and over pairs of layers if there are interactions.

        Raises:
          TypeError: `bits` is no mapping.
          ValueError: a layer is missing or unknown, or a number of bits no choice.
        """
        columns = self.columns(bits)
        rows = np.stack([np.asarray(x, np.float64) for x in self.layers.values()])
        pairs = self.interactions
        if pairs is not None:
            pairs = np.asarray(pairs, np.float64)
        return total_cost(rows, pairs, columns)

    def columns(self, bits: Mapping[str, int]) -> np.ndarray:
        """Return the position of every layer's number of bits among the choices."""
        if not isinstance(bits, Mapping):
            raise TypeError(
                "bits must be a mapping from paths of layers to numbers of bits, got "
                f"{type(bits).__name__}: {bits!r}."
            )
        if bits.keys() != self.layers.keys():
            raise ValueError(
                "bits must name every layer once: "
                f"{sorted(bits.keys() ^ self.layers.keys())} are in one of them only."
            )
        return np.array([_position(self.choices, bits[p], p) for p in self.layers])


def _position(choices: Sequence[int], bits: int, path: str) -> int:
    if bits not in choices:
        raise ValueError(f"bits must be among {[*choices]}, got {bits!r} at {path!r}.")
    return choices.index(bits)


def times_squared_norms(
    errors: Errors,
    values: dict[str, chex.Array],
    stderr: dict[str, chex.Array] | None,
) -> Sensitivity:
    """Multiply one number per layer by `||d||^2 / 2` of every choice."""
    halves = {path: x / 2.0 for path, x in errors.squared_norms().items()}
    return Sensitivity(
        errors.choices,
        {path: values[path] * half for path, half in halves.items()},
        None
        if stderr is None
        else {path: stderr[path] * half for path, half in halves.items()},
    )
