"""From a data set to mini-batches, on the device or by worker processes.

All randomness is a function of the seed and the number of the step, so a run can be
resumed at any step, with any number of workers.
"""

from pathlib import Path
from typing import Any

import numpy as np

from . import datasets
from .array_pipeline import ArrayPipeline
from .config import Config
from .devices import Devices, choose
from .errors import DatasetError
from .file_pipeline import FilePipeline
from .pipeline import Pipeline


def create(
    config: Config,
    *,
    data_dir: Path | None = None,
    download: bool = False,
    workers: int = 0,
    devices: Devices | None = None,
) -> Pipeline:
    """Load the data set of a run and prepare it, by default for JAX's first device.

    `DatasetError` if it is missing, malformed, or smaller than a batch.
    """
    dataset = datasets.load(config.dataset, data_dir=data_dir, download=download)
    as_files = config.augmentation == "resized_crop"
    if as_files and isinstance(dataset.train, datasets.Arrays):
        raise DatasetError(
            f"{config.dataset} has images of one size: use augmentation 'crop_flip' or "
            "'none', not 'resized_crop'."
        )
    dataset = _chosen(dataset, config)
    if len_of(dataset.train) < config.batch_size:
        raise DatasetError(
            f"{len_of(dataset.train)} training images are fewer than "
            f"batch_size={config.batch_size}."
        )
    devices = devices or choose()
    if as_files:
        return FilePipeline(dataset, config, workers, devices)
    train, test = datasets.decode(dataset.train), datasets.decode(dataset.test)
    datasets.check_shapes(config.dataset, train.images, test.images)
    train, test = (datasets.downsampled(x, config.downsample) for x in (train, test))
    return ArrayPipeline(dataset._replace(train=train, test=test), config, devices)


def len_of(data: Any) -> int:
    """Return the number of images of arrays or files."""
    return len(data.labels) if isinstance(data, datasets.Arrays) else len(data)


def _chosen(dataset: datasets.Dataset, config: Config) -> datasets.Dataset:
    """Apply validation_size, train_size and test_size, the same for every seed."""

    def check(name: str, size: int, limit: int) -> None:
        if size > limit:
            raise DatasetError(f"{name} must be at most {limit}, got {size}.")

    train, test = dataset.train, dataset.test
    order = np.random.default_rng(0).permutation(len_of(train))
    if config.validation_size is not None:
        check("validation_size", config.validation_size, len(order) - 1)
        held_out, order = np.split(order, [config.validation_size])
        train, test = datasets.take(train, order), datasets.take(train, held_out)
        order = np.arange(len(order))
    if config.train_size is not None:
        check("train_size", config.train_size, len(order))
        train = datasets.take(train, order[: config.train_size])
    if config.test_size is not None:
        check("test_size", config.test_size, len_of(test))
        some = np.random.default_rng(0).permutation(len_of(test))[: config.test_size]
        test = datasets.take(test, some)
    return dataset._replace(train=train, test=test)
