"""A convolution and its gradients as sums that XLA's CPU backend computes fast.

It computes some convolutions by slow code: the weight gradient inside a loop primitive,
depthwise ones, the input gradient of a strided one, and those of images smaller than
the kernel. Here are other formulations of the same sums:

- depthwise: a convolution with two more axes, of length one, which XLA compiles as a
  plain loop nest; the weight gradient is a sum of products per place of the kernel;
- other outputs: the stock convolution; where the kernel is larger than the images, a
  sum of k x k matrix products;
- input gradient: the convolution with the kernel turned around, in XLA's canonical
  order of axes; of a strided, 1x1 or small layer that sum of matrix products;
- weight gradient: the convolution of the inputs, as `[C, H, W, B]`, with the output
  gradients, as `[H, W, B, O]`; of a 1x1 layer a matrix product. The inputs are kept
  from being computed again.
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

Pads = tuple[tuple[int, int], tuple[int, int]]
Pair = tuple[int, int]

LAYOUT = ("NHWC", "HWIO", "NHWC")
_PARTS = 8  # of a batch, added up in one loop
_LANES = 16  # of a product with the identity, as narrow as is fast


class Layer(NamedTuple):
    """A convolution but for its numbers.

    Attributes:
      inputs: their shape, `[B, H, W, C]`.
      kernel: its shape, `[k, k, C / groups, O]`.
      strides: along both spatial axes.
      pads: zeros before and after, along both.
      groups: of channels; as many as channels are a depthwise convolution, else 1.
      precision: of products, as in `jax.default_matmul_precision`.
    """

    inputs: tuple[int, ...]
    kernel: tuple[int, ...]
    strides: Pair
    pads: Pads
    groups: int
    precision: Any


class Formulation(NamedTuple):
    """A convolution and its gradients.

    Attributes:
      input_gradient: `(layer, kernel, dy) -> dx`.
      kernel_gradient: `(layer, x, dy) -> dkernel`.
      output: `(layer, x, kernel) -> y`.
    """

    input_gradient: Callable[[Layer, chex.Array, chex.Array], chex.Array]
    kernel_gradient: Callable[[Layer, chex.Array, chex.Array], chex.Array]
    output: Callable[[Layer, chex.Array, chex.Array], chex.Array]


def transposed(
    function: Callable[[chex.Array], chex.Array],
    shape: tuple[int, ...],
    dy: chex.Array,
) -> chex.Array:
    """Apply the transpose of a linear function of an array of that shape."""
    like: Any = jax.typeof(dy).update(shape=shape, weak_type=False)
    return jax.linear_transpose(function, like)(dy)[0]


def output(layer: Layer, x: chex.Array, kernel: chex.Array) -> chex.Array:
    """Convolve."""
    if _is_slow(x, layer.kernel):
        return matrix_products(layer, x, kernel)
    return lax.conv_general_dilated(
        x, kernel, layer.strides, layer.pads, dimension_numbers=LAYOUT
    )


def input_gradient(layer: Layer, kernel: chex.Array, dy: chex.Array) -> chex.Array:
    """Return the gradient with respect to the inputs."""
    size = layer.kernel[:2]
    if max(layer.strides) > 1 or size == (1, 1) or _is_slow(dy, layer.kernel):
        return transposed(lambda x: matrix_products(layer, x, kernel), layer.inputs, dy)
    return lax.conv_general_dilated(
        dy,
        kernel[::-1, ::-1].swapaxes(2, 3),
        (1, 1),
        _outer_pads(layer, dy),
        dimension_numbers=LAYOUT,
    )


def kernel_gradient(layer: Layer, x: chex.Array, dy: chex.Array) -> chex.Array:
    """Convolve the inputs with the output gradients, summing over the batch."""
    if layer.kernel[:2] == (1, 1):
        # Of two axes each: XLA is slow at a product that sums over several.
        (places,) = shifted(layer, x)
        return (_rows(places).T @ _rows(dy)).reshape(layer.kernel)
    outer = []
    for i in (0, 1):
        seen = (dy.shape[1 + i] - 1) * layer.strides[i] + layer.kernel[i]
        low = layer.pads[i][0]
        outer.append((low, seen - x.shape[1 + i] - low))  # seen of the padded input
    gradient = lax.conv_general_dilated(
        _written_out(x).transpose(3, 1, 2, 0),
        dy.transpose(1, 2, 0, 3),
        (1, 1),
        outer,
        rhs_dilation=layer.strides,
        dimension_numbers=LAYOUT,
    )
    return gradient.transpose(1, 2, 0, 3)


def shifted(layer: Layer, x: chex.Array) -> list[chex.Array]:
    """Return the inputs that each place of the kernel sees, row by row.

    As many arrays `[B, H', W', C]` as the kernel has places.
    """
    size, strides, pads = layer.kernel[:2], layer.strides, layer.pads
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
    layer: Layer,
    x: chex.Array,
    kernel: chex.Array,
) -> chex.Array:
    """Convolve as a sum of products of inputs and weights, one per place of the kernel.

    Matrix products make a dense convolution, elementwise ones a depthwise one.
    """
    weights = kernel.reshape(-1, *kernel.shape[2:])
    seen = shifted(layer, x)
    products = [multiply(places, w) for places, w in zip(seen, weights, strict=True)]
    return sum(products[1:], products[0])


matrix_products = functools.partial(sum_over_places, operator.matmul)
elementwise_products = functools.partial(sum_over_places, operator.mul)


def _is_slow(x: chex.Array, kernel: tuple[int, ...]) -> bool:
    """Whether XLA's library leaves a convolution to plain loops.

    It takes no doubles, and no kernel larger than the images, whatever the pads.
    """
    size = kernel[:2]
    no_double = size == (1, 1) and x.dtype == jnp.float64
    return no_double or any(h < k for h, k in zip(x.shape[1:3], size, strict=True))


def _outer_pads(layer: Layer, dy: chex.Array) -> Pads:
    """Return the zeros around `dy` that make its convolution as large as the inputs."""

    def along(axis: int) -> tuple[int, int]:
        size = layer.kernel[axis]
        spread = (dy.shape[1 + axis] - 1) * layer.strides[axis] + 1
        before = size - 1 - layer.pads[axis][0]
        return before, layer.inputs[1 + axis] + size - 1 - spread - before

    return along(0), along(1)


def _written_out(x: chex.Array) -> chex.Array:
    """Return the same finite numbers as a result that XLA cannot fuse with others.

    The inputs of a layer are normalized and rectified outputs of others. XLA computes
    them again within the transposition, from all that they were made of and in an order
    that misses the cache: ten times the time of a transposition of what is there. It
    removes optimization barriers too early to prevent that. What is not finite spreads
    to its neighbours.
    """
    if not isinstance(x.size, int) or x.size % _LANES:  # of jax.export: no number
        return x
    identity = jnp.eye(_LANES, dtype=x.dtype)
    rows = x.reshape(-1, _LANES)
    return jnp.dot(rows, identity, precision=lax.Precision.HIGHEST).reshape(x.shape)


def _rows(x: chex.Array) -> chex.Array:
    return x.reshape(-1, x.shape[-1])


def depthwise_output(layer: Layer, x: chex.Array, kernel: chex.Array) -> chex.Array:
    """Convolve every channel with a kernel of its own, `[k, k, 1, C]`."""
    return _loop_nest(x, kernel, layer.strides, layer.pads)


def depthwise_input_gradient(
    layer: Layer, kernel: chex.Array, dy: chex.Array
) -> chex.Array:
    """Return the gradient with respect to the inputs."""
    outer = _outer_pads(layer, dy)
    return _loop_nest(dy, kernel[::-1, ::-1], (1, 1), outer, layer.strides)


def depthwise_kernel_gradient(
    layer: Layer, x: chex.Array, dy: chex.Array
) -> chex.Array:
    """Return the gradient with respect to the kernel."""
    sums = [_channel_sums(place, dy) for place in shifted(layer, x)]
    return jnp.stack(sums).reshape(layer.kernel)


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


def _channel_sums(x: chex.Array, dy: chex.Array) -> chex.Array:
    """Return the sums per channel of `x * dy`, of slices `x` of a larger array.

    A reduction would have XLA write out every slice. A sum of several products is one
    loop over the slices instead, and leaves little for the matrix product to add up.
    """
    examples = x.shape[0]
    count = math.gcd(examples, _PARTS) if isinstance(examples, int) else 1
    parts = zip(jnp.split(x, count), jnp.split(dy, count), strict=True)
    products = [a * b for a, b in parts]
    rows = _rows(sum(products[1:], products[0]))
    return jnp.ones((1, rows.shape[0]), rows.dtype) @ rows


DENSE = Formulation(input_gradient, kernel_gradient, output)
DEPTHWISE = Formulation(
    depthwise_input_gradient, depthwise_kernel_gradient, depthwise_output
)
DEPTHWISE_DOUBLES = Formulation(
    lambda layer, kernel, dy: transposed(
        lambda x: elementwise_products(layer, x, kernel), layer.inputs, dy
    ),
    depthwise_kernel_gradient,
    elementwise_products,
)
"""XLA's own loops are slow for doubles only."""


def fastest(layer: Layer, dtype: Any) -> Formulation:
    """Choose for a layer."""
    if layer.groups == 1:
        return DENSE
    return DEPTHWISE_DOUBLES if dtype == jnp.float64 else DEPTHWISE
