"""How far one can go in a direction before the loss has risen: Theorem 3, measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Unpack

import chex
import jax
import jax.numpy as jnp

from hero_jax import _checks, _programs, _tree
from hero_jax._typing import Params
from hero_jax.curvature import _problem, _progress
from hero_jax.curvature._problem import Options, Problem

_HALVINGS = 20


class HarmfulStep(NamedTuple):
    """The smallest perturbation `d = t * direction` found to raise the loss by c.

    All are infinite if no step up to the longest one does, and NaN if the loss at W is.
    They are NaN, too, where the answer is not known: c is below 16 roundings of the
    loss, W + d is rounded by more than a tenth of d, or all steps did harm, down to a
    millionth of the shortest.

    Attributes:
      step: t.
      l2_norm: `||d||_2`, which Theorem 3 bounds from below (Eq. 6).
      linf_norm: `||d||_inf`, the same (Eq. 7).
    """

    step: chex.Array
    l2_norm: chex.Array
    linf_norm: chex.Array


def smallest_harmful_step(
    loss_fn: Callable[..., Any],
    params: Params,
    direction: Params,
    *args: Any,
    loss_increase: chex.Numeric,
    max_step: chex.Numeric,
    both_ways: bool = False,
    growth: float = 1.25,
    num_steps: int = 40,
    **options: Unpack[Options],
) -> HarmfulStep:
    r"""Find the smallest `t > 0` with `L(W + t d) - L(W) >= c`, for a direction d.

    With `both_ways`, along d or along -d: the sign of an eigenvector means nothing.

    Steps are tried from short to long, `max_step / growth^k`, and the first interval in
    which the loss has risen by c is halved twenty times. A rise and fall between two
    neighbours, or below the shortest step, goes unseen.

    Args:
      loss_fn: `(params, *args) -> loss`, a mean over examples.
      params: weights W.
      direction: d, with the structure and shapes of `params`.
      *args: further arguments of `loss_fn`.
      loss_increase: c, above 0, in units of the loss.
      max_step: longest t, above 0.
      both_ways: whether steps along -d count, too.
      growth: ratio of neighbouring steps, above 1.
      num_steps: how many are tried at most.
      **options: see :class:`Options`; `progress` counts passes over the examples, of
        which there may be fewer than its total.

    Returns:
      The step and the norms of the perturbation.

    Raises:
      TypeError: the loss is not a scalar.
      ValueError: the direction has another structure.

    Example:
      >>> import jax.numpy as jnp
      >>> from hero_jax import bounds, curvature
      >>> loss_fn = lambda w: 4.0 * w @ w  # largest eigenvalue 8
      >>> w, d = jnp.zeros(2), jnp.array([0.6, 0.8])
      >>> found = curvature.smallest_harmful_step(
      ...     loss_fn, w, d, loss_increase=1.0, max_step=10.0
      ... )
      >>> print(f"{found.l2_norm:.4f} {bounds.l2_bound(0.0, 8.0, 1.0):.4f}")
      0.5000 0.5000

    References:
      Yang et al., `HERO <https://arxiv.org/abs/2111.11986>`_, 2021, Eq. 3, Theorem 3.
    """
    problem = _problem.make(loss_fn, params, args, options)
    _tree.check_vector("direction", direction, params)
    for name, value in (("loss_increase", loss_increase), ("max_step", max_step)):
        _checks.check_positive(name, value)
    if not growth > 1.0:
        raise ValueError(f"growth must be above 1, got {growth}.")
    _checks.check_integer("num_steps", num_steps)
    compiled = _programs.compiled(
        _smallest_harmful_step, problem, bool(both_ways), float(growth), num_steps
    )
    total = (num_steps + _HALVINGS) * (2 if both_ways else 1)
    found: HarmfulStep = _progress.listen(
        options.get("progress"),
        total,
        compiled,
        params,
        direction,
        loss_increase,
        max_step,
        args,
    )
    return found


def _smallest_harmful_step(
    problem: Problem,
    both_ways: bool,
    growth: float,
    num_steps: int,
    params: Params,
    direction: Params,
    loss_increase: chex.Numeric,
    max_step: chex.Numeric,
    args: Sequence[Any],
) -> HarmfulStep:
    W = _tree.widen(params)
    d = _tree.cast_like(direction, W)
    dtype = _tree.widest_dtype(W)
    longest = jnp.asarray(max_step, dtype)
    loss = problem.mean_loss(W, args)
    limit = loss + loss_increase

    def rises(t: chex.Array) -> chex.Array:
        U = jax.tree.map(lambda w, x: w + t.astype(w.dtype) * x, W, d)
        there = problem.mean_loss(U, args)
        if problem.reports:
            _progress.tick_after(there)
        # A loss that is not finite does harm, too.
        return ~(there < limit)

    def harms(t: chex.Array) -> chex.Array:
        return rises(t) | rises(-t) if both_ways else rises(t)

    def tried(k: chex.Array) -> chex.Array:
        return longest * jnp.asarray(growth, dtype) ** (k - num_steps + 1)

    def is_harmless(state: tuple[chex.Array, chex.Array]) -> chex.Array:
        k, harmful = state
        return (k < num_steps) & ~harmful

    def go_on(state: tuple[chex.Array, chex.Array]) -> tuple[chex.Array, chex.Array]:
        k, _ = state
        return k + 1, harms(tried(k))

    k, harmful = jax.lax.while_loop(is_harmless, go_on, (0, jnp.array(False)))
    high = tried(k - 1)
    low = jnp.where(k == 1, 0.0, tried(k - 2))

    def halve(_: int, interval: tuple[chex.Array, chex.Array]) -> Any:
        low, high = interval
        middle = (low + high) / 2.0
        harmful = harms(middle)
        return jnp.where(harmful, low, middle), jnp.where(harmful, middle, high)

    low, high = jax.lax.fori_loop(0, _HALVINGS, halve, (low, high))
    step = jnp.where(harmful, high, jnp.inf)
    is_seen = loss_increase > 16.0 * jnp.finfo(loss.dtype).eps * jnp.abs(loss)

    def rounding(w: chex.Array, x: chex.Array) -> chex.Array:
        move = high.astype(w.dtype) * x
        return ((w + move) - w) - move

    rounded = _tree.global_norm(jax.tree.map(rounding, W, d))
    is_made = rounded <= 0.1 * high * _tree.global_norm(d)
    is_known = is_seen & is_made & ((low > 0.0) | ~harmful)
    step = jnp.where(is_known, step, jnp.nan)
    largest = jnp.stack(
        [jnp.abs(x).max(initial=0.0).astype(dtype) for x in jax.tree.leaves(d)]
    ).max()
    return HarmfulStep(step, step * _tree.global_norm(d), step * largest)
