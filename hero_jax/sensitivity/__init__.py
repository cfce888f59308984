r"""How much the loss depends on the precision of each layer, for mixed precision.

>>> import jax, jax.numpy as jnp
>>> from hero_jax import quant, sensitivity
>>> keys = jax.random.split(jax.random.key(0), 3)
>>> params = {"a": jax.random.normal(keys[0], (4, 8)), "b": jnp.linspace(0, 1, 8)}
>>> x, y = jax.random.normal(keys[1], (50, 4)), jax.random.normal(keys[2], (50,))
>>> loss_fn = lambda p, x, y: jnp.mean((jnp.tanh(x @ p["a"]) @ p["b"] - y) ** 2)
>>> errors = sensitivity.weight_errors(params, choices=(2, 3, 4, 8))
>>> found = sensitivity.quadratic(loss_fn, params, errors, x, y)
>>> sizes = quant.layer_sizes(params, found.choices)
>>> best = quant.allocate_bits(found.layers, sizes, 3.5, found.choices)
>>> quantized = quant.quantize(params, best.bits)

Moving the weights of layer i by its quantization error `d_i` raises the loss by

.. math::

    L(W + d_i) - L(W) \approx g_i' d_i + \tfrac{1}{2} d_i' H_{ii} d_i .

At a minimum g is zero. HAWQ bounds the rest from above by the largest eigenvalue of
`H_ii`; HAWQ-V2 takes its mean over all directions, by the average trace; the quadratic
form itself asks for one product with the Hessian for every layer and choice, and knows
what the layers do to each other for the same price.

HAWQ-V2 multiplies the average trace by `||d_i||^2`; HAWQ does so with the eigenvalue
for its order of fine-tuning only, and Q-BERT does not. Here all have the factor
`||d_i||^2 / 2`: changes of the loss, which add up and can be compared with measured
ones.

The measures differ in what they know and what they cost, n being the number of layers
and c that of choices. The c errors of every layer are in memory, and for eigenvalues a
basis of 10 copies of the weights; the rest is that of a Hessian-vector product:

- :func:`eigenvalue` (HAWQ) and :func:`eigenvalue_spread` (Q-BERT): the worst direction
  in the layer; 10 n products with the Hessian.
- :func:`average_trace` (HAWQ-V2): the average direction; 32 n products.
- :func:`quadratic`: the direction of the error itself; c n products, which with
  `pairwise=True` also tell what layers do to each other.
- :func:`measured`: the loss itself, layer by layer; c n evaluations of the loss.
- :func:`greedy_frontier`: the loss itself, layers together; up to c n^2 evaluations.

:func:`activation_problem` makes the same questions out of a network's activations.
"""

from hero_jax.sensitivity.activations import (
    ActivationProblem,
    OffsetLoss,
    activation_problem,
)
from hero_jax.sensitivity.eigenvalues import eigenvalue, eigenvalue_spread
from hero_jax.sensitivity.errors import Errors, weight_errors
from hero_jax.sensitivity.forms import quadratic
from hero_jax.sensitivity.measured import greedy_frontier, measured
from hero_jax.sensitivity.result import Sensitivity
from hero_jax.sensitivity.traces import average_trace

__all__ = [
    "ActivationProblem",
    "Errors",
    "OffsetLoss",
    "Sensitivity",
    "activation_problem",
    "average_trace",
    "eigenvalue",
    "eigenvalue_spread",
    "greedy_frontier",
    "measured",
    "quadratic",
    "weight_errors",
]
