"""Encoded images of any size, decoded and cut by worker processes, ahead of need."""

import functools
import sys
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, Future, ThreadPoolExecutor
from typing import Any

import chex
import jax
import numpy as np

from . import datasets, photographs
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
from .workers import Workers

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class TrainBatches:
    """Training batches by the number of the step: the rows of one host of several."""

    def __init__(
        self,
        files: datasets.Files,
        noisy: np.ndarray,
        config: Config,
        steps: int,
        host: int,
        hosts: int,
    ) -> None:
        self._files, self._noisy, self._config = files, noisy, config
        self._steps = steps
        rows = config.micro_batch // hosts
        self._places = range(host * rows, (host + 1) * rows)

    def __len__(self) -> int:
        return self._config.epochs * self._steps

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Decode and cut the images of a batch; unreadable ones are replaced.

        In the place of an unreadable image stands the next one of the batch.
        """
        size, seed = self._config.micro_batch, self._config.seed
        epoch, k = divmod(number, self._steps)
        chosen = _order(len(self._files), seed, epoch)[k * size : (k + 1) * size]
        images, labels, clean, unreadable = [], [], [], []
        for place in self._places:
            for attempt in range(size):
                index = chosen[(place + attempt) % size]
                rng = np.random.default_rng([seed, AUGMENTATION, number, place])
                try:
                    data, label = self._files.read(int(index))
                    image = photographs.random_crop(data, self._config.image_size, rng)
                except photographs.UNREADABLE:
                    if attempt == 0:
                        unreadable.append(int(index))
                    continue
                images.append(image)
                clean.append(label)
                labels.append(label if self._noisy[index] < 0 else self._noisy[index])
                break
            else:
                raise datasets.DatasetError(
                    f"none of the {size} images of a batch can be read, such as "
                    f"{self._files.name(unreadable[0])}."
                )
        return {
            "images": np.stack(images),
            "labels": np.array(labels, np.int32),
            "clean_labels": np.array(clean, np.int32),
            "unreadable": unreadable,
        }


class EvaluationBatches:
    """Test batches by number; after the last comes the first again.

    Of each, the rows of one host of several.
    """

    def __init__(
        self,
        files: datasets.Files,
        batch_size: int,
        image_size: int,
        rounds: int,
        host: int,
        hosts: int,
    ) -> None:
        self._files, self._batch_size, self._size = files, batch_size, image_size
        self.per_round = -(-len(files) // batch_size)
        self._rounds = rounds
        self._rows = batch_size // hosts
        self._first = host * self._rows

    def __len__(self) -> int:
        return self._rounds * self.per_round

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Decode and cut the images of a batch; unreadable ones are not `real`."""
        images = np.zeros((self._rows, self._size, self._size, 3), np.uint8)
        labels = np.zeros(self._rows, np.int32)
        real = np.zeros(self._rows, bool)
        unreadable = []
        first = number % self.per_round * self._batch_size + self._first
        last = min(first + self._rows, len(self._files))
        for place, index in enumerate(range(first, last)):
            try:
                data, labels[place] = self._files.read(index)
                images[place] = photographs.centre_crop(data, self._size)
            except photographs.UNREADABLE:
                unreadable.append(index)
                continue
            real[place] = True
        return {
            "images": images,
            "labels": labels,
            "real": real,
            "unreadable": unreadable,
        }


