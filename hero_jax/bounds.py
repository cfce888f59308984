r"""Theorem 3: how small a perturbation of the weights can raise the loss by c.

For the quadratic model `L(W + d) - L(W) = g'd + d'Hd / 2` with largest Hessian
eigenvalue v >= 0, every d that raises the loss by c is at least as long as these
bounds. Both are written as `2c / (a + sqrt(a^2 + b))`, which equals the paper's
`(a / v) (sqrt(1 + b / a^2) - 1)` without its cancellation and its 0 / 0 at `v = 0`
and `g = 0`.
"""

from __future__ import annotations

import chex
import jax.numpy as jnp

from hero_jax import _checks

__all__ = ["l2_bound", "linf_bound"]


def l2_bound(
    grad_norm: chex.Numeric, max_eigenvalue: chex.Numeric, loss_increase: chex.Numeric
) -> chex.Array:
    r"""Lower bound on `||d||_2` of any perturbation that raises the loss by c.

    .. math::

        \|d^*\|_2 \ge \frac{\|g\|_2}{v}
            \left( \sqrt{1 + \frac{2 v c}{\|g\|_2^2}} - 1 \right)
            = \frac{2 c}{\|g\|_2 + \sqrt{\|g\|_2^2 + 2 v c}}

    It is `c / ||g||` for `v = 0`, `sqrt(2c / v)` for `g = 0` and infinite for both.

    Args:
      grad_norm: `||g||_2` at least 0; arrays broadcast against each other.
      max_eigenvalue: v, largest eigenvalue of the Hessian, at least 0.
      loss_increase: c, at least 0, in units of the loss.

    Returns:
      The bound, in units of the weights.

    Raises:
      ValueError: an argument that is known before tracing is negative or NaN; traced,
        such an argument gives NaN.

    Example:
      >>> import hero_jax
      >>> hero_jax.bounds.l2_bound(0.0, max_eigenvalue=8.0, loss_increase=1.0)
      Array(0.5, dtype=float32, weak_type=True)

    References:
      Yang et al., `HERO <https://arxiv.org/abs/2111.11986>`_, 2021, Theorem 3, Eq. 6.
    """
    _checks.check_all_nonnegative(
        grad_norm=grad_norm, max_eigenvalue=max_eigenvalue, loss_increase=loss_increase
    )
    return _smallest_step(grad_norm, max_eigenvalue, loss_increase)


def linf_bound(
    grad_l1_norm: chex.Numeric,
    max_eigenvalue: chex.Numeric,
    loss_increase: chex.Numeric,
    num_nonzero: chex.Numeric,
) -> chex.Array:
    r"""Lower bound on `||d||_inf` of any perturbation that raises the loss by c.

    .. math::

        \|d^*\|_\infty \ge \frac{|g|_1}{n v}
            \left( \sqrt{1 + \frac{2 n v c}{|g|_1^2}} - 1 \right)
            = \frac{2 c}{|g|_1 + \sqrt{|g|_1^2 + 2 n v c}}

    It is `sqrt(2c / (n v))` for `g = 0` (Eq. 8). Uniform quantization with bins twice
    as wide as the bound raises the loss of the quadratic model by at most c.

    Args:
      grad_l1_norm: `|g|_1`, sum of magnitudes, at least 0; arrays broadcast.
      max_eigenvalue: v, largest eigenvalue of the Hessian, at least 0.
      loss_increase: c, at least 0, in units of the loss.
      num_nonzero: n, how many weights can move: the number of nonzero ones.

    Returns:
      The bound, in units of the weights.

    Raises:
      ValueError: an argument that is known before tracing is negative or NaN; traced,
        such an argument gives NaN.

    Example:
      >>> import hero_jax
      >>> hero_jax.bounds.linf_bound(0.0, 2.0, loss_increase=1.0, num_nonzero=100)
      Array(0.1, dtype=float32, weak_type=True)

    References:
      Yang et al., `HERO <https://arxiv.org/abs/2111.11986>`_, 2021, Theorem 3, Eq. 7-8.
    """
    _checks.check_all_nonnegative(
        grad_l1_norm=grad_l1_norm,
        max_eigenvalue=max_eigenvalue,
        loss_increase=loss_increase,
        num_nonzero=num_nonzero,
    )
    total = _real(num_nonzero) * max_eigenvalue
    return _smallest_step(grad_l1_norm, total, loss_increase)


def _smallest_step(
    slope: chex.Numeric, curvature: chex.Numeric, rise: chex.Numeric
) -> chex.Array:
    """Positive root t of `slope t + curvature t^2 / 2 = rise`; 0 for no rise."""
    slope, curvature, rise = (_real(x) for x in (slope, curvature, rise))
    # The square root of each factor: their product may overflow.
    bend = jnp.sqrt(2.0 * curvature) * jnp.sqrt(rise)
    twice_mean_slope = slope + jnp.hypot(slope, bend)
    denominator = jnp.where(rise == 0.0, 1.0, twice_mean_slope)
    return 2.0 * rise / denominator


def _real(x: chex.Numeric) -> chex.Array:
    """Return `x` in floating point; a Python integer may exceed those of JAX."""
    return jnp.multiply(float(x) if isinstance(x, int) else x, 1.0)
