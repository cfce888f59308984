"""What the objects of Flax, Equinox and the like hold besides weights.

None of these libraries is required: one that was not imported has no objects.
"""

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import chex
import jax


def check_weights_alone(name: str, tree: chex.ArrayTree) -> None:
    """Raise `TypeError` for what holds more than weights, which would be trained."""
    nnx = sys.modules.get("flax.nnx")
    beside = None
    if tree is None:
        beside = "None: has an init returned nothing?"
    elif all(hasattr(tree, field) for field in ("params", "opt_state", "tx")):
        beside = (
            f"a {type(tree).__name__}, with the optimizer's state: pass state.params."
        )
    elif isinstance(tree, Mapping) and {"params", "batch_stats"} <= {*tree}:
        beside = (
            f"Flax variables with the collections {sorted(tree)}: BatchNorm's "
            "statistics would be perturbed and trained, too. Pass "
            "variables['params'], and batch_stats as another argument."
        )
    elif nnx is not None:
        state = (nnx.BatchStat, nnx.RngState, nnx.Cache, nnx.Intermediate)
        nodes = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, nnx.Variable))
        if kinds := sorted({type(x).__name__ for x in nodes if isinstance(x, state)}):
            beside = (
                f"Flax NNX variables of the kinds {kinds} beside them, which would be "
                "perturbed and trained, too. For a gradient, use "
                "hero_jax.nnx.hero_value_and_grad; elsewhere pass the weights of "
                "nnx.split(model, nnx.Param, ...) and merge in the loss."
            )
    if beside is not None:
        raise TypeError(f"{name} must be weights alone, got {beside}")


def notes(name: str, tree: chex.ArrayTree) -> Iterator[str]:
    """Say how to make a tree of arrays of one that is none."""
    equinox = sys.modules.get("equinox")
    modules = () if equinox is None else (equinox.Module,)
    if _has(tree, lambda x: isinstance(x, modules)):
        yield (
            f"of an Equinox module {name} are the arrays: params, static = "
            "eqx.partition(model, eqx.is_inexact_array), and the loss calls "
            "eqx.combine(params, static)."
        )
    if _has(tree, lambda x: hasattr(x, "dequantize")):
        yield f"the weights are quantized: pass hero_jax.quant.dequantize({name})."


def check_untied(name: str, tree: chex.ArrayTree) -> None:
    """Raise `ValueError` if NNX modules share a variable, which would become two."""
    nnx = sys.modules.get("flax.nnx")
    variables = () if nnx is None else (nnx.Variable,)
    seen: dict[int, str] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda x: isinstance(x, variables)
    ):
        at = jax.tree_util.keystr(path)
        if isinstance(x, variables) and seen.setdefault(id(x), at) != at:
            raise ValueError(
                f"{name} must not have one Flax NNX variable in two places, which "
                f"would be two variables when quantized: got it at {seen[id(x)]} and "
                f"{at}. Pass nnx.state(model), which has it once; nnx.update or "
                "nnx.merge takes the dequantized state."
            )


def needed(package: str, extra: str, what: str) -> ModuleType:
    """Import an optional package, or raise `ImportError` and say how to get it.

    Args:
      package: name of the module.
      extra: of hero_jax, which brings it.
      what: needs it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"{what} needs {package.partition('.')[0]}: "
            f'pip install "hero_jax[{extra}]".'
        ) from error


def _has(tree: chex.ArrayTree, wanted: Callable[[Any], bool]) -> bool:
    return any(map(wanted, jax.tree.leaves(tree, is_leaf=wanted)))