class Stream:
    """Batches by number, made ahead of need by worker processes, or by two threads.

    Which worker makes a batch does not matter: a batch depends on its number alone.
    """

    def __init__(self, source: Any, workers: int) -> None:
        self._source, self._workers = source, workers
        self._threads: ThreadPoolExecutor | None = None
        self._processes: Workers | None = None
        self._coming: dict[int, Future[Any]] = {}

    def read(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """Yield some batches; workers go on with those that follow meanwhile."""
        ahead = 2 * max(self._workers, 2)
        for number in range(start, stop):
            for later in range(number, min(number + ahead, len(self._source))):
                if later not in self._coming:
                    self._coming[later] = self._submit(later)
            try:
                yield self._coming.pop(number).result()
            except BrokenExecutor:
                if self._processes is not None:
                    self._processes.kill()  # the others, too
                raise datasets.DatasetError(
                    "a worker process that decodes images was killed, perhaps for lack "
                    "of memory: use fewer --workers or a smaller batch_size."
                ) from None

    def close(self) -> None:
        """Stop the workers."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        if self._processes is not None:
            self._processes.close()
        self._threads, self._processes, self._coming = None, None, {}

    def _submit(self, number: int) -> Future[Any]:
        if self._workers == 0:
            self._threads = self._threads or ThreadPoolExecutor(2)
            return self._threads.submit(self._source.__getitem__, number)
        self._processes = self._processes or Workers(self._source, self._workers)
        return self._processes.submit(number)


@functools.lru_cache(maxsize=2)
def _order(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, ORDER, epoch]).permutation(size)


class FilePipeline:
    """Encoded images of any size, decoded by workers; see :class:`Pipeline`."""

    on_device = False

    def __init__(
        self,
        dataset: datasets.Dataset,
        config: Config,
        workers: int,
        devices: Devices,
    ) -> None:
        size = len(dataset.train)
        self.devices = devices
        self._files = {"training": dataset.train, "test": dataset.test}
        self.num_classes = dataset.num_classes
        self.image_shape = (config.image_size, config.image_size, 3)
        self.num_test = len(dataset.test)
        self.steps = size // config.batch_size * config.accumulation
        self.skipped = 0
        self.checksum = datasets.checksum(dataset)
        self.facts = Facts(
            classes=[*dataset.classes],
            image_shape=[*self.image_shape],
            mean=[*IMAGENET_MEAN],
            std=[*IMAGENET_STD],
            downsample=1,
            crop=photographs.CENTRE,
        )
        noisy = noisy_labels(config, size, dataset.num_classes)
        host, hosts = jax.process_index(), jax.process_count()
        self._train = TrainBatches(
            dataset.train, noisy, config, self.steps, host, hosts
        )
        batch_size = min(config.micro_batch, self.num_test)
        self._test = EvaluationBatches(
            dataset.test,
            batch_size + -batch_size % devices.count,
            config.image_size,
            config.epochs + 1,
            host,
            hosts,
        )
        self._train_stream = Stream(self._train, workers)
        self._test_stream = Stream(self._test, workers)
        self._round = 0
        self._reported: set[tuple[str, int]] = set()

    def epoch(self, number: int, first: int = 0) -> Iterator[Any]:
        """Yield the decoded batches of an epoch."""
        start = number * self.steps
        for item in self._train_stream.read(start + first, start + self.steps):
            yield self.devices.assemble(self._without_unreadable(item, "training"))

    def sample(self, count: int) -> list[Any]:
        """Decode the first batches of training, to be kept on the device."""
        items = (self._train[k] for k in range(min(count, self.steps)))
        return [
            self.devices.assemble(
                self._without_unreadable(item, "training", count=False)
            )
            for item in items
        ]

    def close(self) -> None:
        """Stop the workers."""
        self._train_stream.close()
        self._test_stream.close()

    def batch(self, item: Any, step: chex.Array) -> Batch:
        """Standardize the images of a step."""
        del step
        images = self.standardized(item["images"])
        return Batch(images, item["labels"], item["clean_labels"])

    def test_items(self) -> Iterator[Any]:
        """Yield the test images batch by batch."""
        start = self._round * self._test.per_round
        self._round += 1
        for item in self._test_stream.read(start, start + self._test.per_round):
            readable = self._without_unreadable(item, "test")
            yield self.devices.sharded.assemble(readable)

    def test_batches(self, item: Any) -> EvaluationBatch:
        """Return a test batch as one of one."""
        return EvaluationBatch(*(item[key][None] for key in EvaluationBatch._fields))

    def standardized(self, images: chex.Array) -> chex.Array:
        """Map bytes to float32 by the usual statistics of ImageNet."""
        return standardized(images, IMAGENET_MEAN, IMAGENET_STD)

    def _without_unreadable(self, item: Any, split: str, count: bool = True) -> Any:
        """Take the unreadable images out, count them and name each of them once."""
        self.skipped += len(item["unreadable"]) if count else 0
        for index in item["unreadable"]:
            if (split, index) not in self._reported:
                self._reported.add((split, index))
                name = self._files[split].name(index)
                print(f"skipped, not readable: {name}", file=sys.stderr)
        return {key: value for key, value in item.items() if key != "unreadable"}
