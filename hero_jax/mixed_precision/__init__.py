r"""Mixed precision: what each layer's bits cost, and the best bits under a budget.

>>> import jax, jax.numpy as jnp
>>> from hero_jax import mixed_precision, quant
>>> keys = jax.random.split(jax.random.key(0), 3)
>>> params = {"a": jax.random.normal(keys[0], (4, 8)), "b": jnp.linspace(0, 1, 8)}
>>> x, y = jax.random.normal(keys[1], (50, 4)), jax.random.normal(keys[2], (50,))
>>> loss_fn = lambda p, x, y: jnp.mean((jnp.tanh(x @ p["a"]) @ p["b"] - y) ** 2)
>>> errors = mixed_precision.weight_errors(params, choices=(2, 3, 4, 8))
>>> found = mixed_precision.quadratic(loss_fn, params, errors, x, y)
>>> sizes = mixed_precision.layer_sizes(params, found.choices)
>>> best = mixed_precision.allocate_bits(found.layers, sizes, 3.5, found.choices)
>>> quantized = quant.quantize(params, best.bits)

Moving the weights of layer i by its quantization error `d_i` raises the loss by

.. math::

    L(W + d_i) - L(W) \approx g_i' d_i + \tfrac{1}{2} d_i' H_{ii} d_i .

At a minimum g is zero. HAWQ bounds the rest from above by the largest eigenvalue of
`H_ii`; HAWQ-V2 takes its mean over all directions, by the average trace; the quadratic
form itself needs one product with the Hessian for every layer and choice, and also sees
what the layers do to each other for the same price.

HAWQ-V2 multiplies the average trace by `||d_i||^2`; HAWQ does so with the eigenvalue
for its order of fine-tuning only, and Q-BERT does not. Here all have the factor
`||d_i||^2 / 2`: changes of the loss, which add up and can be compared with measured
ones.

The measures differ in what they know and what they cost, for n layers and c choices.
The c errors of every layer are in memory, and for eigenvalues a basis of 10 copies of
the weights; the rest is that of a Hessian-vector product:

- :func:`eigenvalue` (HAWQ) and :func:`eigenvalue_spread` (Q-BERT): the worst direction
  in the layer; 10 n products with the Hessian.
- :func:`average_trace` (HAWQ-V2): the average direction; 32 n products.
- :func:`quadratic`: the direction of the error itself; c n products, which with
  `pairwise=True` also tell what layers do to each other.
- :func:`measured`: the loss itself, layer by layer; c n evaluations of the loss.
- :func:`greedy_frontier`: the loss itself, layers together; up to c n^2 evaluations.

A stack of layers, as `nn.scan` and `nn.vmap` make them, is one array with one number of
bits, and so one entry here: each of its layers with its own grids, error and curvature,
and together the sum. :func:`quadratic` and :func:`measured` move all of them at once.

:func:`activation_problem` asks the same of a network's activations.

With the sizes of :func:`layer_sizes`, :func:`allocate_bits` finds the best allocation
under a budget, :func:`pareto_frontier` those of all budgets, and
:func:`smallest_accurate` the smallest on it that is accurate enough.
"""

from hero_jax.mixed_precision._activations import (
    ActivationProblem,
    OffsetLoss,
    activation_problem,
)
from hero_jax.mixed_precision._allocation import allocate_bits
from hero_jax.mixed_precision._eigenvalues import eigenvalue, eigenvalue_spread
from hero_jax.mixed_precision._errors import Errors, weight_errors
from hero_jax.mixed_precision._forms import quadratic
from hero_jax.mixed_precision._frontier import Frontier, pareto_frontier
from hero_jax.mixed_precision._measured import greedy_frontier, measured
from hero_jax.mixed_precision._result import Sensitivity
from hero_jax.mixed_precision._search import Found, smallest_accurate
from hero_jax.mixed_precision._sizes import LayerSize, layer_sizes
from hero_jax.mixed_precision._table import Allocation
from hero_jax.mixed_precision._traces import average_trace

__all__ = [
    "ActivationProblem",
    "Allocation",
    "Errors",
    "Found",
    "Frontier",
    "LayerSize",
    "OffsetLoss",
    "Sensitivity",
    "activation_problem",
    "allocate_bits",
    "average_trace",
    "eigenvalue",
    "eigenvalue_spread",
    "greedy_frontier",
    "layer_sizes",
    "measured",
    "pareto_frontier",
    "quadratic",
    "smallest_accurate",
    "weight_errors",
]
