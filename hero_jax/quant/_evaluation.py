"""Accuracy of a classifier against the number of bits of its weights (Figure 1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, Unpack

import chex
import jax
import jax.numpy as jnp
import numpy as np

from hero_jax import _batches, _checks, _programs
from hero_jax._typing import Mask, Params
from hero_jax.quant._array import fit_levels
from hero_jax.quant._bits import bits_of_leaves
from hero_jax.quant._options import GridOptions, Options, check_bits
from hero_jax.quant._tree import Plan, check_finite, is_quantized, make_plan

LogitsFn: TypeAlias = Callable[[Params, chex.ArrayTree, chex.Array], chex.Array]
"""`(params, batch_stats, images) -> logits` of evaluation, `[B, num_classes]`."""

StatsFn: TypeAlias = Callable[[Params, chex.Array], chex.ArrayTree]
"""`(params, images) -> batch_stats` of one batch by itself."""

MAX_BITS, FLOAT_BITS = 16, 32


def accuracy_against_bits(
    logits_fn: LogitsFn,
    params: Params,
    images: chex.Array,
    labels: chex.Array,
    bits: Sequence[int | Mapping[str, int]] = (32, 8, 6, 5, 4, 3, 2),
    *,
    batch_stats: chex.ArrayTree = None,
    batch_size: int | None = None,
    stats_fn: StatsFn | None = None,
    calibration_images: chex.Array | None = None,
    mask: Mask | None = None,
    **options: Unpack[GridOptions],
) -> chex.Array:
    """Quantize a classifier to several precisions and measure the accuracy of each.

    All precisions run in one compiled program, one after another, each on all images.

    Args:
      logits_fn: `(params, batch_stats, images) -> logits`, the model at evaluation.
        Pass the same function object again to use the compiled program again, which
        is kept for as long as that object is.
      params: weights, as in :func:`hero_jax.quant.quantize`.
      images: inputs of any shape `[N, ...]`.
      labels: classes `[N]`.
      bits: what to try: numbers of bits, 2 to 8 or 16, for all layers, or mappings from
        paths or patterns to numbers, as in :func:`hero_jax.quant.quantize`, such as
        `[a.bits for a in frontier]`; 32 stands for the weights as they are.
      batch_stats: BatchNorm statistics, handed to `logits_fn`.
      batch_size: number of images that go through the model at once; N by default.
      stats_fn: `(params, images) -> batch_stats`, the statistics of one batch by
        itself: in Flax, those of a training pass with `momentum=0`. If given, the
        statistics are estimated anew for every precision, as their mean over the
        calibration images. The paper does not do that, and it is off by default.
      calibration_images: batches `[K, B, ...]` for `stats_fn`.
      mask: which leaves are quantized.
      **options: see :class:`hero_jax.quant.GridOptions`.

    Returns:
      Share of images classified as labelled, `[len(bits)]`, float32. Logits with NaN
      or positive infinity count as wrong, and so do labels that no logit stands for;
      a class of negative infinity is out of the question.

    Raises:
      ValueError: images, labels and logits do not match,
        or the weights are not finite.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from hero_jax import quant
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (16, 10))}
      >>> images = jax.random.normal(jax.random.key(1), (100, 16))
      >>> logits_fn = lambda params, batch_stats, images: images @ params["kernel"]
      >>> labels = logits_fn(params, None, images).argmax(-1)
      >>> bits = (32, 8, 2)
      >>> accuracy = quant.accuracy_against_bits(
      ...     logits_fn, params, images, labels, bits
      ... )
      >>> [f"{a:.2f}" for a in accuracy]
      ['1.00', '0.99', '0.72']

    References:
      Yang et al., `HERO <https://arxiv.org/abs/2111.11986>`_, 2021, Figure 1.
    """
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    num_images = len(images)
    if labels.shape != (num_images,):
        raise ValueError(
            f"labels must have shape {(num_images,)} for images of shape "
            f"{images.shape}, got {labels.shape}."
        )
    if (stats_fn is None) != (calibration_images is None):
        raise ValueError("stats_fn and calibration_images need each other, got one.")
    if num_images == 0:
        raise ValueError("images must be at least one, got none.")
    batch_size = num_images if batch_size is None else batch_size
    _checks.check_integer("batch_size", batch_size)
    plan = make_plan(params, MAX_BITS, mask, options, check_bits)
    check_finite(plan.names, [jnp.isfinite(x).all() for x in plan.arrays])
    program = _Program(int(batch_size), tuple(plan.where), plan.options)
    count_correct = _programs.compiled(_count_correct, logits_fn, stats_fn, program)
    num_correct = count_correct(
        (params, batch_stats, images, labels),
        calibration_images,
        _widths(bits, plan),
    )
    return num_correct.astype(jnp.float32) / num_images


def _widths(bits: Sequence[Any], plan: Plan) -> np.ndarray:
    """Return the number of bits of every quantized leaf, `[len(bits), leaves]`."""
    positions = jax.tree.unflatten(plan.structure, range(len(plan.leaves)))
    chosen = [i in plan.where for i in range(len(plan.leaves))]
    rows = []
    for each in bits:
        if isinstance(each, Mapping):
            widths = bits_of_leaves(each, positions, chosen)
            row = [widths[i] for i in plan.where]
        else:
            row = [each] * len(plan.where)
        for width in row or [each]:
            if width != FLOAT_BITS:
                check_bits(width)
        rows.append(row)
    return np.asarray(rows, np.int32).reshape(len(rows), len(plan.where))


class _Program(NamedTuple):
    """What the compiled program depends on besides the functions; hashable."""

    batch_size: int
    where: tuple[int, ...]
    options: tuple[Options, ...]


def _count_correct(
    logits_fn: LogitsFn,
    stats_fn: StatsFn | None,
    program: _Program,
    data: tuple[Params, chex.ArrayTree, chex.Array, chex.Array],
    calibration_images: chex.Array | None,
    bits: chex.Array,
) -> chex.Array:
    params, batch_stats, images, labels = data
    leaves, structure = jax.tree.flatten(params, is_leaf=is_quantized)
    batches = _in_batches(images, labels, program.batch_size)

    def of_widths(widths: chex.Array) -> chex.Array:
        rounded = list(leaves)
        each = zip(program.where, widths, program.options, strict=True)
        for i, width, options in each:
            x = leaves[i]
            levels, _ = fit_levels(x, jnp.minimum(width, MAX_BITS), None, options)
            rounded[i] = jnp.where(width == FLOAT_BITS, x, levels)
        weights = jax.tree.unflatten(structure, rounded)
        stats = batch_stats
        if stats_fn is not None:
            of_batches = jax.lax.map(
                lambda batch: stats_fn(weights, batch), calibration_images
            )
            stats = jax.tree.map(lambda x: x.mean(0), of_batches)

        def num_correct(batch: tuple[chex.Array, chex.Array, chex.Array]) -> chex.Array:
            logits = logits_fn(weights, stats, batch[0])
            _check_logits(logits, program.batch_size)
            right = (logits.argmax(-1) == batch[1]) & jnp.isfinite(logits.max(-1))
            return jnp.sum(right & batch[2])

        return jax.lax.map(num_correct, batches).sum()

    return jax.lax.map(of_widths, bits)


def _check_logits(logits: Any, batch_size: int) -> None:
    shape: Any = getattr(logits, "shape", ())
    if len(shape) != 2 or shape[0] != batch_size:
        raise ValueError(
            f"logits_fn must return logits of shape ({batch_size}, num_classes), got "
            f"{_checks.described(logits)}."
        )


def _in_batches(
    images: chex.Array, labels: chex.Array, batch_size: int
) -> tuple[chex.Array, chex.Array, chex.Array]:
    """Return batches of equal size, and which of their examples are real."""
    missing = -len(labels) % batch_size
    real = jnp.arange(len(labels) + missing) < len(labels)

    def padded(x: chex.Array) -> chex.Array:
        return jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))

    (images, labels, real), _ = _batches.cut(
        (padded(images), padded(labels), real), (0, 1, 2), batch_size
    )
    return images, labels, real
