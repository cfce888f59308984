"""From a data set to mini-batches, on the device or by worker processes.

Both pipelines give, for every training step, one item for the jitted step, and a pure
function that makes a batch of it: :class:`ArrayPipeline` hands out the same arrays on
the device every time, of which the function picks, crops and flips some;
:class:`FilePipeline` hands out images that grain's worker processes have decoded. All
randomness is a function of the seed and the number of the step, so a run can be resumed
at any step, with any number of workers.
"""

import functools
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp
import numpy as np

from . import augmentation, datasets, photographs
from .config import Config
from .label_noise import symmetric_noise

ORDER, AUGMENTATION, NOISE = 1, 2, 0
"""What a random stream is for, beside the seed."""

TEST_BATCH = 500

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Batch(NamedTuple):
    """A mini-batch.

    Attributes:
      images: float32 `[B, H, W, C]`, standardized.
      labels: int32 `[B]`, with noise.
      clean_labels: int32 `[B]`, as in the data set.
      real: bool `[B]`; the last batch of the test images is filled up.
    """

    images: chex.Array
    labels: chex.Array
    clean_labels: chex.Array
    real: chex.Array


class Pipeline(Protocol):
    """Training and test data of a run.

    Attributes:
      num_classes: labels are below it.
      image_shape: `(H, W, C)`.
      steps: micro-batches in an epoch.
      num_test: test images, unreadable ones included.
      on_device: whether every item of an epoch is the same arrays on the device.
      skipped: unreadable images met since it was last set to zero.
    """

    num_classes: int
    image_shape: tuple[int, int, int]
    steps: int
    num_test: int
    on_device: bool
    skipped: int

    def epoch(self, number: int, first: int = 0) -> Iterator[Any]:
        """Yield one item for every step of an epoch, from step `first`."""
        ...

    def batch(self, item: Any, step: chex.Array) -> Batch:
        """Return the batch of a step since the beginning of training; for jit."""
        ...

    def sample(self, count: int) -> list[Any]:
        """Return items of the first steps of training, always the same."""
        ...

    def test_items(self) -> Iterator[Any]:
        """Yield the test images in items."""
        ...

    def test_batches(self, item: Any) -> Batch:
        """Return batches `[K, B, ...]` of a test item; for jit."""
        ...

    def close(self) -> None:
        """Stop what runs in the background."""
        ...


def create(
    config: Config,
    *,
    data_dir: Path | None = None,
    download: bool = False,
    workers: int = 0,
) -> Pipeline:
    """Load the data set of a run and prepare it.

    Raises:
      datasets.DatasetError: it is missing, malformed, or smaller than a batch.
    """
    dataset = datasets.load(config.dataset, data_dir=data_dir, download=download)
    as_files = config.augmentation == "resized_crop"
    if as_files and isinstance(dataset.train, datasets.Arrays):
        raise datasets.DatasetError(
            f"{config.dataset} has images of one size: use augmentation 'crop_flip' or "
            "'none', not 'resized_crop'."
        )
    dataset = _chosen(dataset, config)
    if len_of(dataset.train) < config.batch_size:
        raise datasets.DatasetError(
            f"{len_of(dataset.train)} training images are fewer than "
            f"batch_size={config.batch_size}."
        )
    if as_files:
        return FilePipeline(dataset, config, workers)
    return ArrayPipeline(
        dataset._replace(
            train=datasets.decode(dataset.train), test=datasets.decode(dataset.test)
        ),
        config,
    )


def len_of(data: Any) -> int:
    """Return the number of images of arrays or files."""
    return len(data.labels) if isinstance(data, datasets.Arrays) else len(data)


def _chosen(dataset: datasets.Dataset, config: Config) -> datasets.Dataset:
    """Apply validation_size, train_size and test_size, the same for every seed."""
    train, test = dataset.train, dataset.test
    order = np.random.default_rng(0).permutation(len_of(train))
    if config.validation_size is not None:
        _check_size("validation_size", config.validation_size, len(order) - 1)
        held_out, order = np.split(order, [config.validation_size])
        train, test = datasets.take(train, order), datasets.take(train, held_out)
        order = np.arange(len(order))
    if config.train_size is not None:
        _check_size("train_size", config.train_size, len(order))
        train = datasets.take(train, order[: config.train_size])
    if config.test_size is not None:
        _check_size("test_size", config.test_size, len_of(test))
        some = np.random.default_rng(0).permutation(len_of(test))[: config.test_size]
        test = datasets.take(test, some)
    return dataset._replace(train=train, test=test)


def _check_size(name: str, size: int, limit: int) -> None:
    if size > limit:
        raise datasets.DatasetError(f"{name} must be at most {limit}, got {size}.")


