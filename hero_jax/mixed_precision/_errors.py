"""What each number of bits does to each layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Unpack

import chex
import jax
import jax.numpy as jnp
import numpy as np

from hero_jax import _tree
from hero_jax._typing import Mask, Params
from hero_jax.quant import fake_quantize
from hero_jax.quant._options import GridOptions, check_choices
from hero_jax.quant._tree import make_plan


class Errors(NamedTuple):
    """The errors of quantization d = Q(W) - W, layer by layer and choice by choice.

    Attributes:
      choices: numbers of bits.
      layers: path of the leaf to its errors, `[len(choices), *shape]`.
    """

    choices: tuple[int, ...]
    layers: dict[str, chex.Array]

    def squared_norms(self) -> dict[str, chex.Array]:
        """Return `||d||^2` of every layer and choice, `[len(choices)]`."""
        return {
            path: jnp.square(jax.vmap(_tree.norm)(d)) for path, d in self.layers.items()
        }


def weight_errors(
    params: Params,
    choices: Sequence[int] = (2, 3, 4, 5, 6, 7, 8),
    *,
    mask: Mask | None = None,
    **options: Unpack[GridOptions],
) -> Errors:
    """Quantize every layer to every number of bits, and take the differences.

    Args:
      params: weights W, all of them floats.
      choices: numbers of bits, 2 to 8 or 16.
      mask: which leaves are quantized, as in :func:`hero_jax.quant.quantize`; empty
        ones are left out.
      **options: see :class:`hero_jax.quant.GridOptions`; `axis=-1, group_size=k` gives
        every k output channels a grid of their own, as in Q-BERT.

    Returns:
      The errors, float32 or wider; as much memory as `len(choices)` times the weights.

    Raises:
      TypeError: an option is unknown.
      ValueError: a mask chooses nothing, or a
        leaf has NaN or infinite entries.

    Example:
      >>> import jax.numpy as jnp
      >>> from hero_jax import mixed_precision
      >>> params = {"kernel": jnp.array([[-1.0, 0.3, 2.0]]), "bias": jnp.ones(3)}
      >>> errors = mixed_precision.weight_errors(params, choices=(2, 4))
      >>> {path: d.shape for path, d in errors.layers.items()}
      {'kernel': (2, 1, 3)}
      >>> [f"{x:.4f}" for x in errors.squared_norms()["kernel"]]
      ['0.0900', '0.0100']

    References:
      Shen et al., `Q-BERT <https://arxiv.org/abs/1909.05840>`_, 2020, Section 3.2.
    """
    choices = check_choices(choices)
    _tree.check_real("params", params)
    plan = make_plan(params, choices[-1], mask, options, lambda _: None)
    if not any(x.size for x in plan.arrays):
        raise ValueError(
            f"mask must choose a leaf of {_tree.unique_leaf_paths(params)} that is not "
            "empty; by default kernels and embeddings are."
        )
    paths = _tree.unique_leaf_paths(params)
    W = [_tree.widen(x) for x in plan.arrays]
    rounded = [
        jax.tree.leaves(fake_quantize(params, bits, mask=mask, **options))
        for bits in choices
    ]
    return Errors(
        choices,
        {
            paths[i]: jnp.stack([_tree.cast_like(q[i], w) - w for q in rounded])
            for i, w in zip(plan.where, W, strict=True)
            if w.size
        },
    )


def positions(errors: Errors, params: Params) -> tuple[int, ...]:
    """Return the positions of the leaves that errors are of, or raise."""
    paths = _tree.unique_leaf_paths(params)
    shapes = dict(zip(paths, map(np.shape, jax.tree.leaves(params)), strict=True))
    for path, d in errors.layers.items():
        count, *shape = np.shape(d)
        if count != len(errors.choices) or shapes.get(path) != tuple(shape):
            raise ValueError(
                f"errors must be of the layers of params, {shapes}, for each of "
                f"{len(errors.choices)} choices, got {path!r} of shape {np.shape(d)}."
            )
    return tuple(paths.index(path) for path in errors.layers)


def mask_of(errors: Errors, params: Params) -> Params:
    """Return which leaves the errors are of."""
    where = positions(errors, params)
    leaves, structure = jax.tree.flatten(params)
    return jax.tree.unflatten(structure, [i in where for i in range(len(leaves))])
