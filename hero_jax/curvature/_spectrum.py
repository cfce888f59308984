"""Density of the Hessian's eigenvalues, by stochastic Lanczos quadrature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Unpack

import chex
import jax
import jax.numpy as jnp

from hero_jax import _checks, _programs, _tree
from hero_jax._typing import Params
from hero_jax.curvature import _lanczos, _problem, _progress
from hero_jax.curvature._probes import Estimate, deviation
from hero_jax.curvature._problem import Options, Problem


class SpectralDensity(NamedTuple):
    """A few weighted points in place of n eigenvalues, from every probe.

    Attributes:
      nodes: `[probes, steps]`; the outer ones are close to eigenvalues.
      weights: share of the eigenvalues that each node stands for, `[probes, steps]`;
        those of a probe add up to 1. Zero where a probe had fewer nodes.
    """

    nodes: chex.Array
    weights: chex.Array

    def moment(self, power: int) -> Estimate:
        """Estimate the mean of so high a power of the eigenvalues, `tr(H^p) / n`."""
        samples = jnp.sum(self.weights * self.nodes**power, axis=-1)
        return _over_probes(jnp.moveaxis(samples, -1, 0))  # several after `jax.vmap`

    def on_grid(self, grid: chex.Array, width: chex.Numeric) -> Estimate:
        """Smooth by Gaussians of standard deviation `width`.

        Args:
          grid: points `[G]`, in units of the eigenvalues.
          width: above 0; a hundredth of the range shows bulk and outliers.

        Returns:
          Share of the eigenvalues per unit, `[G]`, and its standard error. To plot it,
          `value, stderr = density.on_grid(grid, width)`, `plt.plot(grid, value)`.
        """
        _checks.check_positive("width", width)
        on_grid = _on_grid
        for _ in self.nodes.shape[:-2]:  # of `jax.vmap`
            on_grid = jax.vmap(on_grid, in_axes=(0, None, None))
        result: Estimate = on_grid(self, grid, width)
        return result


def spectral_density(
    loss_fn: Callable[..., Any],
    params: Params,
    *args: Any,
    num_samples: int = 4,
    steps: int | None = None,
    key: chex.PRNGKey | None = None,
    **options: Unpack[Options],
) -> SpectralDensity:
    """Estimate how the eigenvalues of the Hessian, or Gauss-Newton matrix, are spread.

    Stochastic Lanczos quadrature: each probe's Lanczos iteration gives a Gauss rule,
    exact for polynomials up to degree `2 steps - 1` of the probe's own measure.

    Args:
      loss_fn: `(params, *args) -> loss`, a mean over examples.
      params: weights W, n in all.
      *args: further arguments of `loss_fn`.
      num_samples: probes.
      steps: products with the matrix for each probe, 1 to n; by default 40, or n. They
        resolve the bulk; the outliers are there after few.
      key: of the probes; `jax.random.key(0)` by default.
      **options: see :class:`Options`.

    Returns:
      Nodes and weights, to be smoothed by `on_grid`.

    Raises:
      TypeError: the loss is not a scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> from hero_jax import curvature
      >>> eigenvalues = jnp.array([0.0, 0.0, 0.0, 1.0])
      >>> loss_fn = lambda w: jnp.sum(eigenvalues * w**2) / 2
      >>> density = curvature.spectral_density(loss_fn, jnp.ones(4), steps=2)
      >>> print(f"{density.moment(1).value:.2f}")  # the mean eigenvalue
      0.25

    References:
      Ubaru et al., `Fast estimation of tr(f(A)) <https://doi.org/10.1137/16M1104974>`_,
      2017; Ghorbani et al., `An investigation into neural net optimization
      <https://arxiv.org/abs/1901.10159>`_, 2019.
    """
    problem = _problem.make(loss_fn, params, args, options)
    _checks.check_integer("num_samples", num_samples)
    size = _tree.size(params)
    steps = _lanczos.check_steps(steps, 40, size)
    total = num_samples * steps * problem.num_batches(args)
    compiled = _programs.compiled(_spectral_density, problem, num_samples, steps)
    key = jax.random.key(0) if key is None else key
    result: SpectralDensity = _progress.listen(
        options.get("progress"), total, compiled, params, key, args
    )
    return result


def _spectral_density(
    problem: Problem,
    num_samples: int,
    steps: int,
    params: Params,
    key: chex.PRNGKey,
    args: Sequence[Any],
) -> SpectralDensity:
    W = _tree.widen(params)
    flat = _lanczos.Flat.of(W)
    matvec = flat.matvec(problem.product(W, args))

    def of_probe(key: chex.PRNGKey) -> tuple[chex.Array, chex.Array]:
        # Signs, all of one length: moments then have the variance of Hutchinson.
        start = jax.random.rademacher(key, (flat.size,), flat.dtype)
        pairs = _lanczos.ritz(_lanczos.krylov(matvec, start, steps))
        weights = jnp.where(pairs.found, pairs.vectors[0] ** 2, 0.0)
        return jnp.where(pairs.found, pairs.values, 0.0), weights

    return SpectralDensity(*jax.lax.map(of_probe, jax.random.split(key, num_samples)))


@jax.jit
def _on_grid(
    density: SpectralDensity, grid: chex.Array, width: chex.Numeric
) -> Estimate:
    dtype = density.nodes.dtype
    grid, width = jnp.asarray(grid, dtype), jnp.asarray(width, dtype)

    def of_probe(probe: tuple[chex.Array, chex.Array]) -> chex.Array:
        nodes, weights = probe
        distance = (grid[:, None] - nodes[None, :]) / width
        bells = jnp.exp(-0.5 * distance**2) / (width * (2.0 * jnp.pi) ** 0.5)
        return _lanczos.matmul(bells, weights)

    return _over_probes(jax.lax.map(of_probe, (density.nodes, density.weights)))


def _over_probes(samples: chex.Array) -> Estimate:
    """Return mean and standard error over the first axis; NaN error of one probe."""
    count = samples.shape[0]
    spread = deviation(samples) if count > 1 else jnp.nan
    return Estimate(samples.mean(0), spread / count**0.5)
