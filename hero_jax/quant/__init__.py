"""Post-training quantization: weights become integers, activations are rounded."""

from hero_jax.quant._activations import quantize_activations
from hero_jax.quant._array import QuantizedArray, fake_quantize_array, quantize_array
from hero_jax.quant._error import QuantizationError, quantization_error
from hero_jax.quant._evaluation import accuracy_against_bits
from hero_jax.quant._files import QuantFileError, file_size, load, save, write_file
from hero_jax.quant._options import GridOptions
from hero_jax.quant._packing import PackedArray
from hero_jax.quant._ranges import ActivationRange, activation_ranges
from hero_jax.quant._tree import (
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
    "write_file",
]