def _noisy_labels(config: Config, size: int, num_classes: int) -> np.ndarray:
    """Return a label for each example that gets a random one, and -1 for the others."""
    rng = np.random.default_rng([config.seed, NOISE])
    chosen, labels = symmetric_noise(size, num_classes, config.label_noise, rng)
    noisy = np.full(size, -1, np.int32)
    noisy[chosen] = labels
    return noisy


def _in_batches(batch_size: int, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    """Reshape to `[K, B, ...]`, filled up with zeros, and tell which rows are real."""
    size = len(arrays[0])
    missing = -size % batch_size
    real = np.arange(size + missing) < size
    padded = (
        np.concatenate([x, np.zeros((missing, *x.shape[1:]), x.dtype)]) for x in arrays
    )
    return tuple(x.reshape(-1, batch_size, *x.shape[1:]) for x in (*padded, real))


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
        self._updates = size // config.batch_size
        self.steps = self._updates * config.accumulation
        self._crop = config.augmentation == "crop_flip"
        self._key = jax.random.key(config.seed)
        flat = train.images.reshape(-1, self.image_shape[-1])
        self.mean = flat.mean(0, dtype=np.float64) / 255.0
        self.std = np.maximum(flat.std(0, dtype=np.float64) / 255.0, 1e-6)
        noisy = _noisy_labels(config, size, dataset.num_classes)
        labels = np.where(noisy < 0, train.labels, noisy)
        self._train = jax.device_put((train.images, labels, train.labels))
        self._test = jax.device_put(
            _in_batches(min(TEST_BATCH, self.num_test), test.images, test.labels)
        )

        @jax.jit
        def order(number: chex.Array) -> chex.Array:
            key = jax.random.fold_in(jax.random.fold_in(self._key, ORDER), number)
            shuffled = jax.random.permutation(key, size)[
                : self.steps * self._batch_size
            ]
            return shuffled.reshape(self.steps, self._batch_size)

        self._order = order

    def epoch(self, number: int, first: int = 0) -> Iterator[Any]:
        """Yield the training set and the order of its batches, again and again."""
        return itertools.repeat((self._train, self._order(number)), self.steps - first)

    def sample(self, count: int) -> list[Any]:
        """Return the items of the first steps."""
        return [*itertools.islice(self.epoch(0), count)]

    def batch(self, item: Any, step: chex.Array) -> Batch:
        """Pick, crop, flip and standardize the images of a step."""
        (images, labels, clean), order = item
        chosen = order[step % self.steps]
        images = images[chosen]
        if self._crop:
            key = jax.random.fold_in(self._key, AUGMENTATION)
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


def standardized(images: chex.Array, mean: Any, std: Any) -> chex.Array:
    """Map uint8 to float32 with mean 0 and deviation 1 over the training set."""
    mean, std = (np.asarray(x, np.float32) for x in (mean, std))
    return (images.astype(jnp.float32) / 255.0 - mean) / std


class TrainBatches:
    """Whole training batches by the number of the step, for grain."""

    def __init__(
        self,
        files: datasets.Files,
        noisy: np.ndarray,
        config: Config,
        steps: int,
        epochs: int,
    ) -> None:
        self._files, self._noisy, self._config = files, noisy, config
        self._steps, self._epochs = steps, epochs

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self._files)} images)"

    def __len__(self) -> int:
        return self._epochs * self._steps

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        """Decode and cut the images of a batch; unreadable ones are replaced.

        In the place of an unreadable image stands another one of the batch.
        """
        size, seed = self._config.micro_batch, self._config.seed
        epoch, k = divmod(int(number), self._steps)
        chosen = _order(len(self._files), seed, epoch)[k * size : (k + 1) * size]
        images, labels, clean, unreadable = [], [], [], []
        for place, index in enumerate(chosen):
            rng = np.random.default_rng([seed, AUGMENTATION, int(number), place])
            try:
                data, label = self._files.read(int(index))
                image = photographs.random_crop(data, self._config.image_size, rng)
            except photographs.UNREADABLE:
                unreadable.append(int(index))
                continue
            images.append(image)
            clean.append(label)
            labels.append(label if self._noisy[index] < 0 else self._noisy[index])
        if not images:
            raise datasets.DatasetError(
                f"none of the {size} images of a batch can be read, such as "
                f"{self._files.name(unreadable[0])}."
            )
        rows = np.arange(size) % len(images)
        return {
            "images": np.stack(images)[rows],
            "labels": np.array(labels, np.int32)[rows],
            "clean_labels": np.array(clean, np.int32)[rows],
            "unreadable": _padded(unreadable, size),
        }


class EvaluationBatches:
    """Whole test batches by number, for grain; after the last comes the first again."""

    def __init__(
        self, files: datasets.Files, batch_size: int, image_size: int, rounds: int
    ) -> None:
        self._files, self._batch_size, self._size = files, batch_size, image_size
        self.per_round = -(-len(files) // batch_size)
        self._rounds = rounds

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self._files)} images)"

    def __len__(self) -> int:
        return self._rounds * self.per_round

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        """Decode and cut the images of a batch; unreadable ones are not `real`."""
        images = np.zeros((self._batch_size, self._size, self._size, 3), np.uint8)
        labels = np.zeros(self._batch_size, np.int32)
        real = np.zeros(self._batch_size, bool)
        unreadable = []
        first = int(number) % self.per_round * self._batch_size
        last = min(first + self._batch_size, len(self._files))
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
            "unreadable": _padded(unreadable, self._batch_size),
        }


