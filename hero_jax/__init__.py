"""HERO: training for generalization and low-bit quantization, in JAX.

>>> import jax, jax.numpy as jnp, optax, hero_jax
>>> x, y = jnp.eye(4), jnp.arange(4.0)
>>> loss_fn = lambda params: jnp.mean((jnp.tanh(x @ params["w"]).sum(1) - y) ** 2)
>>> params = {"w": jnp.full((4, 8), 0.1)}
>>> tx = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.1, momentum=0.9))
>>> state = tx.init(params)
>>> value_and_grad = hero_jax.hero_value_and_grad(loss_fn, h=0.02)
>>> loss, grads = value_and_grad(params)  # in place of jax.value_and_grad
>>> updates, state = tx.update(grads, state, params)
>>> params = optax.apply_updates(params, updates)
>>> quantized = hero_jax.quant.quantize(params, bits=4)
>>> quantized["w"].values.dtype
dtype('uint8')
"""

import importlib
from importlib.metadata import version
from types import ModuleType

from hero_jax import (
    bounds,
    curvature,
    family,
    landscape,
    leaves,
    mixed_precision,
    parts,
    perturbation,
    plot,
    quant,
    schedules,
)
from hero_jax._autodiff import FiniteDifference
from hero_jax.gradient import Metrics, hero_value_and_grad
from hero_jax.transform import HeroState, hero

__version__ = version("hero_jax")

__all__ = [
    "FiniteDifference",
    "HeroState",
    "Metrics",
    "bounds",
    "curvature",
    "family",
    "hero",
    "hero_value_and_grad",
    "landscape",
    "leaves",
    "mixed_precision",
    "parts",
    "perturbation",
    "plot",
    "quant",
    "schedules",
]


def __getattr__(name: str) -> ModuleType:
    """Import `models` and `nnx` when they are asked for: they need Flax."""
    if name in ("models", "nnx"):
        return importlib.import_module(f"hero_jax.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
