"""Residual networks: ResNet20 for CIFAR and ResNet18 for ImageNet.

References:
  He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition. CVPR 2016.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, a 1x1 one where the shape changes."""

    features: int
    strides: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: chex.Array) -> chex.Array:
        """Map `[B, H, W, C]` to `[B, H / strides, W / strides, features]`."""
        conv, norm = self.conv, self.norm
        y = nn.relu(norm()(conv(self.features, (3, 3), self.strides, padding=1)(x)))
        y = norm()(conv(self.features, (3, 3), padding=1)(y))
        if x.shape != y.shape:
            x = norm()(conv(self.features, (1, 1), self.strides, padding=0)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Stages of basic blocks; each but the first halves height and width.

    Attributes:
      num_classes: number of logits.
      blocks: number of blocks per stage.
      features: of the first stage; each stage doubles them.
      stem: "cifar", one 3x3 convolution, or "imagenet", a strided 7x7 one and a
        pooling.
      dtype: in which it computes; parameters and statistics are float32.
      conv_general_dilated: see :func:`hero_jax.models.create`.
      axis_name: see :func:`hero_jax.models.create`.
    """

    num_classes: int
    blocks: Sequence[int]
    features: int
    stem: str
    dtype: Any = jnp.float32
    conv_general_dilated: ConvGeneralDilated | None = None
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: chex.Array, train: bool) -> chex.Array:
        """Map images `[B, H, W, C]` to logits `[B, num_classes]`, float32."""
        large = self.stem == "imagenet"
        multiple = 2 ** (len(self.blocks) - 1) * (4 if large else 1)
        check_images(x, multiple, "ResNet")
        kernel, strides = ((7, 7), 2) if large else ((3, 3), 1)
        conv = convolution(self.dtype, self.conv_general_dilated)
        norm = normalization(train, self.dtype, self.axis_name)
        stem = conv(self.features, kernel, strides, padding=kernel[0] // 2)
        x = nn.relu(norm()(stem(x)))
        if large:
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage, blocks in enumerate(self.blocks):
            for block in range(blocks):
                strides = 2 if stage > 0 and block == 0 else 1
                features = self.features * 2**stage
                x = BasicBlock(features, strides, conv, norm)(x)
        return classifier(x, self.num_classes, dtype=self.dtype)
