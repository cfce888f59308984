"""Sensitivity by the quadratic form along the real error, and between layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Unpack

import chex
import jax
import jax.numpy as jnp

from hero_jax import _programs, _tree
from hero_jax._typing import Params
from hero_jax.curvature import _lanczos, _problem, _progress
from hero_jax.curvature._problem import Options, Problem
from hero_jax.mixed_precision._errors import Errors, positions
from hero_jax.mixed_precision._result import Sensitivity


def quadratic(
    loss_fn: Callable[..., Any],
    params: Params,
    errors: Errors,
    *args: Any,
    first_order: bool = False,
    pairwise: bool = False,
    **options: Unpack[Options],
) -> Sensitivity:
    r"""The quadratic form along the real error, `d_i' H_ii d_i / 2`.

    One product with the Hessian for every layer and choice, which leaves nothing to
    estimate. With `pairwise`, also `d_i' H_ij d_j` between any two layers, from the
    same products: the quadratic model of the loss for every allocation,

    .. math::

        L(W + d) - L(W) \approx \sum_i g_i' d_i + \tfrac{1}{2} d_i' H_{ii} d_i
            + \sum_{i<j} d_i' H_{ij} d_j

    Args:
      loss_fn: `(params, *args) -> loss`, a mean over examples.
      params: float weights W.
      errors: of :func:`hero_jax.mixed_precision.weight_errors` at these weights.
      *args: further arguments of `loss_fn`.
      first_order: add `g_i' d_i`, which is not zero where training stopped short of a
        minimum, as weight decay makes it do.
      pairwise: return the interactions, too.
      **options: see :class:`hero_jax.curvature.Options`.

    Returns:
      Sensitivities, exact for the data at hand; negative where the loss is concave.

    Raises:
      TypeError: the loss is not a scalar.
      ValueError: the errors are of other weights.

    Example:
      >>> import jax.numpy as jnp
      >>> from hero_jax import mixed_precision
      >>> a, b = jnp.array([[-1.0, 0.3, 2.0]]), jnp.array([[0.0, 0.4, 1.0]])
      >>> params = {"a": a, "b": b}
      >>> loss_fn = lambda w: jnp.sum((w["a"] + w["b"]) ** 2) / 2
      >>> errors = mixed_precision.weight_errors(params, (2,))  # by -0.3 and -0.067
      >>> found = mixed_precision.quadratic(loss_fn, params, errors, pairwise=True)
      >>> print(f"{found.layers['a'][0]:.3f} {found.interactions[0, 0, 1, 0]:.3f}")
      0.045 0.020
      >>> print(f"{found.total({'a': 2, 'b': 2}):.3f}")  # 0.367^2 / 2
      0.067

    References:
      Dong et al., `HAWQ-V2 <https://arxiv.org/abs/1911.03852>`_, 2020, Lemma 1, before
      the mean over directions is taken.
    """
    problem = _problem.make(loss_fn, params, args, options)
    where = positions(errors, params)
    total = len(where) * len(errors.choices) * problem.num_batches(args)
    compiled = _programs.compiled(_forms, problem, where)
    slopes, forms = _progress.listen(
        options.get("progress"),
        total,
        compiled,
        params,
        [*errors.layers.values()],
        args,
    )
    layers, choices = slopes.shape
    own = forms.reshape(layers * choices, -1).diagonal().reshape(slopes.shape) / 2.0
    rows = own + slopes if first_order else own
    return Sensitivity(
        errors.choices,
        dict(zip(errors.layers, rows, strict=True)),
        interactions=forms if pairwise else None,
    )


def _forms(
    problem: Problem,
    where: tuple[int, ...],
    params: Params,
    errors: list[chex.Array],
    args: Sequence[Any],
) -> tuple[chex.Array, chex.Array]:
    """Return `g'd`, `[layers, choices]`, and `d'Hd`, `[layers, choices] * 2`."""
    W = _tree.widen(params)
    _, g = problem.loss_and_gradient(W, args)
    product = problem.product(W, args)
    choices = len(errors[0])

    def dots(tree: Params) -> chex.Array:
        """Multiply every error by the leaf of its layer, `[layers, choices]`."""
        leaves = jax.tree.leaves(tree)
        dtype = _tree.widest_dtype(W)
        rows = [
            jax.vmap(_lanczos.vdot, in_axes=(0, None))(d, leaves[i])
            for i, d in zip(where, errors, strict=True)
        ]
        return jnp.stack([row.astype(dtype) for row in rows])

    def of(pair: tuple[chex.Array, chex.Array]) -> chex.Array:
        layer, choice = pair
        d = moved_by(layer, choice, where, errors, W)
        return dots(product(d))

    layer, choice = jnp.divmod(jnp.arange(len(where) * choices), choices)
    forms = jax.lax.map(of, (layer, choice))
    return dots(g), forms.reshape(len(where), choices, len(where), choices)


def moved_by(
    layer: chex.Array,
    choice: chex.Array,
    where: tuple[int, ...],
    errors: list[chex.Array],
    W: Params,
) -> Params:
    """Return the tree of one layer's error at one choice, zero elsewhere.

    Args:
      layer: position among `where`, may be traced.
      choice: position among the choices, may be traced.
      where: positions of the leaves that `errors` are of.
      errors: `[choices, ...]` for every layer.
      W: tree whose structure and dtypes the result has.
    """
    leaves, structure = jax.tree.flatten(jax.tree.map(jnp.zeros_like, W))
    for k, (i, d) in enumerate(zip(where, errors, strict=True)):
        leaves[i] = jnp.where(layer == k, d[choice], 0.0).astype(leaves[i].dtype)
    return jax.tree.unflatten(structure, leaves)
