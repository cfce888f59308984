"""How far quantization moves the weights, leaf by leaf."""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from hero_jax import _tree
from hero_jax._typing import Params
from hero_jax.quant import _structure
from hero_jax.quant._tree import dequantize


class QuantizationError(NamedTuple):
    """The error of one leaf.

    Attributes:
      max: largest absolute difference.
      mean_square: mean squared difference.
      snr: signal-to-noise ratio, ten times the decimal logarithm of the mean square of
        the weights over that of the error, in decibels; infinite without an error.
    """

    max: chex.Array
    mean_square: chex.Array
    snr: chex.Array


def quantization_error(
    params: Params, quantized: chex.ArrayTree
) -> dict[str, QuantizationError]:
    """Compare a tree with what quantization made of it.

    Args:
      params: the weights before.
      quantized: the same tree quantized, packed, or rounded by `fake_quantize`.

    Returns:
      Path of the leaf to its error, scalars of float32 or wider, in the order of the
      leaves; zero for those that were not quantized. May be called inside `jax.jit`.

    Raises:
      ValueError: the trees differ in structure or shapes.

    Example:
      >>> import jax.numpy as jnp
      >>> from hero_jax import quant
      >>> params = {"kernel": jnp.array([[-1.0, 0.5, 2.0]]), "bias": jnp.ones(1)}
      >>> error = quant.quantization_error(params, quant.quantize(params, bits=2))
      >>> error["kernel"].max, error["bias"].max
      (Array(0.5, dtype=float32), Array(0., dtype=float32))
    """
    restored = dequantize(quantized)
    _tree.check_same_structure("quantized", restored, "params", params)
    errors = map(_compare, jax.tree.leaves(params), jax.tree.leaves(restored))
    names = _structure.Names()
    paths = [names((path,)) for path in _tree.leaf_paths(params)]
    return dict(zip(paths, errors, strict=True))


@jax.jit
def _compare(x: chex.Array, y: chex.Array) -> QuantizationError:
    wide = _tree.wide_dtype(x.dtype)
    x, difference = x.astype(wide), y.astype(wide) - x.astype(wide)
    n = max(x.size, 1)
    signal, noise = _tree.norm(x), _tree.norm(difference)
    ratio = jnp.where(noise > 0.0, signal / jnp.where(noise > 0.0, noise, 1.0), jnp.inf)
    return QuantizationError(
        max=jnp.max(jnp.abs(difference), initial=0.0),
        mean_square=jnp.square(noise) / n,
        snr=20.0 * jnp.log10(ratio),
    )
