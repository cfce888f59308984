"""Whose loss a method sees: that of all examples, of a device's, or of m at a time."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hero_jax import _axis, _checks, _tree
from hero_jax._typing import AxisName, Grads, Params

SCOPES = ("global", "local")

At = Callable[[Params], Any]
"""`W -> ((loss, auxiliary), gradient)` over the examples of a scope."""


class Method(Protocol):
    """How a loss becomes a gradient: `(at, W, at_part) -> (value, gradient, metrics)`.

    `at_part` evaluates some of the examples only, for a product with the Hessian; it is
    `None` where the product is that of all.
    """

    def __call__(self, at: At, W: Params, at_part: At | None) -> tuple[Any, Grads, Any]:
        """Return `(loss, auxiliary)`, the gradient, and metrics or `None`."""
        ...


class Scope(NamedTuple):
    """The arguments that say whose, checked.

    Attributes:
      axis_name: mapped axis over which the examples are spread, or `None`.
      local: whether each device has a perturbation and a penalty of its own.
      examples: the same for every so many examples; `None` for all of a device.
      batch_argnums: positions of the arguments with a leading axis of examples.
      hvp_examples: examples of the product with the Hessian; `None` for all.
    """

    axis_name: AxisName | None
    local: bool
    examples: int | None = None
    batch_argnums: tuple[int, ...] = ()
    hvp_examples: int | None = None

    @classmethod
    def of(
        cls,
        axis_name: AxisName | None,
        scope: str,
        examples_per_perturbation: int | None = None,
        batch_argnums: int | Sequence[int] | None = None,
        hvp_examples: int | None = None,
    ) -> "Scope":
        """Check the arguments as the user gave them."""
        _axis.check_axis_name(axis_name)
        _checks.check_choice("scope", scope, SCOPES)
        if scope == "local" and axis_name is None:
            raise ValueError(
                "scope='local' is about the devices of an axis and needs axis_name; on "
                "one device use examples_per_perturbation."
            )
        counts = {
            "examples_per_perturbation": examples_per_perturbation,
            "hvp_examples": hvp_examples,
        }
        if all(value is None for value in counts.values()):
            return cls(axis_name, scope == "local")
        for name, value in counts.items():
            if value is not None:
                _checks.check_positive_integer(name, value)
        several = isinstance(batch_argnums, (list, tuple))
        positions: Any = tuple(batch_argnums) if several else (batch_argnums,)  # type: ignore[arg-type]
        for position in positions:
            if isinstance(position, bool) or not isinstance(position, int):
                raise TypeError(
                    "batch_argnums must name the arguments that are examples by their "
                    f"positions, an integer or several, got {batch_argnums!r}."
                )
            if position < 0:
                raise ValueError(f"batch_argnums must be >= 0, got {batch_argnums!r}.")
        return cls(
            axis_name,
            scope == "local",
            examples_per_perturbation,
            positions,
            hvp_examples,
        )


def value_and_grad(
    loss_fn: Callable[..., Any],
    argnums: int | Sequence[int],
    has_aux: bool,
    scope: Scope,
    method: Method,
    return_metrics: bool = False,
) -> Callable[..., Any]:
    """Apply a method to a loss, over the examples of a scope.

    Where the scope is the global batch, the method is given means over the axis, and
    all that it computes of them is the same on all devices. Where it is local, the
    method sees one device's examples, or a few of them at a time, and its results are
    averaged once.

    Args:
      loss_fn: `(*args, **kwargs) -> loss`, or `-> (loss, auxiliary)` with `has_aux`.
      argnums: positions of the weights.
      has_aux: whether there is an auxiliary output.
      scope: see :class:`Scope`.
      method: see :class:`Method`.
      return_metrics: whether to return what the method says besides.

    Returns:
      A function of the arguments of `loss_fn`: loss or `(loss, auxiliary)`, gradient
      and, if asked for, metrics.
    """
    _checks.check_argnums(argnums)
    axis = scope.axis_name

    @functools.wraps(loss_fn)
    def own_loss(*args: Any, **kwargs: Any) -> Any:
        value = loss_fn(*args, **kwargs)
        loss, auxiliary = _checks.loss_and_aux("loss_fn", value, has_aux)
        _axis.check_summed(loss, _differentiated(args, argnums))
        # A mean over the axis, too, is one value for each device.
        return (loss if axis is None else _axis.own(loss, axis)), auxiliary

    base: Any = jax.value_and_grad(own_loss, argnums, has_aux=True)

    def over_device(args: Sequence[Any], kwargs: dict[str, Any]) -> At:
        return lambda W: base(*_replaced(args, argnums, W), **kwargs)

    def over_axis(args: Sequence[Any], kwargs: dict[str, Any]) -> At:
        at_own = over_device(args, kwargs)

        def at(W: Params) -> Any:
            (loss, auxiliary), gradient = at_own(_axis.own(W, axis))
            loss = lax.stop_gradient(loss)  # it needs no tangent on its way
            loss, gradient = _axis.mean((loss, _tree.widen(gradient)), axis)
            return (loss, auxiliary), gradient

        return at

    @functools.wraps(loss_fn)
    def function(*args: Any, **kwargs: Any) -> Any:
        W = _differentiated(args, argnums)
        devices = _axis.size(axis)
        if axis is not None:
            _axis.check_replicated("params", W, axis)
        _check_no_weights(scope.batch_argnums, argnums, len(args))
        chunks, is_global = _split(scope, args, devices)
        if axis is not None and not is_global:
            W = _axis.own(W, axis)

        def apply(over: Any, args: Sequence[Any]) -> tuple[Any, Grads, Any]:
            part = None
            if scope.hvp_examples is not None:
                chosen = _spaced(args, scope.batch_argnums, scope.hvp_examples)
                part = None if chosen is None else over(chosen, kwargs)
            return method(over(args, kwargs), W, part)

        if is_global or chunks is None:
            at = over_axis if axis is not None and is_global else over_device
            value, gradient, metrics = apply(at, args)
        else:
            value, gradient, metrics = _mean_over_chunks(
                lambda chunk: apply(over_device, chunk),
                args,
                scope.batch_argnums,
                chunks,
            )
        loss, auxiliary = value
        if axis is not None and not is_global:
            wide = _tree.widen(gradient)
            loss, gradient, metrics = _axis.mean((loss, wide, metrics), axis)
        gradient = _tree.cast_like(gradient, W)
        if chunks is not None and is_global:
            auxiliary = jax.tree.map(lambda x: jnp.asarray(x)[None], auxiliary)
        value = (loss, auxiliary) if has_aux else loss
        return (value, gradient, metrics) if return_metrics else (value, gradient)

    return function


def _check_no_weights(
    batch_argnums: Sequence[int], argnums: int | Sequence[int], size: int
) -> None:
    positions = (argnums,) if isinstance(argnums, int) else argnums
    if {k % size for k in positions} & {*batch_argnums}:
        raise ValueError(
            f"batch_argnums must not name the weights, which are at argnums={argnums}, "
            f"got {batch_argnums}."
        )


def _split(scope: Scope, args: Sequence[Any], devices: int) -> tuple[int | None, bool]:
    """Return the number of chunks, if any are asked for, and whether all is one."""
    if scope.examples is None:
        return None, not scope.local
    size = _number_of_examples(args, scope.batch_argnums)
    _check_not_sharded(args, scope.batch_argnums)
    if not scope.local and scope.examples == size * devices:
        return 1, True
    if size % scope.examples:
        one_only = scope.local or devices == 1
        whole = "" if one_only else f", or be all {size * devices}"
        raise ValueError(
            f"examples_per_perturbation must divide the {size} examples of a device"
            f"{whole}, got {scope.examples}."
        )
    return size // scope.examples, False


def _spaced(
    args: Sequence[Any], batch_argnums: Sequence[int], count: int
) -> list[Any] | None:
    """Return the arguments with so many evenly spaced examples; `None` if that is all.

    Of an array whose examples are spread over devices, each gives its share.
    """
    size = _number_of_examples(args, batch_argnums)
    leaves = jax.tree.leaves([args[position] for position in batch_argnums])
    for leaf in filter(_axis.is_sharded, leaves):
        if count % _axis.parts(leaf):
            raise ValueError(
                f"hvp_examples must be a multiple of the {_axis.parts(leaf)} parts of "
                f"examples sharded over Explicit axes, got {count}."
            )
    if size % count:
        raise ValueError(
            f"hvp_examples must divide the {size} examples that share a perturbation "
            f"on a device, got {count}."
        )
    if count == size:
        return None
    chosen = list(args)
    for position in batch_argnums:
        chosen[position] = jax.tree.map(
            lambda x: _in_chunks(x, count)[:, 0], args[position]
        )
    return chosen


def _number_of_examples(args: Sequence[Any], batch_argnums: Sequence[int]) -> int:
    named = {}
    for position in batch_argnums:
        if position >= len(args):
            raise TypeError(
                f"batch_argnums asks for positional argument {position}, which was not "
                f"given: got {len(args)} positional arguments. Pass the examples by "
                "position."
            )
        named[position] = args[position]
    return _tree.number_of_examples(named)


def _check_not_sharded(args: Sequence[Any], batch_argnums: Sequence[int]) -> None:
    for position in batch_argnums:
        for path, leaf in jax.tree_util.tree_leaves_with_path(args[position]):
            if _axis.is_sharded(leaf):
                raise ValueError(
                    "examples_per_perturbation takes the parts of a batch in turns, "
                    f"but argument {position}{jax.tree_util.keystr(path)} is sharded "
                    f"over Explicit axes, {jax.typeof(leaf)}: use jax.shard_map, with "
                    "axis_name."
                )


def _mean_over_chunks(
    function: Callable[[Sequence[Any]], tuple[Any, Grads, Any]],
    args: Sequence[Any],
    batch_argnums: Sequence[int],
    chunks: int,
) -> tuple[Any, Grads, Any]:
    """Average loss, gradient and metrics over chunks, one at a time.

    The auxiliary outputs are stacked along a new leading axis.
    """
    batch = [
        jax.tree.map(lambda x: _in_chunks(x, chunks), args[k]) for k in batch_argnums
    ]

    def of_chunk(chunk: Sequence[Any]) -> tuple[Any, Any]:
        replaced = list(args)
        for position, part in zip(batch_argnums, chunk, strict=True):
            replaced[position] = part
        (loss, auxiliary), gradient, metrics = function(replaced)
        return (loss, gradient, metrics), auxiliary

    def step(total: Any, chunk: Sequence[Any]) -> tuple[Any, Any]:
        result, auxiliary = of_chunk(chunk)
        return jax.tree.map(jnp.add, total, _tree.widen(result)), auxiliary

    first = jax.tree.map(lambda x: x[0], batch)
    result, _ = jax.eval_shape(of_chunk, first)
    total, auxiliary = lax.scan(step, jax.tree.map(_zeros_like, result), batch)
    mean = jax.tree.map(
        lambda x, y: (x / jnp.asarray(chunks, x.dtype)).astype(y.dtype), total, result
    )
    loss, gradient, metrics = mean
    return (loss, auxiliary), gradient, metrics


def _in_chunks(x: chex.Array, chunks: int) -> chex.Array:
    return jnp.reshape(x, (chunks, np.shape(x)[0] // chunks, *np.shape(x)[1:]))


def _zeros_like(x: jax.ShapeDtypeStruct) -> chex.Array:
    """Return zeros that vary over the same axes."""
    zeros = jnp.zeros(x.shape, _tree.wide_dtype(x.dtype))
    return _axis.own(zeros, tuple(_axis.varying(x)))


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
    """Return `args` with `params` in the place of the differentiated ones."""
    replaced = list(args)
    positions, values = (
        ((argnums,), (params,)) if isinstance(argnums, int) else (argnums, params)
    )
    for position, value in zip(positions, values, strict=True):
        replaced[position] = value
    return replaced
