r"""Sensitivity from second-order information: HAWQ, Q-BERT, HAWQ-V2, the real error.

Moving the weights of layer i by its quantization error `d_i` raises the loss by

.. math::

    L(W + d_i) - L(W) \approx g_i' d_i + \tfrac{1}{2} d_i' H_{ii} d_i .

At a minimum g is zero. HAWQ bounds the rest from above by the largest eigenvalue of
`H_ii`; HAWQ-V2 takes its mean over all directions, by the average trace; the quadratic
form itself asks for one product with the Hessian for every layer and choice, and knows
what the layers do to each other for the same price. All three are written with the
half, which the papers leave out, so that they are changes of the loss and can be
compared with measured ones; allocations are the same.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Unpack

import chex
import jax
import jax.numpy as jnp
import numpy as np

from hero_jax import _checks, _tree, curvature
from hero_jax._typing import Params
from hero_jax.curvature import problem as problems
from hero_jax.curvature import progress
from hero_jax.curvature.eigenvalues import only
from hero_jax.curvature.problem import Options, Problem
from hero_jax.sensitivity.errors import Errors
from hero_jax.sensitivity.result import Sensitivity


def eigenvalue(
    loss_fn: Callable[..., Any],
    params: Params,
    errors: Errors,
    *args: Any,
    steps: int = 10,
    key: chex.PRNGKey | None = None,
    **options: Unpack[Options],
) -> Sensitivity:
    r"""HAWQ: `lambda_max(H_ii) ||d_i||^2 / 2`, the worst that an error can do.

    Args:
      loss_fn: `(params, *args) -> loss`, a mean over examples.
      params: float weights W.
      errors: of :func:`hero_jax.sensitivity.weight_errors` at these weights.
      *args: further arguments of `loss_fn`.
      steps: products with the Hessian for each layer.
      key: of the start vectors; `jax.random.key(0)` by default.
      **options: see :class:`hero_jax.curvature.Options`.

    Returns:
      Sensitivities; no standard errors: Lanczos finds eigenvalues from below.

    Raises:
      ImportError: matfree is not installed.
      TypeError: an argument has another type, or the loss is no scalar.
      ValueError: an argument is out of range, or the errors are of other weights.

    Example:
      >>> import jax.numpy as jnp
      >>> from hero_jax import sensitivity
      >>> params = {"kernel": jnp.array([[-1.0, 0.3, 2.0]])}
      >>> loss_fn = lambda w: jnp.sum(jnp.array([1.0, 2.0, 8.0]) * w["kernel"] ** 2) / 2
      >>> errors = sensitivity.weight_errors(params, choices=(2,))  # 0.3 becomes 0
      >>> found = sensitivity.eigenvalue(loss_fn, params, errors)
      >>> print(f"{found.layers['kernel'][0]:.2f}")  # 8 * 0.3^2 / 2
      0.36

    References:
      Dong et al., `HAWQ <https://arxiv.org/abs/1905.03696>`_, 2019.
    """
    positions(errors, params)
    values = curvature.layer_eigenvalues(
        loss_fn,
        params,
        *args,
        mask=_mask(errors, params),
        steps=steps,
        key=key,
        **options,
    )
    return _times_squared_norms(errors, values, None)


def eigenvalue_spread(
    loss_fn: Callable[..., Any],
    params: Params,
    errors: Errors,
    *args: Any,
    subsets: int = 10,
    steps: int = 10,
    key: chex.PRNGKey | None = None,
    **options: Unpack[Options],
) -> Sensitivity:
    r"""Q-BERT: `(|mean lambda| + std lambda) ||d_i||^2 / 2` over parts of the data.

    The largest eigenvalue varies with the examples; a layer in which it varies a lot is
    kept at a higher precision.

    Args:
      loss_fn: `(params, *args) -> loss`, a mean over examples.
      params: float weights W.
      errors: of :func:`hero_jax.sensitivity.weight_errors` at these weights.
      *args: further arguments of `loss_fn`; those with a leading axis of examples, all
        or those that `batch_argnums` names, are cut into equal parts, and what is left
        over is not used.
      subsets: number of parts, at least 2.
      steps: products with the Hessian for each layer and part.
      key: of the start vectors; `jax.random.key(0)` by default.
      **options: see :class:`hero_jax.curvature.Options`. `batch_argnums` may be given
        without `batch_size`.

    Returns:
      Sensitivities, and the standard error of `|mean lambda|`, times `||d_i||^2 / 2`.

    Raises:
      ImportError: matfree is not installed.
      TypeError: an argument has another type, or the loss is no scalar.
      ValueError: an argument is out of range, the errors are of other weights, or there
        are fewer examples than parts.

    References:
      Shen et al., `Q-BERT <https://arxiv.org/abs/1909.05840>`_, 2020, Eq. 2.
    """
    positions(errors, params)
    _checks.check_positive_integer("subsets", subsets)
    if subsets < 2:
        raise ValueError(f"subsets must be at least 2 to have a spread, got {subsets}.")
    argnums = options.get("batch_argnums")
    if isinstance(argnums, int):
        argnums = (argnums,)
    cut = range(1, len(args) + 1) if argnums is None else argnums
    size = problems.number_of_examples(args, cut) // subsets
    if size == 0:
        raise ValueError(
            f"subsets must be at most the number of examples, got {subsets} for "
            f"{problems.number_of_examples(args, cut)}."
        )
    if options.get("batch_size") is None:
        options = {**options, "batch_argnums": None}
    found = []
    for k in range(subsets):
        part = [
            jax.tree.map(lambda x, k=k: x[k * size : (k + 1) * size], arg)
            if position in cut
            else arg
            for position, arg in enumerate(args, start=1)
        ]
        values = curvature.layer_eigenvalues(
            loss_fn,
            params,
            *part,
            mask=_mask(errors, params),
            steps=steps,
            key=key,
            **options,
        )
        found.append(values)
    rows = {path: jnp.stack([each[path] for each in found]) for path in errors.layers}
    spread = {path: jnp.std(x, ddof=1) for path, x in rows.items()}
    return _times_squared_norms(
        errors,
        {path: jnp.abs(x.mean()) + spread[path] for path, x in rows.items()},
        {path: x / np.sqrt(subsets) for path, x in spread.items()},
    )


def average_trace(
    loss_fn: Callable[..., Any],
    params: Params,
    errors: Errors,
    *args: Any,
    num_samples: int = 32,
    deflation: int = 0,
    key: chex.PRNGKey | None = None,
    **options: Unpack[Options],
) -> Sensitivity:
    r"""HAWQ-V2: `tr(H_ii) / n_i ||d_i||^2 / 2`, the mean over all directions of `d_i`.

    All layers are estimated in the same probes: the price does not grow with their
    number.

    Args:
      loss_fn: `(params, *args) -> loss`, a mean over examples.
      params: float weights W.
      errors: of :func:`hero_jax.sensitivity.weight_errors` at these weights.
      *args: further arguments of `loss_fn`.
      num_samples: probes, at least 2, each of them a product with the Hessian.
      deflation: as of :func:`hero_jax.curvature.trace`.
      key: of the probes; `jax.random.key(0)` by default.
      **options: see :class:`hero_jax.curvature.Options`.

    Returns:
      Sensitivities with standard errors. The estimate of a small trace may be negative.

    Raises:
      ImportError: matfree is not installed, and there is deflation.
      TypeError: an argument has another type, or the loss is no scalar.
      ValueError: an argument is out of range, or the errors are of other weights.

    Example:
      >>> import jax.numpy as jnp
      >>> from hero_jax import sensitivity
      >>> params = {"kernel": jnp.array([[-1.0, 0.3, 2.0]])}
      >>> loss_fn = lambda w: jnp.sum(jnp.array([1.0, 2.0, 9.0]) * w["kernel"] ** 2) / 2
      >>> errors = sensitivity.weight_errors(params, choices=(2,))  # 0.3 becomes 0
      >>> found = sensitivity.average_trace(loss_fn, params, errors)
      >>> print(f"{found.layers['kernel'][0]:.2f}")  # (1 + 2 + 9) / 3 * 0.3^2 / 2
      0.18

    References:
      Dong et al., `HAWQ-V2 <https://arxiv.org/abs/1911.03852>`_, 2020.
    """
    positions(errors, params)
    averages = curvature.trace(
        loss_fn,
        params,
        *args,
        num_samples=num_samples,
        deflation=deflation,
        key=key,
        **options,
    ).averages
    return _times_squared_norms(
        errors,
        {path: averages[path].value for path in errors.layers},
        {path: averages[path].stderr for path in errors.layers},
    )


def quadratic(
    loss_fn: Callable[..., Any],
    params: Params,
    errors: Errors,
    *args: Any,
    first_order: bool = False,
    pairwise: bool = False,
    **options: Unpack[Options],
) -> Sensitivity:
    r"""The quadratic form along the real error, `d_i' H_ii d_i / 2`.

    One product with the Hessian for every layer and choice, which leaves nothing to
    estimate. With `pairwise`, also `d_i' H_ij d_j` between any two layers, from the
    same products: the quadratic model of the loss for every allocation,

    .. math::

        L(W + d) - L(W) \approx \sum_i g_i' d_i + \tfrac{1}{2} d_i' H_{ii} d_i
            + \sum_{i<j} d_i' H_{ij} d_j

    Args:
      loss_fn: `(params, *args) -> loss`, a mean over examples.
      params: float weights W.
      errors: of :func:`hero_jax.sensitivity.weight_errors` at these weights.
      *args: further arguments of `loss_fn`.
      first_order: add `g_i' d_i`, which is not zero where training stopped short of a
        minimum, as weight decay makes it do.
      pairwise: tell the interactions, too.
      **options: see :class:`hero_jax.curvature.Options`.

    Returns:
      Sensitivities, exact for the data at hand; negative where the loss is concave.

    Raises:
      TypeError: an argument has another type, or the loss is no scalar.
      ValueError: an option is out of range, or the errors are of other weights.

    Example:
      >>> import jax.numpy as jnp
      >>> from hero_jax import sensitivity
      >>> a, b = jnp.array([[-1.0, 0.3, 2.0]]), jnp.array([[0.0, 0.4, 1.0]])
      >>> params = {"a": a, "b": b}
      >>> loss_fn = lambda w: jnp.sum((w["a"] + w["b"]) ** 2) / 2
      >>> errors = sensitivity.weight_errors(params, choices=(2,))  # by -0.3 and -0.067
      >>> found = sensitivity.quadratic(loss_fn, params, errors, pairwise=True)
      >>> print(f"{found.layers['a'][0]:.3f} {found.interactions[0, 0, 1, 0]:.3f}")
      0.045 0.020
      >>> print(f"{found.total({'a': 2, 'b': 2}):.3f}")  # 0.367^2 / 2
      0.067

    References:
      Dong et al., `HAWQ-V2 <https://arxiv.org/abs/1911.03852>`_, 2020, Lemma 1, before
      the mean over directions is taken.
    """
    problem = problems.make(loss_fn, params, args, options)
    where = positions(errors, params)
    _checks.check_bool("first_order", first_order)
    _checks.check_bool("pairwise", pairwise)
    total = len(where) * len(errors.choices) * problem.num_batches(args)
    compiled = functools.partial(_forms, problem, where)
    slopes, forms = progress.listen(
        options.get("progress"),
        total,
        compiled,
        params,
        [*errors.layers.values()],
        args,
    )
    layers, choices = slopes.shape
    own = forms.reshape(layers * choices, -1).diagonal().reshape(slopes.shape) / 2.0
    rows = own + slopes if first_order else own
    return Sensitivity(
        errors.choices,
        dict(zip(errors.layers, rows, strict=True)),
        interactions=forms if pairwise else None,
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _forms(
    problem: Problem,
    where: tuple[int, ...],
    params: Params,
    errors: list[chex.Array],
    args: Sequence[Any],
) -> tuple[chex.Array, chex.Array]:
    """Return `g'd`, `[layers, choices]`, and `d'Hd`, `[layers, choices] * 2`."""
    W = _tree.widen(params)
    _, g = problem.loss_and_gradient(W, args)
    product = problem.product(W, args)
    choices = len(errors[0])

    def dots(tree: Params) -> chex.Array:
        """Multiply every error by the leaf of its layer, `[layers, choices]`."""
        leaves = jax.tree.leaves(tree)
        dtype = _tree.widest_dtype(W)
        rows = [
            jnp.tensordot(d, leaves[i], leaves[i].ndim)
            for i, d in zip(where, errors, strict=True)
        ]
        return jnp.stack([row.astype(dtype) for row in rows])

    def of(pair: tuple[chex.Array, chex.Array]) -> chex.Array:
        layer, choice = pair
        d = moved_by(layer, choice, where, errors, W)
        return dots(product(d))

    layer, choice = jnp.divmod(jnp.arange(len(where) * choices), choices)
    forms = jax.lax.map(of, (layer, choice))
    return dots(g), forms.reshape(len(where), choices, len(where), choices)


def moved_by(
    layer: chex.Array,
    choice: chex.Array,
    where: tuple[int, ...],
    errors: list[chex.Array],
    W: Params,
) -> Params:
    """Return the tree of one layer's error at one choice, zero elsewhere.

    Args:
      layer: position among `where`, may be traced.
      choice: position among the choices, may be traced.
      where: positions of the leaves that `errors` are of.
      errors: `[choices, ...]` for every layer.
      W: tree whose structure and dtypes the result has.
    """
    leaves, structure = jax.tree.flatten(jax.tree.map(jnp.zeros_like, W))
    for i, d in zip(where, errors, strict=True):
        leaves[i] = d[choice].astype(leaves[i].dtype)
    position = jnp.asarray(where)[layer]
    return only(position, jax.tree.unflatten(structure, leaves))


def positions(errors: Errors, params: Params) -> tuple[int, ...]:
    """Return the positions of the leaves that errors are of, or raise."""
    if not isinstance(errors, Errors):
        raise TypeError(
            f"errors must be of sensitivity.weight_errors, got {type(errors).__name__}."
        )
    paths = _tree.unique_leaf_paths(params)
    shapes = dict(zip(paths, map(np.shape, jax.tree.leaves(params)), strict=True))
    for path, d in errors.layers.items():
        expected = (len(errors.choices), *shapes.get(path, ()))
        if path not in shapes or np.shape(d) != expected:
            raise ValueError(
                f"errors must be of the layers of params: {path!r} has shape "
                f"{np.shape(d)}, and params "
                + (
                    f"asks for {expected}."
                    if path in shapes
                    else f"has only {[*shapes]}."
                )
            )
    return tuple(paths.index(path) for path in errors.layers)


def _mask(errors: Errors, params: Params) -> Params:
    """Return which leaves the errors are of."""
    where = positions(errors, params)
    leaves, structure = jax.tree.flatten(params)
    return jax.tree.unflatten(structure, [i in where for i in range(len(leaves))])


def _times_squared_norms(
    errors: Errors,
    values: dict[str, chex.Array],
    stderr: dict[str, chex.Array] | None,
) -> Sensitivity:
    """Multiply one number per layer by `||d||^2 / 2` of every choice."""
    halves = {path: x / 2.0 for path, x in errors.squared_norms().items()}
    return Sensitivity(
        errors.choices,
        {path: values[path] * half for path, half in halves.items()},
        None
        if stderr is None
        else {path: stderr[path] * half for path, half in halves.items()},
    )
