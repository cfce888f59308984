"""Aliases for the types that appear in public signatures."""

from collections.abc import Callable, Hashable, Sequence
from typing import TypeAlias

import chex

Params: TypeAlias = chex.ArrayTree
"""Pytree of real floating-point arrays: the weights `W`."""

Grads: TypeAlias = chex.ArrayTree
"""Pytree with the structure and shapes of `Params`."""

GradFn: TypeAlias = Callable[[Params], Grads]
"""Gradient of the loss as a function of the weights alone."""

Perturbation: TypeAlias = Callable[[Params, Grads], Params]
"""Direction `z(W, g)` in which the weights are perturbed."""

Directions: TypeAlias = str | Perturbation | Sequence[str | Perturbation]
"""One direction or several, by name or as functions."""

Mask: TypeAlias = chex.ArrayTree | Callable[[Params], chex.ArrayTree]
"""Pytree of booleans (or a prefix of one), or a function `params -> mask`."""

AxisName: TypeAlias = Hashable | tuple[Hashable, ...]
"""Name of an axis of `pmap`, `shard_map` or `vmap`, or several of them."""
