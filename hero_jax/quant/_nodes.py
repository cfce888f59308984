"""Dataclasses as pytree nodes that are checked when made, not when rebuilt."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, NoReturn

import jax
import jax.export
import numpy as np


class NotAnArray:
    """Says how to get an array where one is expected: a layer called with integers."""

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} becomes an array by its method dequantize(), and "
            "a tree of them by hero_jax.quant.dequantize(tree)."
        )

    __array__ = __getitem__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse
    __matmul__ = __rmatmul__ = __truediv__ = __rtruediv__ = __neg__ = _refuse


def unchecked(cls: type, **fields: Any) -> Any:
    """Return an instance of a dataclass without the checks of its construction."""
    node: Any = object.__new__(cls)
    for name, value in fields.items():
        object.__setattr__(node, name, value)
    return node


def register(cls: type, children: tuple[str, ...], name: str) -> None:
    """Make a class a pytree node, also for `jax.export`; unflattening checks nothing.

    Args:
      cls: a dataclass; the fields that are not `children` are static.
      children: names of the fields that are arrays.
      name: under which exported functions refer to it.
    """
    static = tuple(f.name for f in dataclasses.fields(cls) if f.name not in children)

    def flatten(node: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return tuple(getattr(node, f) for f in children), tuple(
            getattr(node, f) for f in static
        )

    def flatten_with_keys(node: Any) -> tuple[Any, Any]:
        values, aux = flatten(node)
        keys = [jax.tree_util.GetAttrKey(f) for f in children]
        return tuple(zip(keys, values, strict=True)), aux

    def unflatten(aux: Any, values: Any) -> Any:
        fields = zip((*children, *static), (*values, *aux), strict=True)
        return unchecked(cls, **dict(fields))

    def to_json(aux: tuple[Any, ...]) -> bytes:
        return json.dumps(
            [str(a) if isinstance(a, np.dtype) else a for a in aux]
        ).encode()

    def from_json(text: bytes) -> tuple[Any, ...]:
        return tuple(
            tuple(a) if isinstance(a, list) else np.dtype(a) if f == "dtype" else a
            for f, a in zip(static, json.loads(text), strict=True)
        )

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    jax.export.register_pytree_node_serialization(
        cls,
        serialized_name=name,
        serialize_auxdata=to_json,
        deserialize_auxdata=from_json,
    )
