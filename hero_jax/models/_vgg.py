"""VGG19 with batch normalization and one linear layer, for CIFAR.

References:
  Simonyan, Zisserman: Very Deep Convolutional Networks for Large-Scale Image
  Recognition. ICLR 2015.
"""

from __future__ import annotations

from typing import Any

import chex
import flax.linen as nn
import jax.numpy as jnp

from hero_jax.models._layers import (
    ConvGeneralDilated,
    check_images,
    classifier,
    convolution,
    normalization,
)

STAGES = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))
"""Features and number of convolutions; every stage ends in a pooling."""


class VGG(nn.Module):
    """Stages of 3x3 convolutions with biases, each followed by BatchNorm.

    Attributes:
      num_classes: number of logits.
      dtype: in which it computes; parameters and statistics are float32.
      conv_general_dilated: see :func:`hero_jax.models.create`.
      axis_name: see :func:`hero_jax.models.create`.
    """

    num_classes: int
    dtype: Any = jnp.float32
    conv_general_dilated: ConvGeneralDilated | None = None
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: chex.Array, train: bool) -> chex.Array:
        """Map images `[B, H, W, C]` to logits `[B, num_classes]`, float32."""
        check_images(x, 32, "VGG19")
        norm = normalization(train, self.dtype, self.axis_name)
        conv = convolution(self.dtype, self.conv_general_dilated)
        for features, layers in STAGES:
            for _ in range(layers):
                x = conv(features, (3, 3), padding=1, use_bias=True)(x)
                x = nn.relu(norm()(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        initial = nn.initializers.normal(0.01)
        return classifier(x, self.num_classes, kernel_init=initial, dtype=self.dtype)
