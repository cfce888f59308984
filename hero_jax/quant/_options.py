"""What can be chosen about a grid, and the checks of it."""

from __future__ import annotations

import operator
from typing import Any, Literal, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from hero_jax import _checks
from hero_jax.leaves import Leaf, Overrides
from hero_jax.quant import _blocks, _grid

WIDTHS = "an integer from 2 to 8, or 16"


class GridOptions(TypedDict, total=False):
    """Keyword arguments that every function of this package which quantizes takes.

    Attributes:
      scheme: "affine" (default), which spreads the levels over the range of the
        weights; "affine_with_zero", over a range that contains zero, too, coarser
        where all weights have one sign: its zero point is from 0 to `2^bits - 1`, as
        PyTorch, ONNX and the uint8 kernels of TFLite and XNNPACK want it; or
        "symmetric", which has no zero point.
      axis: axis or axes along which the grids differ; None (default) for one grid per
        tensor, "output" for one per output feature, whichever axes these are in a leaf
        of a tree, or numbers, -1 for the last one. Each layer of a stack has grids of
        its own: axes are counted in one layer.
      group_size: how many consecutive indices along `axis` share a grid; one number,
        or one per axis. None (default) for 1.
      calibration: range of the grid: "minmax" (default) covers every weight;
        "percentile" leaves the outermost ones out; "mse" clips where the mean squared
        error is least. Weights outside are moved to the end of the range: a leaf
        that is zero but for a few weights loses them to a percentile.
      percentile: above 50, at most 100; for that calibration, 99.9 by default. Of the
        magnitudes in a symmetric grid; else of the weights, and 100 minus it below.
      leaves: of a tree, what :mod:`hero_jax.leaves` does not see in paths and shapes.
    """

    scheme: str
    axis: int | tuple[int, ...] | Literal["output"] | None
    group_size: int | tuple[int, ...] | None
    calibration: str
    percentile: float | None
    leaves: Overrides | None


def check_bits(bits: Any) -> None:
    """Raise unless `bits` is an integer from 2 to 8, or 16."""
    if isinstance(bits, jax.core.Tracer):
        raise TypeError(
            f"bits must be {WIDTHS}, known before tracing: how integers are stored "
            "depends on it. Got a traced array; fake_quantize takes traced integers."
        )
    try:
        number = operator.index(bits)
    except TypeError:
        raise TypeError(f"bits must be {WIDTHS}, got {_checks.got(bits)}.") from None
    if not 2 <= number <= 8 and number != 16:
        raise ValueError(f"bits must be {WIDTHS}, got {bits}.")


def check_traceable_bits(bits: Any) -> None:
    """Raise unless `bits` is a traced integer, or as :func:`check_bits` wants it."""
    traced = isinstance(bits, jax.core.Tracer) and bits.ndim == 0
    if not traced or not jnp.issubdtype(bits.dtype, jnp.integer):
        check_bits(bits)


def check_choices(choices: Any) -> tuple[int, ...]:
    """Return numbers of bits in the order given, or raise unless they differ."""
    in_order = isinstance(choices, (tuple, list, range, np.ndarray, jax.Array))
    numbers = tuple(choices) if in_order else ()
    for bits in numbers:
        check_bits(bits)
    if not numbers or len({*map(int, numbers)}) < len(numbers):
        raise ValueError(
            "choices must be a sequence of different numbers of bits, at least one, "
            f"got {_checks.got(choices)}."
        )
    return tuple(map(int, numbers))


class Options(NamedTuple):
    """Checked and hashable: what the jitted functions need to know in advance."""

    scheme: str
    calibration: str
    percent: float
    block_shape: tuple[int, ...]


def resolve(
    shape: tuple[int, ...], options: GridOptions, leaf: Leaf | None = None
) -> Options:
    """Check the options for an array of this shape and fill in the defaults.

    Of a leaf of a tree it is known which axes are layers and which are outputs.
    """
    _checks.check_options(options, GridOptions.__annotations__)
    scheme = options.get("scheme", "affine")
    calibration = options.get("calibration", "minmax")
    percentile = options.get("percentile")
    _checks.check_choice("scheme", scheme, _grid.SCHEMES)
    _checks.check_choice("calibration", calibration, _grid.CALIBRATIONS)
    if percentile is not None and calibration != "percentile":
        raise ValueError(
            f"percentile needs calibration='percentile', got percentile={percentile!r} "
            f"and calibration={calibration!r}."
        )
    percent = _grid.DEFAULT_PERCENT if percentile is None else percentile
    if not 50.0 < percent <= 100.0:
        raise ValueError(
            f"percentile must be above 50 and at most 100, got {percentile!r}."
        )
    axis = options.get("axis")
    if isinstance(axis, str):
        _checks.check_choice("axis", axis, ("output",))
        if leaf is None:
            raise ValueError(
                "axis='output' is for a leaf of a tree, whose name tells which axes "
                "are outputs; of an array alone pass their numbers."
            )
        axis = leaf.output_axes
    layers = 0 if leaf is None else leaf.layer_axes
    of_layer = _blocks.block_shape_of(shape[layers:], axis, options.get("group_size"))
    block_shape = (1,) * layers + of_layer
    return Options(scheme, calibration, float(percent), block_shape)
