"""Post-training quantization of parameter pytrees to real integers."""

from hero_jax.quant.array import QuantizedArray, fake_quantize_array, quantize_array
from hero_jax.quant.error import QuantizationError, quantization_error
from hero_jax.quant.evaluation import accuracy_against_bits
from hero_jax.quant.files import QuantFileError, load, save
from hero_jax.quant.options import GridOptions
from hero_jax.quant.packing import PackedArray
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
    "GridOptions",
    "PackedArray",
    "QuantFileError",
    "QuantizationError",
    "QuantizedArray",
    "accuracy_against_bits",
    "dequantize",
    "fake_quantize",
    "fake_quantize_array",
    "is_quantized",
    "load",
    "pack",
    "quantization_error",
    "quantize",
    "quantize_array",
    "save",
    "size_in_bytes",
    "unpack",
]
