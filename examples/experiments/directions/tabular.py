"""A dense network on scikit-learn's tables; many runs at once, by `vmap`."""

import dataclasses
import types
from collections.abc import Sequence
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import datasets

import hero_jax
from examples.experiments.sweep.grid import Row, Run
from examples.image_classification.config import Config
from examples.image_classification.label_noise import symmetric_noise
from examples.image_classification.train import (
    Settings,
    make_optimizer,
    make_value_and_grad,
    next_h,
    warmed_up_h,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table(Config):
    """Config of such a run; what it says of images does not matter.

    Attributes:
      hidden: number of hidden layers.
    """

    model: Literal["mlp"] = "mlp"  # type: ignore[assignment]
    hidden: int = 2


LOADERS = {
    "breast_cancer": datasets.load_breast_cancer,
    "digits": datasets.load_digits,
}
WIDTH = 64


def load(config: Table, seed: int) -> tuple[np.ndarray, ...]:
    """Return training inputs and labels, and those to test on.

    Half of the table is for training, standardized; with `validation_size` so many of
    it are held out, labels as given. Noise is drawn by seed, the halves are not.
    """
    table = LOADERS[config.dataset]()
    order = np.random.default_rng(0).permutation(len(table.target))
    half = len(order) // 2
    train, test = order[:half], order[half:]
    if config.validation_size is not None:
        test, train = np.split(train, [config.validation_size])
    mean, std = table.data[train].mean(0), table.data[train].std(0)
    inputs = ((table.data - mean) / np.where(std == 0.0, 1.0, std)).astype(np.float32)
    labels = table.target.astype(np.int32)
    noisy = labels[train]
    rng = np.random.default_rng(seed)
    chosen, drawn = symmetric_noise(
        len(train), len(table.target_names), config.label_noise, rng
    )
    noisy[chosen] = drawn
    return inputs[train], noisy, inputs[test], labels[test]


def init(key: chex.PRNGKey, sizes: Sequence[int]) -> chex.ArrayTree:
    """Return weights by He's rule, of layers of these sizes."""
    pairs = zip(jax.random.split(key, len(sizes)), sizes, sizes[1:], strict=False)
    return {
        f"layer{k}": {
            "kernel": jax.random.normal(key, (i, o)) * np.sqrt(2 / i),
            "bias": jnp.zeros(o),
        }
        for k, (key, i, o) in enumerate(pairs)
    }


def logits_of(params: Any, x: chex.Array) -> chex.Array:
    """Return the output of the network."""
    *hidden, last = params.values()
    for layer in hidden:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x @ last["kernel"] + last["bias"]


def loss_fn(params: Any, x: chex.Array, y: chex.Array) -> tuple[chex.Array, None]:
    """Return the mean cross-entropy, and nothing else."""
    logits = logits_of(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), None


def train(config: Table, runs: Sequence[Run]) -> list[Row]:
    """Train all runs at once; return their rows, without seconds."""
    data = [load(config, run.seed) for run in runs]
    inputs, classes = data[0][0].shape[1], int(max(x[1].max() for x in data)) + 1
    per_epoch = len(data[0][0]) // config.batch_size
    steps = config.epochs * per_epoch
    one_device = types.SimpleNamespace(axis_name=None)
    pipeline: Any = types.SimpleNamespace(steps=per_epoch, devices=one_device)

    def run(settings: Settings, seed: chex.Array, *data: chex.Array) -> Any:
        x, y, x_test, y_test = data
        key = jax.random.key(seed)
        params = init(key, (inputs, *[WIDTH] * config.hidden, classes))
        tx, _ = make_optimizer(config, steps, settings)
        value_and_grad = make_value_and_grad(config, loss_fn, pipeline, settings)

        def step(state: Any, k: chex.Array) -> Any:
            params, opt_state, h = state
            epoch, batch = k // per_epoch, k % per_epoch
            order = jax.random.permutation(jax.random.fold_in(key, epoch), len(y))
            size = config.batch_size
            chosen = jax.lax.dynamic_slice_in_dim(order, batch * size, size)
            (loss, _), grads, metrics = value_and_grad(
                k, warmed_up_h(config, per_epoch, k, h), params, x[chosen], y[chosen]
            )
            updates, opt_state = tx.update(grads, opt_state, params)
            h = next_h(h, loss, metrics, classes, settings.share)
            return (optax.apply_updates(params, updates), opt_state, h), loss

        first = params, tx.init(params), jnp.asarray(settings.h, jnp.float32)
        state, losses = jax.lax.scan(step, first, jnp.arange(steps))
        accuracies = []
        for bits in (32, *config.bits):
            W = state[0]
            if bits < 32:
                W = hero_jax.quant.fake_quantize(W, bits)
            accuracies.append((logits_of(W, x_test).argmax(1) == y_test).mean())
        return jnp.stack(accuracies), losses[-per_epoch:].mean()

    settings = Settings(
        *(jnp.asarray(x) for x in zip(*(r.settings for r in runs), strict=True))
    )
    seeds = jnp.asarray([run.seed for run in runs])
    stacked = [jnp.stack(x) for x in zip(*data, strict=True)]
    trained = jax.jit(jax.vmap(run))(settings, seeds, *stacked)
    rows = []
    for r, accuracies, loss in zip(runs, *map(np.asarray, trained), strict=True):
        by_bits = dict(
            zip(("32", *map(str, config.bits)), accuracies.tolist(), strict=True)
        )
        row = r.settings._asdict() | {"seed": r.seed, "train_loss": float(loss)}
        good = bool(np.isfinite(loss))
        rows.append(row | {"accuracy_by_bits": by_bits if good else None})
    return rows
