"""Gradient and Hessian-vector product at one point: exact, or by a difference."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp

from hero_jax import _tree
from hero_jax._typing import Grads, Params

GradFn = Callable[[Params], tuple[Grads, Any]]


def gradient_and_hvp(
    grad_fn: GradFn,
    params: Params,
    mask: chex.ArrayTree | None = None,
    way_round: str = "",
) -> tuple[Grads, Callable[[chex.ArrayTree], chex.ArrayTree], Any]:
    """Return the gradient and a function for products with the Hessian.

    Forward-over-reverse: the gradient is linearized, so its value is computed once
    and each product costs about two gradients less than differentiating a scalar of
    the gradient again (reverse-over-reverse), with less memory.

    Args:
      grad_fn: `params -> (gradient, auxiliary)`.
      params: point of evaluation.
      mask: Python bools, a tree like `params`: the leaves in which the vectors are not
        zero. Nothing is computed for the others: where they are the first layers of a
        network, the product is the cheaper for it. Default: all.
      way_round: what to do for a loss without forward mode, for the error.

    Returns:
      The gradient at `params`; the function `v -> H(params) v`, whose argument has
      the structure, shapes and dtypes of `params`; the auxiliary value.
    """
    if mask is None:
        gradient, hvp, auxiliary = _linearize(grad_fn, params, way_round)
        return gradient, hvp, auxiliary
    keep = jax.tree.leaves(mask)
    leaves, structure = jax.tree.flatten(params)

    def chosen(tree: chex.ArrayTree) -> list[Any]:
        return [x for x, k in zip(jax.tree.leaves(tree), keep, strict=True) if k]

    def grad_of_chosen(moving: list[Any]) -> tuple[Grads, Any]:
        rest = iter(moving)
        merged = [next(rest) if k else x for x, k in zip(leaves, keep, strict=True)]
        return grad_fn(jax.tree.unflatten(structure, merged))

    gradient, hvp, auxiliary = _linearize(grad_of_chosen, chosen(params), way_round)
    return gradient, lambda v: hvp(chosen(v)), auxiliary


def _linearize(grad_fn: Callable[[Any], Any], point: Any, way_round: str) -> Any:
    """Linearize a gradient, and say so if it is the forward mode that fails.

    JAX may notice only when a product is computed: within a user's `jit`, when it
    compiles, where nothing can be added to its message.
    """

    @contextlib.contextmanager
    def told() -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if _evaluates(grad_fn, point):
                error.add_note(
                    "hero_jax: the loss has no forward-mode rule (custom_vjp, "
                    "callback, adjoint of a differential equation, ...), which the "
                    f"exact product with its Hessian needs. {way_round}".rstrip()
                )
            raise

    with told():
        gradient, hvp, auxiliary = jax.linearize(grad_fn, point, has_aux=True)
    return gradient, told()(hvp), auxiliary


def _evaluates(grad_fn: Callable[[Any], Any], point: Any) -> bool:
    """Whether a gradient can be taken at all, without the forward mode through it."""
    try:
        jax.eval_shape(lambda point: grad_fn(point)[0], point)
    except Exception:
        return False
    return True


def gradient_and_difference(
    grad_fn: GradFn, params: Params, mask: chex.ArrayTree, step: chex.Numeric
) -> tuple[Grads, Callable[[chex.ArrayTree], chex.ArrayTree], Any]:
    r"""Return the gradient and a function for approximate products with the Hessian.

    .. math::

        H(W) v \approx \frac{\nabla L(W + \epsilon v) - \nabla L(W)}{\epsilon},
        \qquad \epsilon = \mathrm{step} \, \frac{\|W\|}{\|v\|}

    with norms over the leaves that move. A product costs a gradient, and no memory but
    that of one.

    Args:
      grad_fn: `params -> (gradient, auxiliary)`.
      params: point of evaluation, W.
      mask: Python bools, a tree like `params`: the leaves in which v is not zero.
      step: length of the step in units of the weights' norm.

    Returns:
      As :func:`gradient_and_hvp`; the product is zero for `v = 0`.
    """
    gradient, auxiliary = grad_fn(params)
    weights = _tree.global_norm(_tree.select(mask, params))

    def hvp(v: chex.ArrayTree) -> chex.ArrayTree:
        length = _tree.global_norm(v)
        epsilon = jnp.asarray(step, length.dtype) * jnp.where(weights > 0, weights, 1)
        epsilon /= jnp.where(length > 0, length, 1)
        ahead, _ = grad_fn(
            jax.tree.map(lambda w, d: w + epsilon.astype(w.dtype) * d, params, v)
        )
        # Two compiled copies of a gradient may round differently at the same point.
        inverse = jnp.where(length == 0, 0, 1 / epsilon)
        return jax.tree.map(
            lambda a, b: inverse.astype(b.dtype) * (a - b), ahead, gradient
        )

    return gradient, hvp, auxiliary


def in_full_precision(
    value_and_grad: Callable[[Params], tuple[Any, Grads]], W: Params
) -> tuple[Any, Grads]:
    """Evaluate half-precision weights in float32; the value keeps its own dtypes.

    G(U) is about a small difference of gradients, and rounding one of them to
    bfloat16 may exceed it.
    """
    if not _tree.has_half_precision(W):
        return value_and_grad(W)
    expected = jax.eval_shape(lambda W: _floats(value_and_grad(W)[0]), W)
    try:
        value, g = value_and_grad(_tree.widen(W))
    except TypeError as error:
        error.add_note(
            "hero_jax: loss_fn was called with float32 weights in place of "
            "half-precision ones, which would round the perturbation away. Let "
            "loss_fn cast the weights to the dtype that it computes in."
        )
        raise
    leaves, structure = jax.tree.flatten(value)
    leaves = [
        x if like is None else jnp.asarray(x, like.dtype)
        for x, like in zip(leaves, expected, strict=True)
    ]
    return jax.tree.unflatten(structure, leaves), g


def _floats(value: Any) -> list[Any]:
    """Return the floating-point arrays among the leaves, and None for all others."""

    def is_float(x: Any) -> bool:
        return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating)

    return [x if is_float(x) else None for x in jax.tree.leaves(value)]
