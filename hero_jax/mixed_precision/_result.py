"""Sensitivity of layers to their precision, as every measure reports it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from hero_jax import _tree
from hero_jax._typing import Params
from hero_jax.curvature import _layers
from hero_jax.curvature._problem import Options
from hero_jax.mixed_precision._errors import Errors
from hero_jax.mixed_precision._program import total_cost
from hero_jax.mixed_precision._table import check_same_layers


class Sensitivity(NamedTuple):
    r"""What every number of bits costs in every layer, in units of the loss.

    :func:`allocate_bits` and :func:`pareto_frontier` take `layers`, `choices` and, if
    there are any, `interactions`.

    Attributes:
      choices: numbers of bits.
      layers: path of the layer to one number per choice, `[len(choices)]`; a stack of
        layers has one entry, since all of them get the same bits.
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
        check_same_layers("bits and the sensitivity", bits, self.layers)
        return np.array([self.choices.index(bits[path]) for path in self.layers])


def by_leaf(
    loss_fn: Callable[..., Any],
    params: Params,
    options: Options,
    found: dict[str, chex.ArrayTree],
) -> dict[str, Any]:
    """Collect what was found of the layers, path of the leaf to `[layers]`."""
    names = _layers.every(loss_fn, params, options).names_by_leaf(params)
    return {
        path: jax.tree.map(lambda *x: jnp.stack(x), *(found[name] for name in own))
        for path, own in zip(_tree.unique_leaf_paths(params), names, strict=True)
        if own and own[0] in found
    }


def times_squared_norms(
    errors: Errors,
    values: dict[str, chex.Array],
    stderr: dict[str, chex.Array] | None = None,
) -> Sensitivity:
    """Multiply one number per layer by `||d||^2 / 2` of every choice.

    What the layers of a stack cost adds up; their errors are independent.

    Args:
      errors: d.
      values: path of the leaf to the numbers, `[layers]`.
      stderr: likewise their standard errors.
    """
    halves = half_squared_norms(errors, values)
    return Sensitivity(
        errors.choices,
        {path: (values[path] * half).sum(1) for path, half in halves.items()},
        None
        if stderr is None
        else {
            path: jax.vmap(_tree.norm)(stderr[path] * half)
            for path, half in halves.items()
        },
    )


def half_squared_norms(
    errors: Errors, values: dict[str, chex.Array]
) -> dict[str, chex.Array]:
    """Return `||d||^2 / 2`, `[choices, layers]`, for as many layers as values."""

    def of(path: str, d: chex.Array) -> chex.Array:
        rows = d.reshape(len(d), len(values[path]), -1)
        return jnp.square(jax.vmap(jax.vmap(_tree.norm))(rows)) / 2.0

    return {path: of(path, d) for path, d in errors.layers.items()}
