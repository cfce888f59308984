"""Strengths of the penalty that change from step to step, besides optax's schedules.

Any `count -> value` will do: `optax.linear_schedule(0.0, gamma, steps)` lets the
penalty grow, `optax.join_schedules` lets it set in later.
"""

from __future__ import annotations

import chex
import jax.numpy as jnp
import optax

from hero_jax import _checks

__all__ = ["every"]


def every(
    k: int, gamma: chex.Numeric | optax.Schedule, *, rescale: bool = True
) -> optax.Schedule:
    """Penalize at every k-th step only, from the first one on.

    Where gamma is zero, :func:`hero_jax.hero` leaves out the product with the Hessian,
    and a step computes `2 + 2 / k` gradients on average, instead of 4.
    With :func:`hero_jax.hero_value_and_grad`, choose by `jax.lax.cond` between that of
    this gamma and that of `gamma=0`.

    Args:
      k: number of steps from one penalty to the next, at least 1.
      gamma: strength, or a schedule of it.
      rescale: make the penalty k times as strong where there is one. The mean gradient
        of k steps is then that of a penalty at each, if the weights stand still.

    Returns:
      `count -> strength`.

    Raises:
      ValueError: `k < 1`, or gamma is negative or not a scalar.

    Example:
      >>> import hero_jax
      >>> gamma = hero_jax.schedules.every(2, 0.5)
      >>> [float(gamma(count)) for count in range(4)]
      [1.0, 0.0, 1.0, 0.0]
    """
    _checks.check_integer("k", k)
    if not callable(gamma):
        _checks.check_nonnegative("gamma", gamma)

    def schedule(count: chex.Numeric) -> chex.Array:
        strength = jnp.asarray(gamma(count) if callable(gamma) else gamma)
        return jnp.where(
            jnp.asarray(count) % k == 0, strength * k if rescale else strength, 0
        ).astype(jnp.result_type(strength, float))

    return schedule
