"""Time a training step of HERO against SGD, and our convolutions against XLA's.

All steps are compiled first and then take turns within one process, so that the ratios
hold where the machine's speed drifts. In its turn, a method takes one step that is not
timed, since the first one after another program pays for fresh memory, and two that
are. Random images; on CPUs, SGD and HERO also take turns with XLA's own convolutions.

    python examples/step_time.py                         # 2 minutes on 2 cores
    python examples/step_time.py --model vgg19_bn --batch 64

It prints the least and the median time over the rounds, the ratio of each to that of
SGD, and the temporary memory that XLA asks for. Other work on the machine can only
add time: the ratio of the least times is the one to quote.
"""

import argparse
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from image_classification.results import markdown
from image_classification.train import make_loss

import hero_jax
from hero_jax import models

METHODS: dict[str, Callable[..., Any]] = {
    "SGD": jax.value_and_grad,
    "GRAD-L1": functools.partial(hero_jax.grad_l1_value_and_grad, strength=1e-3),
    "first-order": functools.partial(hero_jax.hero_value_and_grad, h=1.0, gamma=0.0),
    "HERO": functools.partial(hero_jax.hero_value_and_grad, h=1.0, gamma=0.1),
}


TIMED_STEPS = 2
XLA = ", XLA's convolutions"


def make_step(
    value_and_grad: Callable[..., Any], tx: optax.GradientTransformation
) -> Any:
    """Return the jitted `(params, batch_stats, opt_state) -> the same, updated`."""

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(params: Any, stats: Any, opt_state: Any, images: Any, labels: Any) -> Any:
        (_, (stats, _)), grads = value_and_grad(params, stats, images, labels)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), stats, opt_state

    return step


def measure(
    network: str, size: int, batch: int, rounds: int, methods: Sequence[str] = ()
) -> dict[str, tuple[np.ndarray, int]]:
    """Return, per method, the seconds of every round and the bytes of memory.

    SGD is always among the methods; none means all.
    """
    images = jax.random.normal(jax.random.key(0), (batch, size, size, 3))
    labels = jax.random.randint(jax.random.key(1), (batch,), 0, 10)
    tx = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.1, momentum=0.9))
    settings: dict[str, tuple[str, Any]] = {name: (name, None) for name in METHODS}
    if jax.default_backend() == "cpu":
        stock = jax.lax.conv_general_dilated
        settings |= {name + XLA: (name, stock) for name in ("SGD", "HERO")}
    if methods:
        chosen = {"SGD", *methods}
        settings = {k: value for k, value in settings.items() if value[0] in chosen}

    steps, states, memory = {}, {}, {}
    for title, (method, convolution) in settings.items():
        model = models.create(network, num_classes=10, conv_general_dilated=convolution)
        init = jax.jit(functools.partial(model.init, train=False))
        variables = init(jax.random.key(2), images)
        params, stats = variables["params"], variables["batch_stats"]
        state = (params, stats, tx.init(params))
        step = make_step(METHODS[method](make_loss(model), has_aux=True), tx)
        steps[title] = step.lower(*state, images, labels).compile()
        memory[title] = steps[title].memory_analysis().temp_size_in_bytes
        states[title] = steps[title](*state, images, labels)

    seconds: dict[str, list[float]] = {title: [] for title in settings}
    for _ in range(rounds):
        for title, step in steps.items():
            states[title] = step(*states[title], images, labels)
            jax.block_until_ready(states[title])
            start = time.perf_counter()
            for _ in range(TIMED_STEPS):
                states[title] = step(*states[title], images, labels)
            jax.block_until_ready(states[title])
            seconds[title].append((time.perf_counter() - start) / TIMED_STEPS)
    return {title: (np.array(seconds[title]), memory[title]) for title in settings}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet20", help="as in hero_jax.models")
    parser.add_argument("--size", type=int, default=32, help="height and width")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--method", choices=METHODS, action="append", default=[])
    options = parser.parse_args(arguments)
    results = measure(
        options.model, options.size, options.batch, options.rounds, options.method
    )
    baseline, _ = results["SGD"]
    print(
        f"{options.model}, {options.size}x{options.size} images, batch {options.batch},"
        f" float32, {jax.devices()[0].device_kind}, jax {jax.__version__}\n"
    )
    rows = [["method", "least ms", "ratio", "median ms", "ratio", "temporary MiB"]]
    for title, (seconds, memory) in results.items():
        least, median = seconds.min(), float(np.median(seconds))
        rows.append(
            [
                title,
                f"{1e3 * least:.1f}",
                f"{least / baseline.min():.2f}",
                f"{1e3 * median:.1f}",
                f"{median / np.median(baseline):.2f}",
                f"{memory / 2**20:.0f}",
            ]
        )
    print(markdown(rows))


if __name__ == "__main__":
    main()
