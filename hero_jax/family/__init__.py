"""HERO's relatives: penalties on the gradient's norm, the surrogate gap, and inputs.

Each takes a loss and returns a function that replaces `jax.value_and_grad`, like
:func:`hero_jax.hero_value_and_grad`, which is SAM or ASAM by its `perturbation`.

>>> import jax, jax.numpy as jnp
>>> from hero_jax import family
>>> loss_fn = lambda w, x: jnp.mean((x @ w) ** 2) / 2
>>> w, x = jnp.array([0.6, 0.8]), jnp.array([[1.0, 0.0], [0.0, 2.0]])
>>> loss, grads = family.gsam_value_and_grad(loss_fn, h=0.1, alpha=0.2)(w, x)
>>> loss, grads = family.grad_l1_value_and_grad(loss_fn, strength=0.1)(w, x)
>>> [f"{g:.2f}" for g in grads]  # g + 0.1 H sign(g), with H the diagonal of 0.5 and 2
['0.35', '1.80']
"""

from hero_jax.family._gradient_norm import gnp_value_and_grad, grad_l1_value_and_grad
from hero_jax.family._input_curvature import cure_value_and_grad
from hero_jax.family._surrogate_gap import gsam_value_and_grad

__all__ = [
    "cure_value_and_grad",
    "gnp_value_and_grad",
    "grad_l1_value_and_grad",
    "gsam_value_and_grad",
]
