"""The paper's networks in Flax Linen.

>>> import jax, jax.numpy as jnp
>>> from hero_jax import models
>>> model = models.create("resnet20", num_classes=10)
>>> images = jnp.zeros((2, 32, 32, 3))
>>> variables = jax.eval_shape(
...     lambda: model.init(jax.random.key(0), images, train=False)
... )
>>> sorted(variables)
['batch_stats', 'params']
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

try:
    import flax.linen as nn
except ImportError as error:
    raise ImportError(
        'hero_jax.models needs flax: pip install "hero_jax[models]".'
    ) from error

from hero_jax import _checks
from hero_jax.models._convolution import conv_general_dilated
from hero_jax.models._convolution import convolution_p as convolution_p
from hero_jax.models._layers import ConvGeneralDilated
from hero_jax.models._mobilenet_v2 import MobileNetV2
from hero_jax.models._resnet import ResNet
from hero_jax.models._vgg import VGG

__all__ = ["VGG", "MobileNetV2", "ResNet", "conv_general_dilated", "create"]

_MODELS: dict[str, Callable[..., nn.Module]] = {
    "mobilenet_v2": MobileNetV2,
    "resnet18": lambda **kwargs: ResNet(
        blocks=(2, 2, 2, 2), features=64, stem="imagenet", **kwargs
    ),
    "resnet20": lambda **kwargs: ResNet(
        blocks=(3, 3, 3), features=16, stem="cifar", **kwargs
    ),
    "resnet8": lambda **kwargs: ResNet(
        blocks=(1, 1, 1), features=16, stem="cifar", **kwargs
    ),
    "vgg19_bn": VGG,
}


def create(
    name: str,
    *,
    num_classes: int,
    dtype: Any = jnp.float32,
    conv_general_dilated: ConvGeneralDilated | None = None,
    axis_name: str | None = None,
) -> nn.Module:
    """Return one of the paper's networks.

    Trainable parameters with 10 classes, except ResNet18 with 1,000: "resnet20"
    272,474, "mobilenet_v2" 2,296,922, "vgg19_bn" 20,040,522, "resnet18" 11,689,512, of
    which the classifier has 513,000: without it, 11,176,512, the paper's 11.17 million.
    "resnet8" with 78,042 is ResNet20's little sister, for trying things out.

    Args:
      name: one of these. All but "resnet18" are made for CIFAR's 32x32 images.
      num_classes: number of logits, at least 1.
      dtype: in which it computes, such as bfloat16; parameters, statistics and logits
        are float32.
      conv_general_dilated: the convolution; :func:`conv_general_dilated` of this
        package if None, which is fast on CPUs and elsewhere
        :func:`jax.lax.conv_general_dilated`.
      axis_name: axis of the surrounding `pmap` or `shard_map` over which BatchNorm
        averages its statistics; every device has its own if None. Under `jit` of
        sharded arrays they are those of the whole batch without it.

    Returns:
      A module. `model.init(key, images, train=False)` gives `params` and
      `batch_stats`; `model.apply(variables, images, train=True,
      mutable=["batch_stats"])` logits and new statistics. Images are `[B, H, W, C]`.

    Raises:
      ValueError: the name is unknown, or `num_classes` is below 1.
      TypeError: `num_classes` is not an integer.
    """
    _checks.check_choice("name", name, _MODELS)
    _checks.check_integer("num_classes", num_classes)
    return _MODELS[name](
        num_classes=num_classes,
        dtype=dtype,
        conv_general_dilated=conv_general_dilated,
        axis_name=axis_name,
    )
