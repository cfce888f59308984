"""Lanczos tridiagonalization of a matrix that is given by its product with trees."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from hero_jax import _checks, _tree
from hero_jax._typing import Params

matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
vdot = functools.partial(jnp.vdot, precision=jax.lax.Precision.HIGHEST)
"""Bases lose their orthogonality where a GPU or TPU rounds the factors."""


class Krylov(NamedTuple):
    """Orthonormal basis Q of the Krylov space, and T = QAQ' of m steps.

    Where the space ends early, because it is invariant, `found` is False for what would
    lie beyond, the rows of Q are zero there, and T is decoupled.

    Attributes:
      basis: Q, `[m, n]`.
      tridiagonal: T, `[m, m]`.
      found: bool `[m]`.
    """

    basis: chex.Array
    tridiagonal: chex.Array
    found: chex.Array


class Ritz(NamedTuple):
    """Eigenpairs of T; those that were not found have weight zero.

    Attributes:
      values: `[m]`, ascending within those found.
      vectors: of T, in columns `[m, m]`.
      found: bool `[m]`.
    """

    values: chex.Array
    vectors: chex.Array
    found: chex.Array


class Flat(NamedTuple):
    """A tree and its flat vector, both ways.

    Attributes:
      size: n, number of entries of the tree.
      dtype: of the vector, the widest of the leaves.
      flatten: `tree -> [n]`.
      unflatten: `[n] -> tree` with the dtypes of the leaves.
    """

    size: int
    dtype: np.dtype
    flatten: Callable[[Params], chex.Array]
    unflatten: Callable[[chex.Array], Params]

    @classmethod
    def of(cls, like: Params) -> Flat:
        """Describe trees like this one."""
        leaves, structure = jax.tree.flatten(like)
        dtype = _tree.widest_dtype(like)
        stops = np.cumsum([x.size for x in leaves]).tolist()

        def flatten(tree: Params) -> chex.Array:
            return jnp.concatenate(
                [x.ravel().astype(dtype) for x in jax.tree.leaves(tree)]
            )

        def unflatten(vector: chex.Array) -> Params:
            parts = jnp.split(vector, stops[:-1])
            return jax.tree.unflatten(
                structure,
                [
                    part.reshape(x.shape).astype(x.dtype)
                    for part, x in zip(parts, leaves, strict=True)
                ],
            )

        return cls(stops[-1], dtype, flatten, unflatten)

    def matvec(
        self, tree_matvec: Callable[[Params], Params]
    ) -> Callable[..., chex.Array]:
        """Return the same product on flat vectors."""
        return lambda v: self.flatten(tree_matvec(self.unflatten(v)))


class Lanczos(NamedTuple):
    """Lanczos with full reorthogonalization, after k products with the matrix.

    Attributes:
      count: k.
      basis: `[m, n]`, rows from k on zero.
      alpha: diagonal of T, `[m]`.
      beta: lengths of the new directions, `[m]`.
      v: vector of length 1 to be multiplied next, `[n]`.
    """

    count: chex.Array
    basis: chex.Array
    alpha: chex.Array
    beta: chex.Array
    v: chex.Array

    @classmethod
    def begin(cls, start: chex.Array, steps: int) -> Lanczos:
        """Prepare m steps from a vector that is not zero."""
        zeros = jnp.zeros(steps, start.dtype)
        basis = jnp.zeros((steps, start.size), start.dtype)
        v = start / _tree.norm(start)
        return cls(jnp.zeros((), jnp.int32), basis, zeros, zeros, v)

    def after(self, product: chex.Array) -> Lanczos:
        """Go on with the product of the matrix and v.

        The length is taken out before anything is squared: the matrix may have any
        scale. Once the space is invariant, what is left of u is zero or noise.
        """
        k = self.count
        basis = self.basis.at[k].set(self.v)
        length = _tree.norm(product)
        u = product / jnp.where(length == 0.0, 1.0, length)
        along = matmul(self.v, u)
        for _ in range(2):
            u -= matmul(matmul(basis, u), basis)
        rest = _tree.norm(u)
        return Lanczos(
            k + 1,
            basis,
            self.alpha.at[k].set(length * along),
            self.beta.at[k].set(length * rest),
            u / jnp.where(rest == 0.0, 1.0, rest),
        )

    def space(self) -> Krylov:
        """Return what all m steps have found."""
        alpha, beta = self.alpha, self.beta[:-1]
        T = jnp.diag(alpha) + jnp.diag(beta, 1) + jnp.diag(beta, -1)
        scale = jax.lax.cummax(jnp.abs(alpha[:-1]) + beta)
        goes_on = beta > 100.0 * jnp.finfo(T.dtype).eps * scale
        found = jnp.concatenate([jnp.ones(1, bool), jnp.cumprod(goes_on).astype(bool)])
        both = found[:, None] & found[None, :]
        return Krylov(
            basis=jnp.where(found[:, None], self.basis, 0.0),
            tridiagonal=jnp.where(both, T, 0.0),
            found=found,
        )


def krylov(
    matvec: Callable[[chex.Array], chex.Array], start: chex.Array, steps: int
) -> Krylov:
    """Run all steps in one loop.

    Args:
      matvec: product with a symmetric matrix, `[n] -> [n]`.
      start: vector `[n]`, not zero.
      steps: m, products with the matrix, at most n.

    Returns:
      Basis and tridiagonal matrix.
    """
    state: Lanczos = jax.lax.fori_loop(
        0,
        steps,
        lambda _, state: state.after(matvec(state.v)),
        Lanczos.begin(start, steps),
    )
    return state.space()


def ritz(space: Krylov) -> Ritz:
    """Return the eigenpairs of T, those of the part found first."""
    T, found = space.tridiagonal, space.found
    largest = jnp.abs(T).max()
    scale = jnp.where(largest == 0.0, 1.0, largest)
    # Far outside of the spectrum, the decoupled rest sorts behind the part found.
    filled = T / scale + jnp.diag(jnp.where(found, 0.0, 4.0).astype(T.dtype))
    values, vectors = jnp.linalg.eigh(filled)
    return Ritz(scale * values, vectors, jnp.arange(len(found)) < found.sum())


def check_steps(steps: int | None, default: int, size: int, least: int = 1) -> int:
    """Return the number of Lanczos steps, at least `least` and at most n."""
    steps = min(default, size) if steps is None else steps
    _checks.check_integer("steps", steps)
    if not least <= steps <= size:
        raise ValueError(
            f"steps must be from {least}, or k, to {size}, the number of weights, got "
            f"{steps}."
        )
    return int(steps)
