"""Means over the devices of a mapped axis: one meaning in pmap, shard_map and vmap.

Inside `jax.shard_map` with its default checks, JAX tracks which values vary from device
to device, and sums the gradient with respect to weights that do not over the devices.
Here every device differentiates with respect to weights of its own, so that its
gradient is always that of its own examples, and the mean over the axis that of all.
"""

import math
from collections.abc import Hashable
from typing import Any

import chex
import jax
from jax import lax

from hero_jax._typing import AxisName


def size(axis_name: AxisName | None) -> int:
    """Return the number of devices along an axis, or several; 1 for no axis.

    Raises:
      ValueError: there is no such axis around the caller.
    """
    if axis_name is None:
        return 1
    try:
        return int(lax.psum(1, axis_name))
    except (NameError, ValueError):  # an integer counts axes of the array
        raise ValueError(
            "axis_name must be an axis of the surrounding jax.pmap, jax.shard_map or "
            f"jax.vmap, got {axis_name!r}, which is none. Leave it out where jit "
            "distributes sharded arrays, which needs no axis."
        ) from None


def own(tree: chex.ArrayTree, axis_name: AxisName) -> chex.ArrayTree:
    """Give every device a copy of its own; the values stay the same."""
    if axis_name == ():
        return tree
    tracked = varying(lax.axis_index(axis_name))  # empty but for shard_map's checks

    return jax.tree.map(lambda x: _vary(x, tracked), tree)


def alike(*arrays: chex.Array) -> list[chex.Array]:
    """Let all vary over the axes over which one does, as operands of a primitive do."""
    axes = frozenset[Hashable]().union(*map(varying, arrays))
    return [_vary(x, axes) for x in arrays]


def _vary(x: chex.Array, axes: frozenset[Hashable]) -> chex.Array:
    new = tuple(sorted(axes - varying(x), key=str))
    if not new:
        return x
    if hasattr(lax, "pcast"):
        return lax.pcast(x, new, to="varying")
    return lax.pvary(x, new)  # type: ignore[attr-defined]  # of jax 0.7


def mean(tree: chex.ArrayTree, axis_name: AxisName) -> chex.ArrayTree:
    """Average over the axis, all leaves in one collective operation."""
    return lax.pmean(own(tree, axis_name), axis_name)


def check_replicated(name: str, tree: chex.ArrayTree, axis_name: AxisName) -> None:
    """Raise `ValueError` if a leaf is known to differ from device to device."""
    if any(_varies(x, axis_name) for x in jax.tree.leaves(tree)):
        raise ValueError(
            f"{name} must be the same on all devices of axis {axis_name!r}, got arrays "
            "that vary over it. Pass the replicated ones, by in_specs=P(), without "
            "jax.lax.pcast; weights that are sharded over the axis are for jax.jit."
        )


def check_summed(loss: chex.Array, params: chex.ArrayTree) -> None:
    """Raise `ValueError` if shard_map will sum the gradient of the loss over an axis.

    It does where the loss is known to vary over the axis and no weight is.
    """
    axes = varying(loss).difference(*map(varying, jax.tree.leaves(params)))
    if axes:
        names = ", ".join(sorted(map(repr, axes)))
        raise ValueError(
            f"loss_fn's value varies over the axis {names}, and params do not: the "
            "gradient would be the sum over the devices, and the loss that of one. "
            "Name all such axes in axis_name, or let loss_fn take jax.lax.pmean."
        )


def check_own(name: str, tree: chex.ArrayTree, axis_name: AxisName) -> None:
    """Raise `ValueError` if shard_map is known to have summed the tree over the axis.

    Nothing can be known where it does not keep account of that.
    """
    leaves = jax.tree.leaves(tree)
    tracked = _varies(lax.axis_index(axis_name), axis_name)
    if tracked and leaves and not any(_varies(x, axis_name) for x in leaves):
        raise ValueError(
            f"{name} must be those of each device's own examples, got arrays that do "
            f"not vary over axis {axis_name!r}: inside jax.shard_map the gradient with "
            "respect to replicated weights is the sum over the devices. Differentiate "
            f"at jax.lax.pcast(params, {axis_name!r}, to='varying'), or use "
            "hero_jax.hero_value_and_grad."
        )


def is_sharded(x: chex.Array) -> bool:
    """Whether the type of an array says that it is sharded, over `Explicit` axes."""
    return any(axis is not None for axis in jax.typeof(x).sharding.spec)


def parts(x: chex.Array) -> int:
    """Return into how many parts `Explicit` axes cut the first axis of an array."""
    sharding = jax.typeof(x).sharding
    first = sharding.spec[0] or ()
    names = first if isinstance(first, tuple) else (first,)
    return math.prod(sharding.mesh.shape[name] for name in names)


def _varies(x: Any, axis_name: AxisName) -> bool:
    axes = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    return not varying(x).isdisjoint(axes)


def varying(x: Any) -> frozenset[Hashable]:
    """Return the axes over which shard_map knows a value to vary."""
    kind: Any = jax.typeof(x)
    if hasattr(kind, "manual_axis_type"):
        kind = kind.manual_axis_type
        return frozenset(kind.varying)
    return frozenset(kind.vma)  # before jax 0.10
