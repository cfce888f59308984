"""Post-training quantization: weights to real integers, activations to their levels."""

from hero_jax.quant.activations import quantize_activations
from hero_jax.quant.allocation import allocate_bits
from hero_jax.quant.array import QuantizedArray, fake_quantize_array, quantize_array
from hero_jax.quant.error import QuantizationError, quantization_error
from hero_jax.quant.evaluation import accuracy_against_bits
from hero_jax.quant.files import QuantFileError, file_size, load, save
from hero_jax.quant.frontier import Frontier, pareto_frontier
from hero_jax.quant.options import GridOptions
from hero_jax.quant.packing import PackedArray
from hero_jax.quant.ranges import ActivationRange, activation_ranges
from hero_jax.quant.search import Found, smallest_accurate
from hero_jax.quant.sizes import LayerSize, layer_sizes
from hero_jax.quant.table import Allocation
from hero_jax.quant.tree import (
    dequantize,
    fake_quantize,
    is_quantized,
    pack,
    quantize,
    size_in_bytes,
    unpack,
)

__all__ = [
    "ActivationRange",
    "Allocation",
    "Found",
    "Frontier",
    "GridOptions",
    "LayerSize",
    "PackedArray",
    "QuantFileError",
    "QuantizationError",
    "QuantizedArray",
    "accuracy_against_bits",
    "activation_ranges",
    "allocate_bits",
    "dequantize",
    "fake_quantize",
    "fake_quantize_array",
    "file_size",
    "is_quantized",
    "layer_sizes",
    "load",
    "pack",
    "pareto_frontier",
    "quantization_error",
    "quantize",
    "quantize_activations",
    "quantize_array",
    "save",
    "size_in_bytes",
    "smallest_accurate",
    "unpack",
]
