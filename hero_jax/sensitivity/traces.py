"""Sensitivity by the average trace of a layer's Hessian: HAWQ-V2."""

from collections.abc import Callable
from typing import Any, Unpack

import chex

from hero_jax import curvature
from hero_jax._typing import Params
from hero_jax.curvature.problem import Options
from hero_jax.sensitivity.errors import Errors, positions
from hero_jax.sensitivity.result import Sensitivity, times_squared_norms


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

    All layers are estimated in the same probes: the price does not grow with their
    number.

    Args:
      loss_fn: `(params, *args) -> loss`, a mean over examples.
      params: float weights W.
      errors: of :func:`hero_jax.sensitivity.weight_errors` at these weights.
      *args: further arguments of `loss_fn`.
      num_samples: probes, at least 2, each of them a product with the Hessian.
      deflation: as of :func:`hero_jax.curvature.trace`.
      key: of the probes; `jax.random.key(0)` by default.
      **options: see :class:`hero_jax.curvature.Options`.

    Returns:
      Sensitivities with standard errors. The estimate of a small trace may be negative.

    Raises:
      ImportError: matfree is not installed, and there is deflation.
      TypeError: an argument has another type, or the loss is no scalar.
      ValueError: an argument is out of range, or the errors are of other weights.

    Example:
      >>> import jax.numpy as jnp
      >>> from hero_jax import sensitivity
      >>> params = {"kernel": jnp.array([[-1.0, 0.3, 2.0]])}
      >>> loss_fn = lambda w: jnp.sum(jnp.array([1.0, 2.0, 9.0]) * w["kernel"] ** 2) / 2
      >>> errors = sensitivity.weight_errors(params, choices=(2,))  # 0.3 becomes 0
      >>> found = sensitivity.average_trace(loss_fn, params, errors)
      >>> print(f"{found.layers['kernel'][0]:.2f}")  # (1 + 2 + 9) / 3 * 0.3^2 / 2
      0.18

    References:
      Dong et al., `HAWQ-V2 <https://arxiv.org/abs/1911.03852>`_, 2020.
    """
    positions(errors, params)
    averages = curvature.trace(
        loss_fn,
        params,
        *args,
        num_samples=num_samples,
        deflation=deflation,
        key=key,
        **options,
    ).averages
    return times_squared_norms(
        errors,
        {path: averages[path].value for path in errors.layers},
        {path: averages[path].stderr for path in errors.layers},
    )
