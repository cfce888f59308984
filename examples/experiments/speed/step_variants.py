"""What `step_time.py` measures: networks, methods and their options."""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

import hero_jax
from examples.image_classification.train import make_loss
from hero_jax import models
from hero_jax.models import convolution_p

HERO = functools.partial(hero_jax.hero_value_and_grad, h=1.0)
GAMMA = 0.1
K = 4
"""Steps from one penalty to the next; the product takes one K-th of the images."""


class Network(NamedTuple):
    """How a network is measured.

    Attributes:
      size: height and width of its images.
      batch: images per step on a CPU.
      large_batch: images per step on an accelerator: the paper's.
      last: which modules "last layers" means, a regular expression.
    """

    size: int
    batch: int
    large_batch: int
    last: str


NETWORKS = {
    "resnet20": Network(32, 128, 128, r"BasicBlock_[678]|classifier"),
    "mobilenet_v2": Network(32, 32, 128, r"InvertedResidual_1[3-6]|Conv_1|classifier"),
    "vgg19_bn": Network(32, 64, 128, r"Conv_1[2-5]|classifier"),
    "resnet18": Network(64, 64, 256, r"BasicBlock_[67]|classifier"),
    "transformer": Network(32, 64, 128, r"Block_3|classifier"),
    "resnet8": Network(32, 128, 128, r"BasicBlock_2|classifier"),
}


class Block(nn.Module):
    """Attention and a perceptron beside shortcuts, normalized beforehand."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: chex.Array) -> chex.Array:
        """Map `[B, T, D]` to the same."""
        norm = functools.partial(nn.LayerNorm, dtype=self.dtype)
        attend = nn.MultiHeadDotProductAttention(self.heads, dtype=self.dtype)
        x = x + attend(norm()(x))
        y = nn.gelu(nn.Dense(4 * x.shape[-1], dtype=self.dtype)(norm()(x)))
        return x + nn.Dense(x.shape[-1], dtype=self.dtype)(y)


class Transformer(nn.Module):
    """A small vision transformer: patches of 4x4, four blocks, no BatchNorm."""

    num_classes: int
    dtype: Any = jnp.float32
    features: int = 128
    blocks: int = 4

    @nn.compact
    def __call__(self, images: chex.Array, train: bool) -> chex.Array:
        """Map images `[B, H, W, C]` to logits `[B, num_classes]`, float32."""
        del train
        self.variable("batch_stats", "none", lambda: jnp.zeros(()))
        b, h, w, c = images.shape
        x = images.reshape(b, h // 4, 4, w // 4, 4, c).swapaxes(2, 3)
        x = nn.Dense(self.features, dtype=self.dtype)(x.reshape(b, -1, 16 * c))
        init = nn.initializers.normal(0.02)
        x = x + self.param("position", init, x.shape[1:]).astype(self.dtype)
        for _ in range(self.blocks):
            x = Block(heads=4, dtype=self.dtype)(x)
        x = nn.LayerNorm(dtype=self.dtype)(x).mean(1)
        return jnp.asarray(
            nn.Dense(self.num_classes, name="classifier")(x), jnp.float32
        )


def create(network: str, dtype: Any, convolution: Any) -> nn.Module:
    """Return a network of ten classes."""
    if network == "transformer":
        return Transformer(num_classes=10, dtype=dtype)
    return models.create(
        network, num_classes=10, dtype=dtype, conv_general_dilated=convolution
    )


Step = Callable[..., Any]
"""`(count, params, batch_stats, images, labels) -> (value, gradient)`."""


class Method(NamedTuple):
    """A way to a gradient.

    Attributes:
      make: `(loss_fn, network, images per step) -> Step`.
      timed_steps: so many make up one of its turns.
      stock: whether with XLA's own convolutions.
    """

    make: Callable[[Callable[..., Any], str, int], Step]
    timed_steps: int = 2
    stock: bool = False


def _plain(transform: Callable[..., Any], **options: Any) -> Callable[..., Step]:
    def make(loss_fn: Callable[..., Any], network: str, batch: int) -> Step:
        del network, batch
        value_and_grad = transform(loss_fn, has_aux=True, **options)
        return lambda _, *args: value_and_grad(*args)

    return make


def _part(**options: Any) -> Callable[..., Step]:
    """Take the product over a part of the images."""

    def make(loss_fn: Callable[..., Any], network: str, batch: int) -> Step:
        def part(params: Any, stats: Any, x: Any, y: Any) -> Any:
            return loss_fn(params, stats, x[::K], y[::K])

        hero = _plain(HERO, gamma=GAMMA, hvp_loss_fn=part, **options)
        return hero(loss_fn, network, batch)

    return make


def _every(**options: Any) -> Callable[..., Step]:
    """Penalise at every k-th step."""
    schedule = hero_jax.schedules.every(K, GAMMA)

    def make(loss_fn: Callable[..., Any], network: str, batch: int) -> Step:
        penalised = _plain(HERO, gamma=K * GAMMA, **options)(loss_fn, network, batch)
        first_order = _plain(HERO, gamma=0.0, **options)(loss_fn, network, batch)
        return lambda *args: lax.cond(
            schedule(args[0]) != 0, penalised, first_order, *args
        )

    return make


def _last(loss_fn: Callable[..., Any], network: str, batch: int) -> Step:
    """Penalise the last layers only."""
    pattern = re.compile(NETWORKS[network].last)

    def mask(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, x: bool(pattern.search(path[0].key)) and jnp.ndim(x) >= 2,
            params,
        )

    options = {"gamma": GAMMA, "penalty_mask": mask}
    return _plain(HERO, **options)(loss_fn, network, batch)


def _checkpointed(policy: Callable[..., Any]) -> Callable[..., Step]:
    def make(loss_fn: Callable[..., Any], network: str, batch: int) -> Step:
        kept = jax.checkpoint(loss_fn, policy=policy)
        return _plain(HERO, gamma=GAMMA)(kept, network, batch)

    return make


def _products_saved(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive in (convolution_p, lax.conv_general_dilated_p, lax.dot_general_p)


METHODS = {
    "SGD": Method(_plain(jax.value_and_grad)),
    "first-order": Method(_plain(HERO, gamma=0.0)),
    "GRAD-L1": Method(_plain(hero_jax.family.grad_l1_value_and_grad, strength=1e-3)),
    "HERO": Method(_plain(HERO, gamma=GAMMA)),
    "HERO, finite difference": Method(
        _plain(HERO, gamma=GAMMA, hvp=hero_jax.FiniteDifference())
    ),
    "HERO, product over 1/4": Method(_part()),
    "HERO, difference over 1/4": Method(_part(hvp=hero_jax.FiniteDifference())),
    "HERO, every 4th step": Method(_every(), timed_steps=K),
    "HERO, difference every 4th step": Method(
        _every(hvp=hero_jax.FiniteDifference()), timed_steps=K
    ),
    "HERO, last layers": Method(_last),
    "HERO, checkpoint products": Method(_checkpointed(_products_saved)),
    "HERO, checkpoint nothing": Method(
        _checkpointed(jax.checkpoint_policies.nothing_saveable)
    ),
    "SGD, XLA's convolutions": Method(_plain(jax.value_and_grad), stock=True),
    "HERO, XLA's convolutions": Method(_plain(HERO, gamma=GAMMA), stock=True),
}


def loss_of(
    network: str, dtype: Any, method: Method
) -> tuple[nn.Module, Callable[..., Any]]:
    """Return a network and its loss, as a method takes it."""
    model = create(network, dtype, lax.conv_general_dilated if method.stock else None)
    return model, make_loss(model)
