"""A small decoder-only transformer, and its loss."""

from collections.abc import Callable

import chex
import flax.linen as nn
import optax

SMALL = nn.initializers.normal(0.02)
"""For what ends a block, which starts near the identity, and for the head."""


class Transformer(nn.Module):
    """Causal self-attention, with normalization before each half of a block.

    All weights but the scales and biases are matrices, as Muon wants them.

    Attributes:
      vocabulary: number of different characters.
      context: largest number of characters it can look at.
      width: of the representation of a character.
      blocks: number of layers of attention.
      heads: number of attention heads, a divisor of `width`.
    """

    vocabulary: int
    context: int = 64
    width: int = 48
    blocks: int = 2
    heads: int = 4

    @nn.compact
    def __call__(self, tokens: chex.Array) -> chex.Array:
        """Map characters `[B, T]` to logits of the next one `[B, T, vocabulary]`."""
        positions = self.param(
            "positions", nn.initializers.normal(0.3), (self.context, self.width)
        )
        x = nn.Embed(
            self.vocabulary, self.width, embedding_init=nn.initializers.normal(1.0)
        )(tokens)
        x = x + positions[: tokens.shape[1]]
        for i in range(self.blocks):
            x = Block(self.heads, name=f"block_{i}")(x)
        return nn.Dense(self.vocabulary, kernel_init=SMALL, name="head")(
            nn.LayerNorm()(x)
        )


class Block(nn.Module):
    """Attention, then a hidden layer at each position."""

    heads: int

    @nn.compact
    def __call__(self, x: chex.Array) -> chex.Array:
        """Map `[B, T, width]` to the same shape."""
        width = x.shape[-1]
        shape = (*x.shape[:2], self.heads, width // self.heads)
        y = nn.LayerNorm()(x)
        query, key, value = (
            nn.Dense(width, use_bias=False, name=name)(y).reshape(shape)
            for name in ("query", "key", "value")
        )
        mask = nn.make_causal_mask(x[..., 0])
        y = nn.dot_product_attention(query, key, value, mask=mask).reshape(x.shape)
        x = x + nn.Dense(width, kernel_init=SMALL, name="out")(y)
        y = nn.gelu(nn.Dense(4 * width, name="expand")(nn.LayerNorm()(x)))
        return x + nn.Dense(width, kernel_init=SMALL, name="contract")(y)


def make_loss(model: Transformer) -> Callable[[chex.ArrayTree, chex.Array], chex.Array]:
    """Return `(params, tokens [B, T + 1]) -> mean cross-entropy` in nats."""

    def loss_fn(params: chex.ArrayTree, tokens: chex.Array) -> chex.Array:
        logits = model.apply({"params": params}, tokens[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return losses.mean()

    return loss_fn
