"""Which leaf gets how many bits: one number, a tree, or patterns of paths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import chex
import jax

from hero_jax import _tree
from hero_jax._typing import Params

Bits: TypeAlias = int | chex.ArrayTree | Mapping[str, int]
"""Number of bits per weight: one, a tree (or prefix of one), or patterns to numbers."""


def bits_of_leaves(bits: Any, params: Params, chosen: list[bool]) -> list[Any]:
    """Return the number of bits of every leaf of params, in order.

    Args:
      bits: number; tree of numbers with the structure of `params` or a prefix of it;
        or mapping from paths to numbers: of a leaf, of a subtree, or a pattern
        (`fnmatch`, as in "*/kernel"). A leaf's own path counts first, else the first
        that matches.
      params: the tree to be quantized.
      chosen: which leaves are quantized; patterns are matched against these alone.

    Returns:
      One number per leaf, unchecked; None for leaves that are not chosen.

    Raises:
      ValueError: a pattern matches no chosen leaf, a chosen leaf no pattern, or the
        tree has another structure.
    """
    try:
        leaves = jax.tree.leaves(jax.tree.broadcast(bits, params))
    except (ValueError, TypeError):
        if not _is_pattern_mapping(bits):
            raise ValueError(
                "bits must be an integer, a tree of integers or a prefix of one, or a "
                f"mapping from patterns of paths to integers; got {bits!r} for params "
                f"of structure {jax.tree.structure(params)}."
            ) from None
        leaves = _match(bits, params, chosen)
    return [b if keep else None for b, keep in zip(leaves, chosen, strict=True)]


def _is_pattern_mapping(bits: Any) -> bool:
    return isinstance(bits, Mapping) and all(
        isinstance(pattern, str) and jax.tree_util.all_leaves([value])
        for pattern, value in bits.items()
    )


def _match(
    patterns: Mapping[str, int], params: Params, chosen: list[bool]
) -> list[int | None]:
    used = set()
    bits: list[int | None] = []
    names = _tree.unique_leaf_paths(params)
    paths = _tree.leaf_paths(params)
    for name, path, keep in zip(names, paths, chosen, strict=True):
        matching = [p for p in patterns if keep and _tree.path_matches(path, p)]
        if keep and name in patterns:  # whatever pattern it may look like
            matching = [name, *matching]
        used.update(matching)
        if keep and not matching:
            raise ValueError(
                f"bits must have a pattern for every quantized leaf: none of "
                f"{list(patterns)} matches {path!r}. A last pattern '*' matches all."
            )
        bits.append(patterns[matching[0]] if matching else None)
    if unused := [p for p in patterns if p not in used]:
        quantized = [p for p, keep in zip(paths, chosen, strict=True) if keep]
        raise ValueError(
            f"bits must have patterns that match a quantized leaf: {unused[0]!r} "
            f"matches none of {quantized}."
        )
    return bits
