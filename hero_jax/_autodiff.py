"""Gradient and Hessian-vector product at one point, sharing one linearization."""

from collections.abc import Callable
from typing import Any

import chex
import jax

from hero_jax._typing import Grads, Params


def gradient_and_hvp(
    grad_fn: Callable[[Params], tuple[Grads, Any]], params: Params
) -> tuple[Grads, Callable[[chex.ArrayTree], chex.ArrayTree], Any]:
    """Return the gradient and a function for products with the Hessian.

    Forward-over-reverse: the gradient is linearized, so its value is computed once
    and each product costs about two gradients less than differentiating a scalar of
    the gradient again (reverse-over-reverse), with less memory.

    Args:
      grad_fn: `params -> (gradient, auxiliary)`.
      params: point of evaluation.

    Returns:
      The gradient at `params`; the function `v -> H(params) v`, whose argument has
      the structure, shapes and dtypes of `params`; the auxiliary value.
    """
    gradient, hvp, auxiliary = jax.linearize(grad_fn, params, has_aux=True)
    return gradient, hvp, auxiliary
