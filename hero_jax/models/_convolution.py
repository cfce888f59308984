r"""Two-dimensional convolutions that are fast on CPUs, also inside loops.

XLA's CPU backend computes some convolutions by slow code: the weight gradient inside
a loop primitive, depthwise ones, the input gradient of a strided one, and those of
images smaller than the kernel. Outputs and gradients are here other formulations of the
same sums:

- depthwise: a convolution with two more axes, of length one, which XLA compiles as a
  plain loop nest; the weight gradient is a sum of products per place of the kernel;
- other outputs: the stock convolution; where the kernel is larger than the images, a
  sum of k x k matrix products;
- input gradient: the convolution with the kernel turned around, in XLA's canonical
  order of axes; of a strided, 1x1 or small layer that sum of matrix products;
- weight gradient: the convolution of the inputs, as `[C, H, W, B]`, with the output
  gradients, as `[H, W, B, O]`; of a 1x1 layer a matrix product. The inputs are kept
  from being computed again.

Where the default backend is another, for arguments not mentioned here (dilation, other
groups, other layouts), and for arrays sharded over `Explicit` axes,
:func:`jax.lax.conv_general_dilated` does the work. The
choice is made when a function is traced and changes its speed alone.

The convolutions have derivatives of their own (`jax.custom_vjp`): gradients
and forward-over-reverse Hessian-vector products work, `jax.jvp` of the loss itself does
not. Create a model with `conv_general_dilated=jax.lax.conv_general_dilated` for that.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import lax

from hero_jax import _axis

Pads = tuple[tuple[int, int], tuple[int, int]]
Pair = tuple[int, int]

_LAYOUT = ("NHWC", "HWIO", "NHWC")
_PARTS = 8  # of a batch, added up in one loop
_LANES = 16  # of a product with the identity, as narrow as is fast


def conv_general_dilated(
    lhs: chex.Array,
    rhs: chex.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    **kwargs: Any,
) -> chex.Array:
    """Convolve as :func:`jax.lax.conv_general_dilated` does, faster on CPUs.

    For `flax.linen.Conv(conv_general_dilated=...)`.

    Args:
      lhs: inputs, `[B, H, W, C]`.
      rhs: kernel, `[k, k, C / groups, O]`.
      window_strides: strides along both spatial axes.
      padding: "SAME", "VALID" or pairs.
      lhs_dilation: as of the stock function, like the arguments that follow.
      rhs_dilation: likewise.
      dimension_numbers: likewise.
      feature_group_count: likewise.
      **kwargs: likewise.

    Returns:
      Outputs, `[B, H', W', O]`.
    """
    stock = functools.partial(
        lax.conv_general_dilated,
        lhs,
        rhs,
        window_strides,
        padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=dimension_numbers,
        feature_group_count=feature_group_count,
        **kwargs,
    )
    if jax.default_backend() != "cpu" or lhs.ndim != 4:
        return stock()
    if _axis.is_sharded(lhs) or _axis.is_sharded(rhs):
        return stock()  # a matrix product must be told how to shard its result
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    plain = (
        numbers == lax.conv_dimension_numbers(lhs.shape, rhs.shape, _LAYOUT)
        and all(d == 1 for d in (*(lhs_dilation or ()), *(rhs_dilation or ())))
        and all(value is None for value in kwargs.values())
        and lhs.dtype == rhs.dtype
    )
    if not plain:
        return stock()
    strides = (int(window_strides[0]), int(window_strides[1]))
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], strides, padding)
    pads = tuple((int(low), int(high)) for low, high in padding)
    pads = (pads[0], pads[1])
    channels = lhs.shape[-1]
    if feature_group_count == channels == rhs.shape[-1] and channels > 1:
        # XLA's own loops are fast for all but doubles.
        if lhs.dtype == jnp.float64:
            return sum_over_places(operator.mul, lhs, rhs, strides, pads)
        return depthwise(lhs, rhs, strides, pads)
    if feature_group_count != 1:
        return stock()
    return dense(lhs, rhs, strides, pads)


def shifted(x: chex.Array, size: Pair, strides: Pair, pads: Pads) -> list[chex.Array]:
    """Return the inputs that each place of the kernel sees, row by row.

    Args:
      x: `[B, H, W, C]`.
      size: of the kernel.
      strides: along both axes.
      pads: zeros before and after, along both axes.

    Returns:
      As many arrays `[B, H', W', C]` as the kernel has places.
    """
    zero = lax.full((), 0, x.dtype)
    padded = lax.pad(x, zero, [(0, 0, 0), (*pads[0], 0), (*pads[1], 0), (0, 0, 0)])
    rows, columns = (
        (padded.shape[1 + i] - size[i]) // strides[i] * strides[i] + 1 for i in (0, 1)
    )
    return [
        padded[:, i : i + rows : strides[0], j : j + columns : strides[1]]
        for i in range(size[0])
        for j in range(size[1])
    ]


def sum_over_places(
    multiply: Callable[[chex.Array, chex.Array], chex.Array],
    x: chex.Array,
    kernel: chex.Array,
    strides: Pair,
    pads: Pads,
) -> chex.Array:
    """Convolve as a sum of products of inputs and weights, one per place of the kernel.

    Matrix products make a dense convolution, elementwise ones a depthwise one.
    """
    weights = kernel.reshape(-1, *kernel.shape[2:])
    seen = shifted(x, kernel.shape[:2], strides, pads)
    products = [multiply(places, w) for places, w in zip(seen, weights, strict=True)]
    return sum(products[1:], products[0])


matrix_products = functools.partial(sum_over_places, operator.matmul)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def dense(x: chex.Array, kernel: chex.Array, strides: Pair, pads: Pads) -> chex.Array:
    """Convolve by the stock function, with gradients that are fast on CPUs."""
    return _output(x, kernel, strides, pads)


def _output(x: chex.Array, kernel: chex.Array, strides: Pair, pads: Pads) -> chex.Array:
    if _is_slow(x, kernel):
        return matrix_products(x, kernel, strides, pads)
    return lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=_LAYOUT)


def _is_slow(x: chex.Array, kernel: chex.Array) -> bool:
    """Whether XLA's library leaves a convolution to plain loops.

    It takes no doubles, and no kernel larger than the images, whatever the pads.
    """
    size = kernel.shape[:2]
    no_double = size == (1, 1) and x.dtype == jnp.float64
    return no_double or any(h < k for h, k in zip(x.shape[1:3], size, strict=True))


def _forward(
    x: chex.Array, kernel: chex.Array, strides: Pair, pads: Pads
) -> tuple[chex.Array, tuple[chex.Array, chex.Array]]:
    return _output(x, kernel, strides, pads), (x, kernel)


def _backward(
    strides: Pair, pads: Pads, saved: tuple[chex.Array, chex.Array], dy: chex.Array
) -> tuple[chex.Array, chex.Array]:
    x, kernel = saved
    if max(strides) > 1 or kernel.shape[:2] == (1, 1) or _is_slow(dy, kernel):
        _, transpose = jax.vjp(lambda x: matrix_products(x, kernel, strides, pads), x)
        (dx,) = transpose(dy)
    else:
        dx = lax.conv_general_dilated(
            dy,
            kernel[::-1, ::-1].swapaxes(2, 3),
            (1, 1),
            _outer_pads(x, kernel, strides, pads, dy),
            dimension_numbers=_LAYOUT,
        )
    return dx, _kernel_gradient(x, kernel.shape, strides, pads, dy)


def _outer_pads(
    x: chex.Array, kernel: chex.Array, strides: Pair, pads: Pads, dy: chex.Array
) -> Pads:
    """Return the zeros around `dy` that make its convolution as large as `x`."""

    def along(axis: int) -> tuple[int, int]:
        size = kernel.shape[axis]
        spread = (dy.shape[1 + axis] - 1) * strides[axis] + 1
        before = size - 1 - pads[axis][0]
        return before, x.shape[1 + axis] + size - 1 - spread - before

    return along(0), along(1)


def _kernel_gradient(
    x: chex.Array, shape: Sequence[int], strides: Pair, pads: Pads, dy: chex.Array
) -> chex.Array:
    """Convolve the inputs with the output gradients, summing over the batch."""
    if tuple(shape[:2]) == (1, 1):
        # Of two axes each: XLA is slow at a product that sums over several.
        (seen,) = shifted(x, (1, 1), strides, pads)
        return (_rows(seen).T @ _rows(dy)).reshape(shape)
    outer = []
    for i in (0, 1):
        seen = (dy.shape[1 + i] - 1) * strides[i] + shape[i]  # of the padded input
        low = pads[i][0]
        outer.append((low, seen - x.shape[1 + i] - low))
    gradient = lax.conv_general_dilated(
        _written_out(x).transpose(3, 1, 2, 0),
        dy.transpose(1, 2, 0, 3),
        (1, 1),
        outer,
        rhs_dilation=strides,
        dimension_numbers=_LAYOUT,
    )
    return gradient.transpose(1, 2, 0, 3)


def _written_out(x: chex.Array) -> chex.Array:
    """Return the same finite numbers as a result that XLA cannot fuse with others.

    The inputs of a layer are normalized and rectified outputs of others. XLA computes
    them again within the transposition, from all that they were made of and in an order
    that misses the cache: ten times the time of a transposition of what is there. It
    removes optimization barriers too early to prevent that. What is not finite spreads
    to its neighbours.
    """
    if x.size % _LANES:
        return x
    identity = jnp.eye(_LANES, dtype=x.dtype)
    rows = x.reshape(-1, _LANES)
    return jnp.dot(rows, identity, precision=lax.Precision.HIGHEST).reshape(x.shape)


def _rows(x: chex.Array) -> chex.Array:
    return x.reshape(-1, x.shape[-1])


dense.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def depthwise(
    x: chex.Array, kernel: chex.Array, strides: Pair, pads: Pads
) -> chex.Array:
    """Convolve every channel with a kernel of its own, `[k, k, 1, C]`."""
    return _loop_nest(x, kernel, strides, pads)


def _loop_nest(
    x: chex.Array,
    kernel: chex.Array,
    strides: Pair,
    pads: Pads,
    dilation: Pair = (1, 1),
) -> chex.Array:
    """Convolve per channel by the code that XLA generates, not by its library's.

    Of the two the library is slower by far where every channel is a group, and it
    takes up to three spatial axes: with four, XLA must write the loops itself, and
    vectorizes them over the channels.
    """
    y = lax.conv_general_dilated(
        x[:, :, :, None, None],
        kernel[:, :, None, None],
        (*strides, 1, 1),
        (*pads, (0, 0), (0, 0)),
        lhs_dilation=(*dilation, 1, 1),
        dimension_numbers=lax.ConvDimensionNumbers(
            (0, 5, 1, 2, 3, 4), (5, 4, 0, 1, 2, 3), (0, 5, 1, 2, 3, 4)
        ),
        feature_group_count=x.shape[-1],
    )
    return y[:, :, :, 0, 0]


def _depthwise_forward(
    x: chex.Array, kernel: chex.Array, strides: Pair, pads: Pads
) -> tuple[chex.Array, tuple[chex.Array, chex.Array]]:
    return _loop_nest(x, kernel, strides, pads), (x, kernel)


def _depthwise_backward(
    strides: Pair, pads: Pads, saved: tuple[chex.Array, chex.Array], dy: chex.Array
) -> tuple[chex.Array, chex.Array]:
    x, kernel = saved
    outer = _outer_pads(x, kernel, strides, pads, dy)
    dx = _loop_nest(dy, kernel[::-1, ::-1], (1, 1), outer, strides)
    sums = [
        _channel_sums(place, dy)
        for place in shifted(x, kernel.shape[:2], strides, pads)
    ]
    return dx, jnp.stack(sums).reshape(kernel.shape)


def _channel_sums(x: chex.Array, dy: chex.Array) -> chex.Array:
    """Return the sums per channel of `x * dy`, of slices `x` of a larger array.

    A reduction would have XLA write out every slice. A sum of several products is one
    loop over the slices instead, and leaves little for the matrix product to add up.
    """
    count = math.gcd(len(x), _PARTS)
    parts = zip(jnp.split(x, count), jnp.split(dy, count), strict=True)
    products = [a * b for a, b in parts]
    rows = _rows(sum(products[1:], products[0]))
    return jnp.ones((1, len(rows)), rows.dtype) @ rows


depthwise.defvjp(_depthwise_forward, _depthwise_backward)
