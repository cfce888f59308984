"""Compiled programs that live as long as the user's functions in them, and no longer.

JAX keeps a static argument, with all that it closes over, for ever. What it compiled
goes with the function that it was to jit.
"""

import functools
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax

_programs: dict[tuple[Any, ...], Callable[..., Any]] = {}


def jitted(
    function: Callable[..., Any],
    users: Sequence[Callable[..., Any] | None],
    static_argnums: int | Sequence[int] = (),
) -> Callable[..., Any]:
    """Return `function` jitted with its first arguments fixed: the functions of a user.

    For the same functions it is the same program, until one of them is gone.

    Args:
      function: of a module; gets stand-ins, which do not keep the user's functions.
      users: functions, or None. The bound methods of one object by one name are the
        same function; what cannot be referred to weakly is compiled at every call.
      static_argnums: positions among the arguments that are left, hashable ones.
    """
    try:
        methods = [f if isinstance(f, types.MethodType) else None for f in users]
        owners = [m.__self__ if m else f for m, f in zip(methods, users, strict=True)]
        names = [m and weakref.ref(m.__func__) for m in methods]
        key = (function, *map(id, owners), *names, static_argnums)
        if key not in _programs:
            stand_ins = map(_stand_in, users)
            bound = functools.partial(function, *stand_ins)
            for owner in owners:
                if owner is not None:
                    weakref.finalize(owner, _programs.pop, key, None).atexit = False
            _programs[key] = jax.jit(bound, static_argnums=static_argnums)
        return _programs[key]
    except TypeError:  # from weakref
        bound = functools.partial(function, *users)
        return jax.jit(bound, static_argnums=static_argnums)


def _stand_in(function: Callable[..., Any] | None) -> Callable[..., Any] | None:
    """Return a function that calls this one without keeping it."""
    if function is None:
        return None
    method = isinstance(function, types.MethodType)
    reference: Any = (weakref.WeakMethod if method else weakref.ref)(function)
    return lambda *args, **kwargs: reference()(*args, **kwargs)
