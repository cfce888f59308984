r"""HERO's gradient as a drop-in replacement of `jax.value_and_grad`.

With the mini-batch loss L, weights W, gradient `g = grad L(W)` and a direction z
(:mod:`hero_jax.perturbation`),

.. math::

    U &= W + h z \\
    G(U) &= \sum_i \| \nabla_i L(U) - g^i \|_2^2
        \qquad g \text{ held constant (Eq. 12)} \\
    \text{HERO gradient} &= \nabla L(U) + \gamma \nabla_U G(U)
        \qquad \text{(Eq. 13, weight decay left to optax)}

and `grad_U G(U) = 2 H(U) (grad L(U) - g)` is one Hessian-vector product. The default
penalty, `sum_i ||h z^i|| ||grad_i L(U) - g^i||`, takes one, too.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from hero_jax import _autodiff, _checks, _loss, _tree, perturbation
from hero_jax._autodiff import FiniteDifference
from hero_jax._typing import AxisName, Directions, Grads, Mask, Params, Perturbation
from hero_jax.leaves import Leaf, Overrides, are_weights, describe, per_layer

__all__ = ["Metrics", "hero_value_and_grad"]


def _along(
    z: Params,
    W: Params,
    g: Grads,
    gradient_and_hvp: Callable[[Params], tuple[Grads, Callable[[Params], Grads], Any]],
    h: chex.Numeric,
    gamma: chex.Numeric,
    penalty: Callable[[Grads, Params], chex.Array],
) -> tuple[Grads, Step]:
    """Return Eq. 13 along z, and what was computed on the way.

    Args:
      z: direction.
      W: weights.
      g: `grad L(W)`.
      gradient_and_hvp: `U -> (grad L(U), v -> H(U) v, L(U))`.
      h: length of the step.
      gamma: strength of the penalty.
      penalty: G of Eq. 12, `(grad L(U) - g, h z) -> G`.
    """
    step = _tree.scale(h, z)
    dL, hvp, loss_U = gradient_and_hvp(optax.tree.add(W, step))
    difference = optax.tree.sub(dL, g)
    G, v = jax.value_and_grad(penalty)(difference, step)
    # Gamma inside the product: of a loss that is scaled for float16, H v overflows.
    product = hvp(_tree.scale(gamma, v))
    return optax.tree.add(dL, product), Step(z, dL, difference, product, G, loss_U)


class Step(NamedTuple):
    """A step along z: gradient at its end, differences, penalty, loss there."""

    z: Params
    grad: Grads
    difference: Grads
    product: Grads
    penalty: chex.Array
    loss: Any


class Metrics(NamedTuple):
    """What HERO computes on its way; scalars, over all leaves together.

    Attributes:
      perturbed_loss: `L(U)`; `None` from :func:`hero_jax.hero`, which sees gradients
        only.
      grad_norm: `||g||`, at the clean weights.
      perturbed_grad_norm: `||grad L(U)||`.
      perturbation_norm: `||z||`; the step is h times as long.
      grad_difference_norm: `||grad L(U) - g||`.
      hessian_norm: `||Hz||` by the finite difference `||grad L(U) - g|| / h`
        (section 5.4, Figure 2a); zero for `h = 0`, which looks at one point only.
      penalty: `G(U)` of Eq. 12, over the penalized leaves, before gamma.
      penalty_grad_norm: `||gamma grad_U G(U)||`, the penalty's part of the gradient.
    """

    perturbed_loss: chex.Array | None
    grad_norm: chex.Array
    perturbed_grad_norm: chex.Array
    perturbation_norm: chex.Array
    grad_difference_norm: chex.Array
    hessian_norm: chex.Array
    penalty: chex.Array
    penalty_grad_norm: chex.Array


class Settings(NamedTuple):
    """The static part of HERO, checked: what does not depend on the weights."""

    directions: tuple[Perturbation, ...]
    reduction: str
    perturb_mask: Mask | None
    penalty_mask: Mask | None
    leaves: Overrides | None
    product: _autodiff.Product

    @classmethod
    def of(
        cls,
        perturbation_: Directions,
        reduction: str,
        perturb_mask: Mask | None,
        penalty_mask: Mask | None,
        leaves: Overrides | None,
        hvp: str | FiniteDifference,
    ) -> Settings:
        """Check the arguments shared by `hero` and `hero_value_and_grad`."""
        _checks.check_choice("reduction", reduction, ("mean", "norm", "sum"))
        return cls(
            directions=perturbation.resolve_all(perturbation_, leaves),
            reduction=reduction,
            perturb_mask=perturb_mask,
            penalty_mask=penalty_mask,
            leaves=leaves,
            product=_autodiff.resolve(hvp),
        )


def hero_gradient(
    grad_fn: _autodiff.GradFn,
    W: Params,
    g: Grads,
    *,
    loss: chex.Array | None,
    h: chex.Numeric,
    gamma: chex.Numeric,
    settings: Settings,
    hvp_grad_fn: _autodiff.GradFn | None = None,
) -> tuple[Grads, Metrics]:
    """Compute HERO's gradient from that at W and a function that gives it elsewhere.

    Masks, dtypes, NaN and the mean over several directions are dealt with here.

    Args:
      grad_fn: `U -> (grad L(U), L(U))`; the loss may be `None`.
      W: weights.
      g: `grad L(W)`.
      loss: `L(W)`, or `None` if `grad_fn` knows no loss.
      h: length of the step along z.
      gamma: strength of the penalty.
      settings: direction, reduction, masks and how the product is computed.
      hvp_grad_fn: stands in for `grad_fn` in the product; a part of the examples, say.

    Returns:
      The gradient, with the dtypes of `g`, and the metrics.
    """
    off, no_penalty = _checks.is_zero(h), _checks.is_zero(gamma)
    described = describe(W, settings.leaves)
    penalized = _tree.resolve_mask(
        "penalty_mask",
        settings.penalty_mask,
        W,
        None if off or no_penalty else "gamma",
        default=lambda _: are_weights(described),
    )
    no_penalty = no_penalty or not any(jax.tree.leaves(penalized))
    wide = _tree.widen(g)
    moved = [
        perturbation.which_move(
            direction, W, settings.perturb_mask, settings.leaves, None if off else "h"
        )
        for direction in settings.directions
    ]
    both = [jax.tree.map(operator.and_, penalized, each) for each in moved]
    if settings.reduction == "norm" and not (
        off or no_penalty or any(jax.tree.leaves(both))
    ):
        raise ValueError(
            'reduction="norm" weighs the penalty of a leaf by how far it moves, and no '
            "penalized leaf moves: change perturb_mask or penalty_mask, or pass "
            "gamma=0."
        )
    if off:  # U = W: grad L(U) = g, and the penalty's gradient is zero
        zero = jax.tree.map(jnp.zeros_like, wide)
        return g, _metrics(h, wide, Step(zero, wide, zero, zero, jnp.float32(0), loss))
    penalty = _penalty(settings.reduction, penalized, described)

    def gradient_and_hvp(U: Params) -> tuple[Grads, Callable[[Params], Grads], Any]:
        hvp: Callable[[Params], Grads]
        if no_penalty:
            (dL, loss_U), hvp = grad_fn(U), optax.tree.zeros_like
        elif hvp_grad_fn is None:
            dL, hvp, loss_U = settings.product(grad_fn, U, penalized)
        else:
            dL, loss_U = grad_fn(U)
            _, hvp, _ = settings.product(hvp_grad_fn, U, penalized)
        _tree.check_same_structure("the gradient at W + h z", dL, "params", W)
        dL = _tree.cast_like(dL, wide)
        return dL, lambda v: _tree.cast_like(hvp(_tree.cast_like(v, U)), wide), loss_U

    def along(direction: Perturbation, moved: chex.ArrayTree) -> tuple[Grads, Metrics]:
        z = perturbation.along(direction, W, g, moved)
        gradient, step = _along(
            z, _tree.widen(W), wide, gradient_and_hvp, h, gamma, penalty
        )
        return gradient, _metrics(h, wide, step)

    gradient, metrics = _tree.mean(
        [along(*each) for each in zip(settings.directions, moved, strict=True)]
    )
    # NaN in g can get lost on its way through U: a rectifier may map it to zero.
    finite = jnp.isfinite(metrics.grad_norm)
    gradient = jax.tree.map(lambda x: jnp.where(finite, x, jnp.nan), gradient)
    return _tree.cast_like(gradient, g), metrics


def _penalty(
    reduction: str, penalized: chex.ArrayTree, described: chex.ArrayTree
) -> Callable[[Grads, Params], chex.Array]:
    """Return `G(difference, step)`, over the penalized leaves, layer by layer."""

    def of_layer(d: chex.Array, hz: chex.Array) -> chex.Array:
        if reduction == "norm":
            return _tree.norm(hz) * _tree.norm(d)
        return jnp.sum(d**2) / (max(d.size, 1) if reduction == "mean" else 1)

    def of_leaf(
        keep: bool, leaf: Leaf, d: chex.Array, hz: chex.Array
    ) -> chex.Array | None:
        return per_layer(of_layer, leaf)(d, hz).sum() if keep else None

    def G(difference: Grads, step: Params) -> chex.Array:
        dtype = _tree.widest_dtype(difference)
        each = jax.tree.map(of_leaf, penalized, described, difference, step)
        return sum(
            (x.astype(dtype) for x in jax.tree.leaves(each)), jnp.zeros((), dtype)
        )

    return G


def _metrics(h: chex.Numeric, g: Grads, step: Step) -> Metrics:
    difference_norm = _tree.global_norm(step.difference)
    length = jnp.asarray(h, difference_norm.dtype)
    return Metrics(
        perturbed_loss=step.loss,
        grad_norm=_tree.global_norm(g),
        perturbed_grad_norm=_tree.global_norm(step.grad),
        perturbation_norm=_tree.global_norm(step.z),
        grad_difference_norm=difference_norm,
        hessian_norm=difference_norm / jnp.where(length == 0.0, 1.0, length),
        penalty=step.penalty.astype(length.dtype),
        penalty_grad_norm=_tree.global_norm(step.product),
    )


def hero_value_and_grad(
    loss_fn: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    *,
    h: chex.Numeric,
    gamma: chex.Numeric = 0.0,
    perturbation: Directions = "relative",
    reduction: str = "norm",
    perturb_mask: Mask | None = None,
    penalty_mask: Mask | None = None,
    leaves: Overrides | None = None,
    hvp: str | FiniteDifference = "exact",
    hvp_loss_fn: Callable[..., Any] | None = None,
    has_aux: bool = False,
    return_metrics: bool = False,
    axis_name: AxisName | None = None,
) -> Callable[..., Any]:
    r"""Evaluate a loss and HERO's gradient: a drop-in for `jax.value_and_grad`.

    .. math::

        \nabla L(U) + \gamma \nabla_U G(U), \qquad U = W + h z(W, g)

    at about twice the cost of the plain gradient g, and four times with the penalty G.
    `gamma = 0`, the default, leaves the penalty out: sharpness-aware minimization along
    z. `h = 0` is the plain gradient. Weight decay and step rule are left to optax.

    Each kernel moves by the share h of its norm. No h suits all networks: one that is
    too long lets nothing be learnt, and a deep network bears a tenth of what a shallow
    one does. :func:`hero_jax.schedules.next_h` lets it follow the loss. The paper's
    text is `perturbation="layerwise", reduction="sum"`, with h and gamma to be
    searched; our penalty begins with `gamma=0.5`.

    Args:
      loss_fn: `(params, *args, **kwargs) -> loss`, or `-> (loss, aux)` with `has_aux`.
        Every evaluation is given the same arguments, a random key among them; value
        and auxiliary output are those of the clean weights, BatchNorm statistics, too.
        Half-precision weights are handed over in float32: a small perturbation, or
        difference of gradients, would be rounded away.
      argnums: position of `params` among the arguments, or several of them.
      h: length of the step in units of z, at least 0; a number or a traced scalar.
        What it means is up to the direction: see :mod:`hero_jax.perturbation`.
      gamma: strength of the penalty, at least 0; a number or a traced scalar. With
        "norm" it has no unit. With "sum" and "mean" its unit is 1 / loss: for S times
        the loss, such as a sum over S examples or a loss scaled for float16,
        `gamma / S` does the same.
      perturbation: "relative" (h is the share of its norm by which a kernel moves),
        "layerwise" (Eq. 11), "adaptive" (released code), "normalized" (SAM), or a
        function `(params, grads) -> z`; or a list of several, over which gradient and
        metrics are averaged.
      reduction: what is summed up over the tensors: "norm", `||h z^i|| ||grad_i L(U) -
        g^i||`, which is a loss: with gamma = 1/2 it bounds the second-order term of
        Eq. 4; "sum", `||grad_i L(U) - g^i||^2` (Eq. 12); or "mean", the same over the
        number of weights (released code).
      perturb_mask: which leaves are perturbed: tree of bools, or a function
        `params -> tree`. A leaf left out counts in no norm. Default: kernels and
        embeddings by "relative" and :func:`hero_jax.perturbation.rounding`, all by the
        others.
      penalty_mask: which leaves enter the penalty. Default: kernels and embeddings,
        that is, those of two or more dimensions without biases and normalization; where
        there is none, as in one flat vector, pass `True` for both masks. The product is
        the cheaper, the fewer of a network's first layers are penalized.
      leaves: what :mod:`hero_jax.leaves` does not see in paths and shapes, such as
        `{"blocks/*": {"layer_axes": 1}}`. Each layer of a stack, as `nn.scan` makes
        them, has norms and means of its own.
      hvp: how to compute the product with the Hessian: "exact", forward-over-reverse,
        or :class:`hero_jax.FiniteDifference`, which takes less memory.
      hvp_loss_fn: stands in for `loss_fn` in that product, such as the loss over every
        fourth example: an unbiased estimate, if examples are in random order, for less
        time. It takes and returns what `loss_fn` does.
      has_aux: whether `loss_fn` returns a pair `(loss, aux)`.
      return_metrics: whether to return :class:`Metrics` as a third result; they cost
        a few reductions.
      axis_name: axis of the surrounding `pmap`, `shard_map` or `vmap` over which the
        examples are spread, in equal parts, or several axes. All is as on one device
        with all examples: `loss_fn`, a mean over its examples, g, grad L(U) and the
        product are averaged over the axis; the auxiliary output is not. Leave it out
        under `jit` of sharded arrays. For a perturbation of each device's own, see
        :func:`hero_jax.parts.averaged`.

    Returns:
      A function of the arguments of `loss_fn` that returns `(loss, grads)`, or
      `((loss, aux), grads)` with `has_aux`; with `return_metrics`, the metrics come
      third. The gradient has the structure and dtypes of `params`; it is NaN
      everywhere if the gradient at W is not finite (and h is not 0).

    Raises:
      TypeError: an argument has the wrong type, or a weight is complex or integer.
      ValueError: an argument has a value that is not allowed; or no leaf is penalized
        (or perturbed) by the default or a mask function although gamma (or h) is not 0,
        or none is both with "norm".

    Example:
      >>> import jax.numpy as jnp
      >>> import hero_jax
      >>> loss = lambda W, x, y: jnp.mean((x @ W - y) ** 2)
      >>> value_and_grad = hero_jax.hero_value_and_grad(loss, h=0.04)
      >>> W, x, y = jnp.ones((2, 1)), jnp.eye(2), jnp.zeros((2, 1))
      >>> value, grads = value_and_grad(W, x, y)
      >>> [f"{x:.2f}" for x in grads.ravel()]  # the Hessian is the identity
      ['1.04', '1.04']

    **The released code** takes `perturbation="adaptive", reduction="mean"`, with
    `h=0.5, gamma=5` for ResNet20 on CIFAR-10. It also lets the perturbed pass advance
    the BatchNorm statistics and applies no update in the first epoch, which is not
    copied.

    References:
      Yang et al., `HERO <https://arxiv.org/abs/2111.11986>`_, 2021, Eq. 11-13.
    """
    settings = Settings.of(
        perturbation, reduction, perturb_mask, penalty_mask, leaves, hvp
    )
    _checks.check_nonnegative("h", h)
    _checks.check_nonnegative("gamma", gamma)
    bind = _loss.of_weights(loss_fn, argnums, has_aux, axis_name)
    bind_hvp = None
    if hvp_loss_fn is not None:
        bind_hvp = _loss.of_weights(
            hvp_loss_fn, argnums, has_aux, axis_name, "hvp_loss_fn"
        )

    @functools.wraps(loss_fn)
    def value_and_grad(*args: Any, **kwargs: Any) -> Any:
        W, at = bind(args, kwargs)
        value, g = at(W) if _checks.is_zero(h) else _loss.in_full_precision(at, W)
        gradient, metrics = hero_gradient(
            _gradient_and_loss(at),
            W,
            g,
            loss=value[0],
            h=h,
            gamma=gamma,
            settings=settings,
            hvp_grad_fn=bind_hvp and _gradient_and_loss(bind_hvp(args, kwargs)[1]),
        )
        results = _loss.as_of_jax(value, gradient, W, has_aux)
        return (*results, metrics) if return_metrics else results

    return value_and_grad


def _gradient_and_loss(at: _loss.At) -> _autodiff.GradFn:
    def grad_fn(U: Params) -> tuple[Grads, chex.Array]:
        (loss, _), gradient = at(U)
        return gradient, loss

    return grad_fn
