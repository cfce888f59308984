"""Networks to look at: of the quick start, or of runs of the training recipe."""

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from examples.experiments.common import digits as quickstart
from examples.image_classification.logbook import write_rows
from hero_jax import curvature, models, quant

Statistics = Literal["running", "batch"]


class Network(NamedTuple):
    """A trained network and what it was trained and tested on.

    Attributes:
      name: for tables and legends.
      model: Flax module.
      params: weights.
      batch_stats: running statistics of BatchNorm.
      train: images `[N, H, W, C]`, standardized, and labels `[N]` as in training.
      test: images and labels to test on.
      label_noise: share of the training labels that were redrawn.
      metrics: CSV file with a row for every epoch, if there is one.
    """

    name: str
    model: nn.Module
    params: chex.ArrayTree
    batch_stats: chex.ArrayTree
    train: tuple[chex.Array, chex.Array]
    test: tuple[chex.Array, chex.Array]
    label_noise: float
    metrics: Path | None


@functools.cache
def make_loss(model: nn.Module, statistics: Statistics) -> curvature.ComposedLoss[Any]:
    """Return `(params, batch_stats, images, labels) -> cross-entropy`.

    One object for every model, so that its programs are compiled once.

    Args:
      model: Flax module.
      statistics: of BatchNorm: "running", as deployed; or "batch", as trained, those of
        the images that go through at once with the very weights in question.
    """

    def logits_fn(
        params: Any, batch_stats: Any, images: chex.Array, labels: chex.Array
    ) -> Any:
        del labels
        variables = {"params": params, "batch_stats": batch_stats}
        if statistics == "running":
            return model.apply(variables, images, train=False)
        logits, _ = model.apply(variables, images, train=True, mutable=["batch_stats"])
        return logits

    def criterion(logits: Any, batch_stats: Any, images: Any, labels: Any) -> Any:
        del batch_stats, images
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return curvature.ComposedLoss(logits_fn, criterion)


@functools.cache
def make_accuracy(
    model: nn.Module, statistics: Statistics
) -> Callable[..., chex.Array]:
    """Return `(params, batch_stats, images, labels) -> accuracy`."""
    logits_fn = make_loss(model, statistics).outputs_fn

    def accuracy(params: Any, batch_stats: Any, images: Any, labels: Any) -> chex.Array:
        logits = logits_fn(params, batch_stats, images, labels)
        return jnp.mean(logits.argmax(-1) == labels)

    return accuracy


def logits_fn(
    params: chex.ArrayTree, batch_stats: chex.ArrayTree, images: chex.Array
) -> chex.Array:
    """Evaluate the network of the quick start."""
    variables = {"params": params, "batch_stats": batch_stats}
    logits: chex.Array = quickstart.ConvNet().apply(variables, images, train=False)
    return logits


def load(path: Path) -> Any:
    """Read weights of the quick start's network, quantized or not, as floats."""
    image = jnp.zeros((1, 8, 8, 1))
    like = jax.eval_shape(
        lambda: quickstart.ConvNet().init(jax.random.key(0), image, train=False)
    )
    tree = quant.load(path, like={k: like[k] for k in ("batch_stats", "params")})
    return quant.dequantize(tree)


def of_quickstart(path: Path, label_noise: float) -> Network:
    """Read weights that the quick start saved; metrics of the same name go with them.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is not of that network.
    """
    tree = load(path)
    seed = path.stem.rpartition("_seed")[2]
    data = quickstart.load_data(label_noise, int(seed) if seed.isdigit() else 0)
    metrics = path.with_suffix(".csv")
    return Network(
        path.stem,
        # XLA's convolutions are slow inside of loops on CPUs.
        quickstart.ConvNet(models.conv_general_dilated),
        tree["params"],
        tree["batch_stats"],
        (data.train_images, data.train_labels),
        (data.test_images, data.test_labels),
        label_noise,
        metrics if metrics.exists() else None,
    )


