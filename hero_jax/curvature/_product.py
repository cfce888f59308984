"""Products with the Hessian, and the norm of one along HERO's direction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Unpack

import chex
import jax
import jax.numpy as jnp

from hero_jax import _checks, _programs, _tree, perturbation
from hero_jax._typing import Grads, Params, Perturbation
from hero_jax.curvature import _problem, _progress
from hero_jax.curvature._problem import Options, Problem


def hvp(
    loss_fn: Callable[..., Any],
    params: Params,
    vector: Params,
    *args: Any,
    **options: Unpack[Options],
) -> Params:
    """Multiply the Hessian of a loss, or its Gauss-Newton matrix, by a vector.

    Forward-over-reverse, at the price of two to three gradients.

    Args:
      loss_fn: `(params, *args) -> loss`, a mean over examples.
      params: weights W, at which the Hessian is taken.
      vector: v, with the structure and shapes of `params`.
      *args: further arguments of `loss_fn`.
      **options: see :class:`Options`.

    Returns:
      `H v` with the structure of `params`, float32 or wider.

    Raises:
      TypeError: the loss is not a scalar.
      ValueError: the vector has another structure or shape, an option is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from hero_jax import curvature
      >>> loss_fn = lambda w, scale: scale * jnp.sum(w**3)
      >>> curvature.hvp(loss_fn, jnp.array([1.0, 2.0]), jnp.array([1.0, 1.0]), 2.0)
      Array([12., 24.], dtype=float32)

    References:
      Pearlmutter, `Fast exact multiplication by the Hessian
      <https://doi.org/10.1162/neco.1994.6.1.147>`_, 1994.
    """
    problem = _problem.make(loss_fn, params, args, options)
    _tree.check_vector("vector", vector, params)
    total = problem.num_batches(args)
    compiled = _programs.compiled(_hvp, problem)
    return _progress.listen(
        options.get("progress"), total, compiled, params, vector, args
    )


def loss_and_gradient(
    loss_fn: Callable[..., Any],
    params: Params,
    *args: Any,
    **options: Unpack[Options],
) -> tuple[chex.Array, Grads]:
    """Compute loss and gradient, over a data set where there is a `batch_size`.

    Args:
      loss_fn: `(params, *args) -> loss`, a mean over examples.
      params: weights W.
      *args: further arguments of `loss_fn`.
      **options: see :class:`Options`. `progress` counts batches.

    Returns:
      `L(W)` and `g`, with the structure of `params`, float32 or wider.

    Raises:
      TypeError: the loss is not a scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> from hero_jax import curvature
      >>> loss_fn = lambda w, x: jnp.mean(w * x)
      >>> x = jnp.array([1.0, 2.0, 6.0])
      >>> loss, g = curvature.loss_and_gradient(loss_fn, jnp.ones(()), x, batch_size=2)
      >>> print(loss, g)
      3.0 3.0
    """
    problem = _problem.make(loss_fn, params, args, options)
    total = problem.num_batches(args)
    compiled = _programs.compiled(_loss_and_gradient, problem)
    loss, g = _progress.listen(options.get("progress"), total, compiled, params, args)
    return loss, g


def hessian_norm(
    loss_fn: Callable[..., Any],
    params: Params,
    *args: Any,
    direction: str | Perturbation | Params = "layerwise",
    h: chex.Numeric | None = None,
    **options: Unpack[Options],
) -> chex.Array:
    r"""Measure `||Hz||_2`, the curvature along a direction z (Figure 2a).

    .. math::

        \|Hz\| \approx \frac{\|\nabla L(W + hz) - \nabla L(W)\|}{h}

    The quotient is what HERO's penalty is about, the mean curvature over a step; the
    exact product is its limit for small `h`. They differ a lot where a network has
    learnt every label by heart: at W the cross-entropy is flat there, however steep its
    surroundings.

    Args:
      loss_fn: `(params, *args) -> loss`, a mean over examples.
      params: weights W.
      *args: further arguments of `loss_fn`.
      direction: name of a :mod:`hero_jax.perturbation`, such as "layerwise" (Eq. 11), a
        function `(params, grads) -> z`, or z itself, with the structure of `params`. It
        is not normalized.
      h: step of the finite difference, above 0; the exact product if None.
      **options: see :class:`Options`. The finite difference is always that of the
        gradient.

    Returns:
      The norm, a scalar of float32 or wider.

    Raises:
      TypeError: the loss is not a scalar.
      ValueError: z has another structure or shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from hero_jax import curvature
      >>> loss_fn = lambda w: jnp.sum(w**4) / 12
      >>> w, z = jnp.array([1.0, 2.0]), jnp.array([3.0, 1.0])
      >>> print(curvature.hessian_norm(loss_fn, w, direction=z))  # ||(3, 4)||
      5.0

    References:
      Yang et al., `HERO <https://arxiv.org/abs/2111.11986>`_, 2021, Eq. 11, Figure 2a.
    """
    problem = _problem.make(loss_fn, params, args, options)
    if h is not None:
        _checks.check_positive("h", h)
        if problem.matrix != "hessian":
            raise ValueError(
                "h must be None with matrix='gauss_newton', which no difference of "
                f"gradients gives, got {h}."
            )
    z = None
    direction_fn: Perturbation | None = None
    if callable(direction) or isinstance(direction, str):
        direction_fn = perturbation.resolve(direction)
    else:
        z = direction
        _tree.check_vector("direction", z, params)
    compiled = _programs.compiled(_hessian_norm, problem, direction_fn)
    total = problem.num_batches(args) if h is None else 0
    return _progress.listen(
        options.get("progress"), total, compiled, params, z, h, args
    )


def _loss_and_gradient(
    problem: Problem, params: Params, args: Sequence[Any]
) -> tuple[chex.Array, Grads]:
    return problem.loss_and_gradient(_tree.widen(params), args, problem.reports)


def _hvp(problem: Problem, params: Params, v: Params, args: Sequence[Any]) -> Params:
    W = _tree.widen(params)
    return problem.product(W, args)(_tree.cast_like(v, W))


def _hessian_norm(
    problem: Problem,
    direction_fn: Perturbation | None,
    params: Params,
    z: Params | None,
    h: chex.Numeric | None,
    args: Sequence[Any],
) -> chex.Array:
    W = _tree.widen(params)
    g = None
    if direction_fn is not None:
        _, g = problem.loss_and_gradient(W, args)
        z = direction_fn(W, g)
        _tree.check_vector("the direction's result", z, params)
    z = _tree.cast_like(z, W)
    if h is None:
        return _tree.global_norm(problem.product(W, args)(z))
    if g is None:
        _, g = problem.loss_and_gradient(W, args)
    U = jax.tree.map(lambda w, d: w + jnp.asarray(h, w.dtype) * d, W, z)
    _, dL = problem.loss_and_gradient(U, args)
    norm = _tree.global_norm(jax.tree.map(jnp.subtract, dL, g))
    return norm / jnp.asarray(h, norm.dtype)
