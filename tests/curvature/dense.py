"""Losses whose Hessian is written out, as what the matrix-free functions must give."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from hero_jax import curvature
from tests import problems


@functools.cache
def make():
    """Return the problem of most tests."""
    return Dense()


class Dense:
    """Weights of a small network, a batch, and the derivatives of its loss."""

    def __init__(self):
        self.params = problems.mlp_params()
        self.args = problems.mlp_batch()
        flat, self.unravel = ravel_pytree(self.params)
        self.W = np.asarray(flat)
        derivatives = problems.derivatives(problems.mlp_loss, self.params, *self.args)
        _, self.g, self.H = map(np.asarray, derivatives)
        self.slices = problems.slices(self.params)

    def vector(self, seed=0):
        return np.random.default_rng(seed).normal(size=self.W.size)


def diagonal_loss(eigenvalues):
    """Return a quadratic loss whose Hessian is this diagonal matrix."""
    return lambda w: jnp.sum(jnp.asarray(eigenvalues) * w**2) / 2


def outputs(params, x, labels):
    """Logits of a network with one hidden layer."""
    del labels
    return jnp.tanh(x @ params["in"]) @ params["out"] + params["bias"]


def criterion(logits, x, labels):
    """Mean cross-entropy."""
    del x
    return -jnp.mean(
        jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)
    )


classifier = curvature.ComposedLoss(outputs, criterion)


def classifier_data(size=9):
    """Weights, inputs and labels for the classifier."""
    rng = np.random.default_rng(0)
    params = {
        "in": jnp.asarray(rng.normal(size=(4, 5))),
        "out": jnp.asarray(rng.normal(size=(5, 3))),
        "bias": jnp.asarray(rng.normal(size=3)),
    }
    return params, jnp.asarray(rng.normal(size=(size, 4))), jnp.arange(size) % 3
