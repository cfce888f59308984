"""Compiled programs that live no longer than the functions they are made of.

`jax.jit` keeps its static arguments, and so all that a loss closes over, for as long as
the process runs. Here a program refers weakly to its functions, and is dropped with the
first of them.
"""

import dataclasses
import functools
import types
import weakref
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax

_kept: dict[Hashable, Callable[..., Any]] = {}


class MadeOfFunctions:
    """Base of frozen dataclasses all of whose fields are functions.

    A program made of one lives as long as these functions, not as long as the object.
    """


class _Parts(NamedTuple):
    kind: type
    references: tuple[Any, ...]


def compiled(function: Callable[..., Any], *static: Any) -> Callable[..., Any]:
    """Return `jax.jit` of `arrays -> function(*static, *arrays)`.

    Args:
      function: of a module, traced once for every `static` and shapes of the arrays.
      *static: hashable; functions, and named tuples with functions in them, are
        referred to weakly. The program is compiled anew for every call if one of them
        has no hash or cannot be referred to so.

    Returns:
      The same compiled function for equal arguments, while these live.
    """
    try:
        found = _kept.get((function, *(_weak(x) for x in static)))
    except TypeError:
        return jax.jit(functools.partial(function, *static))
    if found is not None:
        return found

    def forget(_: Any, kept: dict[Hashable, Any] = _kept) -> None:
        kept.pop(key, None)

    def program(*arrays: Any) -> Any:
        return function(*map(_strong, key[1:]), *arrays)

    program.__name__ = program.__qualname__ = function.__name__
    key = (function, *(_weak(x, forget) for x in static))
    return _kept.setdefault(key, jax.jit(program))


def _weak(x: Any, forget: Callable[[Any], None] | None = None) -> Any:
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*(_weak(y, forget) for y in x))
    if isinstance(x, MadeOfFunctions):
        fields = dataclasses.fields(x)  # type: ignore[arg-type]
        parts = [_weak(getattr(x, field.name), forget) for field in fields]
        return _Parts(type(x), tuple(parts))
    if isinstance(x, types.MethodType):
        return weakref.WeakMethod(x, forget)
    return weakref.ref(x, forget) if callable(x) else x


def _strong(x: Any) -> Any:
    if isinstance(x, _Parts):
        return x.kind(*map(_strong, x.references))
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*map(_strong, x))
    return x() if isinstance(x, weakref.ref) else x
