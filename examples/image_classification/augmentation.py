"""Random crops and flips of images that lie on the device, inside jit."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

PADDING = 4


class Draws(NamedTuple):
    """What is random about B images.

    Attributes:
      corners: row and column of the crop in the padded image, int32 `[B, 2]`.
      flipped: whether it is mirrored, bool `[B, 1]`.
    """

    corners: chex.Array
    flipped: chex.Array


def draw(key: chex.PRNGKey, size: int) -> Draws:
    """Draw crops of images padded by 4 pixels, and whether to mirror them."""
    crop_key, flip_key = jax.random.split(key)
    corners = jax.random.randint(crop_key, (size, 2), 0, 2 * PADDING + 1)
    return Draws(corners, jax.random.bernoulli(flip_key, 0.5, (size, 1)))


def crop_and_flip(draws: Draws, images: chex.Array) -> chex.Array:
    """Pad by 4 black pixels, crop to the old size, and mirror, as drawn.

    Args:
      draws: for B images.
      images: `[B, H, W, C]`.

    Returns:
      Images of the same shape and dtype.
    """
    corners, flipped = draws
    size, height, width, _ = images.shape
    pads = ((0, 0), (PADDING, PADDING), (PADDING, PADDING), (0, 0))
    rows = corners[:, :1] + jnp.arange(height)
    columns = jnp.arange(width)
    columns = corners[:, 1:] + jnp.where(flipped, columns[::-1], columns)
    batch = jnp.arange(size)[:, None, None]
    return jnp.pad(images, pads)[batch, rows[:, :, None], columns[:, None, :]]
