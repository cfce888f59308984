"""How much the loss depends on the precision of each layer."""

from hero_jax.sensitivity.errors import Errors, weight_errors

__all__ = ["Errors", "weight_errors"]
