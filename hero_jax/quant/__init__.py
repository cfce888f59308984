"""Post-training quantization: weights to real integers, activations to their levels."""

from hero_jax.quant.activations import quantize_activations
from hero_jax.quant.array import QuantizedArray, fake_quantize_array, quantize_array
from hero_jax.quant.error import QuantizationError, quantization_error
from hero_jax.quant.evaluation import accuracy_against_bits
from hero_jax.quant.files import QuantFileError, file_size, load, save
from hero_jax.quant.options import GridOptions
from hero_jax.quant.packing import PackedArray
from hero_jax.quant.ranges import ActivationRange, activation_ranges
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
    "GridOptions",
    "PackedArray",
    "QuantFileError",
    "QuantizationError",
    "QuantizedArray",
    "accuracy_against_bits",
    "activation_ranges",
    "dequantize",
    "fake_quantize",
    "fake_quantize_array",
    "file_size",
    "is_quantized",
    "load",
    "pack",
    "quantization_error",
    "quantize",
    "quantize_activations",
    "quantize_array",
    "save",
    "size_in_bytes",
    "unpack",
]
