"""Trace of the Hessian, whole and of every layer, with standard errors."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Unpack

import chex
import jax
import jax.numpy as jnp
import numpy as np

from hero_jax import _checks, _tree
from hero_jax._typing import Params
from hero_jax.curvature import lanczos, progress
from hero_jax.curvature import problem as problems
from hero_jax.curvature.eigenvalues import check_steps
from hero_jax.curvature.problem import Options, Problem


class Estimate(NamedTuple):
    """A mean over random probes.

    Attributes:
      value: scalar.
      stderr: standard error of the mean, from the spread of the probes.
    """

    value: chex.Array
    stderr: chex.Array


class Trace(NamedTuple):
    """Traces of the whole matrix and of every leaf's own block.

    Attributes:
      whole: of the matrix.
      layers: path of the leaf to the trace of its block.
      sizes: path of the leaf to the number of its weights.
    """

    whole: Estimate
    layers: dict[str, Estimate]
    sizes: dict[str, int]

    @property
    def averages(self) -> dict[str, Estimate]:
        """Trace over number of weights, per leaf that has some; as in HAWQ-V2."""
        return {
            path: Estimate(e.value / size, e.stderr / size)
            for path, e in self.layers.items()
            if (size := self.sizes[path])
        }


def trace(
    loss_fn: Callable[..., Any],
    params: Params,
    *args: Any,
    num_samples: int = 32,
    deflation: int = 0,
    key: chex.PRNGKey | None = None,
    **options: Unpack[Options],
) -> Trace:
    r"""Estimate the trace of the Hessian, whole and per layer, in the same probes.

    .. math::

        \operatorname{tr} H = \operatorname{tr} B + \mathbb{E}\, v' (H - B) v,
        \qquad v_i = \pm 1

    With B = 0 this is Hutchinson's estimator. With `deflation`, B = QTQ' is the part of
    H in a Krylov space of so many dimensions, whose trace is known: the few large
    eigenvalues of a network are in it, and no longer add to the variance. B is found
    from a start of its own, so the probes stay independent and their standard error
    stays honest. A layer's own trace is the sum of its entries of `v * (H - B) v`.

    Args:
      loss_fn: `(params, *args) -> loss`, a mean over examples.
      params: weights W, n in all.
      *args: further arguments of `loss_fn`.
      num_samples: probes, at least 2, each of them a product with the matrix.
      deflation: further products, for B; none to n.
      key: of the probes; `jax.random.key(0)` by default.
      **options: see :class:`Options`.

    Returns:
      Estimates with standard errors.

    Raises:
      ImportError: matfree is not installed, and there is deflation.
      TypeError: an argument has another type, or the loss is no scalar.
      ValueError: an argument is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from hero_jax import curvature
      >>> loss_fn = lambda w: jnp.sum(w["a"] ** 2) + jnp.sum(w["b"] ** 2) / 2
      >>> tr = curvature.trace(loss_fn, {"a": jnp.ones(3), "b": jnp.ones(4)})
      >>> print(tr.whole.value, tr.whole.stderr, tr.layers["a"].value)
      10.0 0.0 6.0

    References:
      Hutchinson, `A stochastic estimator of the trace
      <https://doi.org/10.1080/03610919008812866>`_, 1990; Gambhir et al., `Deflation as
      a method of variance reduction <https://arxiv.org/abs/1603.05988>`_, 2017; Dong et
      al., `HAWQ-V2 <https://arxiv.org/abs/1911.03852>`_, 2020.
    """
    problem = problems.make(loss_fn, params, args, options)
    _checks.check_positive_integer("num_samples", num_samples)
    _checks.check_key("key", key, optional=True)
    if num_samples < 2:
        raise ValueError("num_samples must be at least 2 to know an error, got 1.")
    sizes = [int(np.size(x)) for x in jax.tree.leaves(params)]
    if deflation:
        try:
            check_steps(deflation, 0, sum(sizes))
        except (TypeError, ValueError) as error:
            raise type(error)(str(error).replace("steps", "deflation", 1)) from None
    total = (num_samples + deflation) * problem.num_batches(args)
    compiled = functools.partial(_trace, problem, num_samples, deflation)
    key = jax.random.key(0) if key is None else key
    whole, layers = progress.listen(
        options.get("progress"), total, compiled, params, key, args
    )
    paths = _tree.unique_leaf_paths(params)
    estimates = map(Estimate, layers.value, layers.stderr)
    return Trace(
        whole,
        dict(zip(paths, estimates, strict=True)),
        dict(zip(paths, sizes, strict=True)),
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _trace(
    problem: Problem,
    num_samples: int,
    deflation: int,
    params: Params,
    key: chex.PRNGKey,
    args: Sequence[Any],
) -> tuple[Estimate, Estimate]:
    """Return the estimates of the whole, and of all leaves in arrays `[leaves]`."""
    W = _tree.widen(params)
    flat = lanczos.Flat.of(W)
    product = problem.product(W, args)
    probe_key, start_key = jax.random.split(key)

    def per_leaf(a: chex.Array, b: chex.Array) -> chex.Array:
        products = jax.tree.map(
            lambda x, y: jnp.vdot(x, y).astype(flat.dtype),
            flat.unflatten(a),
            flat.unflatten(b),
        )
        return jnp.stack(jax.tree.leaves(products))

    matvec = flat.matvec(product)
    if deflation:
        start = jax.random.normal(start_key, (flat.size,), flat.dtype)
        space = lanczos.krylov(matvec, start, deflation)
        Q, T = space.basis, space.tridiagonal
        known = jax.lax.map(lambda rows: per_leaf(*rows), (Q, T @ Q)).sum(0)
    else:
        Q, known = None, 0.0

    def of_probe(key: chex.PRNGKey) -> chex.Array:
        v = jax.random.rademacher(key, (flat.size,), flat.dtype)
        rest = matvec(v)
        if Q is not None:
            rest -= (T @ (Q @ v)) @ Q
        return per_leaf(v, rest)

    samples = jax.lax.map(of_probe, jax.random.split(probe_key, num_samples))

    def estimate(samples: chex.Array, known: chex.Array) -> Estimate:
        spread = jnp.std(samples, axis=0, ddof=1)
        return Estimate(
            known + samples.mean(0),
            spread / jnp.sqrt(jnp.asarray(num_samples, spread.dtype)),
        )

    return (
        estimate(samples.sum(1), jnp.sum(known)),
        estimate(samples, known),
    )
