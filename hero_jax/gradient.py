r"""HERO's gradient as a drop-in replacement of `jax.value_and_grad`.

With the mini-batch loss L, weights W, gradient `g = grad L(W)` and a direction z
(:mod:`hero_jax.perturbation`),

.. math::

    U &= W + h z \\
    G(U) &= \sum_i \| \nabla_i L(U) - g^i \|_2^2
        \qquad g \text{ held constant (Eq. 12)} \\
    \text{HERO gradient} &= \nabla L(U) + \gamma \nabla_U G(U)
        \qquad \text{(Eq. 13, weight decay left to optax)}

and `grad_U G(U) = 2 H(U) (grad L(U) - g)` is one Hessian-vector product.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

from hero_jax import _autodiff, _checks, _scope, _tree, perturbation
from hero_jax._scope import At, Scope
from hero_jax._typing import AxisName, Directions, Grads, Mask, Params, Perturbation

__all__ = ["Metrics", "hero_value_and_grad"]

REDUCTIONS = ("mean", "sum")
PRODUCTS = ("exact", "finite_difference")
STEP = 3e-3
"""Of the finite difference: where its error is least for ResNet20 in float32."""


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
      penalty: `G(U)` of Eq. 12, over the penalised leaves, before gamma.
    """

    perturbed_loss: chex.Array | None
    grad_norm: chex.Array
    perturbed_grad_norm: chex.Array
    perturbation_norm: chex.Array
    grad_difference_norm: chex.Array
    hessian_norm: chex.Array
    penalty: chex.Array


class Settings(NamedTuple):
    """The static part of HERO, checked: what does not depend on the weights."""

    directions: tuple[Perturbation, ...]
    reduction: str
    perturb_mask: Mask | None
    penalty_mask: Mask | None
    hvp: str
    hvp_step: chex.Numeric
    skip_zero_gamma: bool

    @classmethod
    def of(
        cls,
        perturbation_: Directions,
        reduction: str,
        perturb_mask: Mask | None,
        penalty_mask: Mask | None,
        hvp: str,
        hvp_step: chex.Numeric,
        skip_zero_gamma: bool,
    ) -> Settings:
        """Check the arguments shared by `hero` and `hero_value_and_grad`."""
        _checks.check_choice("reduction", reduction, REDUCTIONS)
        _checks.check_choice("hvp", hvp, PRODUCTS)
        _checks.check_positive("hvp_step", hvp_step)
        _checks.check_bool("skip_zero_gamma", skip_zero_gamma)
        return cls(
            directions=perturbation.resolve_all(perturbation_),
            reduction=reduction,
            perturb_mask=perturb_mask,
            penalty_mask=_tree.weights_only if penalty_mask is None else penalty_mask,
            hvp=hvp,
            hvp_step=hvp_step,
            skip_zero_gamma=skip_zero_gamma,
        )


