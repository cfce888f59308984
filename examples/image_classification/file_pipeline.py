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
from .errors import DatasetError
from .pipeline import (
    AUGMENTATION,
    ORDER,
    Batch,
    EvaluationBatch,
    Facts,
    Pipeline,
    noisy_labels,
)
from .workers import Workers

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class TrainBatches:
    """Training batches by the number of the step: this host's rows of them."""

    def __init__(
        self, files: datasets.Files, noisy: np.ndarray, config: Config, steps: int
    ) -> None:
        self._files, self._noisy, self._config = files, noisy, config
        self._steps = steps
        self._places = _own(config.micro_batch)

    def __len__(self) -> int:
        return self._config.epochs * self._steps

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Decode and cut images; in the place of an unreadable one stands the next."""
        size, seed = self._config.micro_batch, self._config.seed
        epoch, k = divmod(number, self._steps)
        chosen = _order(len(self._files), seed, epoch)[k * size : (k + 1) * size]
        images, labels, clean, unreadable = [], [], [], []
        for place in self._places:
            for attempt in range(size):
                index = int(chosen[(place + attempt) % size])
                rng = np.random.default_rng([seed, AUGMENTATION, number, place])
                try:
                    data, label = self._files.read(index)
                    image = photographs.random_crop(data, self._config.image_size, rng)
                except photographs.UNREADABLE:
                    if attempt == 0:
                        unreadable.append(index)
                    continue
                images.append(image)
                clean.append(label)
                labels.append(label if self._noisy[index] < 0 else self._noisy[index])
                break
            else:
                raise DatasetError(
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
    """Test batches by number, this host's rows; after the last comes the first."""

    def __init__(
        self, files: datasets.Files, batch_size: int, image_size: int, rounds: int
    ) -> None:
        self._files, self._batch_size, self._size = files, batch_size, image_size
        self.per_round = -(-len(files) // batch_size)
        self._rounds = rounds
        self._places = _own(batch_size)

    def __len__(self) -> int:
        return self._rounds * self.per_round

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Decode and cut the images of a batch; unreadable ones are not `real`."""
        rows = len(self._places)
        images = np.zeros((rows, self._size, self._size, 3), np.uint8)
        labels = np.zeros(rows, np.int32)
        real = np.zeros(rows, bool)
        unreadable = []
        first = number % self.per_round * self._batch_size + self._places.start
        last = min(first + rows, len(self._files))
        for place, index in enumerate(range(first, last)):
            try:
                data, labels[place] = self._files.read(index)
                images[place] = photographs.centre_crop(data, self._size)
                real[place] = True
            except photographs.UNREADABLE:
                unreadable.append(index)
        arrays = {"images": images, "labels": labels, "real": real}
        return arrays | {"unreadable": unreadable}


def _own(rows: int) -> range:
    """Return the rows of a batch that are this host's."""
    share = rows // jax.process_count()
    return range(jax.process_index() * share, (jax.process_index() + 1) * share)


class Stream:
    """Batches by number, made ahead of need by worker processes, or by two threads.

    Which worker makes a batch does not matter: a batch depends on its number alone.
    """

    def __init__(self, source: Any, workers: int) -> None:
        self._source, self._ahead = source, 2 * max(workers, 2)
        self._pool = Workers(source, workers) if workers else ThreadPoolExecutor(2)
        self._coming: dict[int, Future[Any]] = {}

    def read(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """Yield some batches; workers go on with those that follow meanwhile."""
        for number in range(start, stop):
            for later in range(number, min(number + self._ahead, len(self._source))):
                if later not in self._coming:
                    self._coming[later] = self._make(later)
            try:
                yield self._coming.pop(number).result()
            except BrokenExecutor:
                if isinstance(self._pool, Workers):
                    self._pool.kill()  # the others, too
                raise DatasetError(
                    "a worker process that decodes images was killed, perhaps for lack "
                    "of memory: use fewer --workers or a smaller batch_size."
                ) from None

    def _make(self, number: int) -> Future[Any]:
        if isinstance(self._pool, Workers):
            return self._pool.make(number)
        return self._pool.submit(self._source.__getitem__, number)

    def close(self) -> None:
        """Stop the workers."""
        self._pool.shutdown(cancel_futures=True)


@functools.lru_cache(maxsize=2)
def _order(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, ORDER, epoch]).permutation(size)


class FilePipeline(Pipeline):
    """Encoded images of any size, decoded by workers."""

    on_device = False

    def __init__(
        self, dataset: datasets.Dataset, config: Config, workers: int, devices: Devices
    ) -> None:
        size = len(dataset.train)
        super().__init__(dataset, size, config, devices)
        self.num_test = len(dataset.test)
        self._files = {"training": dataset.train, "test": dataset.test}
        self.facts = Facts(
            classes=[*dataset.classes],
            image_shape=[config.image_size, config.image_size, 3],
            mean=[*IMAGENET_MEAN],
            std=[*IMAGENET_STD],
            downsample=1,
            crop=photographs.CENTRE,
        )
        noisy = noisy_labels(config, size, self.num_classes)
        self._train = TrainBatches(dataset.train, noisy, config, self.steps)
        batch_size = min(config.micro_batch, self.num_test)
        batch_size += -batch_size % devices.count
        self._test = EvaluationBatches(
            dataset.test, batch_size, config.image_size, config.epochs + 1
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
        skipped = self.skipped
        items = (self._train[k] for k in range(min(count, self.steps)))
        readable = [self._without_unreadable(item, "training") for item in items]
        self.skipped = skipped
        return [*map(self.devices.assemble, readable)]

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

    def _without_unreadable(self, item: Any, split: str) -> Any:
        """Take the unreadable images out, count them and name each of them once."""
        self.skipped += len(item["unreadable"])
        for index in item["unreadable"]:
            if (split, index) not in self._reported:
                self._reported.add((split, index))
                name = self._files[split].name(index)
                print(f"skipped, not readable: {name}", file=sys.stderr)
        return {key: value for key, value in item.items() if key != "unreadable"}
