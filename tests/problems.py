"""Losses with known derivatives, and HERO written out densely in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

DIRECTIONS = ("layerwise", "adaptive", "normalized")


def quadratic(eigenvalues, seed=0):
    """Return a symmetric matrix with these eigenvalues and a random basis."""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.normal(size=(len(eigenvalues),) * 2))
    return basis * np.asarray(eigenvalues) @ basis.T


def mlp_params(seed=0, dtype=jnp.float64):
    """Weights of a network with two hidden layers: kernels, biases and a scalar."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    return {
        "hidden": [
            {"kernel": draw(3, 5), "bias": draw(5)},
            {"kernel": draw(5, 4), "bias": draw(4)},
        ],
        "out": {"kernel": draw(4, 2), "temperature": draw()},
    }


def mlp_batch(seed=1, dtype=jnp.float64, size=7):
    """Inputs and targets."""
    rng = np.random.default_rng(seed)
    return (
        jnp.asarray(rng.normal(size=(size, 3)), dtype),
        jnp.asarray(rng.normal(size=(size, 2)), dtype),
    )


def mlp_loss(params, x, y):
    """Mean squared error of a smooth network."""
    for layer in params["hidden"]:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    x = x @ params["out"]["kernel"] * jnp.exp(params["out"]["temperature"])
    return jnp.mean((x - y) ** 2)


def slices(tree):
    """Positions of every leaf in the flattened tree."""
    stops = np.cumsum([np.size(leaf) for leaf in jax.tree.leaves(tree)])
    return [
        slice(stop - np.size(leaf), stop)
        for stop, leaf in zip(stops, jax.tree.leaves(tree), strict=True)
    ]


def numpy_direction(name, W, g, layers):
    """Eq. 11 and its relatives, on flat vectors."""
    z = np.zeros_like(W)
    if name == "layerwise":
        for i in layers:
            z[i] = W[i] ** 2 / np.linalg.norm(W[i]) * g[i] / np.linalg.norm(g[i])
    elif name == "adaptive":
        z = W**2 * g / np.linalg.norm(np.abs(W) * g)
    elif name == "normalized":
        z = g / np.linalg.norm(g)
    return z


@functools.partial(jax.jit, static_argnums=0)
def derivatives(loss, params, *args):
    """Value, gradient and dense Hessian, over the flattened tree."""
    flat, unravel = ravel_pytree(params)
    flat_loss = lambda w: loss(unravel(w), *args)
    return (*jax.value_and_grad(flat_loss)(flat), jax.hessian(flat_loss)(flat))


def dense_hero(
    loss,
    params,
    *args,
    h,
    gamma,
    direction,
    reduction,
    perturbed=None,
    penalized=None,
):
    """Eq. 13 of `loss(params, *args)` with the dense Hessian.

    `perturbed` and `penalized` are lists of bools, one per leaf.
    """
    layers, (leaves, tree) = slices(params), jax.tree.flatten(params)
    perturbed = [True] * len(leaves) if perturbed is None else perturbed
    penalized = [x.ndim >= 2 for x in leaves] if penalized is None else penalized

    def unflatten(flat):
        shaped = [flat[i].reshape(x.shape) for i, x in zip(layers, leaves, strict=True)]
        return jax.tree.unflatten(tree, shaped)

    W = np.concatenate([np.ravel(x) for x in leaves])
    g = np.asarray(derivatives(loss, params, *args)[1])
    seen = np.zeros_like(g)
    for i, keep in zip(layers, perturbed, strict=True):
        seen[i] = g[i] if keep else 0.0
    chosen = [i for i, keep in zip(layers, perturbed, strict=True) if keep]
    z = numpy_direction(direction, W, seen, chosen)
    value, dL, H = map(np.asarray, derivatives(loss, unflatten(W + h * z), *args))
    weighted, penalty = np.zeros_like(g), 0.0
    for i, keep in zip(layers, penalized, strict=True):
        if keep:
            c = 1.0 / g[i].size if reduction == "mean" else 1.0
            weighted[i] = c * (dL[i] - g[i])
            penalty += c * np.sum((dL[i] - g[i]) ** 2)
    product = 2 * gamma * H @ weighted
    return unflatten(dL + product), {
        "perturbed_loss": float(value),
        "grad_norm": np.linalg.norm(g),
        "perturbed_grad_norm": np.linalg.norm(dL),
        "perturbation_norm": np.linalg.norm(z),
        "grad_difference_norm": np.linalg.norm(dL - g),
        "hessian_norm": np.linalg.norm(dL - g) / h,
        "penalty": penalty,
        "penalty_grad_norm": np.linalg.norm(product),
    }
