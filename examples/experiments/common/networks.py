"""Networks to look at: trained on the digits, or by runs of the training recipe."""

import argparse
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from examples.experiments.common import digits
from examples.experiments.common.command_line import at_least, training_parser
from examples.image_classification import config as configs
from examples.image_classification import input_pipeline
from examples.image_classification.errors import DatasetError
from examples.image_classification.logbook import write_rows
from examples.image_classification.train import make_model
from hero_jax import curvature, models, quant

TEST_IMAGES = 2000
"""Of a run of the recipe, at most."""

Statistics = Literal["running", "batch"]


class Network(NamedTuple):
    """A trained network and what it was trained and tested on."""

    name: str  # for tables and legends
    model: nn.Module
    params: chex.ArrayTree
    batch_stats: chex.ArrayTree  # running statistics of BatchNorm
    train: tuple[chex.Array, chex.Array]  # standardized images and labels, as trained
    test: tuple[chex.Array, chex.Array]
    label_noise: float  # share of the training labels that were redrawn
    metrics: Path | None  # CSV file with a row for every epoch


@functools.cache
def make_logits(model: nn.Module, statistics: Statistics = "running") -> Any:
    """Return `(params, batch_stats, images) -> logits`.

    One object for every model, so that its programs are compiled once. BatchNorm's
    statistics are the "running" ones, as deployed, or those of the "batch", as trained:
    of the images that go through at once with the very weights in question.
    """

    def logits_fn(params: Any, batch_stats: Any, images: Any) -> Any:
        variables = {"params": params, "batch_stats": batch_stats}
        if statistics == "running":
            return model.apply(variables, images, train=False)
        return model.apply(variables, images, train=True, mutable="batch_stats")[0]

    return logits_fn


@functools.cache
def make_loss(model: nn.Module, statistics: Statistics) -> curvature.ComposedLoss[Any]:
    """Return `(params, batch_stats, images, labels) -> cross-entropy`."""
    logits_fn = make_logits(model, statistics)

    def outputs_fn(params: Any, batch_stats: Any, images: Any, _: Any) -> Any:
        return logits_fn(params, batch_stats, images)

    def criterion(logits: Any, _: Any, __: Any, labels: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return curvature.ComposedLoss(outputs_fn, criterion)


@functools.cache
def make_accuracy(
    model: nn.Module, statistics: Statistics
) -> Callable[..., chex.Array]:
    """Return `(params, batch_stats, images, labels) -> accuracy`."""
    logits_fn = make_logits(model, statistics)
    return lambda params, batch_stats, images, labels: jnp.mean(
        logits_fn(params, batch_stats, images).argmax(-1) == labels
    )


@contextmanager
def bar(name: str, unit: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar; give the function that moves it."""
    with tqdm(desc=name, unit=unit, disable=quiet) as shown:

        def progress(done: int, total: int) -> None:
            shown.total = total
            shown.update(done - shown.n)

        yield progress
        shown.total = shown.n  # a search may end before it has tried all
        shown.refresh()


def load(path: Path) -> Any:
    """Read weights of the digits' network, quantized or not, as floats."""
    params, batch_stats = jax.eval_shape(lambda: digits.init_network(0))
    like = {"params": params, "batch_stats": batch_stats}
    return quant.dequantize(quant.load(path, like=like))


def of_digits(path: Path, label_noise: float) -> Network:
    """Read weights trained on the digits; metrics of the same name go with them."""
    tree = load(path)
    seed = path.stem.rpartition("_seed")[2]
    data = digits.load_data(label_noise, int(seed) if seed.isdigit() else 0)
    metrics = path.with_suffix(".csv")
    return Network(
        path.stem,
        # XLA's convolutions are slow inside of loops on CPUs.
        digits.ConvNet(models.conv_general_dilated),
        tree["params"],
        tree["batch_stats"],
        (data.train_images, data.train_labels),
        (data.test_images, data.test_labels),
        label_noise,
        metrics if metrics.exists() else None,
    )


def of_run(folder: Path, data_dir: Path | None, num_images: int) -> Network:
    """Read a finished run of the training recipe, and the first images of its data.

    Those to train on are the first batches, cropped and flipped as they were, with
    their noisy labels.
    """
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
        chosen = np.flatnonzero(real)[:TEST_IMAGES]
        test_images = pipeline.standardized(bytes_[chosen])
        model = make_model(config, pipeline, synchronized=False)
    finally:
        pipeline.close()
    init = functools.partial(model.init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), images[:1])
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


def networks_parser(doc: str | None, out: str) -> argparse.ArgumentParser:
    """Return a parser of what commands on networks share; `out` is a folder."""
    parser = training_parser(doc, out)
    add, count = parser.add_argument, at_least(1)
    add("networks", nargs="*", type=Path, help="files of weights or folders of runs")
    add("--images", type=count, default=1000, help="training images to look at")
    add("--batch-size", type=count, default=250, help="images that go through at once")
    add("--data-dir", type=Path, help="of TensorFlow data sets")
    add("--seed", type=int, default=0, help="of all that is drawn")
    return parser


def load_or_train(
    options: argparse.Namespace, methods: Sequence[str], metrics: bool = False
) -> list[Network]:
    """Read the networks that a command line names; train some if it names none."""
    training = (options.epochs, options.label_noise, options.out / "weights")
    try:
        paths = options.networks or train(methods, *training, options.quiet, metrics)
        loaded = [
            of_run(path, options.data_dir, options.images)
            if path.is_dir()
            else of_digits(path, options.label_noise)
            for path in paths
        ]
    except (OSError, TypeError, ValueError) as error:
        raise SystemExit(f"networks: {error}") from None
    if len({network.name for network in loaded}) < len(loaded):
        named = zip(loaded, map(str, paths), strict=True)
        loaded = [network._replace(name=path) for network, path in named]
    return loaded


def train(
    methods: Sequence[str],
    epochs: int,
    label_noise: float,
    folder: Path,
    quiet: bool,
    metrics: bool = False,
) -> list[Path]:
    """Train networks on the digits from seed 0; save weights and, if asked, metrics."""
    data = digits.load_data(label_noise, seed=0)
    on_train = data._replace(
        test_images=data.train_images, test_labels=data.train_labels
    )
    steps = epochs * (len(data.train_labels) // digits.BATCH_SIZE)
    paths = []
    for name in methods:
        program = digits.make_program(digits.METHODS[name], steps)
        rows: list[dict[str, float]] = []

        def record(state: digits.TrainState, rows: Any = rows) -> None:
            row = {
                "epoch": len(rows) + 1,
                "train_accuracy": digits.evaluate(state, on_train, 32),
                "test_accuracy": digits.evaluate(state, data, 32),
            }
            rows.append({name: float(value) for name, value in row.items()})

        with digits.progress_bar(name, steps, quiet) as progress:
            after = record if metrics else None
            state = digits.train(program, data, epochs, 0, progress, after_epoch=after)
        paths.append(digits.save_weights(folder, name, 0, state))
        if metrics:
            write_rows(paths[-1].with_suffix(".csv"), rows)
    return paths
