"""Time a training step of HERO against SGD on the convolutions of a CIFAR ResNet.

All steps are compiled first and then take turns within one process, so that the ratios
hold where the machine's speed drifts. In its turn, a method takes one step that is not
timed, since the first one after another program pays for fresh memory, and two that
are. Random images; the network is ResNet20 with the default `--blocks 3`.

    python examples/step_time.py                         # 2 minutes on 2 cores
    python examples/step_time.py --blocks 1 --batch 32

It prints the least and the median time over the rounds, the ratio of each to that of
SGD, and the temporary memory that XLA asks for. Other work on the machine can only
add time: the ratio of the least times is the one to quote.
"""

import argparse
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import hero_jax

METHODS: dict[str, Callable[..., Any]] = {
    "SGD": jax.value_and_grad,
    "GRAD-L1": functools.partial(hero_jax.grad_l1_value_and_grad, strength=1e-3),
    "first-order": functools.partial(hero_jax.hero_value_and_grad, h=1.0, gamma=0.0),
    "HERO": functools.partial(hero_jax.hero_value_and_grad, h=1.0, gamma=0.1),
}


TIMED_STEPS = 2


class ResNet(nn.Module):
    """Residual network for 32x32 images: 6 * blocks + 2 layers."""

    blocks: int

    @nn.compact
    def __call__(self, x: chex.Array) -> chex.Array:
        """Map images `[B, 32, 32, 3]` to logits `[B, 10]`."""
        norm = functools.partial(nn.BatchNorm, use_running_average=False)
        conv = functools.partial(nn.Conv, use_bias=False)
        x = nn.relu(norm()(conv(16, (3, 3))(x)))
        for features in (16, 32, 64):
            for block in range(self.blocks):
                strides = 2 if block == 0 and features > 16 else 1
                y = nn.relu(norm()(conv(features, (3, 3), strides=strides)(x)))
                y = norm()(conv(features, (3, 3))(y))
                if x.shape != y.shape:
                    x = norm()(conv(features, (1, 1), strides=strides)(x))
                x = nn.relu(x + y)
        return nn.Dense(10)(x.mean(axis=(1, 2)))


def make_step(
    value_and_grad: Callable[..., Any], tx: optax.GradientTransformation
) -> Any:
    """Return the jitted `(params, batch_stats, opt_state) -> the same, updated`."""

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(params: Any, stats: Any, opt_state: Any, images: Any, labels: Any) -> Any:
        (_, stats), grads = value_and_grad(params, stats, images, labels)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), stats, opt_state

    return step


def measure(blocks: int, batch: int, rounds: int) -> dict[str, tuple[np.ndarray, int]]:
    """Return, per method, the seconds of every round and the bytes of memory."""
    model = ResNet(blocks)
    images = jax.random.normal(jax.random.key(0), (batch, 32, 32, 3))
    labels = jax.random.randint(jax.random.key(1), (batch,), 0, 10)
    variables = jax.jit(model.init)(jax.random.key(2), images)
    tx = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.1, momentum=0.9))

    def loss_fn(params: Any, stats: Any, images: Any, labels: Any) -> Any:
        logits, new = model.apply(
            {"params": params, "batch_stats": stats}, images, mutable=["batch_stats"]
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), new["batch_stats"]

    steps, states, memory = {}, {}, {}
    for name, method in METHODS.items():
        state = jax.tree.map(
            jnp.copy,
            (
                variables["params"],
                variables["batch_stats"],
                tx.init(variables["params"]),
            ),
        )
        step = make_step(method(loss_fn, has_aux=True), tx)
        steps[name] = step.lower(*state, images, labels).compile()
        memory[name] = steps[name].memory_analysis().temp_size_in_bytes
        states[name] = steps[name](*state, images, labels)

    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    for _ in range(rounds):
        for name, step in steps.items():
            states[name] = step(*states[name], images, labels)
            jax.block_until_ready(states[name])
            start = time.perf_counter()
            for _ in range(TIMED_STEPS):
                states[name] = step(*states[name], images, labels)
            jax.block_until_ready(states[name])
            seconds[name].append((time.perf_counter() - start) / TIMED_STEPS)
    return {name: (np.array(seconds[name]), memory[name]) for name in METHODS}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=3, help="per stage; ResNet6n+2")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    results = measure(options.blocks, options.batch, options.rounds)
    baseline, _ = results["SGD"]
    device = jax.devices()[0].device_kind
    print(
        f"ResNet{6 * options.blocks + 2}, batch {options.batch}, float32, {device}, "
        f"jax {jax.__version__}"
    )
    print("| method      | least ms | ratio | median ms | ratio | temporary MiB |")
    print("|-------------|----------|-------|-----------|-------|---------------|")
    for name, (seconds, size) in results.items():
        least, median = seconds.min(), np.median(seconds)
        print(
            f"| {name:<11} | {1e3 * least:8.1f} | {least / baseline.min():5.2f} "
            f"| {1e3 * median:9.1f} | {median / np.median(baseline):5.2f} "
            f"| {size / 2**20:13.0f} |"
        )


if __name__ == "__main__":
    main()
