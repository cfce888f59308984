"""Largest eigenvalues of the Hessian, whole or of one layer, by Lanczos."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Unpack, get_args

import chex
import jax
import jax.numpy as jnp

from hero_jax import _checks, _programs, _tree
from hero_jax._typing import Mask, Params
from hero_jax.curvature import _lanczos, _layers, _problem, _progress
from hero_jax.curvature._layers import Layers
from hero_jax.curvature._problem import Options, Problem

Which = Literal["largest", "smallest", "magnitude"]


class Eigenpairs(NamedTuple):
    """Eigenvalues with a certificate each.

    Attributes:
      values: `[k]`, the one asked for first.
      vectors: tree of arrays `[k, ...]` like `params`; each vector has length 1.
      residuals: `||Hv - value v||`, `[k]`: an eigenvalue of the matrix lies within this
        distance of the value. It does not show that none was missed.
    """

    values: chex.Array
    vectors: Params
    residuals: chex.Array


def top_eigenvalues(
    loss_fn: Callable[..., Any],
    params: Params,
    *args: Any,
    k: int = 1,
    which: Which = "largest",
    steps: int | None = None,
    key: chex.PRNGKey | None = None,
    **options: Unpack[Options],
) -> Eigenpairs:
    """Compute the outermost eigenvalues of the Hessian, or of the Gauss-Newton matrix.

    Lanczos from a random start with full reorthogonalization; the basis takes the
    memory of `steps` copies of the weights. Of an eigenvalue that occurs several times
    only one is found; values and residuals are NaN where fewer than k are there, or
    where the others are below the resolution, 1e-5 of the largest in float32.

    Args:
      loss_fn: `(params, *args) -> loss`, a mean over examples.
      params: weights W, n in all.
      *args: further arguments of `loss_fn`.
      k: how many.
      which: "largest", whose first is Theorem 3's v; "smallest"; or "magnitude".
      steps: products with the matrix, k to n; by default 20 + 2k, or n. Another k give
        the residuals.
      key: of the start vector; `jax.random.key(0)` by default.
      **options: see :class:`Options`.

    Returns:
      Values, vectors and residuals.

    Raises:
      TypeError: the loss is not a scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> from hero_jax import curvature
      >>> loss_fn = lambda w: (w[0] ** 2 + 2 * w[1] ** 2 - 3 * w[2] ** 2) / 2
      >>> top = curvature.top_eigenvalues(loss_fn, jnp.ones(3), k=2)
      >>> [f"{value:.3f}" for value in top.values]
      ['2.000', '1.000']

    References:
      Lanczos, `An iteration method for the solution of the eigenvalue problem
      <https://doi.org/10.6028/jres.045.026>`_, 1950.
    """
    problem = _problem.make(loss_fn, params, args, options)
    _checks.check_integer("k", k)
    _checks.check_choice("which", which, get_args(Which))
    size = _tree.size(params)
    steps = _lanczos.check_steps(steps, 20 + 2 * k, size, least=k)
    total = (steps + k) * problem.num_batches(args)
    compiled = _programs.compiled(_top_eigenvalues, problem, k, which, steps)
    key = jax.random.key(0) if key is None else key
    result: Eigenpairs = _progress.listen(
        options.get("progress"), total, compiled, params, key, args
    )
    return result


def layer_eigenvalues(
    loss_fn: Callable[..., Any],
    params: Params,
    *args: Any,
    mask: Mask | None = None,
    steps: int = 10,
    key: chex.PRNGKey | None = None,
    **options: Unpack[Options],
) -> dict[str, chex.Array]:
    """Compute the largest eigenvalue of every layer's own block of the Hessian.

    Each layer takes a Lanczos iteration of its own, and each of its products is one
    with the whole matrix. Small blocks need few steps: the space is then exhausted.
    In a stack, of `nn.scan` or of experts, every layer has a block of its own.

    Args:
      loss_fn: `(params, *args) -> loss`, a mean over examples.
      params: weights W.
      *args: further arguments of `loss_fn`.
      mask: which leaves; kernels and embeddings by default. Empty ones are left out.
      steps: products with the matrix for each layer; n at most are taken.
      key: of the start vectors; `jax.random.key(0)` by default.
      **options: see :class:`Options`.

    Returns:
      Path of the leaf, `path[0]`, `path[1]` and so on in a stack, to the largest
      eigenvalue of `d^2 L / dW_i^2`, as found from below.

    Raises:
      TypeError: the loss is not a scalar.
      ValueError: no leaf is chosen.

    Example:
      >>> import jax.numpy as jnp
      >>> from hero_jax import curvature
      >>> params = {"a": jnp.ones((1, 2)), "b": jnp.ones((2, 1))}
      >>> loss_fn = lambda w: jnp.sum((w["a"] @ w["b"]) ** 2) / 2  # (a'b)^2 / 2
      >>> top = curvature.layer_eigenvalues(loss_fn, params)
      >>> {path: f"{value:.3f}" for path, value in top.items()}  # |b|^2 and |a|^2
      {'a': '2.000', 'b': '2.000'}

    References:
      Dong et al., `HAWQ <https://arxiv.org/abs/1905.03696>`_, 2019.
    """
    problem = _problem.make(loss_fn, params, args, options)
    layers = _layers.choose(loss_fn, params, mask, options)
    size = _tree.size(params)
    _checks.check_integer("steps", steps)
    steps = min(steps, size)
    total = steps * len(layers.chosen) * problem.num_batches(args)
    compiled = _programs.compiled(_layer_eigenvalues, problem, layers, steps)
    key = jax.random.key(0) if key is None else key
    values = _progress.listen(
        options.get("progress"), total, compiled, params, key, args
    )
    return dict(zip(layers.chosen_names(params), values, strict=True))


def _top_eigenvalues(
    problem: Problem,
    k: int,
    which: Which,
    steps: int,
    params: Params,
    key: chex.PRNGKey,
    args: Sequence[Any],
) -> Eigenpairs:
    W = _tree.widen(params)
    flat = _lanczos.Flat.of(W)
    matvec = flat.matvec(problem.product(W, args))
    start = jax.random.normal(key, (flat.size,), flat.dtype)

    # One loop for the space and the residuals, since the product is what takes minutes
    # to compile.
    def body(
        i: chex.Array, state: tuple[_lanczos.Lanczos, _Pairs, chex.Array]
    ) -> tuple[_lanczos.Lanczos, _Pairs, chex.Array]:
        space, top, residuals = state
        j = jnp.maximum(i - steps, 0)
        v = jnp.where(i < steps, space.v, top.vectors[j])
        product = matvec(v)
        space = jax.lax.cond(i < steps, lambda: space.after(product), lambda: space)
        residual = _tree.norm(product - top.values[j] * v)
        top = jax.lax.cond(
            i == steps - 1, lambda: _outermost(space.space(), k, which), lambda: top
        )
        return space, top, residuals.at[j].set(residual)

    zeros = jnp.zeros(k, flat.dtype)
    nothing = _Pairs(zeros, jnp.zeros((k, flat.size), flat.dtype))
    _, top, residuals = jax.lax.fori_loop(
        0, steps + k, body, (_lanczos.Lanczos.begin(start, steps), nothing, zeros)
    )
    return Eigenpairs(top.values, jax.vmap(flat.unflatten)(top.vectors), residuals)


class _Pairs(NamedTuple):
    values: chex.Array
    vectors: chex.Array


def _outermost(space: _lanczos.Krylov, k: int, which: Which) -> _Pairs:
    """Return k eigenvalues of the part found, and flat vectors of length 1."""
    pairs = _lanczos.ritz(space)
    order = {
        "largest": -pairs.values,
        "smallest": pairs.values,
        "magnitude": -jnp.abs(pairs.values),
    }[which]
    chosen = jnp.argsort(jnp.where(pairs.found, order, jnp.inf))[:k]
    values = jnp.where(pairs.found[chosen], pairs.values[chosen], jnp.nan)
    vectors = _lanczos.matmul(pairs.vectors[:, chosen].T, space.basis)
    norms = jax.vmap(_tree.norm)(vectors)
    return _Pairs(values, vectors / jnp.where(norms > 0.0, norms, 1.0)[:, None])


def _layer_eigenvalues(
    problem: Problem,
    layers: Layers,
    steps: int,
    params: Params,
    key: chex.PRNGKey,
    args: Sequence[Any],
) -> chex.Array:
    W = _tree.widen(params)
    flat = _lanczos.Flat.of(W)
    product = problem.product(W, args)
    random = flat.unflatten(jax.random.normal(key, (flat.size,), flat.dtype))

    def of_layer(number: chex.Array) -> chex.Array:
        block = flat.matvec(lambda v: layers.only(number, product(v)))
        start = flat.flatten(layers.only(number, random))
        pairs = _lanczos.ritz(_lanczos.krylov(block, start, steps))
        return jnp.max(jnp.where(pairs.found, pairs.values, -jnp.inf))

    return jax.lax.map(of_layer, jnp.array(layers.chosen))
