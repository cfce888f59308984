"""Images of one size, all on the device; batches are made inside jit."""

import copy
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import chex
import jax
import numpy as np

from . import augmentation, datasets
from .config import Config
from .devices import Devices
from .pipeline import (
    AUGMENTATION,
    ORDER,
    Batch,
    EvaluationBatch,
    Facts,
    noisy_labels,
    standardized,
)

TEST_BATCH = 500


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


class ArrayPipeline:
    """Images of one size, all on the device as uint8; see :class:`Pipeline`."""

    on_device = True
    skipped = 0

    def __init__(
        self, dataset: datasets.Dataset, config: Config, devices: Devices
    ) -> None:
        train, test = dataset.train, dataset.test
        size = len(train.labels)
        self.num_classes = dataset.num_classes
        self.image_shape = train.images.shape[1:]
        self.num_test = len(test.labels)
        self._batch_size = config.micro_batch
        self.steps = size // config.batch_size * config.accumulation
        self._crop = config.augmentation == "crop_flip"
        self._config, self.devices = config, devices
        self.checksum = datasets.checksum(dataset)
        self.mean, self.std = mean_and_std(train.images)
        self.facts = Facts(
            classes=[*dataset.classes],
            image_shape=[*self.image_shape],
            mean=self.mean.tolist(),
            std=self.std.tolist(),
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

    def drawn(self, seed: int, label_noise: float | None) -> "ArrayPipeline":
        """Return the same images with label noise, order and crops of another seed."""
        other = copy.copy(self)
        if label_noise is not None:
            other._config = dataclasses.replace(self._config, label_noise=label_noise)
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
        order = order[: self.steps * self._batch_size].reshape(self.steps, -1)
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
        if self._crop:
            key = jax.random.wrap_key_data(item.key)
            key = jax.random.fold_in(jax.random.fold_in(key, AUGMENTATION), step)
            draws = augmentation.draw(key, self._batch_size)
            images = augmentation.crop_and_flip(self.devices.share(draws), images)
        return Batch(
            self.standardized(images), item.labels[chosen], item.clean_labels[chosen]
        )

    def close(self) -> None:
        """Do nothing: all is on the device."""

    def test_items(self) -> Iterator[Any]:
        """Yield all test images at once."""
        yield self._test

    def test_batches(self, item: Any) -> EvaluationBatch:
        """Return all test images in batches."""
        return EvaluationBatch(*item)

    def standardized(self, images: chex.Array) -> chex.Array:
        """Map bytes to float32 with mean 0 and deviation 1 over the training set."""
        return standardized(images, self.mean, self.std)


def mean_and_std(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return exact statistics of each channel, as parts of 255; a constant has 1."""
    levels = np.arange(256) / 255.0
    shares = (
        np.stack(
            [np.bincount(x.ravel(), minlength=256) for x in np.moveaxis(images, -1, 0)]
        )
        / images[..., 0].size
    )
    mean = shares @ levels
    std = np.sqrt(np.sum(shares * (levels - mean[:, None]) ** 2, axis=1))
    return mean, np.where(std > 0.0, std, 1.0)


def _in_batches(batch_size: int, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    """Reshape to `[K, B, ...]`, filled up with zeros, and tell which rows are real."""
    size = len(arrays[0])
    missing = -size % batch_size
    real = np.arange(size + missing) < size
    padded = (
        np.concatenate([x, np.zeros((missing, *x.shape[1:]), x.dtype)]) for x in arrays
    )
    return tuple(x.reshape(-1, batch_size, *x.shape[1:]) for x in (*padded, real))
