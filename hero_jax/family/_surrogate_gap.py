r"""GSAM: sharpness-aware minimization that also closes the gap to the clean loss."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import chex
import optax

from hero_jax import _checks, _loss, _tree
from hero_jax import perturbation as directions
from hero_jax._typing import AxisName, Mask, Perturbation

__all__ = ["gsam_value_and_grad"]


def gsam_value_and_grad(
    loss_fn: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    *,
    h: chex.Numeric,
    alpha: chex.Numeric,
    perturbation: str | Perturbation = "normalized",
    perturb_mask: Mask | None = None,
    has_aux: bool = False,
    axis_name: AxisName | None = None,
) -> Callable[..., Any]:
    r"""Evaluate a loss and the gradient of surrogate-gap guided minimization.

    Sharpness-aware minimization descends the loss at U; this also descends the gap
    `L(U) - L(W)`, by climbing along the part of `grad L(W)` that does not change the
    loss at U:

    .. math::

        \nabla L(U) - \alpha g_\perp, \qquad
        g_\perp = g - \langle g, u \rangle u, \qquad
        u = \frac{\nabla L(U)}{\|\nabla L(U)\|_2}, \qquad U = W + h z

    at twice the cost of the plain gradient. `alpha = 0` is sharpness-aware
    minimization, HERO's with `gamma = 0`.

    Args:
      loss_fn: `(params, *args, **kwargs) -> loss`, or `-> (loss, aux)` with `has_aux`.
      argnums: position of `params` among the arguments, or several of them.
      h: length of the step (rho) in units of z, at least 0; a number or traced. The
        paper lets rho fall along with the learning rate: pass a traced value for that.
      alpha: how much of the gap's gradient, at least 0; likewise.
      perturbation: "normalized" (SAM, the default), "adaptive", "layerwise",
        "gradient", or a function `(params, grads) -> z`.
      perturb_mask: which leaves are perturbed. Default: all.
      has_aux: whether `loss_fn` returns a pair `(loss, aux)`.
      axis_name: axis of the surrounding `pmap`, `shard_map` or `vmap` over which the
        examples are spread, as in :func:`hero_jax.hero_value_and_grad`.

    Returns:
      A function of the arguments of `loss_fn` that returns `(loss, grads)`, or
      `((loss, aux), grads)` with `has_aux`; loss and auxiliary output are those of the
      clean weights. The gradient is NaN everywhere if that at W is not finite.

    Raises:
      TypeError: a weight is complex or integer.
      ValueError: h or alpha is negative or not a scalar, a name is unknown, a mask has
        another structure than the weights, or there is no such axis, or one is missing.

    Example:
      >>> import jax.numpy as jnp
      >>> import hero_jax
      >>> loss = lambda W: W[0] ** 2 + 2 * W[1] ** 2
      >>> value_and_grad = hero_jax.family.gsam_value_and_grad(loss, h=0.1, alpha=0.5)
      >>> value, grads = value_and_grad(jnp.array([1.0, 1.0]))

    References:
      Zhuang et al., `Surrogate Gap Minimization Improves Sharpness-Aware Training
      <https://arxiv.org/abs/2203.08065>`_, 2022, Algorithm 1.
    """
    _checks.check_nonnegative("h", h)
    _checks.check_nonnegative("alpha", alpha)
    direction = directions.resolve(perturbation)
    bind = _loss.of_weights(loss_fn, argnums, has_aux, axis_name)

    @functools.wraps(loss_fn)
    def value_and_grad(*args: Any, **kwargs: Any) -> Any:
        W, at = bind(args, kwargs)
        perturbed = _tree.resolve_mask(
            "perturb_mask", perturb_mask, W, None if _checks.is_zero(h) else "h"
        )
        value, g = _loss.in_full_precision(at, W)
        z = directions.along(direction, W, g, perturbed)
        U = optax.tree.add(_tree.widen(W), _tree.scale(h, z))
        dL = _tree.widen(at(U)[1])
        g = _tree.cast_like(g, dL)
        u = directions.normalized(dL, dL)
        # NaN in g reaches every leaf by way of the inner product.
        # Not by vdot, which refuses weights sharded over an explicit axis.
        along = optax.tree.sum(optax.tree.mul(g, u))
        across = optax.tree.sub(g, _tree.scale(along, u))
        gradient = optax.tree.sub(dL, _tree.scale(alpha, across))
        return _loss.as_of_jax(value, gradient, W, has_aux)

    return value_and_grad
