"""h and gamma that change from step to step, besides optax's schedules.

Any `count -> value` will do: `optax.linear_schedule(0.0, gamma, steps)` lets the
penalty grow, `optax.join_schedules` lets it set in later. :func:`next_h` looks at the
loss instead.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from hero_jax import _checks

__all__ = ["every", "next_h"]


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


def next_h(
    h: chex.Numeric,
    loss: chex.Numeric,
    perturbed_loss: chex.Numeric,
    *,
    untrained_loss: chex.Numeric,
    share: chex.Numeric = 0.3,
) -> chex.Array:
    r"""Return the h of the next step: as long as what has been learnt allows.

    .. math::

        L(U) - L(W) = \text{share} \cdot (L_0 - L(W))

    with L_0 the loss of a network that knows nothing. Where h is too long, U forgets
    all that W has learnt, and training ends there: the loss stays at L_0. How long is
    too long depends on the depth of the network, its normalization and the number of
    wrong labels, and changes from step to step. Here h begins small, as little is
    known, and grows with what is learnt.

    Near a minimum the loss rises by the square of h, so h changes by the root of the
    quotient of the allowed rise and the last one, by a factor of 0.7 to 1.1: a batch is
    noisy, and a step that is too long does more harm than one that is too short. Where
    the rise was less than a tenth of the allowed one, h doubles. It stays between
    1e-4 and 1: this is for the direction :func:`hero_jax.perturbation.relative`. It
    costs nothing, since L(U) is known to :func:`hero_jax.hero_value_and_grad`;
    :func:`hero_jax.hero` sees no loss.

    Args:
      h: of this step; begin with `jnp.float32(0.001)`. Zero stays zero.
      loss: `L(W)` of this step, computed in float32 or wider: the rise is small.
      perturbed_loss: `L(U)`, from :class:`hero_jax.Metrics`.
      untrained_loss: `L_0`, the loss of the best constant output, in the unit of the
        loss: of C classes that are equally frequent `log(C)`, else the entropy of their
        frequencies; of squared errors the variance of the targets; N times as much of a
        sum over N examples. If h stays at 1e-4, it is too small; if the loss stays
        there, it is too large.
      share: the part of `L_0 - L(W)` that a step may cost, above 0 and at most 1.

    Returns:
      h of the next step, float32 or wider. Where a loss is not finite, h shrinks.

    Raises:
      TypeError: h or share is no number, or `perturbed_loss` is None, as
        :func:`hero_jax.hero` has it.
      ValueError: h is negative, share is not in its range, or `untrained_loss` is not
        finite.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import hero_jax
      >>> loss_fn = lambda W: jnp.mean(W**2)
      >>> @jax.jit
      ... def step(W, h):
      ...     loss, grads, metrics = hero_jax.hero_value_and_grad(
      ...         loss_fn, h=h, return_metrics=True
      ...     )(W)
      ...     h = hero_jax.schedules.next_h(
      ...         h, loss, metrics.perturbed_loss, untrained_loss=2.0
      ...     )
      ...     return W - 0.1 * grads, h
      >>> W, h = jnp.ones((2, 2)), jnp.float32(0.001)
      >>> for _ in range(3):
      ...     W, h = step(W, h)
      >>> f"{h:.6f}"
      '0.008000'
    """
    _checks.check_nonnegative("h", h)
    _checks.check_positive("share", share)
    if not isinstance(share, jax.core.Tracer) and share > 1:
        raise ValueError(f"share must be at most 1, got {share}.")
    known = not isinstance(untrained_loss, jax.core.Tracer)
    if known and not np.isfinite(untrained_loss):
        raise ValueError(f"untrained_loss must be finite, got {untrained_loss}.")
    if perturbed_loss is None:
        raise TypeError(
            "perturbed_loss must be a number, got None: hero sees no loss. Take the "
            "metrics of hero_value_and_grad(..., return_metrics=True)."
        )
    h = jnp.asarray(h, jnp.promote_types(jnp.result_type(h), jnp.float32))
    rise = jnp.asarray(perturbed_loss - loss, h.dtype)
    allowed = jnp.asarray(share * (untrained_loss - loss), h.dtype)
    uphill = rise > 0.0
    quotient = jnp.where(uphill, allowed / jnp.where(uphill, rise, 1.0), jnp.inf)
    finite = jnp.isfinite(rise) & jnp.isfinite(allowed)
    quotient = jnp.where(finite, jnp.maximum(quotient, 0.0), 0.0)
    near = jnp.clip(jnp.sqrt(quotient), 0.7, 1.1)
    following = jnp.clip(h * jnp.where(quotient > 10.0, 2.0, near), 1e-4, 1.0)
    return jnp.where(h == 0.0, h, following)
