"""A loss and its gradient as functions of the weights alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hero_jax import _axis, _checks, _tree
from hero_jax._typing import AxisName, Grads, Params

At = Callable[[Params], tuple[tuple[Any, Any], Grads]]
"""`W -> ((loss, auxiliary), gradient)`."""


def of_weights(
    loss_fn: Callable[..., Any],
    argnums: int | Sequence[int],
    has_aux: bool,
    axis_name: AxisName | None,
    name: str = "loss_fn",
) -> Callable[[Sequence[Any], dict[str, Any]], tuple[Params, At]]:
    """Return a function of a call's arguments that gives its weights W, and `At`.

    With `axis_name`, loss and gradient are means over the axis, the latter widened.
    """
    signature = "(params, *args, **kwargs) -> loss"
    _checks.check_callable(name, loss_fn, signature)
    _checks.positions("argnums", argnums)

    def own_loss(*args: Any, **kwargs: Any) -> Any:
        value = loss_fn(*args, **kwargs)
        loss, auxiliary = _checks.loss_and_aux(name, value, has_aux)
        _axis.check_summed(loss, _differentiated(args, argnums))
        # A mean over the axis, too, is one value for each device.
        return (loss if axis_name is None else _axis.own(loss, axis_name)), auxiliary

    own_value_and_grad: Any = jax.value_and_grad(own_loss, argnums, has_aux=True)

    def bind(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Params, At]:
        def at_own(W: Params) -> Any:
            return own_value_and_grad(*_replaced(args, argnums, W), **kwargs)

        def at_mean(W: Params) -> Any:
            (loss, auxiliary), gradient = at_own(_axis.own(W, axis_name))
            loss = lax.stop_gradient(loss)  # it needs no tangent on its way
            loss, gradient = _axis.mean((loss, _tree.widen(gradient)), axis_name)
            return (loss, auxiliary), gradient

        W = _differentiated(args, argnums)
        if axis_name is None:
            return W, at_own
        _axis.size(axis_name)  # raises where there is no such axis
        _axis.check_replicated("params", W, axis_name)
        return W, at_mean

    return bind


def in_full_precision(at: At, W: Params) -> tuple[tuple[Any, Any], Grads]:
    """Evaluate half-precision weights in float32; the value keeps its own dtypes.

    G(U) is about a small difference of gradients, and rounding one of them to
    bfloat16 may exceed it.
    """
    if not _tree.has_half_precision(W):
        return at(W)
    expected = jax.eval_shape(lambda W: _floats(at(W)[0]), W)
    try:
        value, g = at(_tree.widen(W))
    except TypeError as error:
        error.add_note(
            "hero_jax: loss_fn was called with float32 weights in place of "
            "half-precision ones, which would round the perturbation away. Let "
            "loss_fn cast the weights to the dtype that it computes in."
        )
        raise
    leaves, structure = jax.tree.flatten(value)
    leaves = [
        x if like is None else jnp.asarray(x, like.dtype)
        for x, like in zip(leaves, expected, strict=True)
    ]
    return jax.tree.unflatten(structure, leaves), g


def as_of_jax(
    value: tuple[Any, Any], gradient: Grads, W: Params, has_aux: bool
) -> tuple[Any, Grads]:
    """Return what `jax.value_and_grad` would: with `has_aux` and the dtypes of W."""
    return (value if has_aux else value[0]), _tree.cast_like(gradient, W)


def _floats(value: Any) -> list[Any]:
    """Return the floating-point arrays among the leaves, and None for all others."""

    def is_float(x: Any) -> bool:
        return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating)

    return [x if is_float(x) else None for x in jax.tree.leaves(value)]


def _differentiated(args: Sequence[Any], argnums: int | Sequence[int]) -> Params:
    """Return the arguments to be differentiated; a tuple if `argnums` is one."""
    try:
        if isinstance(argnums, int):
            params = args[argnums]
            _tree.check_params("params", params)
        else:
            params = tuple(args[i] for i in argnums)
            for i, part in zip(argnums, params, strict=True):
                _tree.check_params(f"argument {i}", part)
    except IndexError:
        raise TypeError(
            f"argnums={argnums} asks for a positional argument that was not given: "
            f"got {len(args)} positional arguments. Pass params by position."
        ) from None
    return params


def _replaced(
    args: Sequence[Any], argnums: int | Sequence[int], params: Params
) -> list[Any]:
    """Return `args` with `params` in place of the differentiated ones."""
    replaced = list(args)
    if isinstance(argnums, int):
        replaced[argnums] = params
    else:
        for position, value in zip(argnums, params, strict=True):
            replaced[position] = value
    return replaced
