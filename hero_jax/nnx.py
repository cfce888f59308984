r"""HERO for Flax NNX: modules in place of trees of weights.

>>> import jax.numpy as jnp, optax
>>> from flax import nnx
>>> import hero_jax.nnx
>>> model = nnx.Sequential(
...     nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.tanh, nnx.Linear(8, 1, rngs=nnx.Rngs(1))
... )
>>> optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)
>>> def loss_fn(model, x, y):
...     return jnp.mean((model(x) - y) ** 2)
>>> value_and_grad = hero_jax.nnx.hero_value_and_grad(loss_fn, h=0.02)
>>> @nnx.jit
... def step(model, optimizer, x, y):
...     loss, grads = value_and_grad(model, x, y)  # in place of nnx.value_and_grad
...     optimizer.update(model, grads)
...     return loss
>>> loss = step(model, optimizer, jnp.ones((16, 4)), jnp.ones((16, 1)))

The loss may change variables of modules, as BatchNorm and dropout do. Every pass starts
from the same state, so that all of them drop the same units, and what remains is the
state after the pass at the clean weights. Compile with `nnx.jit`, which hands that
state on: `jax.jit` silently drops it. Other changes of a module (attributes that are
not variables, a switch to evaluation) belong outside the loss, and are refused; weights
that the loss sets are not kept.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp

try:
    from flax import nnx
except ImportError as error:
    raise ImportError(
        'hero_jax.nnx needs flax: pip install "hero_jax[models]".'
    ) from error

from hero_jax import _checks, gradient

__all__ = ["hero_value_and_grad", "over_modules"]

_NODES = (nnx.Pytree if hasattr(nnx, "Pytree") else nnx.Object, nnx.Variable)
"""What NNX passes by reference; the base of modules had another name in Flax 0.11."""


def hero_value_and_grad(
    loss_fn: Callable[..., Any],
    argnums: int = 0,
    *,
    wrt: Any = nnx.Param,
    **options: Any,
) -> Callable[..., Any]:
    """Evaluate a loss of a module and HERO's gradient, for `nnx.value_and_grad`.

    Args:
      loss_fn: `(model, *args, **kwargs) -> loss`, or `-> (loss, aux)` with
        `has_aux=True`.
      argnums: position of the model among the arguments; one only. Several models go
        into one, an `nnx.List`.
      wrt: the variables that are weights, a filter as that of `nnx.Optimizer`.
      **options: as in :func:`hero_jax.hero_value_and_grad`. Masks are trees like
        `nnx.state(model, wrt)`, or functions of it.

    Returns:
      A function of the arguments of `loss_fn`, see :func:`over_modules`.

    Raises:
      TypeError: there is no module at `argnums`, or as
        :func:`hero_jax.hero_value_and_grad`.
      ValueError: `wrt` selects no variable, the loss changes more of the modules than
        variables, or as there.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import hero_jax.nnx
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> value_and_grad = hero_jax.nnx.hero_value_and_grad(
      ...     lambda model, x: jnp.mean(model(x) ** 2), h=0.02
      ... )
      >>> loss, grads = value_and_grad(model, jnp.ones((3, 2)))
      >>> grads["kernel"].shape
      (2, 1)

    References:
      Yang et al., `HERO <https://arxiv.org/abs/2111.11986>`_, 2021, Eq. 11-13.
    """
    method = over_modules(gradient.hero_value_and_grad)
    return method(loss_fn, argnums, wrt=wrt, **options)


def over_modules(
    method: Callable[..., Any],
) -> Callable[..., Callable[..., Any]]:
    """Let a method of this library differentiate losses of modules.

    Args:
      method: such as :func:`hero_jax.family.gsam_value_and_grad`, or
        `jax.value_and_grad`: something that takes a loss, `argnums`, `has_aux` and
        options.

    Returns:
      The same method for losses of modules, `(loss_fn, argnums=0, *, wrt=nnx.Param,
      has_aux=False, **options)`. What it makes of a loss is a function of the loss's
      arguments that returns what the method would. Gradients are an `nnx.State` like
      `nnx.state(model, wrt)`, for `nnx.Optimizer.update`. As a side effect the modules
      among the arguments get the state of the pass at the clean weights: of several
      passes, by :func:`hero_jax.parts.in_parts`, the mean of what is floating-point and
      the first of what is not, such as counts of random keys: do not sow then. In
      `pmap` and `shard_map` that state is each device's own, unless the modules average
      it, as `nnx.BatchNorm(axis_name=...)` does.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import hero_jax.nnx
      >>> gsam = hero_jax.nnx.over_modules(hero_jax.family.gsam_value_and_grad)
      >>> value_and_grad = gsam(
      ...     lambda model, x: jnp.mean(model(x) ** 2), h=0.05, alpha=0.2
      ... )
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> loss, grads = value_and_grad(model, jnp.ones((3, 2)))
    """

    def method_over_modules(
        loss_fn: Callable[..., Any],
        argnums: int = 0,
        *,
        wrt: Any = nnx.Param,
        has_aux: bool = False,
        **options: Any,
    ) -> Callable[..., Any]:
        _checks.check_integer("argnums", argnums, 0)
        method(loss_fn, argnums, has_aux=True, **options)  # checks them
        return _OverModules(
            functools.partial(method, argnums=argnums, has_aux=True, **options),
            loss_fn,
            argnums,
            wrt,
            has_aux,
        )

    return method_over_modules


class _OverModules:
    """A function that returns value and gradient of a loss of modules."""

    def __init__(
        self,
        method: Callable[..., Callable[..., Any]],
        loss_fn: Callable[..., Any],
        argnums: int,
        wrt: Any,
        has_aux: bool,
    ) -> None:
        self._method, self._loss_fn, self._has_aux = method, loss_fn, has_aux
        self._argnums, self._wrt = argnums, wrt
        self._of_model = nnx.filterlib.to_predicate(wrt)
        functools.update_wrapper(self, loss_fn)

    def around(self, combinator: Callable[..., Callable[..., Any]]) -> _OverModules:
        """Apply a combinator of :mod:`hero_jax.parts` to the function of arrays."""

        def method(loss_fn: Callable[..., Any]) -> Callable[..., Any]:
            return combinator(self._method(loss_fn), has_aux=True)

        return _OverModules(
            method, self._loss_fn, self._argnums, self._wrt, self._has_aux
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        _check_model(args, self._argnums)
        nodes, emptied, kwargs = _take_nodes(args, self._argnums, kwargs)
        graph, *(weights, state) = nnx.split(nodes, self._is_weight, ...)
        if not jax.tree.leaves(weights):
            hint = " A string is a tag: nnx.PathContains goes by names."
            raise ValueError(
                f"wrt must select variables of the model, and {self._wrt!r} selects "
                f"none of this {type(nodes[0]).__name__}."
                f"{hint if isinstance(self._wrt, str) else ''}"
            )

        def loss_of_weights(*args: Any, **kwargs: Any) -> Any:
            # Variables can be changed in their own trace only: new ones, in here.
            own_state = jax.tree.map(lambda x: x, state)
            nodes = nnx.merge(graph, {0: args[self._argnums]}, own_state)
            filled, kwargs = _put_nodes(nodes, args, self._argnums, kwargs)
            value = self._loss_fn(*filled, **kwargs)
            loss, auxiliary = _checks.loss_and_aux("loss_fn", value, self._has_aux)
            changed_graph, *(_, changed) = nnx.split(nodes, self._is_weight, ...)
            return loss, (auxiliary, changed, _Static(changed_graph))

        emptied[self._argnums] = weights[0]
        value_and_grad = self._method(loss_of_weights)
        (loss, (auxiliary, changed, static)), *rest = value_and_grad(*emptied, **kwargs)
        same: Any = jax.tree.structure(changed)
        if same == jax.tree.structure(state):  # nothing is sown
            changed = jax.tree.map(_over_parts, changed, state)
        _update(nodes, changed, static.value)
        return ((loss, auxiliary) if self._has_aux else loss), *rest

    def _is_weight(self, path: Any, value: Any) -> bool:
        return bool(path[0] == 0 and self._of_model(path[1:], value))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Hole:
    """Where a module was among the arguments; no leaf of the tree."""

    index: int


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Static:
    """What is known before tracing; no leaf of the tree."""

    value: Any


def _take_nodes(
    args: Sequence[Any], argnums: int, kwargs: dict[str, Any]
) -> tuple[list[Any], list[Any], dict[str, Any]]:
    """Return the modules, the model first, and the arguments with holes for them."""
    nodes = [args[argnums]]

    def take(x: Any) -> Any:
        if not isinstance(x, _NODES):
            return x
        nodes.append(x)
        return _Hole(len(nodes) - 1)

    others = [*args]
    others[argnums] = None
    emptied, kwargs = jax.tree.map(
        take, (others, kwargs), is_leaf=lambda x: isinstance(x, _NODES)
    )
    return nodes, emptied, kwargs


def _put_nodes(
    nodes: list[Any], args: Sequence[Any], argnums: int, kwargs: dict[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    """Return the arguments with the modules in their places."""
    filled, kwargs = jax.tree.map(
        lambda x: nodes[x.index] if isinstance(x, _Hole) else x,
        ([*args], kwargs),
        is_leaf=lambda x: isinstance(x, _Hole),
    )
    filled[argnums] = nodes[0]
    return filled, kwargs


def _over_parts(x: chex.Array, before: chex.Array) -> chex.Array:
    """Return, of stacks over parts, the mean or, of integers and keys, the first."""
    new = jnp.ndim(x) - jnp.ndim(before)
    if not new:
        return x
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    return jnp.mean(x, axis=range(new)) if floating else x[(0,) * new]


def _check_model(args: Sequence[Any], argnums: int) -> None:
    model = args[argnums] if argnums < len(args) else None
    if not isinstance(model, _NODES):
        raise TypeError(
            f"the positional argument {argnums} must be an nnx.Module, got "
            f"{type(model).__name__}. Put several into an nnx.List; for trees of "
            "arrays, as of Flax Linen, use hero_jax.hero_value_and_grad."
        )


def _update(nodes: list[Any], changed: Any, after: Any) -> None:
    """Give modules these variables, or raise if the loss did more to them."""
    try:
        nnx.update(nodes, changed)
        complete = nnx.graphdef(nodes) == after
    except ValueError:  # a variable where something else was
        complete = False
    if not complete:
        raise ValueError(
            "loss_fn must change variables of the modules only, and it changed other "
            "attributes, such as a counter that is no nnx.Variable, one that was None, "
            "or the mode by train() or eval(). Do that outside of the loss, or make it "
            "a variable from the beginning."
        )
