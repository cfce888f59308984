r"""CURE: the same penalty in the space of inputs, for robustness against attacks."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from hero_jax import _autodiff, _batches, _checks, _tree
from hero_jax._autodiff import FiniteDifference

__all__ = ["cure_value_and_grad"]


def cure_value_and_grad(
    loss_fn: Callable[..., Any],
    argnums: int = 0,
    *,
    input_argnum: int = 1,
    h: chex.Numeric,
    gamma: chex.Numeric,
    hvp: str | FiniteDifference = "exact",
    has_aux: bool = False,
) -> Callable[..., Any]:
    r"""Evaluate a loss and its gradient with a penalty on the curvature in the inputs.

    .. math::

        \nabla_W \left( L(W) + \gamma \frac{1}{B} \sum_{b=1}^{B} \left\|
            \nabla_x \ell(W, x_b + h z_b) - \nabla_x \ell(W, x_b) \right\|_2^2 \right),
        \qquad z_b = \frac{\operatorname{sign}(\nabla_x \ell(W, x_b))}
            {\| \operatorname{sign}(\nabla_x \ell(W, x_b)) \|_2}

    with z held constant. HERO took its penalty from here, and moved it from inputs to
    weights. What it makes robust is the prediction against changed inputs, not against
    changed weights: this is no training for quantization.

    The penalty's gradient needs no second reverse pass: with v the difference of the
    input gradients, it is the derivative of `grad_W L` along v in the inputs, forward
    over reverse, at both points. A step costs four to five plain ones.

    Args:
      loss_fn: `(params, x, *args, **kwargs) -> loss`, or `-> (loss, aux)` with
        `has_aux`; a mean over the B examples of x. The loss of an example should not
        depend on the others, as it does with BatchNorm in training mode: the penalty
        then counts that as well.
      argnums: position of `params` among the arguments.
      input_argnum: position of x, a real floating-point array of shape `[B, ...]` or a
        tree of such. Integers, such as tokens, have no gradient: embed them before.
      h: length of the step in the inputs, in their units, at least 0; a number or a
        traced scalar. The paper increases it to 1.5 for images in [0, 1].
      gamma: strength of the penalty, at least 0; likewise. For S times the loss
        `gamma / S` does the same.
      hvp: how to compute these derivatives: "exact", or
        :class:`hero_jax.FiniteDifference`, in units of the inputs' norm, for losses
        without forward mode.
      has_aux: whether `loss_fn` returns a pair `(loss, aux)`.

    Returns:
      A function of the arguments of `loss_fn` that returns `(loss, grads)`, or
      `((loss, aux), grads)` with `has_aux`; loss and auxiliary output are those of the
      clean inputs, without the penalty. In place of half-precision weights and inputs
      `loss_fn` is given float32 ones; the gradient has the dtypes of the weights. On
      several devices average what comes out: the penalty is a mean over examples, too.

    Raises:
      TypeError: x is of integers.
      ValueError: h or gamma is negative or not a scalar, the two positions are one, or
        x has no axis of examples.

    Example:
      >>> import jax.numpy as jnp
      >>> import hero_jax
      >>> loss = lambda w, x: jnp.mean((x @ w) ** 2)  # its Hessian in x: 2 w w'
      >>> value_and_grad = hero_jax.family.cure_value_and_grad(loss, h=1.0, gamma=0.5)
      >>> w, x = jnp.array([1.0, 0.0]), jnp.array([[2.0, 0.0]])
      >>> value, grads = value_and_grad(w, x)  # z = (1, 0): penalty 4 w_0^4, + 8 w_0^3
      >>> grads
      Array([16.,  0.], dtype=float32)

    References:
      Moosavi-Dezfooli et al., `Robustness via Curvature Regularization, and Vice Versa
      <https://arxiv.org/abs/1811.09716>`_, 2019, Eq. 4-6.
    """
    _checks.check_callable("loss_fn", loss_fn, "(params, x, *args, **kwargs) -> loss")
    _checks.check_nonnegative("h", h)
    _checks.check_nonnegative("gamma", gamma)
    product = _autodiff.resolve(hvp)
    _checks.check_integer("argnums", argnums, 0)
    _checks.check_integer("input_argnum", input_argnum, 0)
    if argnums == input_argnum:
        raise ValueError(f"input_argnum must differ from argnums, got {argnums} twice.")

    def with_aux(*args: Any, **kwargs: Any) -> Any:
        return _checks.loss_and_aux("loss_fn", loss_fn(*args, **kwargs), has_aux)

    both = jax.value_and_grad(with_aux, (argnums, input_argnum), has_aux=True)

    @functools.wraps(loss_fn)
    def value_and_grad(*args: Any, **kwargs: Any) -> Any:
        W, x = args[argnums], args[input_argnum]
        _tree.check_params("params", W)
        _tree.check_real("x", x)
        examples = _batches.number_of_examples(args, [input_argnum], "input_argnum")
        W_wide, x = _tree.widen(W), _tree.widen(x)

        def grads_at(x: chex.ArrayTree) -> tuple[Any, Any]:
            """Return the gradient in the weights; value and gradient in the inputs."""
            given = list(args)
            given[argnums], given[input_argnum] = W_wide, x
            value, (in_weights, in_inputs) = both(*given, **kwargs)
            return in_weights, (value, in_inputs)

        def linearized(x: chex.ArrayTree) -> tuple[Any, Callable[..., Any], Any]:
            return product(grads_at, x, jax.tree.map(lambda _: True, x))

        def returned(value: Any, grads: Any) -> Any:
            loss, auxiliary = value
            return ((loss, auxiliary) if has_aux else loss), _tree.cast_like(grads, W)

        if _checks.is_zero(h) or _checks.is_zero(gamma):
            g, (value, _) = grads_at(x)
            return returned(value, g)
        g, along_at_x, (value, clean) = linearized(x)
        ahead = optax.tree.add(x, _tree.scale(h, _signs_over_norm(clean)))
        _, along_ahead, (_, perturbed) = linearized(ahead)
        v = optax.tree.sub(perturbed, clean)
        # L is a mean, so grad_x of an example's loss is B times that of L.
        penalty = optax.tree.sub(along_ahead(v), along_at_x(v))
        penalty = _tree.scale(2 * jnp.asarray(gamma) * examples, penalty)
        return returned(value, optax.tree.add(g, penalty))

    return value_and_grad


def _signs_over_norm(gradient: chex.ArrayTree) -> chex.ArrayTree:
    """Return the signs, for each example divided by their norm; zero for zero."""
    signs = jax.tree.map(jnp.sign, gradient)

    def squares(x: chex.Array) -> chex.Array:
        return jnp.sum(x**2, axis=tuple(range(1, x.ndim)))

    norm = jnp.sqrt(jax.tree.reduce(operator.add, jax.tree.map(squares, signs)))
    norm = jnp.where(norm == 0, 1, norm)
    return jax.tree.map(
        lambda x: x / norm.astype(x.dtype).reshape(-1, *[1] * (x.ndim - 1)), signs
    )
