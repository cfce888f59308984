"""Curvature of a loss at trained weights, without ever forming the Hessian.

>>> import jax, jax.numpy as jnp
>>> from hero_jax import curvature
>>> x, y = jax.random.normal(jax.random.key(0), (50, 3)), jnp.arange(50.0) / 50
>>> loss_fn = lambda w, x, y: jnp.mean((jnp.tanh(x @ w) - y) ** 2)
>>> w = jnp.array([0.1, -0.2, 0.3])
>>> top = curvature.top_eigenvalues(loss_fn, w, x, y, batch_size=20)
>>> bool(top.residuals[0] < 1e-5)
True

Every function takes `loss_fn, params, *args`, with a loss that is a mean over examples,
over one batch or, with `batch_size`, over a whole data set on the device; other options
are in :class:`Options`. All are compiled, and work under `jax.jit` and `jax.vmap`. The
program is kept for the next call with the same `loss_fn` and shapes, as long as that
function lives: pass what changes, such as BatchNorm statistics, as arguments.

Layers are named by the paths of leaves, those of a stack, as `nn.scan` and `nn.vmap`
make it, one by one: `blocks/kernel[0]`, `blocks/kernel[1]`. What :mod:`hero_jax.leaves`
does not see, say in `leaves`.

The loss decides what BatchNorm does. With the running statistics it is the loss of the
deployed network; with those of each batch, in training mode, it is the one that
training descended, and the mean is over batches of `batch_size`, each with its own
statistics:

>>> def eval_loss(params, batch_stats, images, labels):
...     variables = {"params": params, "batch_stats": batch_stats}
...     return cross_entropy(model.apply(variables, images, train=False), labels)
>>> def train_loss(params, batch_stats, images, labels):
...     variables = {"params": params, "batch_stats": batch_stats}
...     logits, _ = model.apply(variables, images, train=True, mutable="batch_stats")
...     return cross_entropy(logits, labels)

Then `batch_argnums=(2, 3)` says that images and labels hold examples. Lanczos and
probes are loops inside a program: XLA's own convolutions are slow there on CPUs, those
of :mod:`hero_jax.models` are not.
"""

from hero_jax.curvature._eigenvalues import (
    Eigenpairs,
    layer_eigenvalues,
    top_eigenvalues,
)
from hero_jax.curvature._harm import HarmfulStep, smallest_harmful_step
from hero_jax.curvature._loss_change import Change, LossChange, loss_change
from hero_jax.curvature._probes import Estimate
from hero_jax.curvature._problem import ComposedLoss, Options
from hero_jax.curvature._product import hessian_norm, hvp, loss_and_gradient
from hero_jax.curvature._spectrum import SpectralDensity, spectral_density
from hero_jax.curvature._trace import Trace, layer_traces, trace

__all__ = [
    "Change",
    "ComposedLoss",
    "Eigenpairs",
    "Estimate",
    "HarmfulStep",
    "LossChange",
    "Options",
    "SpectralDensity",
    "Trace",
    "hessian_norm",
    "hvp",
    "layer_eigenvalues",
    "layer_traces",
    "loss_and_gradient",
    "loss_change",
    "smallest_harmful_step",
    "spectral_density",
    "top_eigenvalues",
    "trace",
]
