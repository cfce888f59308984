"""Train a small network in six ways, HERO among them, then round its weights.

1,000 of scikit-learn's digits to train on, 40 % of them with random labels, and 797 to
test on; the same first weights and batches for all. Two minutes on two cores.
"""

import argparse
import functools
import json
import re
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from tqdm import tqdm

from hero_jax import family, hero_value_and_grad, quant, schedules

TRAIN_SIZE, BATCH_SIZE, STEPS, BITS = 1000, 128, 7, (32, 8, 6, 5, 4, 3)


class ConvNet(nn.Module):
    """Four convolutions with batch normalization, then a linear classifier."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map images `[B, 8, 8, 1]` to logits `[B, 10]`."""
        for features, stride in ((16, 1), (32, 2), (32, 1), (64, 2)):
            x = nn.Conv(features, (3, 3), strides=stride, use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(10)(x.mean(axis=(1, 2)))


def loss_fn(params: Any, batch_stats: Any, images: Any, labels: Any) -> Any:
    """Return the cross-entropy, and the new statistics of batch normalization."""
    variables = {"params": params, "batch_stats": batch_stats}
    logits, new = ConvNet().apply(variables, images, train=True, mutable="batch_stats")
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), new["batch_stats"]


EQ_11: Any = {"perturbation": "layerwise", "reduction": "sum", "has_aux": True}
GRADIENTS: Any = {  # what takes the place of jax.value_and_grad
    "SGD": jax.value_and_grad(loss_fn, has_aux=True),
    "SGD, tuned": jax.value_and_grad(loss_fn, has_aux=True),
    "GRAD-L1": family.grad_l1_value_and_grad(loss_fn, strength=5e-3, has_aux=True),
    "first-order": hero_value_and_grad(loss_fn, h=12.0, gamma=0.0, **EQ_11),
    "HERO": hero_value_and_grad(loss_fn, h=15.0, gamma=0.1, **EQ_11),
}
METHODS = [*GRADIENTS, NO_SEARCH := "first-order, no search"]


def optimizer(method: str, epochs: int) -> optax.GradientTransformation:
    """Return SGD with momentum, a cosine schedule and weight decay."""
    rate, decay = (0.03, 1e-2) if method == "SGD, tuned" else (0.1, 1e-4)
    sgd = optax.sgd(optax.cosine_decay_schedule(rate, epochs * STEPS), momentum=0.9)
    return optax.chain(optax.add_decayed_weights(decay), sgd)


@functools.partial(jax.jit, static_argnames=("method", "epochs"))
def step(state: Any, images: Any, labels: Any, method: str, epochs: int) -> Any:
    """Take a training step."""
    params, stats, opt_state, h = state
    if method == NO_SEARCH:  # h follows the loss
        hero = hero_value_and_grad(loss_fn, h=h, has_aux=True, return_metrics=True)
        (loss, stats), grads, metrics = hero(params, stats, images, labels)
        h = schedules.next_h(h, loss, metrics.perturbed_loss, untrained_loss=np.log(10))
    else:
        (_, stats), grads = GRADIENTS[method](params, stats, images, labels)
    updates, opt_state = optimizer(method, epochs).update(grads, opt_state, params)
    return optax.apply_updates(params, updates), stats, opt_state, h


def load_data(label_noise: float, seed: int) -> Any:
    """Return images and noisy labels to train on, then images and labels to test on."""
    digits, rng = load_digits(), np.random.default_rng(seed)
    order = np.random.default_rng(0).permutation(len(digits.target))
    x, y = digits.images[order].astype(np.float32)[..., None], digits.target[order]
    x = (x - x[:TRAIN_SIZE].mean()) / x[:TRAIN_SIZE].std()
    noisy = rng.permutation(TRAIN_SIZE)[: round(label_noise * TRAIN_SIZE)]
    y[noisy] = rng.integers(10, size=len(noisy))
    return x[:TRAIN_SIZE], y[:TRAIN_SIZE], x[TRAIN_SIZE:], y[TRAIN_SIZE:]


