"""The inputs of a Flax model's layers, seen and changed from outside the model."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp

from hero_jax import _frameworks, _tree

Change = Callable[[Any, str, chex.Array], chex.Array]
"""`(module, path, x) -> x`: what a layer gets in place of its input."""

_make_context = getattr(jax, "make_user_context", None)
_tokens = None if _make_context is None else _make_context(())
"""What is intercepted at the moment, as part of the keys of JAX's caches."""


def weight_layers() -> tuple[type, ...]:
    """Return the layers of Flax Linen that multiply their input by a kernel."""
    nn = _linen()
    return (
        nn.Conv,
        nn.ConvTranspose,
        nn.ConvLocal,
        nn.Dense,
        nn.DenseGeneral,
        nn.Einsum,
    )


@contextlib.contextmanager
def inputs_changed(change: Change, token: object) -> Iterator[None]:
    """Let `change` replace the first argument of every `__call__` of a module.

    Args:
      change: called for every module, from the outside in; a module's own path, keys
        joined by "/", is empty at the root.
      token: stands for `change` in the caches of functions that are jitted inside,
        which would otherwise run as traced before. The same token may come again only
        with a `change` that does the same and holds no tracers of its own call.
    """
    running: set[str] = set()

    def interceptor(
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: Any,
    ) -> Any:
        if context.method_name != "__call__" or context.module.scope is None:
            return call(*args, **kwargs)
        path = "/".join(context.module.path)
        if path in running:  # the method of a parent class: the input is known
            return call(*args, **kwargs)
        running.add(path)
        try:
            if args:
                args = (change(context.module, path, args[0]), *args[1:])
            elif kwargs:
                first = next(iter(inspect.signature(context.orig_method).parameters))
                if first in kwargs:
                    x = change(context.module, path, kwargs[first])
                    kwargs = {**kwargs, first: x}
            return call(*args, **kwargs)
        finally:
            running.discard(path)

    with contextlib.ExitStack() as stack:
        if _tokens is not None:
            stack.enter_context(_tokens((*_tokens.value, token)))
        stack.enter_context(_linen().intercept_methods(interceptor))
        yield


def recorded_inputs(
    function: Callable[..., Any],
    args: Sequence[Any],
    chosen: Callable[[Any, str], bool],
) -> dict[str, list[chex.Array]]:
    """Run a function and return the inputs of layers, one per call of each.

    Args:
      function: runs Flax modules.
      args: its arguments.
      chosen: `(module, path) -> bool`, which layers.

    Raises:
      TypeError: an input is not real floating-point.
      ValueError: an input is known only inside a transformation.
    """
    inputs: dict[str, list[chex.Array]] = {}

    def record(module: Any, path: str, x: chex.Array) -> chex.Array:
        if chosen(module, path):
            _tree.check_real(f"the input of {path!r}", x)
            inputs.setdefault(path, []).append(x)
        return x

    # Inner functions that are jitted hand nothing out: they run as if they were not.
    with jax.disable_jit(), inputs_changed(record, object()):
        function(*args)
    for path, calls in inputs.items():
        try:
            inputs[path] = [jnp.positive(x) for x in calls]
        except jax.errors.UnexpectedTracerError:
            raise ValueError(
                f"the input of {path!r} must be known outside of transformations such "
                "as jax.vmap, nn.scan and nn.remat: run the model without them for "
                "this, if it can be."
            ) from None
    return inputs


def _linen() -> Any:
    """Import Flax Linen, which only this needs."""
    return _frameworks.needed("flax.linen", "models", "looking at activations")
