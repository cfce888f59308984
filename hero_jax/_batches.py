"""Which arguments hold examples, and how they are cut into batches.

`batch_argnums` are the positions of the arguments whose arrays have a leading axis of
examples, among the arguments of the user's function, as `argnums` counts them in JAX.
"""

from collections.abc import Sequence
from typing import Any

import chex
import jax
import numpy as np

from hero_jax import _checks


def positions(
    batch_argnums: Any, num_args: int, weights: Sequence[int] = ()
) -> tuple[int, ...]:
    """Return the positions of the examples, counted from 0.

    Args:
      batch_argnums: as the user gave them.
      num_args: how many positional arguments there are.
      weights: positions of the weights, which cannot be examples.

    Raises:
      TypeError: they are not positions, or one is of an argument that was not given.
      ValueError: they name the weights.
    """
    found = _checks.positions("batch_argnums", batch_argnums)
    for k in found:
        if not -num_args <= k < num_args:
            raise TypeError(
                f"batch_argnums asks for positional argument {k}, which was not "
                f"given: got {num_args} positional arguments. Pass the examples by "
                "position."
            )
    found = tuple(int(k) % num_args for k in found)
    if {k % num_args for k in weights} & {*found}:
        at = weights[0] if len(weights) == 1 else tuple(weights)
        raise ValueError(
            f"batch_argnums must not name the weights, which are at argnums={at}, "
            f"got {batch_argnums}."
        )
    return found


def number_of_examples(
    args: Sequence[Any], where: Sequence[int], named_by: str = "batch_argnums"
) -> int:
    """Return the length of the leading axis that all examples share.

    Args:
      args: the arguments.
      where: positions of those that are examples.
      named_by: what says which those are, for the error.

    Raises:
      ValueError: a leaf is a scalar, or the lengths differ or are zero.
    """
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves([args[k] for k in where])]
    sizes = {shape[:1] for shape in shapes}
    if len(sizes) != 1 or sizes & {(), (0,)}:
        raise ValueError(
            f"the arguments {tuple(where)}, which {named_by} or its default takes for "
            "examples, must have the same number of them, at least one, along their "
            f"first axis, got the shapes {shapes}."
        )
    return int(shapes[0][0])


def cut(
    args: Sequence[Any], where: Sequence[int], size: int
) -> tuple[list[chex.ArrayTree], list[chex.ArrayTree] | None]:
    """Cut the examples among the arguments into parts of a size.

    Args:
      args: the arguments.
      where: positions of those that are examples, n of them.
      size: examples of a part.

    Returns:
      Trees of arrays `[n // size, size, ...]`, one for each position, as `lax.map` and
      `lax.scan` take them; and of `[n % size, ...]`, or None if nothing is left over.
    """
    examples = [args[k] for k in where]
    parts, left = divmod(number_of_examples(args, where), size)
    rest = None
    if left:
        rest = jax.tree.map(lambda x: x[-left:], examples)
        examples = jax.tree.map(lambda x: x[:-left], examples)
    whole = jax.tree.map(lambda x: x.reshape(parts, size, *x.shape[1:]), examples)
    return whole, rest


def replaced(
    args: Sequence[Any], where: Sequence[int], examples: Sequence[Any]
) -> list[Any]:
    """Return the arguments with other examples in place of theirs."""
    changed = list(args)
    for k, part in zip(where, examples, strict=True):
        changed[k] = part
    return changed
