"""What moving the weights does to the loss: predicted to second order, and measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Unpack

import chex
import jax
import jax.numpy as jnp

from hero_jax import _programs, _tree
from hero_jax._typing import Mask, Params
from hero_jax.curvature import _lanczos, _layers, _problem, _progress
from hero_jax.curvature._layers import Layers
from hero_jax.curvature._problem import Options, Problem


class Change(NamedTuple):
    """Change of the loss from W to W + d.

    Attributes:
      first_order: `g'd`.
      second_order: `d'Hd / 2`.
      measured: `L(W + d) - L(W)`.
    """

    first_order: chex.Array
    second_order: chex.Array
    measured: chex.Array

    @property
    def predicted(self) -> chex.Array:
        """The quadratic model's change, `g'd + d'Hd / 2`."""
        return self.first_order + self.second_order


class LossChange(NamedTuple):
    """Changes of the loss where all layers move, and where one moves alone.

    Attributes:
      whole: all layers at once.
      layers: path of the leaf, `path[0]`, `path[1]` and so on in a stack, to the change
        that it makes alone.
    """

    whole: Change
    layers: dict[str, Change]


def loss_change(
    loss_fn: Callable[..., Any],
    params: Params,
    moved: Params,
    *args: Any,
    mask: Mask | None = None,
    **options: Unpack[Options],
) -> LossChange:
    r"""Compare the quadratic model of a change of the weights with the loss itself.

    .. math::

        L(W + d) - L(W) \approx g'd + \tfrac{1}{2} d'Hd

    for `W + d = moved`, such as weights quantized by
    :func:`hero_jax.quant.fake_quantize`: for all of them at once, and for each layer by
    itself with the others left at W.

    Args:
      loss_fn: `(params, *args) -> loss`, a mean over examples.
      params: weights W.
      moved: weights with the structure and shapes of `params`.
      *args: further arguments of `loss_fn`.
      mask: which leaves are looked at by themselves; kernels and embeddings by
        default.
      **options: see :class:`Options`.

    Returns:
      The changes, scalars of float32 or wider.

    Raises:
      TypeError: the loss is not a scalar.
      ValueError: `moved` has another structure or shape, an option is out of range, or
        no leaf is chosen.

    Example:
      >>> import jax.numpy as jnp
      >>> from hero_jax import curvature, quant
      >>> params = {"kernel": jnp.array([[-1.0, 0.3, 2.0]])}
      >>> moved = quant.fake_quantize(params, bits=2)  # 0.3 becomes 0
      >>> loss_fn = lambda w: jnp.sum(w["kernel"] ** 2)
      >>> change = curvature.loss_change(loss_fn, params, moved).layers["kernel"]
      >>> print(f"{change.predicted:.2f} {change.measured:.2f}")
      -0.09 -0.09

    References:
      Dong et al., `HAWQ-V2 <https://arxiv.org/abs/1911.03852>`_, 2020, Lemma 1.
    """
    problem = _problem.make(loss_fn, params, args, options)
    _tree.check_vector("moved", moved, params)
    layers = _layers.choose(loss_fn, params, mask, options)
    total = (len(layers.chosen) + 1) * problem.num_batches(args)
    compiled = _programs.compiled(_loss_change, problem, layers)
    whole, each = _progress.listen(
        options.get("progress"), total, compiled, params, moved, args
    )
    names = layers.chosen_names(params)
    return LossChange(whole, dict(zip(names, map(Change, *each), strict=True)))


def _loss_change(
    problem: Problem,
    layers: Layers,
    params: Params,
    moved: Params,
    args: Sequence[Any],
) -> tuple[Change, Change]:
    W = _tree.widen(params)
    d = jax.tree.map(jnp.subtract, _tree.cast_like(moved, W), W)
    loss, g = problem.loss_and_gradient(W, args)
    product = problem.product(W, args)

    def dot(a: Params, b: Params) -> chex.Array:
        products = jax.tree.map(_lanczos.vdot, a, b)
        dtype = _tree.widest_dtype(products)
        return jnp.stack([x.astype(dtype) for x in jax.tree.leaves(products)]).sum()

    def of(d: Params) -> Change:
        U = jax.tree.map(jnp.add, W, d)
        return Change(
            dot(g, d), dot(d, product(d)) / 2.0, problem.mean_loss(U, args) - loss
        )

    each = jax.lax.map(
        lambda number: of(layers.only(number, d)), jnp.array(layers.chosen)
    )
    return of(d), each
