"""Images of one size, all on the device; batches are made inside jit."""

import copy
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from . import datasets
from .config import Config
from .devices import Devices
from .pipeline import (
    AUGMENTATION,
    ORDER,
    Batch,
    EvaluationBatch,
    Facts,
    Pipeline,
    noisy_labels,
)

TEST_BATCH = 500
PADDING = 4


class Item(NamedTuple):
    """What the batches of an epoch are made of; the seed is in the last three.

    Attributes:
      images: uint8 `[N, H, W, C]`.
      clean_labels: int32 `[N]`, as in the data set.
      labels: int32 `[N]`, with noise.
      order: of the images, int32 `[steps, B]`.
      key: data of the key that the seed gives, uint32.
    """

    images: chex.Array
    clean_labels: chex.Array
    labels: chex.Array
    order: chex.Array
    key: chex.Array


class ArrayPipeline(Pipeline):
    """Images of one size, all on the device as uint8."""

    on_device = True

    def __init__(
        self, dataset: datasets.Dataset, config: Config, devices: Devices
    ) -> None:
        train, test = dataset.train, dataset.test
        super().__init__(dataset, len(train.labels), config, devices)
        self.num_test = len(test.labels)
        mean, std = mean_and_std(train.images)
        self.facts = Facts(
            classes=[*dataset.classes],
            image_shape=[*train.images.shape[1:]],
            mean=mean.tolist(),
            std=std.tolist(),
            downsample=config.downsample,
            crop=1.0,
        )
        self._clean_labels = train.labels
        self._shared = devices.replicate((train.images, train.labels))
        self._draw(config.seed)
        batch_size = min(TEST_BATCH, self.num_test)
        batch_size += -batch_size % devices.count
        self._test = devices.sharded.distribute(
            _in_batches(batch_size, test.images, test.labels), axis=1
        )

    def drawn(self, seed: int) -> "ArrayPipeline":
        """Return the same images with label noise, order and crops of another seed."""
        other = copy.copy(self)
        other._draw(seed)
        return other

    def _draw(self, seed: int) -> None:
        config = dataclasses.replace(self._config, seed=seed)
        noisy = noisy_labels(config, len(self._clean_labels), self.num_classes)
        labels = np.where(noisy < 0, self._clean_labels, noisy)
        self._key = jax.random.key(seed)
        self._drawn = self.devices.replicate((labels, jax.random.key_data(self._key)))

    def epoch(self, number: int, first: int = 0) -> Iterator[Item]:
        """Yield the training set and the order of its batches, again and again."""
        key = jax.random.fold_in(jax.random.fold_in(self._key, ORDER), number)
        order = np.asarray(jax.random.permutation(key, len(self._clean_labels)))
        order = order[: self.steps * self._config.micro_batch].reshape(self.steps, -1)
        (images, clean_labels), (labels, data) = self._shared, self._drawn
        order = self.devices.replicate(order)
        item = Item(images, clean_labels, labels, order, data)
        return itertools.repeat(item, self.steps - first)

    def sample(self, count: int) -> list[Any]:
        """Return the items of the first steps."""
        return [*itertools.islice(self.epoch(0), count)]

    def batch(self, item: Item, step: chex.Array) -> Batch:
        """Pick, crop, flip and standardize the images of a step."""
        chosen = self.devices.share(item.order[step % self.steps])
        images = item.images[chosen]
        if self._config.augmentation == "crop_flip":
            key = jax.random.wrap_key_data(item.key)
            key = jax.random.fold_in(jax.random.fold_in(key, AUGMENTATION), step)
            draws = draw(key, self._config.micro_batch)
            images = crop_and_flip(self.devices.share(draws), images)
        return Batch(
            self.standardized(images), item.labels[chosen], item.clean_labels[chosen]
        )

    def test_items(self) -> Iterator[Any]:
        """Yield all test images at once."""
        yield self._test

    def test_batches(self, item: Any) -> EvaluationBatch:
        """Return all test images in batches."""
        return EvaluationBatch(*item)


Draws = tuple[chex.Array, chex.Array]
"""Corner of the crop in the padded image, int32 `[B, 2]`; if mirrored, `[B, 1]`."""


def draw(key: chex.PRNGKey, size: int) -> Draws:
    """Draw crops of images padded by 4 pixels, and whether to mirror them."""
    crop_key, flip_key = jax.random.split(key)
    corners = jax.random.randint(crop_key, (size, 2), 0, 2 * PADDING + 1)
    return corners, jax.random.bernoulli(flip_key, 0.5, (size, 1))


def crop_and_flip(draws: Draws, images: chex.Array) -> chex.Array:
    """Pad by 4 black pixels, crop `[B, H, W, C]` to the old size, and mirror."""
    corners, flipped = draws
    size, height, width, _ = images.shape
    pads = ((0, 0), (PADDING, PADDING), (PADDING, PADDING), (0, 0))
    rows = corners[:, :1] + jnp.arange(height)
    columns = jnp.arange(width)
    columns = corners[:, 1:] + jnp.where(flipped, columns[::-1], columns)
    batch = jnp.arange(size)[:, None, None]
    return jnp.pad(images, pads)[batch, rows[:, :, None], columns[:, None, :]]


def mean_and_std(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return exact statistics of each channel, as parts of 255; a constant has 1."""
    levels = np.arange(256) / 255.0
    channels = np.moveaxis(images, -1, 0).reshape(images.shape[-1], -1)
    counts = np.stack([np.bincount(x, minlength=256) for x in channels])
    shares = counts / channels.shape[1]
    mean = shares @ levels
    std = np.sqrt(np.sum(shares * (levels - mean[:, None]) ** 2, axis=1))
    return mean, np.where(std > 0.0, std, 1.0)


def _in_batches(batch_size: int, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    """Reshape to `[K, B, ...]`, filled up with zeros, and tell which rows are real."""
    size = len(arrays[0])

    def batches(x: np.ndarray) -> np.ndarray:
        pads = [(0, -size % batch_size), *[(0, 0)] * (x.ndim - 1)]
        return np.pad(x, pads).reshape(-1, batch_size, *x.shape[1:])

    return tuple(map(batches, (*arrays, np.full(size, True))))
