"""How many bytes each layer takes at each precision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Unpack

import jax

from hero_jax import _tree
from hero_jax._typing import Mask, Params
from hero_jax.quant._options import GridOptions, check_choices
from hero_jax.quant._tree import is_quantized, quantize, size_in_bytes


class LayerSize(NamedTuple):
    """Size of a layer.

    Attributes:
      weights: how many it has.
      bytes: number of bits per weight to bytes, with scales and zero points.
    """

    weights: int
    bytes: dict[int, int]


def layer_sizes(
    params: Params,
    choices: Sequence[int] = (2, 3, 4, 5, 6, 7, 8),
    *,
    mask: Mask | None = None,
    **options: Unpack[GridOptions],
) -> dict[str, LayerSize]:
    """Return the exact size of every layer for every number of bits.

    Args:
      params: weights, or anything with shapes and dtypes.
      choices: numbers of bits.
      mask: which leaves are quantized, as in :func:`hero_jax.quant.quantize`.
      **options: see :class:`hero_jax.quant.GridOptions`; finer grids take more scales.

    Returns:
      Path of the leaf to its size; empty leaves are left out.

    Raises:
      TypeError: as :func:`hero_jax.quant.quantize`.
      ValueError: as :func:`hero_jax.quant.quantize`.

    Example:
      >>> import jax.numpy as jnp
      >>> from hero_jax import mixed_precision
      >>> params = {"kernel": jnp.ones((3, 5)), "bias": jnp.ones(5)}
      >>> mixed_precision.layer_sizes(params, choices=(3, 4))["kernel"]
      LayerSize(weights=15, bytes={3: 14, 4: 16})
      >>> mixed_precision.layer_sizes(params, (3, 4), axis=-1)["kernel"].bytes
      {3: 46, 4: 48}
    """
    choices = check_choices(choices)
    before = jax.tree.leaves(params, is_leaf=is_quantized)
    positions = jax.tree.unflatten(
        jax.tree.structure(params, is_leaf=is_quantized), range(len(before))
    )
    sizes: dict[str, LayerSize] = {}
    for bits in choices:
        tree = jax.eval_shape(
            lambda params, bits=bits: quantize(params, bits, mask=mask, **options),
            params,
        )
        after = jax.tree.leaves(tree, is_leaf=is_quantized)
        paths = _tree.unique_leaf_paths(positions)
        for path, old, new in zip(paths, before, after, strict=True):
            if is_quantized(new) and not is_quantized(old) and new.size:
                size = sizes.setdefault(path, LayerSize(math.prod(new.shape), {}))
                size.bytes[bits] = size_in_bytes(new)
    return sizes
