r"""Two-dimensional convolutions that are fast on CPUs, also inside loops.

A convolution is one of three bilinear functions, the derivatives of

    T(x, k, dy) = sum(dy * conv(x, k))

with respect to `dy` (the outputs), `x` (the input gradient) and `k` (the weight
gradient); the derivatives of each are the other two. One JAX primitive,
`convolution_p`, is all three, so that derivatives of any order, forwards and backwards,
consist of them. The platform that a program is compiled for decides how they are
computed, whichever machine compiles it: on CPUs by the formulations of
:mod:`hero_jax.models._convolution_on_cpu`, elsewhere as
:func:`jax.lax.conv_general_dilated` and its gradients are.

For arguments not mentioned here (dilation, other groups, other layouts, images of
unknown size), and for arrays sharded over `Explicit` axes, the stock function does the
work. All that changes speed alone. Policies of `jax.checkpoint` that go by primitives,
such as `dots_saveable`, do not know this one: they save no convolution.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from hero_jax import _axis
from hero_jax.models import _convolution_on_cpu
from hero_jax.models._convolution_on_cpu import (
    LAYOUT,
    Formulation,
    Layer,
    transposed,
)

_X, _KERNEL, _DY = range(3)  # the arguments of T
_Levels = tuple[tuple[int | None, int | None], ...]


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
    if lhs.ndim != 4:
        return stock()
    if _axis.is_sharded(lhs) or _axis.is_sharded(rhs):
        return stock()  # a matrix product must be told how to shard its result
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    channels = lhs.shape[-1]
    depthwise = feature_group_count == channels == rhs.shape[-1] and channels > 1
    plain = (
        numbers == lax.conv_dimension_numbers(lhs.shape, rhs.shape, LAYOUT)
        and all(d == 1 for d in (*(lhs_dilation or ()), *(rhs_dilation or ())))
        and all(value is None for value in kwargs.values())
        and lhs.dtype == rhs.dtype
        and (depthwise or feature_group_count == 1)
        and all(isinstance(n, int) for n in lhs.shape[1:])  # else: of jax.export
    )
    if not plain:
        return stock()
    strides = (int(window_strides[0]), int(window_strides[1]))
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], strides, padding)
    pads = tuple((int(low), int(high)) for low, high in padding)
    layer = Layer(
        tuple(lhs.shape),
        tuple(rhs.shape),
        strides,
        (pads[0], pads[1]),
        feature_group_count,
        jax.config.jax_default_matmul_precision,  # type: ignore[attr-defined]
    )
    lhs, rhs = _axis.alike(jnp.asarray(lhs), jnp.asarray(rhs))
    return convolution_p.bind(lhs, rhs, wanted=_DY, layer=layer, levels=())


convolution_p = Primitive("convolution")
"""A derivative of T.

Its operands are two of T's three arguments, in their order. Parameters:
  wanted: with respect to which argument, the third.
  layer: the convolution.
  levels: for each `jax.vmap` around it, innermost first, the mapped axes of both
    operands: 0 or None.
"""


def _output(layer: Layer, x: chex.Array, kernel: chex.Array) -> chex.Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        layer.strides,
        layer.pads,
        dimension_numbers=LAYOUT,
        feature_group_count=layer.groups,
    )


def _input_gradient(layer: Layer, kernel: chex.Array, dy: chex.Array) -> chex.Array:
    return transposed(lambda x: _output(layer, x, kernel), layer.inputs, dy)


def _kernel_gradient(layer: Layer, x: chex.Array, dy: chex.Array) -> chex.Array:
    return transposed(lambda kernel: _output(layer, x, kernel), layer.kernel, dy)


def _function(
    formulation: Callable[[Layer, Any], Formulation],
) -> Callable[..., chex.Array]:
    """Return what the primitive computes where layers are formulated like that."""

    def function(
        a: chex.Array, b: chex.Array, *, wanted: int, layer: Layer, levels: _Levels
    ) -> chex.Array:
        compute = functools.partial(formulation(layer, a.dtype)[wanted], layer)
        for axes in levels:
            compute = jax.vmap(compute, in_axes=axes)
        with jax.default_matmul_precision(layer.precision):
            return compute(a, b)

    return function


_STOCK = Formulation(_input_gradient, _kernel_gradient, _output)
_stock = _function(lambda *_: _STOCK)
_on_cpu = _function(_convolution_on_cpu.fastest)


@functools.lru_cache(maxsize=1024)
def _type(a: Any, b: Any, **params: Any) -> Any:
    return jax.make_jaxpr(functools.partial(_stock, **params))(a, b).out_avals[0]


@functools.partial(jax.jit, static_argnames=("wanted", "layer", "levels"))
def _compiled(a: chex.Array, b: chex.Array, **params: Any) -> chex.Array:
    return convolution_p.bind(a, b, **params)


def _run(a: chex.Array, b: chex.Array, **params: Any) -> chex.Array:
    with jax.disable_jit(False):
        return _compiled(a, b, **params)


def _transpose(
    place: int,
    cotangent: chex.Array,
    a: chex.Array,
    b: chex.Array,
    *,
    wanted: int,
    layer: Layer,
    levels: _Levels,
) -> chex.Array:
    """Return the gradient with respect to the operand at that place, 0 or 1.

    The cotangent takes the part in T of what was wanted, and is mapped at all levels.
    """
    arguments = [argument for argument in (_X, _KERNEL, _DY) if argument != wanted]
    other = 1 - place
    known = ((a, b)[other], [axes[other] for axes in levels])
    given = (cotangent, [0] * len(levels))
    first, second = (known, given) if arguments[other] < wanted else (given, known)
    gradient = convolution_p.bind(
        first[0],
        second[0],
        wanted=arguments[place],
        layer=layer,
        levels=tuple(zip(first[1], second[1], strict=True)),
    )
    shared = [i for i, axes in enumerate(reversed(levels)) if axes[place] is None]
    return gradient.sum(shared) if shared else gradient


def _batch(
    operands: Sequence[chex.Array],
    axes: Sequence[int | None],
    *,
    levels: _Levels,
    **params: Any,
) -> tuple[chex.Array, int]:
    """Map over the first axes, one level further out."""
    a, b = (
        x if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(operands, axes, strict=True)
    )
    first, second = (None if axis is None else 0 for axis in axes)
    return convolution_p.bind(a, b, levels=(*levels, (first, second)), **params), 0


convolution_p.def_impl(_run)
convolution_p.def_abstract_eval(_type)
ad.defbilinear(
    convolution_p,
    functools.partial(_transpose, 0),
    functools.partial(_transpose, 1),
)
batching.primitive_batchers[convolution_p] = _batch
mlir.register_lowering(convolution_p, mlir.lower_fun(_stock, multiple_results=False))
mlir.register_lowering(
    convolution_p, mlir.lower_fun(_on_cpu, multiple_results=False), platform="cpu"
)
