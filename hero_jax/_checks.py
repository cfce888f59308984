"""Argument checks that raise where the user called, naming argument and value."""

import math
from collections.abc import Callable, Iterable
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


def check_key(name: str, value: Any) -> None:
    """Raise `TypeError` unless `value` is one random key of JAX, new style or old."""
    dtype = getattr(value, "dtype", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not (typed and value.shape == ()) and not (
        dtype == jnp.uint32 and np.ndim(value) == 1
    ):
        got = value if typed or dtype is None else f"{dtype}{list(np.shape(value))}"
        raise TypeError(
            f"{name} must be one random key, as jax.random.key(0) gives it, got "
            f"{type(value).__name__}: {got!r}."
        )


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