def hero_gradient(
    grad_fn: Callable[[Params], tuple[Grads, chex.Array | None]],
    W: Params,
    g: Grads,
    *,
    loss: chex.Array | None,
    h: chex.Numeric,
    gamma: chex.Numeric,
    settings: Settings,
    hvp_grad_fn: _autodiff.GradFn | None = None,
) -> tuple[Grads, Metrics]:
    """Compute Eq. 13 from the gradient at W and a function that gives it elsewhere.

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
    perturbed = _tree.resolve_mask(
        "perturb_mask", settings.perturb_mask, W, None if off else "h"
    )
    penalised = _tree.resolve_mask(
        "penalty_mask", settings.penalty_mask, W, None if off or no_penalty else "gamma"
    )
    no_penalty = no_penalty or not any(jax.tree.leaves(penalised))
    g_wide = _tree.widen(g)

    if off:  # U = W: grad L(U) = g, and the penalty's gradient is zero
        zero = jax.tree.map(jnp.zeros_like, g_wide)
        return g, _metrics(loss, h, g_wide, g_wide, zero, zero, zero)

    def difference(dL: Grads) -> Grads:
        _tree.check_same_structure("the gradient at W + h z", dL, "params", W)
        return jax.tree.map(lambda a, b: a.astype(b.dtype) - b, dL, g_wide)

    def weighted(d: Grads) -> Grads:
        """Return c_i d_i: G(U) = sum_i c_i ||d_i||^2, grad G(U) = 2 H(U) (c_i d_i)."""
        return jax.tree.map(
            lambda keep, x: _penalty_weight(keep, x, settings.reduction) * x,
            penalised,
            d,
        )

    def times_gamma(d: Grads) -> Grads:
        return jax.tree.map(lambda x: 2 * jnp.asarray(gamma, x.dtype) * x, d)

    def without_penalty(U: Params) -> tuple[Grads, Grads, chex.Array | None]:
        dL, loss_U = grad_fn(U)
        _tree.check_same_structure("the gradient at W + h z", dL, "params", W)
        dL = _tree.cast_like(dL, g_wide)
        return dL, dL, loss_U

    def with_penalty(U: Params) -> tuple[Grads, Grads, chex.Array | None]:
        dL, hvp, loss_U = _gradient_and_hvp(
            grad_fn, hvp_grad_fn, U, penalised, settings
        )
        # Times gamma before the product: of a loss that is scaled for float16, H v
        # would overflow, and H (gamma v) does not.
        v = _tree.cast_like(times_gamma(weighted(difference(dL))), U)
        dL, dG = _tree.cast_like((dL, hvp(v)), (g_wide, g_wide))
        return dL, jax.tree.map(jnp.add, dL, dG), loss_U

    def along(direction: Perturbation) -> tuple[Grads, Metrics]:
        U, z = perturbation.displace(W, g, h, direction, perturbed)
        if no_penalty:
            dL, gradient, loss_U = without_penalty(U)
        elif settings.skip_zero_gamma and isinstance(gamma, jax.core.Tracer):
            dL, gradient, loss_U = lax.cond(
                gamma != 0, with_penalty, without_penalty, U
            )
        else:
            dL, gradient, loss_U = with_penalty(U)
        d = difference(dL)
        return gradient, _metrics(loss_U, h, g_wide, dL, z, d, weighted(d))

    gradient, metrics = _tree.mean([along(z) for z in settings.directions])
    # NaN in g can get lost on its way through U: a rectifier may map it to zero.
    finite = jnp.isfinite(metrics.grad_norm)
    gradient = jax.tree.map(lambda x: jnp.where(finite, x, jnp.nan), gradient)
    return _tree.cast_like(gradient, g), metrics


def _gradient_and_hvp(
    grad_fn: _autodiff.GradFn,
    hvp_grad_fn: _autodiff.GradFn | None,
    U: Params,
    penalised: chex.ArrayTree,
    settings: Settings,
) -> tuple[Grads, Callable[[Params], Grads], Any]:
    """Return the gradient at U, a function for products with the Hessian, L(U)."""
    if settings.hvp == "finite_difference":
        product = functools.partial(
            _autodiff.gradient_and_difference, step=settings.hvp_step
        )
    else:
        product = functools.partial(
            _autodiff.gradient_and_hvp, way_round="Pass hvp='finite_difference'."
        )
    if hvp_grad_fn is None:
        return product(grad_fn, U, penalised)
    dL, loss_U = grad_fn(U)
    _, hvp, _ = product(hvp_grad_fn, U, penalised)
    return dL, hvp, loss_U


def _penalty_weight(keep: bool, leaf: chex.Array, reduction: str) -> float:
    """Return c_i: 1 for the sum of squares, 1 / n_i for their mean, 0 if masked."""
    if not keep:
        return 0.0
    return 1.0 / max(leaf.size, 1) if reduction == "mean" else 1.0


def _metrics(
    loss_U: chex.Array | None,
    h: chex.Numeric,
    g: Grads,
    dL: Grads,
    z: Params,
    difference: Grads,
    weighted: Grads,
) -> Metrics:
    difference_norm = _tree.global_norm(difference)
    step = jnp.asarray(h, difference_norm.dtype)
    products = jax.tree.map(lambda a, b: jnp.sum(a * b), weighted, difference)
    return Metrics(
        perturbed_loss=loss_U,
        grad_norm=_tree.global_norm(g),
        perturbed_grad_norm=_tree.global_norm(dL),
        perturbation_norm=_tree.global_norm(z),
        grad_difference_norm=difference_norm,
        hessian_norm=difference_norm / jnp.where(step == 0.0, 1.0, step),
        penalty=sum(
            (x.astype(step.dtype) for x in jax.tree.leaves(products)),
            jnp.zeros((), step.dtype),
        ),
    )


def hero_value_and_grad(
    loss_fn: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    *,
    h: chex.Numeric,
    gamma: chex.Numeric,
    perturbation: Directions = "layerwise",
    reduction: str = "sum",
    perturb_mask: Mask | None = None,
    penalty_mask: Mask | None = None,
    hvp: str = "exact",
    hvp_step: chex.Numeric = STEP,
    hvp_examples: int | None = None,
    skip_zero_gamma: bool = False,
    has_aux: bool = False,
    return_metrics: bool = False,
    axis_name: AxisName | None = None,
    scope: str = "global",
    examples_per_perturbation: int | None = None,
    batch_argnums: int | Sequence[int] | None = None,
) -> Callable[..., Any]:
    r"""Evaluate a loss and HERO's gradient: a drop-in for `jax.value_and_grad`.

    The value and the auxiliary output come from the clean weights W; the gradient is

    .. math::

        \nabla L(U) + \gamma \nabla_U \sum_i \| \nabla_i L(U) - g^i \|_2^2,
        \qquad U = W + h z(W, g)

    at about four times the cost of the plain one; `hvp`, `hvp_examples` and a gamma
    that is zero at most steps make it cheaper. `gamma = 0` leaves out the penalty:
    sharpness-aware minimization with this direction, at twice the cost. `h = 0` is the
    plain gradient. Weight decay and step rule are left to optax.

    Every evaluation is given the same arguments, so pass the random key of dropout
    as one of them. BatchNorm statistics belong into the auxiliary output: those of
    the perturbed passes are dropped.

    **Differences.** The defaults follow the paper. The code released with it takes
    `perturbation="adaptive", reduction="mean"`, with `h=0.5, gamma=5` for ResNet20 on
    CIFAR-10; it also lets the perturbed pass advance the BatchNorm statistics and
    applies no update in the first epoch, which is not copied.

    Args:
      loss_fn: `(params, *args, **kwargs) -> loss`, or `-> (loss, aux)` with `has_aux`.
        In place of half-precision weights it is given float32 ones, clean and
        perturbed: a small perturbation, or difference of gradients, would be rounded
        away. Value and auxiliary output keep the dtypes of a plain call.
      argnums: position of `params` among the arguments, or several of them.
      h: length of the step in units of z, at least 0; a number or a traced scalar.
        Its useful range depends on `perturbation`: see :mod:`hero_jax.perturbation`.
      gamma: strength of the penalty, at least 0; a number or a traced scalar. Its unit
        is 1 / loss, since the penalty is a square: for S times the loss, such as a sum
        over S examples or a loss scaled for float16, `gamma / S` does the same.
      perturbation: "layerwise" (Eq. 11), "adaptive" (released code), "normalized"
        (SAM), or a function `(params, grads) -> z`; or a list of several, over which
        gradient and metrics are averaged, each at the cost of another perturbed
        gradient and product. See :mod:`hero_jax.perturbation`.
      reduction: "sum" of the squared differences of a tensor (the paper), or their
        "mean" (released code); tensors are summed up either way.
      perturb_mask: which leaves are perturbed: tree of bools, or a function
        `params -> tree`. A leaf left out counts in no norm. Default: all.
      penalty_mask: which leaves enter the penalty. Default: those of two or more
        dimensions, that is, no biases and no normalization scales; where there is none,
        as in one flat vector, pass `True` for all. Of a network whose last layers alone
        are penalised the product is cheaper.
      hvp: "exact", forward-over-reverse, which keeps all that a gradient remembers of
        its layers until the product is done, and needs a loss with forward mode; or
        "finite_difference", one more gradient, `(grad L(U + e v) - grad L(U)) / e` in
        place of `H(U) v`, which keeps nothing but a few copies of the weights. Networks
        with rectifiers have kinks, and at the best of all steps the two differ by 0.6
        of the product's norm for ResNet20 in float32, and by several times that norm at
        a hundredth of that step (`examples/product_error.py`). It needs a loss that
        computes in float32 or wider: to bfloat16 the step is nearly nothing.
      hvp_step: length of that difference's step, `||e v|| / ||U||`. The default, 3e-3,
        suits networks with rectifiers in float32. The error of smooth ones is in
        proportion to it, down to rounding; 1e-6 is a good step for them in float64.
      hvp_examples: take the product over so many examples only, evenly spaced in the
        batch (of each device, or perturbation): where the loss is a mean over examples
        in random order, an unbiased estimate, but for BatchNorm. It needs
        `batch_argnums`, which must name all that has an axis of examples, and divides
        their number. The penalty's value remains that of all examples. Dropout draws
        other units for fewer examples.
      skip_zero_gamma: where gamma is traced and turns out zero, leave out the product
        by `jax.lax.cond` in place of multiplying it by zero: for
        :func:`hero_jax.schedules.every`, or a penalty that sets in later. Gamma must be
        the same on all devices. `jax.vmap` over gamma computes both branches.
      has_aux: whether `loss_fn` returns a pair `(loss, aux)`.
      return_metrics: whether to return :class:`Metrics` as a third result; they cost
        a few reductions.
      axis_name: axis of the surrounding `pmap`, `shard_map` or `vmap` over which the
        examples are spread, in equal parts, or several axes. Loss, gradient and
        metrics come out averaged over it, the auxiliary output does not. `loss_fn` is
        a mean over its examples. Leave it out under `jit` of sharded arrays. A random
        key among the arguments serves all devices, and parts, alike: fold
        `jax.lax.axis_index` in for others.
      scope: "global", exactly as on one device with all examples: means of g,
        grad L(U) and the product over the axis; or "local", m-sharpness: each device
        has its own perturbation and penalty, and only the gradients that come of them
        are averaged, in one collective operation.
      examples_per_perturbation: m, for m-sharpness whatever the number of devices:
        every m consecutive examples have a perturbation and a penalty of their own.
        It divides a device's examples, or is the whole batch. The parts take turns;
        auxiliary outputs are stacked along a new first axis. Under `jit` of sharded
        arrays every device would take all of them: use `shard_map` there.
      batch_argnums: positions of the arguments whose arrays have a first axis of
        examples, which `examples_per_perturbation` and `hvp_examples` need to know.

    Returns:
      A function of the arguments of `loss_fn` that returns `(loss, grads)`, or
      `((loss, aux), grads)` with `has_aux`; with `return_metrics`, the metrics come
      third. The gradient has the structure and dtypes of `params`; it is NaN
      everywhere if the gradient at W is not finite (and h is not 0).

    Raises:
      TypeError: an argument has the wrong type, or a weight is complex or integer.
      ValueError: h or gamma is negative or not a scalar, a name is unknown, a mask or
        perturbation has another structure than the weights, no leaf is penalised (or
        perturbed) by the default or a mask function although gamma (or h) is not 0,
        there is no such axis, or one is missing, the examples cannot be divided as
        asked for, or `hvp_step` is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> import hero_jax
      >>> loss = lambda W, x, y: jnp.mean((x @ W - y) ** 2)
      >>> value_and_grad = hero_jax.hero_value_and_grad(loss, h=0.1, gamma=0.1)
      >>> W, x, y = jnp.ones((2, 1)), jnp.eye(2), jnp.zeros((2, 1))
      >>> value, grads = value_and_grad(W, x, y)
      >>> value, grads.ravel()  # the Hessian is the identity
      (Array(1., dtype=float32), Array([1.06, 1.06], dtype=float32))

    References:
      Yang et al., `HERO <https://arxiv.org/abs/2111.11986>`_, 2021, Eq. 11-13;
      m-sharpness: Foret et al., `SAM <https://arxiv.org/abs/2010.01412>`_, 2021,
      section 4.1.
    """
    _checks.check_callable("loss_fn", loss_fn, "(params, *args, **kwargs) -> loss")
    _checks.check_nonnegative("h", h)
    _checks.check_nonnegative("gamma", gamma)
    settings = Settings.of(
        perturbation,
        reduction,
        perturb_mask,
        penalty_mask,
        hvp,
        hvp_step,
        skip_zero_gamma,
    )
    examples = Scope.of(
        axis_name, scope, examples_per_perturbation, batch_argnums, hvp_examples
    )

    def hero(at: At, W: Params, at_part: At | None) -> tuple[Any, Grads, Any]:
        def grad_fn_of(at: At) -> Callable[[Params], tuple[Grads, chex.Array]]:
            def grad_fn(U: Params) -> tuple[Grads, chex.Array]:
                (loss, _), gradient = at(U)
                return gradient, loss

            return grad_fn

        value, g = at(W) if _checks.is_zero(h) else _autodiff.in_full_precision(at, W)
        grads, metrics = hero_gradient(
            grad_fn_of(at),
            W,
            g,
            loss=value[0],
            h=h,
            gamma=gamma,
            settings=settings,
            hvp_grad_fn=None if at_part is None else grad_fn_of(at_part),
        )
        return value, grads, metrics if return_metrics else None

    return _scope.value_and_grad(
        loss_fn, argnums, has_aux, examples, hero, return_metrics
    )