def of_run(
    folder: Path,
    data_dir: Path | None,
    num_images: int,
    num_test_images: int | None = None,
) -> Network:
    """Read a finished run of the training recipe, and the first images of its data.

    Those to train on are the first batches, cropped and flipped as they were, with
    their noisy labels. There are as many to test on, or `num_test_images`.

    Raises:
      OSError: a file cannot be read.
      ValueError: it is not of that network, or the data set is missing.
    """
    from examples.image_classification import config as configs
    from examples.image_classification import input_pipeline, train
    from examples.image_classification.datasets import DatasetError

    config = configs.load(folder / "config.toml")
    try:
        pipeline = input_pipeline.create(config, data_dir=data_dir)
    except DatasetError as error:
        raise ValueError(f"{folder}: {error}") from None
    try:
        count = min(-(-num_images // config.micro_batch), pipeline.steps)
        items = pipeline.sample(count)
        batches = [pipeline.batch(item, jnp.int32(k)) for k, item in enumerate(items)]
        images, labels = (
            np.concatenate(x)[:num_images]
            for x in zip(*((b.images, b.labels) for b in batches), strict=True)
        )
        tested = [pipeline.test_batches(item) for item in pipeline.test_items()]
        real = np.concatenate([np.ravel(b.real) for b in tested])
        bytes_, test_labels = (
            np.concatenate([np.reshape(x, (-1, *x.shape[2:])) for x in each])
            for each in zip(*((b.images, b.labels) for b in tested), strict=True)
        )
        chosen = np.flatnonzero(real)[: num_test_images or num_images]
        test_images = pipeline.standardized(bytes_[chosen])
        model = train.make_model(config, pipeline, synchronized=False)
        shapes = jax.eval_shape(
            lambda: model.init(jax.random.key(0), images[:1], train=False)
        )
    finally:
        pipeline.close()
    tree = quant.load(folder / "weights.safetensors", like=dict(shapes))
    metrics = folder / "metrics.csv"
    return Network(
        f"{folder.parent.name}/{folder.name}",
        model,
        tree["params"],
        tree["batch_stats"],
        (jnp.asarray(images), jnp.asarray(labels)),
        (test_images, jnp.asarray(test_labels[chosen])),
        config.label_noise,
        metrics if metrics.exists() else None,
    )


def load_all(
    paths: Sequence[Path],
    label_noise: float,
    data_dir: Path | None,
    num_images: int,
    num_test_images: int | None = None,
) -> list[Network]:
    """Read files of the quick start and folders of runs, each under a name of its own.

    Raises:
      OSError: a file cannot be read.
      TypeError: a config has a value of another type.
      ValueError: a file is not of its network, or a data set is missing.
    """
    found = [
        of_run(path, data_dir, num_images, num_test_images)
        if path.is_dir()
        else of_quickstart(path, label_noise)
        for path in paths
    ]
    if len({network.name for network in found}) < len(found):
        named = zip(found, paths, strict=True)
        found = [network._replace(name=str(path)) for network, path in named]
    return found


def add_arguments(parser: argparse.ArgumentParser, out: str) -> None:
    """Add the arguments that all commands on networks have; `out` is a folder."""
    add = parser.add_argument
    add("networks", nargs="*", type=Path, help="files of weights or folders of runs")
    add("--out", type=Path, default=Path(out), help="folder to write")
    add("--batch-size", type=int, default=250, help="images that go through at once")
    add("--data-dir", type=Path, help="of TensorFlow data sets")
    add("--label-noise", type=float, default=0.4, help="of networks of the quick start")
    add("--epochs", type=int, default=40, help="of training, if there is any")
    add("--quiet", action="store_true", help="show no progress bars")


def load_named(
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    num_test_images: int | None = None,
) -> list[Network]:
    """Read the networks that a command line names, or exit and say why not."""
    try:
        return load_all(
            options.networks,
            options.label_noise,
            options.data_dir,
            options.images,
            num_test_images,
        )
    except (OSError, TypeError, ValueError) as error:
        parser.error(str(error))


def train(
    methods: Sequence[str],
    epochs: int,
    label_noise: float,
    folder: Path,
    quiet: bool,
    metrics: bool = False,
) -> list[Path]:
    """Train networks on the digits from seed 0; save weights and, if asked, metrics."""
    data = quickstart.load_data(label_noise, seed=0)
    steps = epochs * (len(data.train_labels) // quickstart.BATCH_SIZE)
    paths = []
    for name in methods:
        program = quickstart.make_program(quickstart.METHODS[name], steps)
        rows: list[dict[str, float]] = []

        def record(state: quickstart.TrainState, rows: Any = rows) -> None:
            rows.append(_row(state, data, len(rows) + 1))

        with tqdm(
            total=steps * quickstart.BATCH_SIZE,
            desc=f"{name:<12}",
            unit="images",
            unit_scale=True,
            disable=quiet,
        ) as progress:
            after = {"after_epoch": record} if metrics else {}
            state = quickstart.train(program, data, epochs, 0, progress, **after)
        paths.append(quickstart.save_weights(folder, name, 0, state))
        if metrics:
            write_rows(paths[-1].with_suffix(".csv"), rows)
    return paths


def _row(
    state: quickstart.TrainState, data: quickstart.Data, epoch: int
) -> dict[str, float]:
    """Return the metrics of an epoch, with the columns of the training recipe."""
    on_train = data._replace(
        test_images=data.train_images, test_labels=data.train_labels
    )
    return {
        "epoch": epoch,
        "train_accuracy": float(quickstart.evaluate(state, on_train, 32)),
        "test_accuracy": float(quickstart.evaluate(state, data, 32)),
        "hessian_norm": float(quickstart.measure_curvature(state, data)[0]),
    }
