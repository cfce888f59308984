"""The containers of a tree as JSON, and back, with a name for every leaf.

A container becomes a JSON list that begins with its kind, None becomes null, and a leaf
whatever a given function makes of it, a JSON string or object:

    {"conv": (x, None)}  ->  ["dict", [["conv", ["tuple", ["float32", null]]]]]

Leaves go by their paths, `conv/0`; traversal is in the order of `jax.tree.leaves`.
"""

from __future__ import annotations

import collections
import weakref
from collections.abc import Callable, Collection, Mapping
from typing import Any

import chex
import jax
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

Path = tuple[str, ...]

_RESERVED = "__metadata__"
"""A name that safetensors keeps for itself."""


class Names:
    """Hands out one name per leaf, the same for the same paths in the same order."""

    def __init__(self) -> None:
        self._given = {_RESERVED}

    def __call__(self, path: Path) -> str:
        """Return the path, marked if another leaf of this tree looks the same."""
        name = "/".join(path) or "."
        while name in self._given:
            name += "~"
        self._given.add(name)
        return name


def describe(
    tree: chex.ArrayTree,
    leaf: Callable[[str, Any], Any],
    is_leaf: Callable[[Any], bool],
) -> Any:
    """Return the structure of a tree as JSON.

    Args:
      tree: of dicts, lists, tuples, named tuples and None; another registered
        container is described as the dict or list that it flattens to, and a box
        around a single `value` (`nnx.Param`, `nn.Partitioned`) as its content.
      leaf: `(name, leaf) -> JSON string or object`, called in the order of leaves.
      is_leaf: what is a leaf although it is a pytree node.

    Returns:
      JSON-compatible value.

    Raises:
      TypeError: a key of a dict is neither string nor integer, keys are of both kinds,
        or a container gives no names to its children.
    """
    names = Names()

    def visit(node: Any, path: Path) -> Any:
        if node is None:
            return None
        if is_leaf(node) or jax.tree_util.all_leaves([node]):
            return leaf(names(path), node)
        children = _children(node, path)
        if [key for key, _ in children] == ["value"] and not isinstance(
            node, (Mapping, tuple)
        ):
            return visit(children[0][1], path)
        visited = [[key, visit(child, (*path, str(key)))] for key, child in children]
        if isinstance(node, tuple) and hasattr(node, "_fields"):
            return ["namedtuple", type(node).__name__, visited]
        if isinstance(node, (list, tuple)):
            kind = "list" if isinstance(node, list) else "tuple"
            return [kind, [child for _, child in visited]]
        return ["dict", visited]

    return visit(tree, ())


def _children(node: Any, path: Path) -> list[tuple[str | int, Any]]:
    """Flatten one level, in the order of the leaves."""
    if isinstance(node, Mapping):
        _check_keys([*node], node, path)  # first: JAX cannot sort both kinds
    pairs = jax.tree_util.tree_leaves_with_path(node, is_leaf=lambda x: x is not node)
    names: list[Any] = []
    for (key, *_), _ in pairs:
        match key:
            case DictKey(key=name) | SequenceKey(idx=name) | GetAttrKey(name=name):
                pass
            case FlattenedIndexKey(key=name):
                pass
            case _:
                name = None
        names.append(name)
    _check_keys(names, node, path)
    return [(name, child) for name, (_, child) in zip(names, pairs, strict=True)]


def _check_keys(keys: list[Any], node: Any, path: Path) -> None:
    """Raise `TypeError` unless all keys are strings, or all are integers."""
    if not _of_one_kind(keys):
        raise TypeError(
            "the keys of a tree must be all strings or all integers to be saved, got "
            f"{keys} in {type(node).__name__} at {'/'.join(path) or 'the root'}."
        )


def _of_one_kind(keys: Collection[Any]) -> bool:
    """Whether all are strings, or all are integers."""
    strings = [isinstance(key, str) for key in keys]
    integers = [isinstance(key, int) and not isinstance(key, bool) for key in keys]
    return all(strings) or all(integers)


def skeleton(structure: Any) -> Any:
    """Return a structure without what is said of leaves, its dicts in one order."""
    match structure:
        case ["list" | "tuple" as kind, list(nodes)]:
            return [kind, [skeleton(node) for node in nodes]]
        case [*kind, list(pairs)]:
            named = [[key, skeleton(node)] for key, node in pairs]
            return [*kind, sorted(named, key=lambda pair: str(pair[0]))]
    return None if structure is None else "leaf"


def rebuild(structure: Any, leaf: Callable[[str, Any], Any]) -> chex.ArrayTree:
    """Return the tree of a structure.

    Args:
      structure: as returned by :func:`describe`.
      leaf: `(name, what describe's leaf returned) -> leaf`, called in the same order.

    Returns:
      The tree; a named tuple is of a class made here, one per name and fields for as
      long as it is in use.

    Raises:
      ValueError: the structure is malformed.
    """
    names = Names()

    def visit(node: Any, path: Path) -> Any:
        match node:
            case None:
                return None
            case str() | dict():
                return leaf(names(path), node)
            case ["list" | "tuple" as kind, list(nodes)]:
                items = [visit(child, (*path, str(i))) for i, child in enumerate(nodes)]
                return items if kind == "list" else tuple(items)
            case ["dict", list(pairs)]:
                return children(pairs, path)
            case ["namedtuple", str(name), list(pairs)]:
                fields = children(pairs, path)
                return _named_tuple(name, tuple(fields))(**fields)
        raise ValueError(f"unknown node at {'/'.join(path) or 'the root'}")

    def children(pairs: list[Any], path: Path) -> dict[Any, Any]:
        visited = {}
        for pair in pairs:
            match pair:
                case [str() | int() as key, child] if key not in visited:
                    visited[key] = visit(child, (*path, str(key)))
                case _:
                    raise ValueError(f"bad keys at {'/'.join(path) or 'the root'}")
        if not _of_one_kind(visited):
            raise ValueError(f"bad keys at {'/'.join(path) or 'the root'}")
        return visited

    return visit(structure, ())


_CLASSES: weakref.WeakValueDictionary[Any, Any] = weakref.WeakValueDictionary()


def _named_tuple(name: str, fields: tuple[str, ...]) -> Callable[..., Any]:
    made: Callable[..., Any] | None = _CLASSES.get((name, fields))
    if made is None:
        made = _CLASSES[name, fields] = collections.namedtuple(name, fields)
    return made
