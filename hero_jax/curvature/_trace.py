"""Trace of the Hessian, whole and of every layer, with standard errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Unpack

import chex
import jax
import jax.numpy as jnp
import numpy as np

from hero_jax import _programs, _tree
from hero_jax._typing import Mask, Params
from hero_jax.curvature import _lanczos, _layers, _probes, _problem, _progress
from hero_jax.curvature._layers import Layers
from hero_jax.curvature._probes import Estimate
from hero_jax.curvature._problem import Options, Problem


class Trace(NamedTuple):
    """Traces of the whole matrix and of every layer's own block.

    Attributes:
      whole: of the matrix.
      layers: path of the leaf, `path[0]`, `path[1]` and so on in a stack, to the trace
        of its block.
      sizes: likewise to the number of its weights.
    """

    whole: Estimate
    layers: dict[str, Estimate]
    sizes: dict[str, int]

    @property
    def averages(self) -> dict[str, Estimate]:
        """Trace over number of weights, per layer that has some; as in HAWQ-V2."""
        sizes: dict[str, Any] = (
            self.sizes
        )  # arrays after `jax.vmap`, traced in `jax.jit`
        return {
            path: Estimate(e.value / size, e.stderr / size)
            for path, e in self.layers.items()
            if isinstance(size := sizes[path], jax.core.Tracer) or np.all(size)
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
    stays honest. A layer's own trace is the sum of its entries of `v * (H - B) v`. Its
    error holds the blocks between the layers, too, and may exceed the trace of a small
    one; :func:`layer_traces` gives every layer probes of its own.

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
      TypeError: the loss is not a scalar.

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
    problem = _problem.make(loss_fn, params, args, options)
    _probes.check_probes(num_samples, deflation, _tree.size(params))
    layers = _layers.every(loss_fn, params, options)
    total = (num_samples + deflation) * problem.num_batches(args)
    compiled = _programs.compiled(_trace, problem, layers, num_samples, deflation)
    key = jax.random.key(0) if key is None else key
    whole, each = _progress.listen(
        options.get("progress"), total, compiled, params, key, args
    )
    names = layers.names(params)
    estimates = map(Estimate, each.value, each.stderr)
    return Trace(
        whole,
        dict(zip(names, estimates, strict=True)),
        dict(zip(names, layers.sizes(params), strict=True)),
    )


def layer_traces(
    loss_fn: Callable[..., Any],
    params: Params,
    *args: Any,
    mask: Mask | None = None,
    num_samples: int = 32,
    deflation: int = 0,
    key: chex.PRNGKey | None = None,
    **options: Unpack[Options],
) -> dict[str, Estimate]:
    r"""Estimate the trace of every layer's own block, each in probes of its own.

    Probes that are zero outside a layer know nothing of the others. Those that
    :func:`trace` shares among all layers carry the blocks between them, too, which of
    a small layer may exceed its trace; they cost as much as one layer's here.

    Args:
      loss_fn: `(params, *args) -> loss`, a mean over examples.
      params: weights W, n in all.
      *args: further arguments of `loss_fn`.
      mask: which leaves; kernels and embeddings by default. Empty ones are left out.
      num_samples: probes of each layer, at least 2, each a product with the matrix.
      deflation: as in :func:`trace`; these products serve all layers.
      key: of the probes; `jax.random.key(0)` by default.
      **options: see :class:`Options`.

    Returns:
      Path of the leaf, `path[0]`, `path[1]` and so on in a stack, to the estimate, with
      its standard error.

    Raises:
      TypeError: the loss is not a scalar.
      ValueError: no leaf is chosen.

    Example:
      >>> import jax.numpy as jnp
      >>> from hero_jax import curvature
      >>> loss_fn = lambda w: (jnp.sum(w["a"]) + w["b"][0, 0]) ** 2 / 2  # all ones
      >>> params = {"a": jnp.ones((9, 9)), "b": jnp.ones((1, 1))}
      >>> shared = curvature.trace(loss_fn, params).layers["b"]
      >>> own = curvature.layer_traces(loss_fn, params)["b"]
      >>> bool(shared.stderr > 1.0), f"{own.value:.0f} +- {own.stderr:.0f}"
      (True, '1 +- 0')
    """
    problem = _problem.make(loss_fn, params, args, options)
    layers = _layers.choose(loss_fn, params, mask, options)
    _probes.check_probes(num_samples, deflation, _tree.size(params))
    total = (num_samples * len(layers.chosen) + deflation) * problem.num_batches(args)
    compiled = _programs.compiled(
        _layer_traces, problem, layers, num_samples, deflation
    )
    key = jax.random.key(0) if key is None else key
    found = _progress.listen(
        options.get("progress"), total, compiled, params, key, args
    )
    estimates = map(Estimate, found.value, found.stderr)
    return dict(zip(layers.chosen_names(params), estimates, strict=True))


def _trace(
    problem: Problem,
    layers: Layers,
    num_samples: int,
    deflation: int,
    params: Params,
    key: chex.PRNGKey,
    args: Sequence[Any],
) -> tuple[Estimate, Estimate]:
    """Return the estimates of the whole, and of all layers in arrays `[layers]`."""
    W = _tree.widen(params)
    flat = _lanczos.Flat.of(W)
    probe_key, start_key = jax.random.split(key)
    keys = jax.random.split(probe_key, num_samples)

    def draw(j: chex.Array) -> chex.Array:
        return jax.random.rademacher(keys[j], (flat.size,), flat.dtype)

    matvec = flat.matvec(problem.product(W, args))
    samples, known = _probes.samples_per_layer(
        flat, layers, matvec, draw, num_samples, deflation, start_key
    )
    return _probes.estimate(samples.sum(1), known.sum()), _probes.estimate(
        samples, known
    )


def _layer_traces(
    problem: Problem,
    layers: Layers,
    num_samples: int,
    deflation: int,
    params: Params,
    key: chex.PRNGKey,
    args: Sequence[Any],
) -> Estimate:
    """Return the estimates of the chosen layers, in arrays `[layers]`."""
    W = _tree.widen(params)
    flat = _lanczos.Flat.of(W)
    probe_key, start_key = jax.random.split(key)
    chosen = jnp.asarray(layers.chosen)
    count = num_samples * len(chosen)
    keys = jax.random.split(probe_key, count)

    def draw(j: chex.Array) -> chex.Array:
        v = jax.random.rademacher(keys[j], (flat.size,), flat.dtype)
        return flat.flatten(layers.only(chosen[j % len(chosen)], flat.unflatten(v)))

    matvec = flat.matvec(problem.product(W, args))
    samples, known = _probes.samples_per_layer(
        flat, layers, matvec, draw, count, deflation, start_key
    )
    rows = samples.reshape(num_samples, len(chosen), -1)
    own = rows[:, jnp.arange(len(chosen)), chosen]
    return _probes.estimate(own, known[chosen])
