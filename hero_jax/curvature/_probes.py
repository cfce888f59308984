"""Means over random probes of the matrix, with standard errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from hero_jax import _checks
from hero_jax.curvature import _lanczos
from hero_jax.curvature._layers import Layers


class Estimate(NamedTuple):
    """A mean over random probes.

    Attributes:
      value: scalar.
      stderr: standard error of the mean, from the spread of the probes.
    """

    value: chex.Array
    stderr: chex.Array


def deviation(samples: chex.Array) -> chex.Array:
    """Standard deviation over the first axis, whatever the scale of the samples."""
    largest = jnp.abs(samples).max(axis=0)
    scale = jnp.where((largest > 0.0) & jnp.isfinite(largest), largest, 1.0)
    return scale * jnp.std(samples / scale, axis=0, ddof=1)


def check_probes(num_samples: int, deflation: int, size: int) -> None:
    """Check the arguments of estimates from probes of n weights."""
    _checks.check_integer("num_samples", num_samples, 2)
    if deflation:
        with _checks.at("deflation"):
            _lanczos.check_steps(deflation, 0, size)


def estimate(samples: chex.Array, known: chex.Array) -> Estimate:
    """Return `known` plus the mean over the first axis, and the error of that mean."""
    count = jnp.asarray(len(samples), samples.dtype)
    return Estimate(known + samples.mean(0), deviation(samples) / jnp.sqrt(count))


def samples_per_layer(
    flat: _lanczos.Flat,
    layers: Layers,
    matvec: Callable[[chex.Array], chex.Array],
    draw: Callable[[chex.Array], chex.Array],
    count: int,
    deflation: int,
    start_key: chex.PRNGKey,
) -> tuple[chex.Array, chex.Array]:
    """Return `v * (H - B) v` summed over each layer, and the traces of B.

    Args:
      flat: of the weights.
      layers: of the weights.
      matvec: product with H.
      draw: number of the probe to the probe v, `[n]`.
      count: of probes.
      deflation: dimensions of B.
      start_key: of the space of B.

    Returns:
      `[count, layers]` and `[layers]`.
    """

    def per_layer(a: chex.Array, b: chex.Array) -> chex.Array:
        return layers.dots(flat.unflatten(a), flat.unflatten(b))

    start = jax.random.normal(start_key, (flat.size,), flat.dtype)
    nothing = jnp.zeros_like(per_layer(start, start))
    if not deflation:

        def of_probe(j: chex.Array) -> chex.Array:
            v = draw(j)
            return per_layer(v, matvec(v))

        return jax.lax.map(of_probe, jnp.arange(count)), nothing

    # One loop for the space and the probes, since the product is what takes minutes to
    # compile.
    def body(space: _lanczos.Lanczos, j: chex.Array) -> Any:
        v = jnp.where(j < 0, space.v, draw(jnp.maximum(j, 0)))
        product = matvec(v)

        def probed() -> chex.Array:
            Q, T, _ = space.space()
            known = _lanczos.matmul(_lanczos.matmul(T, _lanczos.matmul(Q, v)), Q)
            return per_layer(v, product - known)

        return jax.lax.cond(
            j < 0, lambda: (space.after(product), nothing), lambda: (space, probed())
        )

    space, samples = jax.lax.scan(
        body, _lanczos.Lanczos.begin(start, deflation), jnp.arange(-deflation, count)
    )
    Q, T, _ = space.space()
    known = jax.lax.map(lambda rows: per_layer(*rows), (Q, _lanczos.matmul(T, Q)))
    return samples[deflation:], known.sum(0)
