"""Quantization of a parameter pytree, leaf by leaf."""

import chex
import jax
import jax.numpy as jnp

from hero_jax import _tree
from hero_jax._typing import Mask, Params
from hero_jax.quant.array import QuantizedArray, check_bits, quantize_array


def quantize(params: Params, bits: int, *, mask: Mask | None = None) -> chex.ArrayTree:
    """Store the weights of a network as integers of a few bits.

    Post-training quantization of the weights alone: no data, no retraining. Every
    chosen leaf gets a grid of its own over its own range
    (:func:`hero_jax.quant.quantize_array`).

    Args:
      params: tree of real floating-point arrays.
      bits: number of bits per weight, 2 to 8.
      mask: which leaves are quantized: tree of bools or function `params -> tree`.
        Default: those of two or more dimensions; biases and normalization scales are
        few and stay as they are.

    Returns:
      `params` with :class:`hero_jax.quant.QuantizedArray` in place of these leaves.

    Raises:
      TypeError: a leaf is not real floating-point, or `bits` is no integer.
      ValueError: `bits` is out of range, the mask has another structure, or a leaf
        has NaN or infinite entries (seen only outside of `jax.jit`).

    Example:
      >>> import jax.numpy as jnp
      >>> import hero_jax
      >>> params = {"kernel": jnp.array([[-1.0, 0.4, 2.0]]), "bias": jnp.zeros(3)}
      >>> quantized = hero_jax.quant.quantize(params, bits=2)
      >>> quantized["kernel"].values
      Array([[0, 1, 3]], dtype=uint8)
      >>> hero_jax.quant.dequantize(quantized)["kernel"]
      Array([[-1.,  0.,  2.]], dtype=float32)
    """
    check_bits(bits)
    _tree.check_real("params", params)
    chosen = _tree.resolve_mask(
        "mask", _tree.weights_only if mask is None else mask, params
    )
    for name, keep, x in zip(
        _tree.leaf_names(params),
        jax.tree.leaves(chosen),
        jax.tree.leaves(params),
        strict=True,
    ):
        if keep and not isinstance(x, jax.core.Tracer) and not jnp.isfinite(x).all():
            raise ValueError(
                f"params must be finite to be quantized: {name} has NaN or infinity."
            )
    return jax.tree.map(
        lambda keep, x: quantize_array(x, bits) if keep else x, chosen, params
    )


def dequantize(tree: chex.ArrayTree) -> Params:
    """Return the tree with the quantized leaves turned back into float arrays.

    Args:
      tree: as returned by :func:`quantize`; may be called inside `jax.jit`, where the
        weights stay integers in memory until they are used.

    Returns:
      The tree of float arrays, with the structure and dtypes that were quantized.
    """
    return jax.tree.map(
        lambda x: x.dequantize() if isinstance(x, QuantizedArray) else x,
        tree,
        is_leaf=lambda x: isinstance(x, QuantizedArray),
    )
