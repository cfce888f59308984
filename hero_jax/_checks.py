"""Argument checks that raise where the user called, naming argument and value."""

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np


def check_callable(name: str, value: object, signature: str) -> None:
    """Raise `TypeError` unless `value` can be called."""
    if not callable(value):
        raise TypeError(
            f"{name} must be a callable {signature}, "
            f"got {type(value).__name__}: {value!r}."
        )


def can_be_called(function: Callable[..., Any], *args: Any) -> bool:
    """Whether a function takes these arguments, as far as its signature tells."""
    try:
        inspect.signature(function).bind(*args)
    except TypeError:
        return False
    except ValueError:  # it has none
        return True
    return True


def check_choice(name: str, value: object, allowed: Iterable[str]) -> None:
    """Raise `ValueError` unless `value` is one of the `allowed` strings."""
    allowed = sorted(allowed)
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}.")


def check_positive_integer(name: str, value: object) -> None:
    """Raise unless `value` is an integer of at least one, and no array."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(
            f"{name} must be an integer >= 1, got {type(value).__name__}: {value!r}."
        )
    if value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value}.")


def check_bool(name: str, value: object) -> None:
    """Raise `TypeError` unless `value` is True or False, and no array."""
    if not isinstance(value, bool):
        raise TypeError(
            f"{name} must be True or False, got {type(value).__name__}: {value!r}."
        )


def check_nonnegative(name: str, value: Any) -> None:
    """Raise unless `value` is a real scalar that is finite and at least zero.

    A traced scalar has no value yet: only its shape and type are checked.
    """
    array_like = isinstance(value, (int, float, np.ndarray, np.generic, jax.Array))
    if isinstance(value, bool) or not array_like:
        hint = (
            " Schedules are accepted by hero_jax.hero only; elsewhere pass the"
            " scheduled value as a traced scalar."
            if callable(value)
            else ""
        )
        raise TypeError(
            f"{name} must be a real number >= 0 (a Python number or a scalar array), "
            f"got {type(value).__name__}: {value!r}.{hint}"
        )
    if np.shape(value) != ():
        raise ValueError(
            f"{name} must be a scalar, got shape {np.shape(value)}. "
            "Use jax.vmap to run over several values."
        )
    dtype = jnp.result_type(value)
    if not any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer)):
        raise TypeError(f"{name} must be a real number >= 0, got dtype {dtype}.")
    if not isinstance(value, jax.core.Tracer):
        number = float(value)
        if not math.isfinite(number) or number < 0.0:
            raise ValueError(f"{name} must be finite and >= 0, got {number}.")


def check_positive(name: str, value: Any) -> None:
    """Raise unless `value` is a finite real scalar above zero, or a traced one."""
    check_nonnegative(name, value)
    if is_zero(value):
        raise ValueError(f"{name} must be finite and > 0, got {value}.")


def check_key(name: str, key: Any, *, optional: bool = False) -> None:
    """Raise `TypeError` unless `key` is one random key of JAX, new style or old."""
    if optional and key is None:
        return
    dtype = getattr(key, "dtype", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    old = dtype == jnp.uint32 and np.ndim(key) == 1
    if not (typed and key.shape == ()) and not old:
        got = f"{type(key).__name__}: {key!r}" if dtype is None else _described(key)
        raise TypeError(
            f"{name} must be {'None or ' if optional else ''}a random key such as "
            f"jax.random.key(0), got {got}."
        )


def check_argnums(argnums: Any) -> None:
    """Raise unless `argnums` is a position of an argument, or several."""
    several = isinstance(argnums, Sequence) and not isinstance(argnums, str)
    positions = tuple(argnums) if several else (argnums,)
    if not positions or any(
        isinstance(k, bool) or not isinstance(k, int) for k in positions
    ):
        raise TypeError(
            "argnums must be the position of params among the arguments of loss_fn, "
            f"an integer or several, got {argnums!r}."
        )
    if len({*positions}) < len(positions):
        raise ValueError(f"argnums must differ from each other, got {argnums!r}.")


def loss_and_aux(name: str, value: Any, has_aux: bool) -> tuple[Any, Any]:
    """Return loss and auxiliary output of what a loss function returned.

    Args:
      name: what the function is called, for the errors.
      value: what it returned.
      has_aux: whether that should be a pair.

    Returns:
      The pair; without `has_aux`, the auxiliary output is None.

    Raises:
      TypeError: it is no pair, or the loss is no real floating-point scalar.
    """
    loss, auxiliary = pair(name, value) if has_aux else (value, None)
    hint = ""
    if isinstance(loss, (tuple, list)) and not has_aux:
        hint = " If that is (loss, aux), pass has_aux=True."
    elif getattr(loss, "shape", ()):
        hint = " Take the mean over the examples."
    shape, dtype = getattr(loss, "shape", None), getattr(loss, "dtype", None)
    scalar = isinstance(loss, float) or (shape == () and dtype is not None)
    if not scalar or not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
        raise TypeError(
            f"{name} must return a scalar loss, a real floating-point number, got "
            f"{_described(loss)}{' for the loss' if has_aux else ''}.{hint}"
        )
    return loss, auxiliary


def pair(name: str, value: Any) -> tuple[Any, Any]:
    """Return the two parts of what a loss function with `has_aux` returned."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(
            f"{name} must return a pair (loss, aux) with has_aux=True, got "
            f"{_described(value)}. Leave has_aux out for a loss alone."
        )
    loss, auxiliary = value
    return loss, auxiliary


def _described(value: Any) -> str:
    """Say what kind of value this is, without what a tracer is called."""
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return type(value).__name__


def check_all_nonnegative(**values: Any) -> None:
    """Raise `ValueError` unless all entries known before tracing are at least 0."""
    for name, value in values.items():
        if isinstance(value, jax.core.Tracer):
            continue
        array = np.asarray(value)
        real = (jnp.floating, jnp.integer)
        if not any(jnp.issubdtype(array.dtype, kind) for kind in real):
            raise TypeError(f"{name} must be real numbers >= 0, got {value!r}.")
        if not np.all(array >= 0):
            raise ValueError(f"{name} must be >= 0, got {value!r}.")


def is_zero(value: chex.Numeric | Callable[..., Any]) -> bool:
    """Whether `value` is known, before any tracing, to be zero."""
    if callable(value) or isinstance(value, jax.core.Tracer):
        return False
    return float(value) == 0.0
