"""HERO as a link of an optax chain."""

from __future__ import annotations

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax

from hero_jax import _axis, _checks, _tree
from hero_jax._autodiff import FiniteDifference
from hero_jax._typing import AxisName, Directions, GradFn, Grads, Mask, Params
from hero_jax.gradient import Metrics, Settings, hero_gradient
from hero_jax.leaves import Overrides

__all__ = ["HeroState", "hero"]


class HeroState(NamedTuple):
    """State of :func:`hero`.

    Attributes:
      count: number of updates done, int32.
      metrics: of the latest update; zeros before the first.
    """

    count: chex.Array
    metrics: Metrics


def hero(
    h: chex.Numeric | optax.Schedule,
    gamma: chex.Numeric | optax.Schedule = 0.0,
    *,
    perturbation: Directions = "relative",
    reduction: str = "norm",
    perturb_mask: Mask | None = None,
    penalty_mask: Mask | None = None,
    leaves: Overrides | None = None,
    hvp: str | FiniteDifference = "exact",
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replace the gradient by HERO's: the first link of an optax chain.

    .. math::

        g \;\to\; \nabla L(U) + \gamma \nabla_U G(U), \qquad U = W + h z(W, g)

    `update` needs the weights and a function that gives the gradient of the same
    mini-batch loss at other weights: `tx.update(grads, state, params, grad_fn=...)`.
    It must differentiate the very loss that `grads` came from: same batch, same
    random key, same axis means. Use :func:`hero_jax.hero_value_and_grad` where the
    loss function is at hand and nothing between the gradient and HERO is wanted; the
    results are the same. A further `hvp_grad_fn` may take its place in the product
    with the Hessian, as `hvp_loss_fn` does there: the gradient of the loss over some of
    the examples, say.

    Composition:

    - What comes out is a gradient: an optimizer must stand behind HERO, not before it.
    - `optax.apply_if_finite` judges the gradient that it is given. Put it behind
      HERO to skip steps whose gradient at U is not finite:
      `optax.chain(hero(...), optax.apply_if_finite(optimizer, 5))`.
    - `optax.MultiSteps` goes behind HERO as well; HERO then perturbs each
      micro-batch by itself. Around HERO it would mix the mean gradient of several
      micro-batches with the `grad_fn` of the last.
    - To treat some leaves only, use `perturb_mask` and `penalty_mask`. Inside
      `optax.masked` or `optax.partition` HERO sees a part of the weights, and
      `grad_fn` must be a function of that part.
    - Gradients of half-precision weights are best taken and passed on in float32:
      the penalty is about a small difference of gradients, and their rounding to
      bfloat16 may be larger. :func:`hero_jax.hero_value_and_grad` does it by itself.
    - Flax's `TrainState.apply_gradients` hands no extra arguments to `update`: use
      :func:`hero_jax.hero_value_and_grad` there.
    - Inside `jax.shard_map` with its default checks, the gradient with respect to
      replicated weights is summed over the devices, and `axis_name` refuses it: take
      it at `jax.lax.pcast(params, axis, to="varying")`. Without `axis_name`, and with
      those checks only, a loss that is averaged by `jax.lax.pmean` works, too.
    - `optax.inject_hyperparams(hero)` takes every callable for a schedule: name the
      perturbation by its string, or list it (and masks that are functions) in
      `static_args`.

    Args:
      h: length of the step in units of z, at least 0; a number, a traced scalar or a
        schedule of the step count.
      gamma: strength of the penalty, at least 0; likewise. Where it is a schedule or
        traced, the product with the Hessian is left out of a step at which it is zero.
      perturbation: direction, as in :func:`hero_jax.hero_value_and_grad`.
      reduction: of the penalty, "norm", "sum" or "mean", as there.
      perturb_mask: which leaves are perturbed, as there.
      penalty_mask: which leaves enter the penalty, as there. Default: kernels and
        embeddings.
      leaves: what :mod:`hero_jax.leaves` does not see in paths and shapes.
      hvp: how to compute the product, as there.
      axis_name: axis of the surrounding `pmap`, `shard_map` or `vmap` over which the
        examples are spread. The gradient that comes in and `grad_fn` are then those of
        each device's own examples, not averaged yet; what goes out is averaged.

    Returns:
      A `optax.GradientTransformationExtraArgs` with :class:`HeroState`. Its updates
      keep the dtypes of the gradients. Other extra arguments are ignored.

    Raises:
      TypeError: an argument has the wrong type, or a weight is complex or integer.
      ValueError: h or gamma is negative or not a scalar, a name is unknown, a mask
        has another structure than the weights, there is no such axis, or the gradient
        is known to have been summed over it; from `update`: `params` or `grad_fn`
        is missing, `grad_fn` returns another structure than that of `params`, or no
        leaf is penalized (or perturbed) by the default although gamma (or h) is not 0.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import hero_jax
      >>> tx = optax.chain(
      ...     hero_jax.hero(h=0.02),
      ...     optax.add_decayed_weights(1e-4),
      ...     optax.sgd(0.1, momentum=0.9),
      ... )
      >>> grad_fn = jax.grad(lambda W: jnp.sum(W**2))
      >>> params = jnp.ones((2, 2))
      >>> state = tx.init(params)
      >>> updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
      >>> params = optax.apply_updates(params, updates)
      >>> optax.tree.get(state, "metrics").hessian_norm.round(2)  # H = 2 I, z = W
      Array(4., dtype=float32)

    References:
      Yang et al., `HERO <https://arxiv.org/abs/2111.11986>`_, 2021, Eq. 11-13.
    """
    settings = Settings.of(
        perturbation, reduction, perturb_mask, penalty_mask, leaves, hvp
    )
    for name, value in (("h", h), ("gamma", gamma)):
        if not callable(value):
            _checks.check_nonnegative(name, value)

    def init(params: Params) -> HeroState:
        _tree.check_params("params", params)
        dtype = _tree.widest_dtype(params)
        # An array for each: one for all could not be donated.
        zeros = [jnp.zeros((), dtype) for _ in Metrics._fields[1:]]
        return HeroState(jnp.zeros((), jnp.int32), Metrics(None, *zeros))

    def update(
        updates: Grads,
        state: HeroState,
        params: Params | None = None,
        *,
        grad_fn: GradFn | None = None,
        hvp_grad_fn: GradFn | None = None,
        **extra_args: Any,
    ) -> tuple[Grads, HeroState]:
        del extra_args
        _check_update(updates, state, params, grad_fn)
        g = updates
        if axis_name is not None:
            _axis.size(axis_name)  # raises where there is no such axis
            _axis.check_replicated("params", params, axis_name)
            _axis.check_own("grads", updates, axis_name)
            g = _axis.mean(_tree.widen(updates), axis_name)

        def without_loss(function: Any) -> Any:
            if function is None:
                return None
            hinted = _with_hint(function, params)
            if axis_name is not None:
                hinted = _mean_of(hinted, axis_name)
            return lambda U: (hinted(U), None)

        def at(gamma: chex.Numeric) -> tuple[Grads, Metrics]:
            return hero_gradient(
                without_loss(grad_fn),
                params,
                g,
                loss=None,
                h=_at("h", h, state.count),
                gamma=gamma,
                settings=settings,
                hvp_grad_fn=without_loss(hvp_grad_fn),
            )

        strength = _at("gamma", gamma, state.count)
        # Of a schedule's value, also as inject_hyperparams hands it on, it is not known
        # now whether it is zero.
        if callable(gamma) or isinstance(strength, jax.core.Tracer):
            results = lax.cond(strength != 0, at, lambda _: at(0.0), strength)
        else:
            results = at(strength)
        gradient, metrics = _tree.cast_like(results, (updates, state.metrics))
        return gradient, HeroState(
            count=optax.safe_increment(state.count), metrics=metrics
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _check_update(grads: Grads, state: Any, params: Any, grad_fn: Any) -> None:
    """Raise for what optimizers without a function for the gradient do not need."""
    if not isinstance(state, HeroState):
        raise TypeError(
            "state must be the HeroState that init(params) of this very optimizer "
            f"made, got {type(state).__name__}: has another one made it?"
        )
    if params is None or grad_fn is None:
        raise ValueError(
            "hero needs the weights, and grad_fn, the gradient of the loss as a "
            "function of them: tx.update(grads, state, params, grad_fn=grad_fn), with "
            "grad_fn = jax.grad(lambda params: loss_fn(params, batch)). Where it "
            "cannot be passed, as by Flax's TrainState.apply_gradients, use "
            "hero_jax.hero_value_and_grad."
        )
    _checks.check_callable("grad_fn", grad_fn, "params -> grads")
    _tree.check_params("params", params)
    _tree.check_same_structure("grads", grads, "params", params)


def _at(
    name: str, value: chex.Numeric | optax.Schedule, count: chex.Array
) -> chex.Numeric:
    """Return the number, or what the schedule gives for this count."""
    if not callable(value):
        return value
    scheduled = value(count)
    _checks.check_nonnegative(f"{name}(count)", scheduled)
    return scheduled


def _mean_of(grad_fn: GradFn, axis_name: AxisName) -> GradFn:
    """Average over the axis the gradients with respect to each device's own weights."""
    return lambda U: _axis.mean(grad_fn(_axis.own(U, axis_name)), axis_name)


def _with_hint(grad_fn: GradFn, params: Params) -> GradFn:
    """Wrap `grad_fn` to say what to do when it cannot take a part of the weights."""
    nodes = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    partial = any(isinstance(x, optax.MaskedNode) for x in nodes)

    def wrapped(U: Params) -> Grads:
        try:
            gradient = grad_fn(U)
            _tree.check_same_structure(
                "grad_fn's result, the gradient without value or auxiliary output,",
                gradient,
                "params",
                params,
            )
        except Exception as error:
            if not partial:
                if not _checks.can_be_called(grad_fn, U):
                    error.add_note(
                        "hero_jax: grad_fn was called as grad_fn(params). Let it know "
                        "the batch: jax.grad(lambda params: loss_fn(params, batch))."
                    )
                raise
            raise ValueError(
                "hero stands inside optax.masked or optax.partition and sees only a "
                "part of the weights, for which grad_fn failed. Take hero out of the "
                "wrapper and choose leaves by perturb_mask and penalty_mask, or pass "
                "a grad_fn of that part of the weights."
            ) from error
        return gradient

    return wrapped
