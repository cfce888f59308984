r"""Two-dimensional convolutions that are fast on CPUs, also inside loops.

XLA's CPU backend computes three convolutions by slow code: the weight gradient inside
a loop primitive, depthwise ones anywhere, and the input gradient of a strided one. Each
is here as another formulation of the same sum, made of convolutions in XLA's canonical
order, matrix products and shifted slices:

- 1x1: a matrix product;
- depthwise: a sum over the k x k places of shifted inputs times a weight per channel;
- other: the stock convolution, whose weight gradient is the convolution of the inputs,
  as `[C, H, W, B]`, with the output gradients, as `[H, W, B, O]`, and whose strided
  input gradient is a sum of k x k matrix products.

Where the default backend is another, and for arguments not mentioned here (dilation,
other groups, other layouts), :func:`jax.lax.conv_general_dilated` does the work. The
choice is made when a function is traced and changes its speed alone.

Dense convolutions have derivatives of their own (`jax.custom_vjp`): gradients
and forward-over-reverse Hessian-vector products work, `jax.jvp` of the loss itself does
not. Pass `conv_general_dilated=jax.lax.conv_general_dilated` to a model for that.
"""

import functools
from collections.abc import Sequence
from typing import Any

import chex
import jax
from jax import lax

Pads = tuple[tuple[int, int], tuple[int, int]]
Pair = tuple[int, int]

_LAYOUT = ("NHWC", "HWIO", "NHWC")


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
        return depthwise(lhs, rhs, strides, pads)
    if feature_group_count != 1:
        return stock()
    if rhs.shape[:2] == (1, 1) and pads == ((0, 0), (0, 0)):
        return lhs[:, :: strides[0], :: strides[1]] @ rhs[0, 0]
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


def depthwise(
    x: chex.Array, kernel: chex.Array, strides: Pair, pads: Pads
) -> chex.Array:
    """Convolve every channel with a kernel of its own, `[k, k, 1, C]`."""
    size = kernel.shape[:2]
    weights = kernel.reshape(-1, kernel.shape[-1])
    products = [
        places * w
        for places, w in zip(shifted(x, size, strides, pads), weights, strict=True)
    ]
    return sum(products[1:], products[0])


def matrix_products(
    x: chex.Array, kernel: chex.Array, strides: Pair, pads: Pads
) -> chex.Array:
    """Convolve as a sum of matrix products, one per place of the kernel."""
    matrices = kernel.reshape(-1, *kernel.shape[2:])
    products = [
        places @ matrix
        for places, matrix in zip(
            shifted(x, kernel.shape[:2], strides, pads), matrices, strict=True
        )
    ]
    return sum(products[1:], products[0])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def dense(x: chex.Array, kernel: chex.Array, strides: Pair, pads: Pads) -> chex.Array:
    """Convolve by the stock function, with gradients that are fast on CPUs."""
    return _stock(x, kernel, strides, pads)


def _stock(x: chex.Array, kernel: chex.Array, strides: Pair, pads: Pads) -> chex.Array:
    return lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=_LAYOUT)


def _forward(
    x: chex.Array, kernel: chex.Array, strides: Pair, pads: Pads
) -> tuple[chex.Array, tuple[chex.Array, chex.Array]]:
    return _stock(x, kernel, strides, pads), (x, kernel)


def _backward(
    strides: Pair, pads: Pads, saved: tuple[chex.Array, chex.Array], dy: chex.Array
) -> tuple[chex.Array, chex.Array]:
    x, kernel = saved
    if max(strides) > 1:
        _, transpose = jax.vjp(lambda x: matrix_products(x, kernel, strides, pads), x)
        (dx,) = transpose(dy)
    else:
        dx = _input_gradient(x.shape, kernel, pads, dy)
    return dx, _kernel_gradient(x, kernel.shape, strides, pads, dy)


def _input_gradient(
    shape: Sequence[int], kernel: chex.Array, pads: Pads, dy: chex.Array
) -> chex.Array:
    """Convolve the output gradients with the kernel turned around; strides of one."""
    outer = []
    for i in (0, 1):
        size, low = kernel.shape[i], pads[i][0]
        before = size - 1 - low
        outer.append((before, shape[1 + i] - dy.shape[1 + i] - before + size - 1))
    turned = kernel[::-1, ::-1].swapaxes(2, 3)
    return lax.conv_general_dilated(
        dy, turned, (1, 1), outer, dimension_numbers=_LAYOUT
    )


def _kernel_gradient(
    x: chex.Array, shape: Sequence[int], strides: Pair, pads: Pads, dy: chex.Array
) -> chex.Array:
    """Convolve the inputs with the output gradients, summing over the batch."""
    outer = []
    for i in (0, 1):
        seen = (dy.shape[1 + i] - 1) * strides[i] + shape[i]  # of the padded input
        low = pads[i][0]
        outer.append((low, seen - x.shape[1 + i] - low))
    gradient = lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0),
        dy.transpose(1, 2, 0, 3),
        (1, 1),
        outer,
        rhs_dilation=strides,
        dimension_numbers=_LAYOUT,
    )
    return gradient.transpose(1, 2, 0, 3)


dense.defvjp(_forward, _backward)
