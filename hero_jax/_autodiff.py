"""Gradient and Hessian-vector product at one point: exact, or by a difference."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp

from hero_jax import _checks, _tree
from hero_jax._typing import Grads, Params

GradFn = Callable[[Params], tuple[Grads, Any]]
"""`U -> (grad L(U), auxiliary)`."""

Product = Callable[
    [GradFn, Params, chex.ArrayTree],
    tuple[Grads, Callable[[chex.ArrayTree], chex.ArrayTree], Any],
]
"""`(grad_fn, U, mask) -> (grad L(U), v -> H(U) v, auxiliary)`."""


@dataclasses.dataclass(frozen=True)
class FiniteDifference:
    r"""Product with the Hessian by one more gradient, in place of forward mode.

    .. math::

        H(U) v \approx \frac{\nabla L(U + \epsilon v) - \nabla L(U)}{\epsilon},
        \qquad \epsilon = \mathrm{step} \, \frac{\|U\|}{\|v\|}

    The exact product keeps all that a gradient remembers of its layers until it is
    done, and needs a loss with forward mode; this keeps nothing but a few copies of
    the weights. Networks with rectifiers have kinks, and at the best of all steps the
    two differ by 0.6 of the product's norm for ResNet20 in float32, and by several
    times that norm at a hundredth of that step
    (`examples/experiments/speed/product_error.py`). The loss must compute in float32 or
    wider: to bfloat16 the step is nearly nothing.

    Attributes:
      step: length of the step in units of the weights' norm, above 0; a number or a
        traced scalar. The default suits networks with rectifiers in float32. The error
        of smooth ones is in proportion to it, down to rounding; 1e-6 is a good step
        for them in float64.
    """

    step: "chex.Numeric" = 3e-3

    def __post_init__(self) -> None:
        """Check the step."""
        _checks.check_positive("step", self.step)


def resolve(hvp: str | FiniteDifference) -> Product:
    """Return how to compute a gradient and products with the Hessian."""
    if isinstance(hvp, FiniteDifference):
        return functools.partial(gradient_and_difference, step=hvp.step)
    if hvp != "exact":
        raise ValueError(
            "hvp must be 'exact' or a hero_jax.FiniteDifference(step=...), got "
            f"{hvp!r}."
        )
    return functools.partial(
        gradient_and_hvp, way_round="Pass hvp=hero_jax.FiniteDifference()."
    )


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
    """Return the gradient and a function for products by :class:`FiniteDifference`.

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
