r"""Many gradients in place of one: for parts of a batch, and for each device.

Sharpness depends on how many examples share a perturbation; a perturbation for every m
of them (m-sharpness) often generalizes better, whatever the method. These two wrap any
function that returns a value and a gradient (:func:`hero_jax.hero_value_and_grad`,
those of :mod:`hero_jax.family` and :mod:`hero_jax.nnx`, `jax.value_and_grad`) and
return one that does the same for each part, and averages the results:

>>> import jax.numpy as jnp
>>> import hero_jax
>>> from hero_jax import parts
>>> def loss_fn(W, x, y):
...     return jnp.mean((x @ W - y) ** 2)
>>> value_and_grad = hero_jax.hero_value_and_grad(loss_fn, h=0.02)
>>> W, x, y = jnp.ones((2, 1)), jnp.ones((8, 2)), jnp.zeros((8, 1))
>>> by_fours = parts.in_parts(value_and_grad, 4, batch_argnums=(1, 2))
>>> loss, grads = by_fours(W, x, y)  # two perturbations, in turn

Half-precision results are averaged in float32. Inside `pmap` and `shard_map`,
`averaged(in_parts(value_and_grad, m, ...), axis_name)` has a perturbation for every m
examples on each device, and one collective operation.

References:
  Foret et al., `SAM <https://arxiv.org/abs/2010.01412>`_, 2021, section 4.1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hero_jax import _axis, _batches, _checks, _tree
from hero_jax._typing import AxisName

__all__ = ["averaged", "in_parts"]

ValueAndGrad = Callable[..., Any]
"""`(*args, **kwargs) -> (value, gradient)`, or with more results behind them."""


def in_parts(
    value_and_grad: ValueAndGrad,
    size: int,
    *,
    batch_argnums: int | Sequence[int],
    has_aux: bool = False,
) -> ValueAndGrad:
    """Evaluate a batch in parts, one after the other, and average.

    Under `jit` of sharded arrays every device would take all parts: use `shard_map`
    and :func:`averaged` there.

    Args:
      value_and_grad: any function that returns `(loss, gradient)`, or
        `((loss, aux), gradient)` with `has_aux`; what comes behind, such as
        :class:`hero_jax.Metrics`, is averaged as well.
      size: number of consecutive examples of a part. It divides the batch.
      batch_argnums: positions of the arguments whose arrays have a first axis of
        examples; all parts share the others, a random key among them.
      has_aux: whether the value is a pair `(loss, aux)`.

    Returns:
      A function like `value_and_grad`. Auxiliary outputs are stacked along a new first
      axis, one entry for each part.

    Raises:
      TypeError: an argument has the wrong type, or one named by `batch_argnums` is not
        given by position.
      ValueError: the examples cannot be divided so, or are sharded over `Explicit`
        axes.
    """
    _checks.check_integer("size", size)
    _checks.positions("batch_argnums", batch_argnums)
    around: Any = getattr(value_and_grad, "around", None)
    if around is not None:  # modules change: not in here, but around this
        return around(  # type: ignore[no-any-return]
            functools.partial(in_parts, size=size, batch_argnums=batch_argnums)
        )

    @functools.wraps(value_and_grad)
    def in_turns(*args: Any, **kwargs: Any) -> Any:
        where = _batches.positions(batch_argnums, len(args))
        _check_not_sharded(args, where)
        examples = _batches.number_of_examples(args, where)
        count, left = divmod(examples, size)
        if left:
            raise ValueError(f"size must divide the {examples} examples, got {size}.")
        stacked, _ = _batches.cut(args, where, size)

        def of_part(part: Sequence[Any]) -> tuple[Any, Any]:
            results = value_and_grad(*_batches.replaced(args, where, part), **kwargs)
            return _without_aux(results, has_aux)

        def add(total: Any, part: Sequence[Any]) -> tuple[Any, Any]:
            result, auxiliary = of_part(part)
            return jax.tree.map(jnp.add, total, _tree.widen(result)), auxiliary

        like, _ = jax.eval_shape(of_part, jax.tree.map(lambda x: x[0], stacked))
        total, auxiliary = lax.scan(add, jax.tree.map(_zeros, like), stacked)
        mean = jax.tree.map(lambda x: x / jnp.asarray(count, x.dtype), total)
        return _with_aux(_tree.cast_like(mean, like), auxiliary, has_aux)

    return in_turns


def averaged(
    value_and_grad: ValueAndGrad, axis_name: AxisName, *, has_aux: bool = False
) -> ValueAndGrad:
    """Evaluate each device's examples by themselves, and average over the devices.

    With :func:`hero_jax.hero_value_and_grad`, each device has a perturbation and a
    penalty of its own. Where its own argument `axis_name` says so, all share one, and
    the result is that of one device with all examples.

    Args:
      value_and_grad: as for :func:`in_parts`, without a mean over this axis.
      axis_name: axis of the surrounding `pmap`, `shard_map` or `vmap`, or several.
      has_aux: whether the value is a pair `(loss, aux)`.

    Returns:
      A function like `value_and_grad`, whose results are the same on all devices; the
      auxiliary output is that of the device.

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: there is no such axis around the call.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from hero_jax import parts
      >>> loss_fn = lambda w, x: jnp.mean((w - x) ** 2)
      >>> step = parts.averaged(jax.value_and_grad(loss_fn), "data")
      >>> x = jnp.array([[1.0], [3.0]])
      >>> jax.vmap(step, in_axes=(None, 0), axis_name="data")(jnp.float32(0), x)[1]
      Array([-4., -4.], dtype=float32)
    """
    if axis_name is None:
        raise TypeError(
            "averaged needs the axis_name of the surrounding pmap, shard_map or vmap, "
            "got None: on one device use in_parts."
        )
    around: Any = getattr(value_and_grad, "around", None)
    if around is not None:
        return around(functools.partial(averaged, axis_name=axis_name))  # type: ignore[no-any-return]

    @functools.wraps(value_and_grad)
    def mean_over_axis(*args: Any, **kwargs: Any) -> Any:
        _axis.size(axis_name)  # raises where there is no such axis
        # shard_map sums the gradient of weights that all devices share.
        own = [_own(x, axis_name) for x in args]
        result, auxiliary = _without_aux(value_and_grad(*own, **kwargs), has_aux)
        _axis.check_own("the gradient", result[1], axis_name)
        mean = _axis.mean(_tree.widen(result), axis_name)
        return _with_aux(_tree.cast_like(mean, result), auxiliary, has_aux)

    return mean_over_axis


def _check_not_sharded(args: Sequence[Any], where: Sequence[int]) -> None:
    for k in where:
        for path, leaf in jax.tree_util.tree_leaves_with_path(args[k]):
            if _axis.is_sharded(leaf):
                raise ValueError(
                    "in_parts takes the parts of a batch in turns, but argument "
                    f"{k}{jax.tree_util.keystr(path)} is sharded over Explicit axes, "
                    f"{jax.typeof(leaf)}: use jax.shard_map, with averaged."
                )


def _without_aux(results: Any, has_aux: bool) -> tuple[Any, Any]:
    """Split what is averaged from the auxiliary output."""
    if not isinstance(results, tuple) or len(results) < 2:
        raise TypeError(
            "value_and_grad must return (value, gradient), got "
            f"{type(results).__name__}: pass jax.value_and_grad(loss_fn), not jax.grad."
        )
    value, *others = results
    loss, auxiliary = _checks.loss_and_aux("value_and_grad", value, has_aux)
    return (loss, *others), auxiliary


def _with_aux(results: Any, auxiliary: Any, has_aux: bool) -> Any:
    loss, *others = results
    return ((loss, auxiliary) if has_aux else loss), *others


def _own(arg: Any, axis_name: AxisName) -> Any:
    """Give the device floating-point leaves of its own; all else stays as it is.

    An argument that is a Python number stays one: the loss may branch on it.
    """

    def of_leaf(x: Any) -> Any:
        if not isinstance(x, (jax.Array, np.ndarray, float)):
            return x
        floating = jnp.issubdtype(jnp.result_type(x), jnp.inexact)
        return _axis.own(x, axis_name) if floating else x

    return arg if type(arg) is float else jax.tree.map(of_leaf, arg)


def _zeros(x: jax.ShapeDtypeStruct) -> chex.Array:
    """Return zeros that vary over the same axes."""
    zeros = jnp.zeros(x.shape, _tree.wide_dtype(x.dtype))
    return _axis.own(zeros, tuple(_axis.varying(x)))
