"""What a pipeline of images is, and what the two kinds have in common."""

import abc
from collections.abc import Iterator
from typing import Any, NamedTuple

import chex
import jax.numpy as jnp
import numpy as np

from .config import Config
from .datasets import Dataset, checksum
from .devices import Devices
from .label_noise import symmetric_noise

NOISE, ORDER, AUGMENTATION = 0, 1, 2
"""What a random stream is for, beside the seed."""


class Batch(NamedTuple):
    """Images, float32 `[B, H, W, C]`, standardized; labels, int32 `[B]`, with noise.

    Clean labels are those of the data set.
    """

    images: chex.Array
    labels: chex.Array
    clean_labels: chex.Array


class EvaluationBatch(NamedTuple):
    """Test images, uint8 `[B, H, W, C]`, and labels, int32 `[B]`.

    The last batch is filled up, and files may be unreadable: `real`, bool `[B]`.
    """

    images: chex.Array
    labels: chex.Array
    real: chex.Array


class Facts(NamedTuple):
    """What it takes to use a network beside its weights, for JSON.

    Attributes:
      classes: their names, in the order of the labels.
      image_shape: `[H, W, C]` of what the network sees.
      mean: of each channel, as parts of 255.
      std: likewise.
      downsample: squares of so many pixels a side are averaged first.
      crop: share of the shorter side that is cut out of the middle, and resized; 1
        where images have one size.
    """

    classes: list[str]
    image_shape: list[int]
    mean: list[float]
    std: list[float]
    downsample: int
    crop: float


class Pipeline(abc.ABC):
    """Training and test data of a run.

    Attributes:
      num_classes: labels are below it.
      steps: micro-batches in an epoch.
      num_test: test images, unreadable ones included.
      devices: to which its items go.
      on_device: whether every item of an epoch is the same arrays on the device.
      checksum: tells different data apart.
      facts: how an image is prepared, and what the classes are called.
      skipped: unreadable images met since it was last set to zero.
    """

    on_device: bool
    facts: Facts
    num_test: int
    skipped = 0

    def __init__(
        self, dataset: Dataset, size: int, config: Config, devices: Devices
    ) -> None:
        self.num_classes = len(dataset.classes)
        self.steps = size // config.batch_size * config.accumulation
        self.checksum = checksum(dataset)
        self.devices = devices
        self._config = config

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(H, W, C)`."""
        height, width, channels = self.facts.image_shape
        return height, width, channels

    @abc.abstractmethod
    def epoch(self, number: int, first: int = 0) -> Iterator[Any]:
        """Yield one item for every step of an epoch, from step `first`."""

    @abc.abstractmethod
    def batch(self, item: Any, step: chex.Array) -> Batch:
        """Return, in a program, a device's share of the batch of a step of the run."""

    @abc.abstractmethod
    def sample(self, count: int) -> list[Any]:
        """Return items of the first steps of training, always the same."""

    @abc.abstractmethod
    def test_items(self) -> Iterator[Any]:
        """Yield the test images in items, for programs of `devices.sharded`."""

    @abc.abstractmethod
    def test_batches(self, item: Any) -> EvaluationBatch:
        """Return, in a program, batches `[K, B, ...]` of a test item."""

    def standardized(self, images: chex.Array) -> chex.Array:
        """Map bytes to float32 with mean 0 and deviation 1 over the training set."""
        return standardized(images, self.facts.mean, self.facts.std)

    def close(self) -> None:  # noqa: B027 - most have nothing in the background
        """Stop what runs in the background."""


def noisy_labels(config: Config, size: int, num_classes: int) -> np.ndarray:
    """Return a label for each example that gets a random one, and -1 for the others."""
    rng = np.random.default_rng([config.seed, NOISE])
    chosen, labels = symmetric_noise(size, num_classes, config.label_noise, rng)
    noisy = np.full(size, -1, np.int32)
    noisy[chosen] = labels
    return noisy


def standardized(images: chex.Array, mean: Any, std: Any) -> chex.Array:
    """Map uint8 to float32 with mean 0 and deviation 1 over the training set."""
    mean, std = (np.asarray(x, np.float32) for x in (mean, std))
    return (images.astype(jnp.float32) / 255.0 - mean) / std
