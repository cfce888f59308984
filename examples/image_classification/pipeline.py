"""What a pipeline of images is, and what the two kinds have in common."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import chex
import jax.numpy as jnp
import numpy as np

from .config import Config
from .devices import Devices
from .label_noise import symmetric_noise

NOISE, ORDER, AUGMENTATION = 0, 1, 2
"""What a random stream is for, beside the seed."""


class Batch(NamedTuple):
    """A mini-batch to train on.

    Attributes:
      images: float32 `[B, H, W, C]`, standardized.
      labels: int32 `[B]`, with noise.
      clean_labels: int32 `[B]`, as in the data set.
    """

    images: chex.Array
    labels: chex.Array
    clean_labels: chex.Array


class EvaluationBatch(NamedTuple):
    """A batch of test images.

    Attributes:
      images: uint8 `[B, H, W, C]`.
      labels: int32 `[B]`.
      real: bool `[B]`; the last batch is filled up, and files may be unreadable.
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


class Pipeline(Protocol):
    """Training and test data of a run.

    Attributes:
      num_classes: labels are below it.
      image_shape: `(H, W, C)`.
      steps: micro-batches in an epoch.
      num_test: test images, unreadable ones included.
      devices: to which its items go.
      on_device: whether every item of an epoch is the same arrays on the device.
      checksum: tells different data apart.
      facts: how an image is prepared, and what the classes are called.
      skipped: unreadable images met since it was last set to zero.
    """

    num_classes: int
    image_shape: tuple[int, int, int]
    steps: int
    num_test: int
    devices: Devices
    on_device: bool
    checksum: int
    facts: Facts
    skipped: int

    def epoch(self, number: int, first: int = 0) -> Iterator[Any]:
        """Yield one item for every step of an epoch, from step `first`."""
        ...

    def batch(self, item: Any, step: chex.Array) -> Batch:
        """Return a device's share of a step's batch, counted from the first step.

        For use in a program of `devices`.
        """
        ...

    def sample(self, count: int) -> list[Any]:
        """Return items of the first steps of training, always the same."""
        ...

    def test_items(self) -> Iterator[Any]:
        """Yield the test images in items, for programs of `devices.sharded`."""
        ...

    def test_batches(self, item: Any) -> EvaluationBatch:
        """Return batches `[K, B, ...]` of a test item; for use in a program."""
        ...

    def standardized(self, images: chex.Array) -> chex.Array:
        """Map bytes to float32 with mean 0 and deviation 1 over the training set."""
        ...

    def close(self) -> None:
        """Stop what runs in the background."""
        ...


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
