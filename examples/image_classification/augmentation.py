"""Random crops and flips of images that lie on the device, inside jit."""

import chex
import jax
import jax.numpy as jnp

PADDING = 4


def crop_and_flip(key: chex.PRNGKey, images: chex.Array) -> chex.Array:
    """Pad by 4 black pixels, crop at random to the old size, mirror every second one.

    Args:
      key: random key.
      images: `[B, H, W, C]`.

    Returns:
      Images of the same shape and dtype.
    """
    crop_key, flip_key = jax.random.split(key)
    size, height, width, _ = images.shape
    pads = ((0, 0), (PADDING, PADDING), (PADDING, PADDING), (0, 0))
    corners = jax.random.randint(crop_key, (size, 2), 0, 2 * PADDING + 1)
    rows = corners[:, :1] + jnp.arange(height)
    flipped = jax.random.bernoulli(flip_key, 0.5, (size, 1))
    columns = jnp.arange(width)
    columns = corners[:, 1:] + jnp.where(flipped, columns[::-1], columns)
    batch = jnp.arange(size)[:, None, None]
    return jnp.pad(images, pads)[batch, rows[:, :, None], columns[:, None, :]]