def train(images: Any, labels: Any, epochs: int, seed: int, seconds: Any) -> Any:
    """Return weights, statistics, optimizer state, h by method; add to the seconds."""
    params, stats = ConvNet().init(jax.random.key(seed), images[:1], False).values()
    first, h = (params, stats), jnp.float32(1e-3)
    states = {m: (*first, optimizer(m, epochs).init(params), h) for m in METHODS}
    rng = np.random.default_rng(seed)
    for _ in tqdm(range(epochs), f"seed {seed}", unit="epochs"):
        order = rng.permutation(TRAIN_SIZE)[: STEPS * BATCH_SIZE]
        for method, state in states.items():
            start = time.perf_counter()
            for batch in order.reshape(STEPS, BATCH_SIZE):
                state = step(state, images[batch], labels[batch], method, epochs)
            states[method] = jax.block_until_ready(state)
            seconds[method].append(time.perf_counter() - start)
            if not np.isfinite(optax.tree.norm(state[:2])):
                raise SystemExit(f"{method} diverged: lower its h or learning rate.")
    return states


def logits_fn(params: Any, stats: Any, images: Any) -> Any:
    """Return the logits of a trained network."""
    return ConvNet().apply({"params": params, "batch_stats": stats}, images, False)


def main(arguments: list[str] | None = None) -> None:
    """Train, round, test; print the table and write the files."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--label-noise", type=float, default=0.4, help="from 0 to 1")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("quickstart_results"))
    options = parser.parse_args(arguments)
    wrong = min(options.seeds) < 0 or len({*options.seeds}) < len(options.seeds)
    if wrong or not 0 <= options.label_noise <= 1 <= options.epochs:
        allowed = "--seeds must differ and be >= 0, --epochs >= 1, --label-noise 0 to 1"
        parser.error(f"{allowed}, got {vars(options)}")
    (options.out / "weights").mkdir(parents=True, exist_ok=True)
    accuracy: Any = {method: [] for method in METHODS}
    seconds: Any = {method: [] for method in METHODS}
    for seed in options.seeds:
        x, y, images, labels = load_data(options.label_noise, seed)
        states = train(x, y, options.epochs, seed, seconds)
        for method, (params, stats, *_) in states.items():
            test = (logits_fn, params, images, labels, BITS)
            shares = quant.accuracy_against_bits(*test, batch_stats=stats)
            accuracy[method].append((100 * shares).tolist())
            name = "_".join(re.findall("[a-z0-9]+", method.lower())) + f"_seed{seed}"
            tree = {"params": params, "batch_stats": stats}
            quant.save(options.out / "weights" / f"{name}.safetensors", tree)
    axes = (figure := Figure(layout="constrained")).subplots()
    times = {method: np.median(s[1:] or s) for method, s in seconds.items()}
    print(f"| {'method':22}", *(f"| {bits:2} bits   " for bits in BITS), "| time |")
    for method, rows in accuracy.items():
        mean, error = np.mean(rows, 0), np.std(rows, 0) / max(len(rows) - 1, 1) ** 0.5
        form = "{:.1f} ± {:.1f}" if len(rows) > 1 else "{:.1f}"
        cells = " | ".join(map(form.format, mean, error))
        print(f"| {method:22} | {cells} | {times[method] / times['SGD']:.2f} |")
        axes.errorbar([*map(str, BITS)], mean, error, fmt="o-", label=method)
    axes.set(xlabel="bits per weight", ylabel="test accuracy (%)")
    axes.legend()
    figure.savefig(options.out / "quickstart.png", dpi=150)
    record = {"accuracy": accuracy, "seconds_per_epoch": times, **vars(options)}
    (options.out / "quickstart.json").write_text(json.dumps(record, default=str))
    print(f"Test accuracy in %, mean ± standard error; wrote {options.out}.")


if __name__ == "__main__":
    main()