class Stream:
    """Batches by number, read ahead in order by worker processes, or by threads."""

    def __init__(self, source: Any, workers: int) -> None:
        self._source, self._workers = source, workers
        self._position = -1
        self._batches: Any = None

    def read(self, start: int, stop: int) -> Iterator[dict[str, np.ndarray]]:
        """Yield some batches; workers go on with those that follow meanwhile."""
        if self._position != start:
            self.close()
            self._position, self._batches = start, self._start(start)
        while self._position < stop:
            self._position += 1
            yield next(self._batches)

    def close(self) -> None:
        """Stop the workers."""
        if self._batches is not None:
            self._batches.close()
        self._position, self._batches = -1, None

    def _start(self, start: int) -> Any:
        import grain
        from absl import flags

        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain sends all flags to its workers
        threads = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
        batches = grain.MapDataset.source(self._source)[start:].to_iter_dataset(
            grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
            if self._workers
            else threads
        )
        if self._workers:
            batches = batches.mp_prefetch(
                grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=2)
            )
        return iter(batches)


def _padded(indices: list[int], size: int) -> np.ndarray:
    """Fill up with -1: what comes from worker processes has one shape."""
    return np.array(indices + [-1] * (size - len(indices)), np.int64)


@functools.lru_cache(maxsize=2)
def _order(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, ORDER, epoch]).permutation(size)


class FilePipeline:
    """Encoded images of any size, decoded by workers; see :class:`Pipeline`."""

    on_device = False

    def __init__(self, dataset: datasets.Dataset, config: Config, workers: int) -> None:
        size = len(dataset.train)
        self._files = {"training": dataset.train, "test": dataset.test}
        self.num_classes = dataset.num_classes
        self.image_shape = (config.image_size, config.image_size, 3)
        self.num_test = len(dataset.test)
        self.steps = size // config.batch_size * config.accumulation
        self.skipped = 0
        noisy = _noisy_labels(config, size, dataset.num_classes)
        self._train = TrainBatches(
            dataset.train, noisy, config, self.steps, config.epochs
        )
        self._test = EvaluationBatches(
            dataset.test,
            min(config.micro_batch, self.num_test),
            config.image_size,
            rounds=config.epochs + 1,
        )
        self._train_stream = Stream(self._train, workers)
        self._test_stream = Stream(self._test, workers)
        self._round = 0
        self._reported: set[tuple[str, int]] = set()

    def epoch(self, number: int, first: int = 0) -> Iterator[Any]:
        """Yield the decoded batches of an epoch."""
        start = number * self.steps
        for item in self._train_stream.read(start + first, start + self.steps):
            yield self._without_unreadable(item, "training")

    def sample(self, count: int) -> list[Any]:
        """Decode the first batches of training, to be kept on the device."""
        items = (self._train[k] for k in range(min(count, self.steps)))
        return [
            jax.device_put(self._without_unreadable(item, "training", count=False))
            for item in items
        ]

    def close(self) -> None:
        """Stop the workers."""
        self._train_stream.close()
        self._test_stream.close()

    def batch(self, item: Any, step: chex.Array) -> Batch:
        """Standardize the images of a step."""
        del step
        images, real = self._standardized(item["images"]), jnp.ones_like(item["labels"])
        return Batch(images, item["labels"], item["clean_labels"], real > 0)

    def test_items(self) -> Iterator[Any]:
        """Yield the test images batch by batch."""
        start = self._round * self._test.per_round
        self._round += 1
        for item in self._test_stream.read(start, start + self._test.per_round):
            yield self._without_unreadable(item, "test")

    def test_batches(self, item: Any) -> Batch:
        """Standardize the test images."""
        images, labels, real = (item[key][None] for key in ("images", "labels", "real"))
        return Batch(self._standardized(images), labels, labels, real)

    def _standardized(self, images: chex.Array) -> chex.Array:
        return standardized(images, IMAGENET_MEAN, IMAGENET_STD)

    def _without_unreadable(self, item: Any, split: str, count: bool = True) -> Any:
        """Take the unreadable images out, count them and name each of them once."""
        indices = item["unreadable"][item["unreadable"] >= 0]
        self.skipped += len(indices) if count else 0
        for index in map(int, indices):
            if (split, index) not in self._reported:
                self._reported.add((split, index))
                name = self._files[split].name(index)
                print(f"skipped, not readable: {name}", file=sys.stderr)
        return {key: value for key, value in item.items() if key != "unreadable"}
