"""The layers of a tree of weights: its leaves, those of a stack one by one."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from hero_jax import _tree
from hero_jax._typing import Mask, Params
from hero_jax.curvature import _lanczos
from hero_jax.curvature._problem import Options
from hero_jax.leaves import describe, weights


class Layers(NamedTuple):
    """All layers, numbered leaf by leaf; hashable.

    Attributes:
      stacks: of every leaf the shape of its stack of layers, `()` where it is one.
      chosen: numbers of the layers that are looked at.
    """

    stacks: tuple[tuple[int, ...], ...]
    chosen: tuple[int, ...]

    def names_by_leaf(self, params: Params) -> list[list[str]]:
        """Return of every leaf the names of its layers: its path, or `path[0]`, ..."""
        return [
            [f"{path}[{', '.join(map(str, i))}]" for i in np.ndindex(stack)]
            if stack
            else [path]
            for path, stack in zip(
                _tree.unique_leaf_paths(params), self.stacks, strict=True
            )
        ]

    def names(self, params: Params) -> list[str]:
        """Return the names of all layers."""
        return [*itertools.chain.from_iterable(self.names_by_leaf(params))]

    def chosen_names(self, params: Params) -> list[str]:
        """Return the names of the layers that are looked at."""
        names = self.names(params)
        return [names[number] for number in self.chosen]

    def sizes(self, params: Params) -> list[int]:
        """Return of every layer how many weights it has."""
        return [
            math.prod(np.shape(x)[len(stack) :])
            for x, stack in zip(jax.tree.leaves(params), self.stacks, strict=True)
            for _ in range(math.prod(stack))
        ]

    def only(self, number: chex.Array, tree: Params) -> Params:
        """Keep the layer of a traced number, and put zeros in place of others."""
        leaves, structure = jax.tree.flatten(tree)
        kept = []
        first = 0
        for x, stack in zip(leaves, self.stacks, strict=True):
            numbers: Any = first
            if stack:
                numbers = first + jnp.arange(math.prod(stack)).reshape(stack)
                numbers = jnp.expand_dims(numbers, range(len(stack), x.ndim))
            kept.append(jnp.where(number == numbers, x, 0.0))
            first += math.prod(stack)
        return jax.tree.unflatten(structure, kept)

    def dots(self, a: Params, b: Params) -> chex.Array:
        """Return the dot products of every layer of two trees, `[layers]`."""
        dtype = _tree.widest_dtype(a)
        dots = []
        for x, y, stack in zip(
            jax.tree.leaves(a), jax.tree.leaves(b), self.stacks, strict=True
        ):
            dot: Callable[..., chex.Array] = _lanczos.vdot
            for _ in stack:
                dot = jax.vmap(dot)
            dots.append(dot(x, y).astype(dtype).ravel())
        return jnp.concatenate(dots)


def every(loss_fn: Callable[..., Any], params: Params, options: Options) -> Layers:
    """Number the layers, and choose them all, empty ones, too."""
    leaves, axes = jax.tree.leaves(params), [0] * len(jax.tree.leaves(params))
    if _of_weights(loss_fn):
        known = describe(params, options.get("leaves"))
        axes = [leaf.layer_axes for leaf in jax.tree.leaves(known)]
    stacks = tuple(np.shape(x)[:n] for x, n in zip(leaves, axes, strict=True))
    return Layers(stacks, tuple(range(sum(map(math.prod, stacks)))))


def choose(
    loss_fn: Callable[..., Any], params: Params, mask: Mask | None, options: Options
) -> Layers:
    """Number the layers, and choose at least one of those that are not empty."""
    default = functools.partial(weights, overrides=options.get("leaves"))
    resolved = _tree.resolve_mask(
        "mask", mask, params, default=default if _of_weights(loss_fn) else None
    )
    layers = every(loss_fn, params, options)
    keep = [
        keep
        for keep, stack in zip(jax.tree.leaves(resolved), layers.stacks, strict=True)
        for _ in range(math.prod(stack))
    ]
    sizes = layers.sizes(params)
    chosen = tuple(i for i in layers.chosen if keep[i] and sizes[i])
    if not chosen:
        raise ValueError(
            "mask must choose a leaf that is not empty; by default kernels and "
            "embeddings are chosen."
        )
    return layers._replace(chosen=chosen)


def _of_weights(loss_fn: Callable[..., Any]) -> bool:
    """Tell whether it is a loss of weights; offsets of activations are not layers."""
    return getattr(loss_fn, "of_weights", True)
