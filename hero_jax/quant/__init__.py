"""Post-training quantization of parameter pytrees to real integers."""

from hero_jax.quant.array import QuantizedArray, quantize_array
from hero_jax.quant.tree import dequantize, quantize

__all__ = ["QuantizedArray", "dequantize", "quantize", "quantize_array"]
