"""What the objects of Flax, Equinox and the like hold beside weights.

None of these libraries need be there: one that was not imported has no objects.
"""

import sys
from collections.abc import Mapping
from typing import Any

import chex
import jax


def check_no_state(name: str, tree: chex.ArrayTree) -> None:
    """Raise `ValueError` if Flax NNX variables that are no weights are in the tree."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return
    state = (nnx.BatchStat, nnx.RngState, nnx.Cache, nnx.Intermediate)
    nodes = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, nnx.Variable))
    kinds = sorted({type(x).__name__ for x in nodes if isinstance(x, state)})
    if kinds:
        raise ValueError(
            f"{name} must be weights alone, got Flax NNX variables of the kinds "
            f"{kinds} beside them, which would be perturbed and trained, too. For a "
            "gradient, use hero_jax.nnx.hero_value_and_grad; elsewhere pass the "
            "weights of nnx.split(model, nnx.Param, ...) and merge in the loss."
        )


def check_untied(name: str, tree: chex.ArrayTree) -> None:
    """Raise `ValueError` if NNX modules share a variable, which would become two."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return
    seen: dict[int, str] = {}
    nodes = jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )
    for path, x in nodes:
        at = jax.tree_util.keystr(path)
        if isinstance(x, nnx.Variable) and seen.setdefault(id(x), at) != at:
            raise ValueError(
                f"{name} must not have one Flax NNX variable in two places, which "
                f"would be two variables when quantized: got it at {seen[id(x)]} and "
                f"{at}. Pass nnx.state(model), which has it once; nnx.update or "
                "nnx.merge takes the dequantized state."
            )


def check_no_train_state(name: str, tree: chex.ArrayTree) -> None:
    """Raise `TypeError` for a train state, which has the optimizer's as well."""
    if all(hasattr(tree, field) for field in ("params", "opt_state", "tx")):
        raise TypeError(
            f"{name} must be weights alone, got a {type(tree).__name__}, which holds "
            "the optimizer's state as well: pass state.params."
        )


def check_no_collections(name: str, tree: chex.ArrayTree) -> None:
    """Raise `ValueError` for all of a Flax Linen model's variables."""
    if isinstance(tree, Mapping) and {"params", "batch_stats"} <= {*tree}:
        raise ValueError(
            f"{name} must be weights alone, got Flax variables with the collections "
            f"{sorted(tree)}: BatchNorm's statistics would be perturbed and trained, "
            "too. Pass variables['params'], and batch_stats as another argument."
        )


def has_equinox_module(tree: chex.ArrayTree) -> bool:
    """Whether a module of Equinox is in the tree."""
    equinox = sys.modules.get("equinox")

    def is_module(x: Any) -> bool:
        return equinox is not None and isinstance(x, equinox.Module)

    return any(map(is_module, jax.tree.leaves(tree, is_leaf=is_module)))
