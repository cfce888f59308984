"""Images of one size, all on the device; batches are made inside jit."""

import itertools
from collections.abc import Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from . import augmentation, datasets
from .config import Config
from .pipeline import AUGMENTATION, ORDER, Batch, noisy_labels, standardized

TEST_BATCH = 500


class ArrayPipeline:
    """Images of one size, all on the device as uint8; see :class:`Pipeline`."""

    on_device = True
    skipped = 0

    def __init__(self, dataset: datasets.Dataset, config: Config) -> None:
        train, test = dataset.train, dataset.test
        size = len(train.labels)
        self.num_classes = dataset.num_classes
        self.image_shape = train.images.shape[1:]
        self.num_test = len(test.labels)
        self._batch_size = config.micro_batch
        self.steps = size // config.batch_size * config.accumulation
        self._crop = config.augmentation == "crop_flip"
        key = jax.random.key(config.seed)
        self._order_key = jax.random.fold_in(key, ORDER)
        self._crop_key = jax.random.fold_in(key, AUGMENTATION)
        flat = train.images.reshape(-1, self.image_shape[-1])
        self.mean = flat.mean(0, dtype=np.float64) / 255.0
        self.std = np.maximum(flat.std(0, dtype=np.float64) / 255.0, 1e-6)
        noisy = noisy_labels(config, size, dataset.num_classes)
        labels = np.where(noisy < 0, train.labels, noisy)
        self._train = jax.device_put((train.images, labels, train.labels))
        self._test = jax.device_put(
            _in_batches(min(TEST_BATCH, self.num_test), test.images, test.labels)
        )

    def epoch(self, number: int, first: int = 0) -> Iterator[Any]:
        """Yield training set, order of its batches and key, again and again."""
        key = jax.random.fold_in(self._order_key, number)
        order = jax.random.permutation(key, len(self._train[1]))
        order = order[: self.steps * self._batch_size].reshape(self.steps, -1)
        return itertools.repeat(
            (self._train, order, self._crop_key), self.steps - first
        )

    def sample(self, count: int) -> list[Any]:
        """Return the items of the first steps."""
        return [*itertools.islice(self.epoch(0), count)]

    def batch(self, item: Any, step: chex.Array) -> Batch:
        """Pick, crop, flip and standardize the images of a step."""
        (images, labels, clean), order, key = item
        chosen = order[step % self.steps]
        images = images[chosen]
        if self._crop:
            images = augmentation.crop_and_flip(jax.random.fold_in(key, step), images)
        real = jnp.ones(chosen.shape, bool)
        return Batch(self._standardized(images), labels[chosen], clean[chosen], real)

    def close(self) -> None:
        """Do nothing: all is on the device."""

    def test_items(self) -> Iterator[Any]:
        """Yield all test images at once."""
        yield self._test

    def test_batches(self, item: Any) -> Batch:
        """Standardize the test images."""
        images, labels, real = item
        return Batch(self._standardized(images), labels, labels, real)

    def _standardized(self, images: chex.Array) -> chex.Array:
        return standardized(images, self.mean, self.std)


def _in_batches(batch_size: int, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    """Reshape to `[K, B, ...]`, filled up with zeros, and tell which rows are real."""
    size = len(arrays[0])
    missing = -size % batch_size
    real = np.arange(size + missing) < size
    padded = (
        np.concatenate([x, np.zeros((missing, *x.shape[1:]), x.dtype)]) for x in arrays
    )
    return tuple(x.reshape(-1, batch_size, *x.shape[1:]) for x in (*padded, real))
