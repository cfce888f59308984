"""Lanczos tridiagonalization of a matrix that is given by its product with trees."""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from hero_jax import _tree
from hero_jax._typing import Params


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
    def of(cls, like: Params) -> "Flat":
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


def krylov(
    matvec: Callable[[chex.Array], chex.Array], start: chex.Array, steps: int
) -> Krylov:
    """Run Lanczos with full reorthogonalization, all steps in one loop.

    Args:
      matvec: product with a symmetric matrix, `[n] -> [n]`.
      start: vector `[n]`, not zero.
      steps: m, products with the matrix, at most n.

    Returns:
      Basis and tridiagonal matrix.

    Raises:
      ImportError: matfree is not installed.
    """
    try:
        from matfree import decomp
    except ImportError as error:
        raise ImportError(
            'curvature needs matfree: pip install "hero_jax[curvature]".'
        ) from error
    # With full reorthogonalization Lanczos is Arnoldi, whose subdiagonal keeps the
    # length of each new direction. Once the space is invariant that is zero, or noise,
    # which matfree divides by all the same; what follows is thrown away here.
    iterate = decomp.hessenberg(steps, reortho="full", custom_vjp=False)
    Q, H, *_ = iterate(matvec, start)
    alpha, beta = jnp.diagonal(H), jnp.diagonal(H, -1)
    T = jnp.diag(alpha) + jnp.diag(beta, 1) + jnp.diag(beta, -1)
    scale = jax.lax.cummax(jnp.abs(alpha[:-1]) + jnp.abs(beta))
    tolerance = 100.0 * jnp.finfo(T.dtype).eps
    goes_on = beta > tolerance * scale
    found = jnp.concatenate([jnp.ones(1, bool), jnp.cumprod(goes_on).astype(bool)])
    both = found[:, None] & found[None, :]
    return Krylov(
        basis=jnp.where(found[:, None], Q, 0.0),
        tridiagonal=jnp.where(both, T, 0.0),
        found=found,
    )


def ritz(space: Krylov) -> Ritz:
    """Return the eigenpairs of T, those of the part found first."""
    T, found = space.tridiagonal, space.found
    # Far outside of the spectrum, the decoupled rest sorts behind the part found.
    largest = jnp.abs(T).max()
    beyond = jnp.where(largest == 0.0, 1.0, 4.0 * largest)
    filled = T + jnp.diag(jnp.where(found, 0.0, beyond).astype(T.dtype))
    values, vectors = jnp.linalg.eigh(filled)
    count = found.sum()
    return Ritz(values, vectors, jnp.arange(len(found)) < count)
