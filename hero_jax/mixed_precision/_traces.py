"""Sensitivity by the average trace of a layer's Hessian: HAWQ-V2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

import chex

from hero_jax import curvature
from hero_jax._typing import Params
from hero_jax.curvature._problem import Options
from hero_jax.mixed_precision._errors import Errors, mask_of
from hero_jax.mixed_precision._result import Sensitivity, by_leaf, times_squared_norms


def average_trace(
    loss_fn: Callable[..., Any],
    params: Params,
    errors: Errors,
    *args: Any,
    num_samples: int = 32,
    deflation: int = 0,
    key: chex.PRNGKey | None = None,
    **options: Unpack[Options],
) -> Sensitivity:
    r"""HAWQ-V2: `tr(H_ii) / n_i ||d_i||^2 / 2`, the mean over all directions of `d_i`.

    Every layer has probes of its own, so that a small one is as accurate as a large. Of
    a stack, the sum over its layers, with the trace and error of each.

    Args:
      loss_fn: `(params, *args) -> loss`, a mean over examples.
      params: float weights W.
      errors: of :func:`hero_jax.mixed_precision.weight_errors` at these weights.
      *args: further arguments of `loss_fn`.
      num_samples: probes of each layer, at least 2, each a product with the Hessian.
      deflation: as in :func:`hero_jax.curvature.layer_traces`.
      key: of the probes; `jax.random.key(0)` by default.
      **options: see :class:`hero_jax.curvature.Options`.

    Returns:
      Sensitivities with standard errors. The estimate of a small trace may be negative.

    Raises:
      TypeError: the loss is not a scalar.
      ValueError: the errors are of other weights.

    Example:
      >>> import jax.numpy as jnp
      >>> from hero_jax import mixed_precision
      >>> params = {"kernel": jnp.array([[-1.0, 0.3, 2.0]])}
      >>> loss_fn = lambda w: jnp.sum(jnp.array([1.0, 2.0, 9.0]) * w["kernel"] ** 2) / 2
      >>> errors = mixed_precision.weight_errors(params, choices=(2,))  # 0.3 becomes 0
      >>> found = mixed_precision.average_trace(loss_fn, params, errors)
      >>> print(f"{found.layers['kernel'][0]:.2f}")  # (1 + 2 + 9) / 3 * 0.3^2 / 2
      0.18

    References:
      Dong et al., `HAWQ-V2 <https://arxiv.org/abs/1911.03852>`_, 2020.
    """
    traces = curvature.layer_traces(
        loss_fn,
        params,
        *args,
        mask=mask_of(errors, params),
        num_samples=num_samples,
        deflation=deflation,
        key=key,
        **options,
    )
    each = by_leaf(loss_fn, params, options, traces)
    sizes = {p: d[0].size // len(each[p].value) for p, d in errors.layers.items()}
    return times_squared_norms(
        errors,
        {path: each[path].value / n for path, n in sizes.items()},
        {path: each[path].stderr / n for path, n in sizes.items()},
    )
