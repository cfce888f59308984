"""MobileNetV2 in its variant for CIFAR: fewer strides than for ImageNet.

Depthwise kernels start with variance 2 / (9 C), as in torchvision: the fan-out counts
all C outputs, though each input has one. BatchNorm undoes the scale of the outputs.

References:
  Sandler, Howard, Zhu, Zhmoginov, Chen: MobileNetV2: Inverted Residuals and Linear
  Bottlenecks. CVPR 2018.
"""

from __future__ import annotations

from collections.abc import Callable
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

STAGES = (
    # expansion, features, blocks, strides of the first block
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """Widen by 1x1, convolve every channel by itself, narrow by 1x1.

    The shortcut is there wherever the size stays, with a 1x1 convolution where the
    number of features changes, as in the CIFAR variant.
    """

    features: int
    expansion: int
    strides: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: chex.Array) -> chex.Array:
        """Map `[B, H, W, C]` to `[B, H / strides, W / strides, features]`."""
        conv, norm = self.conv, self.norm
        width = self.expansion * x.shape[-1]
        y = nn.relu(norm()(conv(width, (1, 1), padding=0)(x)))
        depthwise = conv(
            width, (3, 3), self.strides, padding=1, feature_group_count=width
        )
        y = nn.relu(norm()(depthwise(y)))
        y = norm()(conv(self.features, (1, 1), padding=0)(y))
        if self.strides > 1:
            return y
        if x.shape != y.shape:
            x = norm()(conv(self.features, (1, 1), padding=0)(x))
        return x + y


class MobileNetV2(nn.Module):
    """Inverted residuals between a 3x3 stem of 32 features and a 1x1 head of 1280.

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
        check_images(x, 8, "MobileNetV2")
        norm = normalization(train, self.dtype, self.axis_name)
        conv = convolution(self.dtype, self.conv_general_dilated)
        x = nn.relu(norm()(conv(32, (3, 3), padding=1)(x)))
        for expansion, features, blocks, first in STAGES:
            for block in range(blocks):
                strides = first if block == 0 else 1
                x = InvertedResidual(features, expansion, strides, conv, norm)(x)
        x = nn.relu(norm()(conv(1280, (1, 1), padding=0)(x)))
        return classifier(x, self.num_classes, dtype=self.dtype)
