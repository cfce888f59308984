r"""Directions `z(W, g)` along which HERO perturbs the weights.

Each is a pure function `(params, grads) -> z` with the structure of `params`;
HERO evaluates the loss at `U = W + h z`. Any function of this signature can stand in
their place. Norms and directions are computed in float32 (float64 for float64
leaves), whatever the dtype of half-precision leaves. A leaf with zero weights or zero
gradient is not perturbed: the quotient `x / ||x||` is taken as zero at `x = 0`. A
gradient with NaN or infinity gives NaN: it is never hidden.

How long `z` is decides what `h` means. Over a network of N tensors with n_i entries,

- :func:`relative`, the default, gives a step of `||W^i||` in tensor i,
- :func:`rounding` gives half a bin of the quantizer to every weight,
- :func:`layerwise` gives a step of about `rms(W^i) / sqrt(n_i)` in tensor i,
- :func:`adaptive` gives a whole step of about `max |W|` at most,
- :func:`normalized` gives a whole step of exactly 1,

so an `h` tuned for one of them means nothing for another: :func:`step_for` tells what h
a direction needs to move the weights by a given share of their norm. The first two move
the weights that get quantized, kernels and embeddings, unless `perturb_mask` says
otherwise; under the others nearly all of the step may go to the smallest tensors. Two
more are those that the paper comes from: :func:`hutchinson`, random (Eq. 9), and
:func:`gradient`, the gradient as it is (Eq. 10).

Several directions, `perturbation=[first, second]`, have a perturbed point and a penalty
each, and HERO's gradient is the mean over them.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from hero_jax import _checks, _tree, quant
from hero_jax._typing import Directions, Grads, Mask, Params, Perturbation
from hero_jax.leaves import Overrides, describe, per_layer, weights
from hero_jax.quant import _options

__all__ = [
    "adaptive",
    "gradient",
    "hutchinson",
    "layerwise",
    "normalized",
    "relative",
    "rounding",
    "share_moved",
    "step_for",
]

_SAMPLERS = {"normal": jax.random.normal, "rademacher": jax.random.rademacher}

_BY_NAME: dict[str, Perturbation] = {}


def _by_name(direction: Callable[..., Params]) -> Callable[..., Params]:
    """Let a direction go by its name, and explain the call that cannot work."""
    name = direction.__name__

    @functools.wraps(direction)
    def checked(*args: Any, **kwargs: Any) -> Params:
        if len(args) + len(kwargs) < 2:
            raise TypeError(
                f"{name} takes two arguments, (params, grads): pass it without calling "
                "it. As optax.inject_hyperparams calls every function as a schedule, "
                f"pass perturbation={name!r} there, or static_args=('perturbation',)."
            )
        return direction(*args, **kwargs)

    _BY_NAME[name] = checked
    return checked


@_by_name
def relative(params: Params, grads: Grads, leaves: Overrides | None = None) -> Params:
    r"""Move each kernel by a share of its own norm: the default.

    .. math::

        z^i = \|W^i\|_2 \, \frac{u^i}{\|u^i\|_2}, \qquad u^i = (W^i)^2 g^i

    with the square taken elementwise. h is the share: with h = 0.02 every kernel moves
    by 2 % of its norm, whatever its size. That is what the paper's words promise, "to
    match the weight value range in each layer", and its Eq. 11, of the same u, does not
    do: there the share falls with the size of the tensor. Rounding to 4 bits moves a
    kernel by some 14 %.

    HERO moves kernels and embeddings with it, and other leaves only by a
    `perturb_mask`; wrapped in a function of yours, it moves all. A stack of layers, as
    under `nn.scan`, is as many tensors.

    Args:
      params: weights `W`, a tree of real arrays.
      grads: gradient `g` at `W`, same structure and shapes.
      leaves: which leading axes are layers, where :mod:`hero_jax.leaves` does not see
        it.

    Returns:
      `z`, same structure and shapes, float32 or wider.

    Example:
      >>> import jax.numpy as jnp
      >>> import hero_jax
      >>> W, g = jnp.array([[3.0, 4.0]]), jnp.array([[0.0, 2.0]])
      >>> hero_jax.perturbation.relative(W, g)
      Array([[0., 5.]], dtype=float32)
    """

    def direction(W: chex.Array, g: chex.Array) -> chex.Array:
        w = _over_norm(W, _tree.norm(W))
        u = w**2 * _over_norm(g, _tree.norm(g))
        return _tree.norm(W) * _over_norm(u, _tree.norm(u))

    return _layer_by_layer(direction, params, grads, leaves)


@_by_name
def layerwise(params: Params, grads: Grads, leaves: Overrides | None = None) -> Params:
    r"""Perturb each tensor by its own scale: the paper's direction.

    .. math::

        z^i = \frac{(W^i)^2}{\|W^i\|_2} \, \frac{g^i}{\|g^i\|_2}

    with the square taken elementwise. Every tensor moves, however small its share of
    the gradient, and large weights move most. A stack of layers, as under `nn.scan`, is
    as many tensors.

    Args:
      params: weights `W`, a tree of real arrays.
      grads: gradient `g` at `W`, same structure and shapes.
      leaves: which leading axes are layers, where :mod:`hero_jax.leaves` does not see
        it.

    Returns:
      `z`, same structure and shapes, float32 or wider.

    Example:
      >>> import jax.numpy as jnp
      >>> import hero_jax
      >>> W, g = jnp.array([3.0, 4.0]), jnp.array([0.0, 2.0])
      >>> hero_jax.perturbation.layerwise(W, g)  # (16 / 5) * (2 / 2)
      Array([0. , 3.2], dtype=float32)

    References:
      Yang et al., `HERO <https://arxiv.org/abs/2111.11986>`_, 2021, Eq. 11.
    """

    def direction(W: chex.Array, g: chex.Array) -> chex.Array:
        return W * _over_norm(W, _tree.norm(W)) * _over_norm(g, _tree.norm(g))

    return _layer_by_layer(direction, params, grads, leaves)


@_by_name
def adaptive(params: Params, grads: Grads) -> Params:
    r"""Perturb all tensors under one norm, scaled by the weights: the released code's.

    .. math::

        z = \frac{W^2 \, g}{\| \, |W| \, g \, \|_2}

    with one norm over all tensors, so those with a large gradient take the largest
    share of the step. This is the direction of adaptive sharpness-aware minimization.

    Args:
      params: weights `W`, a tree of real arrays.
      grads: gradient `g` at `W`, same structure and shapes.

    Returns:
      `z`, same structure and shapes, float32 or wider.

    Example:
      >>> import jax.numpy as jnp
      >>> import hero_jax
      >>> W, g = jnp.array([1.0, 2.0]), jnp.array([3.0, 2.0])
      >>> hero_jax.perturbation.adaptive(W, g)  # (3, 8) / ||(3, 4)||
      Array([0.6, 1.6], dtype=float32)

    References:
      Kwon et al., `ASAM <https://arxiv.org/abs/2102.11600>`_, 2021, Eq. 3;
      the code released with HERO.
    """
    W = _tree.widen(params)
    scaled = jax.tree.map(jnp.multiply, W, _tree.widen(grads))
    total = _tree.global_norm(scaled)
    return jax.tree.map(lambda w, s: w * _over_norm(s, total), W, scaled)


@_by_name
def normalized(params: Params, grads: Grads) -> Params:
    r"""Perturb along the gradient, by a step of length one: the direction of SAM.

    .. math::

        z = g / \|g\|_2

    Args:
      params: weights; only the structure counts.
      grads: gradient `g`, same structure and shapes.

    Returns:
      `z`, same structure and shapes, float32 or wider.

    Example:
      >>> import jax.numpy as jnp
      >>> import hero_jax
      >>> W, g = jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0])
      >>> hero_jax.perturbation.normalized(W, g)
      Array([0.6, 0.8], dtype=float32)

    References:
      Foret et al., `SAM <https://arxiv.org/abs/2010.01412>`_, 2021, Eq. 2.
    """
    del params
    grads = _tree.widen(grads)
    total = _tree.global_norm(grads)
    return jax.tree.map(lambda g: _over_norm(g, total), grads)


@_by_name
def gradient(params: Params, grads: Grads) -> Params:
    r"""Perturb along the gradient as it is: where the paper's derivation begins.

    .. math::

        z = g

    The step `h ||g||` shrinks as training goes on. The paper leaves this direction for
    that of :func:`layerwise`, since layers differ in the size of their gradients.

    Args:
      params: weights; only the structure counts.
      grads: gradient `g`, same structure and shapes.

    Returns:
      `z`, same structure and shapes, float32 or wider.

    Example:
      >>> import jax.numpy as jnp
      >>> import hero_jax
      >>> W, g = jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0])
      >>> hero_jax.perturbation.gradient(W, g)
      Array([3., 4.], dtype=float32)

    References:
      Yang et al., `HERO <https://arxiv.org/abs/2111.11986>`_, 2021, Eq. 10.
    """
    del params
    return _tree.widen(grads)


def hutchinson(key: chex.PRNGKey, distribution: str = "normal") -> Perturbation:
    r"""Return a random direction: the penalty is the sum of squared eigenvalues.

    .. math::

        z \sim \mathcal N(0, I), \qquad
        \mathbb E \| H z \|_2^2 = \| H \|_F^2 = \sum_i \lambda_i^2

    so that `G(U) / h^2` estimates it where h is small and all leaves are penalized. The
    paper begins with this and goes on to z along the gradient, where one direction is
    enough. Here a few probes are averaged:
    `perturbation=[hutchinson(key) for key in jax.random.split(key, 4)]`, at the cost of
    three gradients each.

    Every step needs a new key, as an argument of the jitted function. So this is for
    :func:`hero_jax.hero_value_and_grad`, called inside of it; :func:`hero_jax.hero`,
    which is made once, would take the same direction at every step.

    The step's length is h times the square root of the number of weights: h is smaller
    than that of other directions by far.

    Args:
      key: of the random numbers, `jax.random.key(...)`; may be traced.
      distribution: "normal" (Eq. 9) or "rademacher", entries of plus or minus one: the
        same mean and, for the trace of a matrix, less variance.

    Returns:
      A direction, `(params, grads) -> z`.

    Raises:
      ValueError: the distribution is unknown.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import hero_jax
      >>> @jax.jit
      ... def step(W, key):
      ...     keys = jax.random.split(key, 8)
      ...     probes = [hero_jax.perturbation.hutchinson(k) for k in keys]
      ...     options = {"perturbation": probes, "reduction": "sum"}
      ...     value_and_grad = hero_jax.hero_value_and_grad(
      ...         lambda W: jnp.sum(W**2), h=1e-3, gamma=0.1, **options
      ...     )
      ...     return value_and_grad(W)
      >>> loss, grads = step(jnp.ones((3, 2)), jax.random.key(0))

    References:
      Yang et al., `HERO <https://arxiv.org/abs/2111.11986>`_, 2021, Eq. 9;
      Hutchinson, *A stochastic estimator of the trace of the influence matrix*, 1989.
    """
    _checks.check_choice("distribution", distribution, _SAMPLERS)

    def random(params: Params, grads: Grads) -> Params:
        del grads
        return optax.tree.random_like(key, _tree.widen(params), _SAMPLERS[distribution])

    return random


@dataclasses.dataclass(frozen=True)
class _OfWeights:
    """A direction of kernels and embeddings, of each layer of a stack by itself.

    Attributes:
      z: `(params, grads, leaves) -> z`.
      leaves: what :mod:`hero_jax.leaves` does not see.
    """

    z: Callable[[Params, Grads, Overrides | None], Params]
    leaves: Overrides | None = None

    def __call__(self, params: Params, grads: Grads) -> Params:
        """Return z."""
        return self.z(params, grads, self.leaves)


def rounding(bits: int, axis: Any = None) -> Perturbation:
    r"""Return the direction in which rounding to so many bits does the most harm.

    .. math::

        z^i = \tfrac12 s^i \, \mathrm{sign}(g^i)

    with `s^i` the width of a bin of :func:`hero_jax.quant.quantize`. Rounding moves no
    weight by more than half a bin, so at h = 1 this is, to first order, the worst
    that rounding can do: the corner of the ball of Theorem 2.

    Kernels and embeddings move, as they are quantized by default.

    Args:
      bits: of the quantizer, 2 to 8, or 16.
      axis: along which its grids differ, as of :func:`hero_jax.quant.quantize`.

    Returns:
      A direction, `(params, grads) -> z`.

    Raises:
      ValueError: bits is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> import hero_jax
      >>> W, g = jnp.array([[0.0, 1.0, 3.0]]), jnp.array([[2.0, -1.0, 0.0]])
      >>> hero_jax.perturbation.rounding(bits=2)(W, g)  # a bin is 1 wide
      Array([[ 0.5, -0.5,  0. ]], dtype=float32)

    References:
      Yang et al., `HERO <https://arxiv.org/abs/2111.11986>`_, 2021, Theorem 2.
    """
    _options.check_bits(bits)

    def of_leaf(grid: Any, W: chex.Array, g: chex.Array) -> chex.Array:
        if not quant.is_quantized(grid):
            return jnp.zeros_like(g)
        own = [k for k, n in enumerate(np.shape(grid.scale)) if n == 1]
        largest = jnp.max(jnp.abs(W), own, keepdims=True)  # no bins for zeros alone
        return jnp.where(largest == 0.0, 0.0, 0.5 * grid.scale) * jnp.sign(g)

    def z(params: Params, grads: Grads, leaves: Overrides | None) -> Params:
        W = _tree.widen(params)
        grids = quant.quantize(W, bits, axis=axis, leaves=leaves)
        return jax.tree.map(
            of_leaf, grids, W, _tree.widen(grads), is_leaf=quant.is_quantized
        )

    return _OfWeights(z)


def share_moved(
    params: Params,
    grads: Grads,
    *,
    h: chex.Numeric,
    perturbation: str | Perturbation,
    perturb_mask: Mask | None = None,
    leaves: Overrides | None = None,
) -> chex.ArrayTree:
    r"""Tell how far HERO's step moves each tensor, as a share of its norm.

    .. math:: h \, \|z^i\|_2 / \|W^i\|_2

    Rounding a kernel to 4 bits moves it by some 14 %. If the step moves kernels by
    0.03 % and normalization scales by 3 %, as Eq. 11 does at h = 1, it is no
    preparation for rounding.

    Args:
      params: weights `W`.
      grads: gradient `g` at `W`, of one mini-batch.
      h: length of the step.
      perturbation: direction, by name or as a function.
      perturb_mask: which leaves move, as of :func:`hero_jax.hero_value_and_grad`.
      leaves: as there.

    Returns:
      Tree like `params` of scalars; zero for a tensor of zeros.

    Example:
      >>> import jax.numpy as jnp
      >>> import hero_jax
      >>> W = {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}
      >>> hero_jax.perturbation.share_moved(W, W, h=1.0, perturbation="layerwise")
      {'bias': Array(0.25, dtype=float32), 'kernel': Array(0.0625, dtype=float32)}
    """
    z, _ = _masked(params, grads, perturbation, perturb_mask, leaves)

    def share(W: chex.Array, z: chex.Array) -> chex.Array:
        norm = _tree.norm(W)
        ratio = jnp.abs(h) * _over_norm(_tree.norm(z), norm)
        return jnp.where(norm == 0.0, 0.0, ratio)

    return jax.tree.map(share, params, z)


def step_for(
    share: chex.Numeric,
    params: Params,
    grads: Grads,
    *,
    perturbation: str | Perturbation,
    perturb_mask: Mask | None = None,
    leaves: Overrides | None = None,
) -> chex.Array:
    r"""Return the h at which the weights move by a share of their norm.

    .. math:: h = \text{share} \cdot \|W\|_2 / \|z\|_2

    over the kernels and embeddings that move, together, from one gradient: a place to
    begin a search of h, for a direction and a network that are new.

    Args:
      share: how far, such as 0.05.
      params: weights `W`.
      grads: gradient `g` at `W`, of one mini-batch.
      perturbation: direction, by name or as a function.
      perturb_mask: which leaves move, as of :func:`hero_jax.hero_value_and_grad`.
      leaves: as there.

    Returns:
      h, a scalar; infinite where they do not move, as with a gradient of zero.

    Raises:
      ValueError: no kernel or embedding moves.

    Example:
      >>> import jax.numpy as jnp
      >>> import hero_jax
      >>> W = {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}
      >>> hero_jax.perturbation.step_for(0.05, W, W, perturbation="layerwise")
      Array(0.8, dtype=float32)
    """
    z, moved = _masked(params, grads, perturbation, perturb_mask, leaves)
    chosen = jax.tree.map(operator.and_, moved, weights(params, leaves))
    if not any(jax.tree.leaves(chosen)):
        raise ValueError(
            "step_for needs a kernel or an embedding that moves: params has none, or "
            "perturb_mask leaves them out."
        )
    W = _tree.global_norm(_tree.select(chosen, _tree.widen(params)))
    return share * W / _tree.global_norm(_tree.select(chosen, z))


def _masked(
    params: Params,
    grads: Grads,
    perturbation: str | Perturbation,
    perturb_mask: Mask | None,
    leaves: Overrides | None,
) -> tuple[Params, chex.ArrayTree]:
    direction = resolve(perturbation, leaves)
    moved = which_move(direction, params, perturb_mask, leaves)
    return along(direction, params, grads, moved), moved


def which_move(
    direction: Perturbation,
    params: Params,
    perturb_mask: Mask | None,
    leaves: Overrides | None,
    needed_for: str | None = None,
) -> chex.ArrayTree:
    """Return Python bools like params: the mask, or what the direction is of."""
    default = None
    if isinstance(direction, _OfWeights):
        default = functools.partial(weights, overrides=leaves)
    return _tree.resolve_mask(
        "perturb_mask", perturb_mask, params, needed_for, default=default
    )


def resolve(
    perturbation: str | Perturbation, leaves: Overrides | None = None
) -> Perturbation:
    """Return the direction that goes by this name, or the function itself.

    Those that treat layers by themselves are told which leaves are stacks of layers.
    """
    if leaves is not None and perturbation in ("layerwise", layerwise):
        return functools.partial(layerwise, leaves=leaves)
    if perturbation in ("relative", relative):
        perturbation = _OfWeights(relative)
    if isinstance(perturbation, _OfWeights):
        return dataclasses.replace(perturbation, leaves=leaves)
    if perturbation in ("rounding", rounding):
        raise ValueError(
            "perturbation=rounding is a function that makes a direction: pass "
            "hero_jax.perturbation.rounding(bits)."
        )
    if perturbation in ("hutchinson", hutchinson):
        raise ValueError(
            "perturbation=hutchinson lacks a key: pass "
            "hero_jax.perturbation.hutchinson(key), with a new key at every step."
        )
    if isinstance(perturbation, str):
        _checks.check_choice("perturbation", perturbation, NAMES)
        return _BY_NAME[perturbation]
    _checks.check_callable(
        "perturbation",
        perturbation,
        f"(params, grads) -> z, or one of {NAMES}",
    )
    return perturbation


def resolve_all(
    perturbation: Directions, leaves: Overrides | None = None
) -> tuple[Perturbation, ...]:
    """Return the directions, of which there may be one or several."""
    if not isinstance(perturbation, (list, tuple)):
        return (resolve(perturbation, leaves),)  # type: ignore[arg-type]  # one
    if not perturbation:
        raise ValueError("perturbation must name at least one direction, got none.")
    return tuple(resolve(direction, leaves) for direction in perturbation)


def along(
    direction: Perturbation, W: Params, g: Grads, perturbed: chex.ArrayTree
) -> Params:
    """Return `z(W, g)` in float32 or wider.

    Args:
      direction: `(W, g) -> z`.
      W: weights.
      g: `grad L(W)`.
      perturbed: Python bools, a tree like W; other leaves stay and count in no norm.
    """
    z = direction(_tree.widen(W), _tree.select(perturbed, g))
    _tree.check_same_structure("the perturbation's result", z, "params", W)
    _tree.check_real("the perturbation's result", z)
    return _tree.select(perturbed, _tree.cast_like(z, _tree.widen(W)))


NAMES = tuple(sorted(_BY_NAME))
"""Directions that go by a name."""


def _layer_by_layer(
    direction: Callable[[chex.Array, chex.Array], chex.Array],
    params: Params,
    grads: Grads,
    leaves: Overrides | None,
) -> Params:
    """Return z of every tensor from its weights and gradient; a stack is several."""
    return jax.tree.map(
        lambda leaf, W, g: per_layer(direction, leaf)(W, g),
        describe(params, leaves),
        _tree.widen(params),
        _tree.widen(grads),
    )


def _over_norm(x: chex.Array, norm: chex.Array) -> chex.Array:
    """Return `x / norm`, zero where the norm is zero and NaN where it is NaN."""
    norm = norm.astype(x.dtype)
    return x / jnp.where(norm == 0.0, 1.0, norm)
