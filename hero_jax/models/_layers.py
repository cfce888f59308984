"""Layers that the networks share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import chex
import flax.linen as nn
import jax.numpy as jnp

from hero_jax.models import _convolution

he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
"""Normal with variance 2 / (k * k * outputs): He et al. 2015."""

ConvGeneralDilated = Callable[..., chex.Array]
"""What :func:`jax.lax.conv_general_dilated` is, or stands in for it."""


def convolution(
    dtype: Any, conv_general_dilated: ConvGeneralDilated | None
) -> Callable[..., nn.Conv]:
    """Return `nn.Conv` without biases, with He's initialization."""
    return functools.partial(
        nn.Conv,
        use_bias=False,
        kernel_init=he_normal,
        dtype=dtype,
        conv_general_dilated=conv_general_dilated or _convolution.conv_general_dilated,
    )


def normalization(
    train: bool, dtype: Any, axis_name: str | None
) -> Callable[..., nn.BatchNorm]:
    """Return BatchNorm with a momentum of 0.9 and an epsilon of 1e-5."""
    return functools.partial(
        nn.BatchNorm,
        use_running_average=not train,
        momentum=0.9,
        epsilon=1e-5,
        dtype=dtype,
        axis_name=axis_name,
    )


def check_images(x: chex.Array, multiple: int, model: str) -> None:
    """Raise `ValueError` unless x is `[B, H, W, C]` of sizes that a network takes."""
    if x.ndim != 4 or x.shape[1] % multiple or x.shape[2] % multiple or 0 in x.shape:
        raise ValueError(
            f"images for {model} must have shape [batch, height, width, channels] with "
            f"height and width multiples of {multiple}, got {tuple(x.shape)}."
        )


def classifier(x: chex.Array, num_classes: int, **kwargs: Any) -> chex.Array:
    """Average over the image, then a linear layer; logits are float32."""
    logits = nn.Dense(num_classes, name="classifier", **kwargs)(x.mean(axis=(1, 2)))
    return jnp.asarray(logits, jnp.float32)
