"""Sensitivity by the largest eigenvalue of a layer's Hessian: HAWQ and Q-BERT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

import chex
import jax
import jax.numpy as jnp

from hero_jax import _batches, _checks, curvature
from hero_jax._typing import Params
from hero_jax.curvature import _problem
from hero_jax.curvature._probes import deviation
from hero_jax.curvature._problem import Options
from hero_jax.mixed_precision._errors import Errors, mask_of
from hero_jax.mixed_precision._result import (
    Sensitivity,
    by_leaf,
    half_squared_norms,
    times_squared_norms,
)


def eigenvalue(
    loss_fn: Callable[..., Any],
    params: Params,
    errors: Errors,
    *args: Any,
    steps: int = 10,
    key: chex.PRNGKey | None = None,
    **options: Unpack[Options],
) -> Sensitivity:
    r"""HAWQ: `lambda_max(H_ii) ||d_i||^2 / 2`, the worst that an error can do.

    Of a stack, the sum over its layers, with the eigenvalue and error of each.

    Args:
      loss_fn: `(params, *args) -> loss`, a mean over examples.
      params: float weights W.
      errors: of :func:`hero_jax.mixed_precision.weight_errors` at these weights.
      *args: further arguments of `loss_fn`.
      steps: products with the Hessian for each layer.
      key: of the start vectors; `jax.random.key(0)` by default.
      **options: see :class:`hero_jax.curvature.Options`.

    Returns:
      Sensitivities; no standard errors, since Lanczos errs to one side. Its basis
      takes the memory of `steps` copies of all weights.

    Raises:
      TypeError: the loss is not a scalar.
      ValueError: the errors are of other weights.

    Example:
      >>> import jax.numpy as jnp
      >>> from hero_jax import mixed_precision
      >>> params = {"kernel": jnp.array([[-1.0, 0.3, 2.0]])}
      >>> loss_fn = lambda w: jnp.sum(jnp.array([1.0, 2.0, 8.0]) * w["kernel"] ** 2) / 2
      >>> errors = mixed_precision.weight_errors(params, choices=(2,))  # 0.3 becomes 0
      >>> found = mixed_precision.eigenvalue(loss_fn, params, errors)
      >>> print(f"{found.layers['kernel'][0]:.2f}")  # 8 * 0.3^2 / 2
      0.36

    References:
      Dong et al., `HAWQ <https://arxiv.org/abs/1905.03696>`_, 2019, who use
      `lambda ||d||^2` for the order of fine-tuning, and `lambda / n` for that of bits.
    """
    values = curvature.layer_eigenvalues(
        loss_fn,
        params,
        *args,
        mask=mask_of(errors, params),
        steps=steps,
        key=key,
        **options,
    )
    return times_squared_norms(errors, by_leaf(loss_fn, params, options, values))


def eigenvalue_spread(
    loss_fn: Callable[..., Any],
    params: Params,
    errors: Errors,
    *args: Any,
    subsets: int = 10,
    steps: int = 10,
    key: chex.PRNGKey | None = None,
    **options: Unpack[Options],
) -> Sensitivity:
    r"""Q-BERT: `(|mean lambda| + std lambda) ||d_i||^2 / 2` over parts of the data.

    The largest eigenvalue varies with the examples; a layer in which it varies a lot is
    kept at a higher precision.

    Args:
      loss_fn: `(params, *args) -> loss`, a mean over examples.
      params: float weights W.
      errors: of :func:`hero_jax.mixed_precision.weight_errors` at these weights.
      *args: further arguments of `loss_fn`; those with a leading axis of examples, all
        or those that `batch_argnums` names, are cut into equal parts, and what is left
        over is not used.
      subsets: number of parts, at least 2.
      steps: products with the Hessian for each layer and part.
      key: of the start vectors; `jax.random.key(0)` by default.
      **options: see :class:`hero_jax.curvature.Options`.

    Returns:
      Sensitivities, and the standard error of `|mean lambda|`, times `||d_i||^2 / 2`.

    Raises:
      TypeError: the loss is not a scalar.
      ValueError: the errors are of other weights, or there
        are fewer examples than parts.

    References:
      Shen et al., `Q-BERT <https://arxiv.org/abs/1909.05840>`_, 2020, Eq. 2, which
      leaves `||d||^2` out.
    """
    mask = mask_of(errors, params)
    _checks.check_integer("subsets", subsets, 2)
    all_args, where = [None, *args], _problem.batch_positions(args, options)
    examples = _batches.number_of_examples(all_args, where)
    size = examples // subsets
    if size == 0:
        raise ValueError(f"subsets must be at most {examples} examples, got {subsets}.")
    parts, _ = _batches.cut(all_args, where, size)
    found = []
    for k in range(subsets):
        part = jax.tree.map(lambda x, k=k: x[k], parts)
        values = curvature.layer_eigenvalues(
            loss_fn,
            params,
            *_batches.replaced(all_args, where, part)[1:],
            mask=mask,
            steps=steps,
            key=key,
            **options,
        )
        found.append(by_leaf(loss_fn, params, options, values))
    rows = jax.tree.map(lambda *x: jnp.stack(x), *found)  # [subsets, layers]
    values = {path: jnp.abs(x.mean(0)) + deviation(x) for path, x in rows.items()}
    # The layers of a stack see the same examples: their errors are not independent.
    stderr = {}
    for path, half in half_squared_norms(errors, values).items():
        signed = jnp.where(rows[path].mean(0) < 0.0, -rows[path], rows[path])
        summed = (signed[:, None] * half).sum(-1)
        stderr[path] = deviation(summed) / subsets**0.5
    return times_squared_norms(errors, values)._replace(stderr=stderr)
