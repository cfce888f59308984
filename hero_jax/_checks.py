"""Argument checks that raise where the user called, naming argument and value."""

import contextlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator
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
    except (TypeError, ValueError) as error:
        return isinstance(error, ValueError)  # it has none
    return True


def check_choice(name: str, value: object, allowed: Iterable[str]) -> None:
    """Raise `ValueError` unless `value` is one of the `allowed` strings."""
    allowed = sorted(allowed)
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}.")


def check_options(given: Iterable[str], known: Iterable[str]) -> None:
    """Raise `TypeError` for keyword arguments that are not among the known ones."""
    if unknown := sorted({*given} - {*known}):
        raise TypeError(f"unknown options {unknown}; known are {sorted(known)}.")


def check_integer(name: str, value: Any, least: int = 1) -> None:
    """Raise unless `value` is an integer of at least so much, and no array."""
    integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not integer or value < least:
        kind = ValueError if integer else TypeError
        raise kind(f"{name} must be an integer >= {least}, got {got(value)}.")


def check_nonnegative(name: str, value: Any) -> None:
    """Raise unless `value` is a real scalar that is finite and at least zero.

    A traced scalar has no value yet: only its shape and type are checked.
    """
    if not _is_real(value):
        hint = (
            " Schedules are accepted by hero_jax.hero only; elsewhere pass the"
            " scheduled value as a traced scalar."
        )
        raise TypeError(
            f"{name} must be a real number >= 0 (a Python number or a scalar array), "
            f"got {got(value)}.{hint if callable(value) else ''}"
        )
    if np.shape(value) != ():
        raise ValueError(
            f"{name} must be a scalar, got shape {np.shape(value)}. "
            "Use jax.vmap to run over several values."
        )
    if not isinstance(value, jax.core.Tracer) and not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and >= 0, got {float(value)}.")


def check_positive(name: str, value: Any) -> None:
    """Raise unless `value` is a finite real scalar above zero, or a traced one."""
    check_nonnegative(name, value)
    if is_zero(value):
        raise ValueError(f"{name} must be finite and > 0, got {value}.")


def check_all_nonnegative(**values: Any) -> None:
    """Raise `ValueError` unless all entries known before tracing are at least 0."""
    for name, value in values.items():
        known = not isinstance(value, jax.core.Tracer)
        if known and not np.all(np.asarray(value) >= 0):
            raise ValueError(f"{name} must be >= 0, got {value!r}.")


def positions(name: str, value: Any) -> tuple[int, ...]:
    """Return positions of arguments that were given as one or as several."""
    several = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    integers = all(isinstance(k, int) and not isinstance(k, bool) for k in several)
    if not several or not integers or len({*several}) < len(several):
        raise (ValueError if integers else TypeError)(
            f"{name} must name arguments by their positions, an integer or several "
            f"that differ, got {value!r}."
        )
    return several


@contextlib.contextmanager
def at(where: object) -> Iterator[None]:
    """Add to a message which leaf, layer or field it is about."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{str(error).rstrip('.')} (at {where}).") from None


def loss_and_aux(name: str, value: Any, has_aux: bool) -> tuple[Any, Any]:
    """Return loss and auxiliary output of what a loss function returned.

    Args:
      name: what the function is called, for the errors.
      value: what it returned.
      has_aux: whether that should be a pair.

    Returns:
      The pair; without `has_aux`, the auxiliary output is None.

    Raises:
      TypeError: it is not a pair, or the loss is not a real floating-point scalar.
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
            f"{described(loss)}{' for the loss' if has_aux else ''}.{hint}"
        )
    return loss, auxiliary


def pair(name: str, value: Any) -> tuple[Any, Any]:
    """Return the two parts of what a loss function with `has_aux` returned."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(
            f"{name} must return a pair (loss, aux) with has_aux=True, got "
            f"{described(value)}. Leave has_aux out for a loss alone."
        )
    loss, auxiliary = value
    return loss, auxiliary


def described(value: Any) -> str:
    """Say what kind of value this is, without what a tracer is called."""
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return type(value).__name__


def got(value: Any) -> str:
    """Say what was given instead: its type, and an array's dtype and shape."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return repr(value)
    array = isinstance(value, (np.ndarray, jax.Array))
    return described(value) if array else f"{type(value).__name__}: {value!r}"


def _is_real(value: Any) -> bool:
    """Whether this is a number or an array, integer or floating-point."""
    if not isinstance(value, (int, float, np.ndarray, np.generic, jax.Array)):
        return False
    dtype = jnp.result_type(value)
    return any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer))


def is_zero(value: chex.Numeric | Callable[..., Any]) -> bool:
    """Whether `value` is known, before any tracing, to be zero."""
    if callable(value) or isinstance(value, jax.core.Tracer):
        return False
    return float(value) == 0.0
