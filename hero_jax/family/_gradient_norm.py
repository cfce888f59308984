r"""Penalties on the norm of the gradient: to first order, where HERO's is to second.

.. math::

    \nabla \left( L(W) + s \| \nabla L(W) \| \right) = g + s \, H(W) \, v

with `v = sign(g)` for the L1 norm (GRAD-L1) and `v = g / ||g||` for the Euclidean one
(GNP): one Hessian-vector product at the weights themselves, in the interface of
:func:`hero_jax.hero_value_and_grad`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from hero_jax import _autodiff, _checks, _loss, _tree, perturbation
from hero_jax._typing import AxisName, Grads, Mask, Params

__all__ = ["gnp_value_and_grad", "grad_l1_value_and_grad"]


def grad_l1_value_and_grad(
    loss_fn: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    *,
    strength: chex.Numeric,
    radius: chex.Numeric | None = None,
    penalty_mask: Mask | None = None,
    has_aux: bool = False,
    axis_name: AxisName | None = None,
) -> Callable[..., Any]:
    r"""Evaluate a loss and its gradient with an L1 penalty on the gradient.

    The baseline GRAD-L1: robustness against quantization to first order.

    .. math::

        \nabla \left( L(W) + s \| \nabla L(W) \|_1 \right)
        = g + s \, H(W) \, \mathrm{sign}(g)
        \approx g + \frac{s}{r} \left(
            \nabla L \left( W + r \, \mathrm{sign}(g) \right) - g \right)

    exactly, at about three times the cost of the plain gradient, or with a radius r by
    the difference on the right, at twice the cost.

    Args:
      loss_fn: `(params, *args, **kwargs) -> loss`, or `-> (loss, aux)` with `has_aux`.
      argnums: position of `params` among the arguments, or several of them.
      strength: s, at least 0; a number or a traced scalar.
      radius: r, above 0, by which each weight moves for the difference; a number or a
        traced scalar. Default: the exact product, which needs a loss with forward mode:
        one with a `custom_vjp` or a callback inside may have none.
      penalty_mask: which leaves enter the norm. Default: all.
      has_aux: whether `loss_fn` returns a pair `(loss, aux)`.
      axis_name: axis of the surrounding `pmap`, `shard_map` or `vmap` over which the
        examples are spread, as in :func:`hero_jax.hero_value_and_grad`.

    Returns:
      A function of the arguments of `loss_fn` that returns `(loss, grads)`, or
      `((loss, aux), grads)` with `has_aux`; the loss is without the penalty.

    Raises:
      TypeError: a weight is complex or integer.
      ValueError: the strength is negative, the radius not positive, one of them is not
        a scalar, the mask has another structure than the weights, or there is no such
        axis, or one is missing.

    Example:
      >>> import jax.numpy as jnp
      >>> import hero_jax
      >>> value_and_grad = hero_jax.family.grad_l1_value_and_grad(
      ...     lambda W: jnp.sum(W**2), strength=0.1
      ... )
      >>> value_and_grad(jnp.array([3.0, -1.0]))[1]  # 2 W + 0.1 * 2 * sign(2 W)
      Array([ 6.2, -2.2], dtype=float32)

    References:
      Alizadeh et al., `Gradient L1 Regularization for Quantization Robustness
      <https://arxiv.org/abs/2002.07520>`_, 2020, Eq. 8.
    """
    return _penalized(
        loss_fn,
        argnums,
        has_aux,
        axis_name,
        direction=lambda g: jax.tree.map(jnp.sign, g),
        strength=strength,
        penalty_mask=penalty_mask,
        radius=radius,
    )


def gnp_value_and_grad(
    loss_fn: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    *,
    strength: chex.Numeric,
    radius: chex.Numeric | None = None,
    penalty_mask: Mask | None = None,
    has_aux: bool = False,
    axis_name: AxisName | None = None,
) -> Callable[..., Any]:
    r"""Evaluate a loss and its gradient with a penalty on the gradient's norm.

    .. math::

        \nabla \left( L(W) + s \| \nabla L(W) \|_2 \right)
        = g + s \, H(W) \, \frac{g}{\|g\|_2}
        \approx g + \frac{s}{r} \left(
            \nabla L \left( W + r \frac{g}{\|g\|_2} \right) - g \right)

    exactly, at about three times the cost of the plain gradient, or with a radius r by
    the difference on the right, at twice the cost, as the paper on it does. With
    `strength = radius` the latter is sharpness-aware minimization:
    :func:`hero_jax.hero_value_and_grad` with `perturbation="normalized"`, `h = radius`
    and `gamma = 0`.

    Args:
      loss_fn: `(params, *args, **kwargs) -> loss`, or `-> (loss, aux)` with `has_aux`.
      argnums: position of `params` among the arguments, or several of them.
      strength: s, at least 0; a number or a traced scalar.
      radius: r, above 0, of the difference; a number or a traced scalar. Default: the
        exact product, which needs a loss with forward mode. Where the network has
        rectifiers, a difference over a radius also sees the kinks in it, and the
        product at a point does not.
      penalty_mask: which leaves enter the norm. Default: all.
      has_aux: whether `loss_fn` returns a pair `(loss, aux)`.
      axis_name: axis of the surrounding `pmap`, `shard_map` or `vmap` over which the
        examples are spread, as in :func:`hero_jax.hero_value_and_grad`.

    Returns:
      A function of the arguments of `loss_fn` that returns `(loss, grads)`, or
      `((loss, aux), grads)` with `has_aux`; the loss is without the penalty, which has
      no gradient where that of the loss is zero.

    Raises:
      TypeError: a weight is complex or integer.
      ValueError: the strength is negative, the radius not positive, one of them is not
        a scalar, the mask has another structure than the weights, or there is no such
        axis, or one is missing.

    Example:
      >>> import jax.numpy as jnp
      >>> import hero_jax
      >>> value_and_grad = hero_jax.family.gnp_value_and_grad(
      ...     lambda W: jnp.sum(W**2), strength=0.1
      ... )
      >>> value_and_grad(jnp.array([3.0, -4.0]))[1]  # 2 W + 0.1 * 2 * W / ||W||
      Array([ 6.12, -8.16], dtype=float32)

    References:
      Zhao et al., `Penalizing Gradient Norm for Efficiently Improving Generalization
      <https://arxiv.org/abs/2202.03599>`_, 2022, Eq. 4 and 9.
    """
    return _penalized(
        loss_fn,
        argnums,
        has_aux,
        axis_name,
        direction=lambda g: perturbation.normalized(g, g),
        strength=strength,
        penalty_mask=penalty_mask,
        radius=radius,
    )


def _penalized(
    loss_fn: Callable[..., Any],
    argnums: int | Sequence[int],
    has_aux: bool,
    axis_name: AxisName | None,
    *,
    direction: Callable[[Grads], Params],
    strength: chex.Numeric,
    penalty_mask: Mask | None,
    radius: chex.Numeric | None,
) -> Callable[..., Any]:
    """Return `(loss, g + s H v)` as a function; v is the norm's derivative at g."""
    _checks.check_nonnegative("strength", strength)
    if radius is not None:
        _checks.check_positive("radius", radius)
    bind = _loss.of_weights(loss_fn, argnums, has_aux, axis_name)

    @functools.wraps(loss_fn)
    def value_and_grad(*args: Any, **kwargs: Any) -> Any:
        W, at = bind(args, kwargs)
        off = _checks.is_zero(strength)
        penalized = _tree.resolve_mask(
            "penalty_mask", penalty_mask, W, None if off else "strength"
        )
        if off:
            return _loss.as_of_jax(*at(W), W, has_aux)

        def v(g: Grads) -> Params:
            return _tree.select(penalized, direction(_tree.select(penalized, g)))

        if radius is None:
            value, g, product = _exact(at, W, penalized, v)
        else:
            value, g = _loss.in_full_precision(at, W)
            U = optax.tree.add(_tree.widen(W), _tree.scale(radius, v(g)))
            product = _tree.scale(1 / radius, optax.tree.sub(at(U)[1], g))
        grads = optax.tree.add(
            _tree.widen(g), _tree.scale(strength, _tree.widen(product))
        )
        return _loss.as_of_jax(value, grads, W, has_aux)

    return value_and_grad


def _exact(
    at: _loss.At, W: Params, penalized: chex.ArrayTree, v: Callable[[Grads], Params]
) -> tuple[Any, Grads, Grads]:
    """Return value, gradient g and product `H v(g)`, forward over reverse."""

    def grad_fn(W: Params) -> tuple[Grads, Any]:
        value, gradient = at(W)
        return gradient, value

    g, hvp, value = _autodiff.gradient_and_hvp(
        grad_fn, W, penalized, "Pass radius=..., for a difference of gradients."
    )
    return value, g, hvp(_tree.cast_like(v(g), W))
