"""Train one small network by SGD, GRAD-L1, first-order-only and HERO; then quantize.

The data are scikit-learn's digits (1,797 images of 8x8 pixels, part of that package):
1,000 to train on, of which a share gets random labels, and 797 to test on. For each
seed, all methods start from the same weights and see the same batches. The result is
a table of the test accuracy with weights of 32 to 3 bits, the same numbers as JSON,
and a picture.

    python -m examples.experiments.common.digits  # about a minute on 2 cores
    python -m examples.experiments.common.digits --label-noise 0    # clean labels

The settings in METHODS were chosen by `examples/experiments/quickstart_search.py`, on other seeds
and without the test images. Runs on a CPU dispatch one jitted step at a time: XLA's
convolutions are ten times slower there inside a loop primitive.
"""

import argparse
import dataclasses
import functools
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from tqdm import tqdm

import hero_jax
from examples.experiments.common.command_line import (
    check_at_least,
    check_training_options,
)
from examples.experiments.common.statistics import cell, summary
from examples.image_classification.label_noise import symmetric_noise
from examples.image_classification.results import (
    environment,
    markdown,
    write_figure,
    write_json,
)
from examples.image_classification.train import make_loss

NUM_CLASSES = 10
TRAIN_SIZE = 1000
BATCH_SIZE = 128
BITS = (32, 8, 6, 5, 4, 3)
MEASURED_STEP = 5.0
"""h of the finite difference in the reported ||Hz||, the same for all methods."""


@dataclasses.dataclass(frozen=True)
class Method:
    """How the loss becomes a gradient, and the step rule that follows.

    Attributes:
      gradient: `jax.value_and_grad` or a drop-in replacement of it.
      settings: its keyword arguments.
      learning_rate: at the start of the cosine.
      weight_decay: coefficient of `optax.add_decayed_weights`.
    """

    gradient: Callable[..., Any]
    settings: dict[str, float] = dataclasses.field(default_factory=dict)
    learning_rate: float = 0.1
    weight_decay: float = 1e-4


METHODS = {
    "SGD": Method(jax.value_and_grad),
    "SGD, tuned": Method(jax.value_and_grad, learning_rate=0.03, weight_decay=1e-2),
    "GRAD-L1": Method(hero_jax.family.grad_l1_value_and_grad, {"strength": 5e-3}),
    "first-order": Method(hero_jax.hero_value_and_grad, {"h": 12.0, "gamma": 0.0}),
    "HERO": Method(hero_jax.hero_value_and_grad, {"h": 15.0, "gamma": 0.1}),
}


class Data(NamedTuple):
    """Images `[N, 8, 8, 1]`, standardized by the training set, and labels `[N]`."""

    train_images: chex.Array
    train_labels: chex.Array
    test_images: chex.Array
    test_labels: chex.Array


class TrainState(NamedTuple):
    """All that changes from step to step."""

    params: chex.ArrayTree
    batch_stats: chex.ArrayTree
    opt_state: optax.OptState


class Program(NamedTuple):
    """The jitted functions that train by one method.

    Attributes:
      init: `seed -> state`.
      step: `(state, data, indices) -> (state, loss, accuracy)` on one mini-batch.
    """

    init: Callable[[int], TrainState]
    step: Callable[[TrainState, Data, chex.Array], tuple[TrainState, Any, Any]]


class Curvature(NamedTuple):
    """Two readings of ||Hz|| on the training set, with z of Eq. 11.

    Attributes:
      finite_difference: `||grad L(W + hz) - grad L(W)|| / h` with MEASURED_STEP for
        h: the mean curvature on the way, which the penalty is about.
      exact: at W itself. It vanishes where a network has learnt every label by heart,
        since the cross-entropy is flat there, however steep its surroundings.
    """

    finite_difference: chex.Array
    exact: chex.Array


def load_data(label_noise: float, seed: int, validation: int = 0) -> Data:
    """Split the digits and replace training labels by noise.

    Args:
      label_noise: share of the training labels that are redrawn.
      seed: of the noise; the split is the same for all.
      validation: if positive, so many training images are held out and stand in for
        the test set, with their true labels.

    Returns:
      Training and test set.
    """
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    if validation:
        order = order[:TRAIN_SIZE]
    images = digits.images[order][..., None].astype(np.float32)
    labels = digits.target[order].astype(np.int32)
    train = slice(None, TRAIN_SIZE - validation)
    test = slice(TRAIN_SIZE - validation, None)
    images = (images - images[train].mean()) / images[train].std()
    noisy, rng = labels[train].copy(), np.random.default_rng(seed)
    chosen, drawn = symmetric_noise(len(noisy), NUM_CLASSES, label_noise, rng)
    noisy[chosen] = drawn
    arrays = (images[train], noisy, images[test], labels[test])
    return Data(*(jnp.asarray(x) for x in arrays))


def batches(num_examples: int, epochs: int, seed: int) -> Iterator[np.ndarray]:
    """Yield the indices of every mini-batch; the last partial one is left out."""
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(num_examples)
        for start in range(0, num_examples - BATCH_SIZE + 1, BATCH_SIZE):
            yield order[start : start + BATCH_SIZE]


class ConvNet(nn.Module):
    """Four 3x3 convolutions with batch normalization, then a linear classifier.

    Attributes:
      conv_general_dilated: another convolution than XLA's, such as that of
        `hero_jax.models`, which CPUs want inside of loops.
    """

    conv_general_dilated: Callable[..., chex.Array] | None = None

    @nn.compact
    def __call__(self, x: chex.Array, train: bool) -> chex.Array:
        """Map images `[B, 8, 8, 1]` to logits `[B, 10]`."""
        for features, stride in ((16, 1), (32, 2), (32, 1), (64, 2)):
            x = nn.Conv(
                features,
                (3, 3),
                strides=stride,
                use_bias=False,
                conv_general_dilated=self.conv_general_dilated,
            )(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(NUM_CLASSES)(x.mean(axis=(1, 2)))


loss_fn = make_loss(ConvNet())
"""`(params, batch_stats, images, labels) -> (cross-entropy, (batch_stats, logits))`."""


def make_program(method: Method, num_steps: int) -> Program:
    """Build the training step: the method's gradient, then an ordinary optax chain."""
    value_and_grad = method.gradient(loss_fn, has_aux=True, **method.settings)
    schedule = optax.cosine_decay_schedule(method.learning_rate, num_steps)
    tx = optax.chain(
        optax.add_decayed_weights(method.weight_decay),
        optax.sgd(schedule, momentum=0.9),
    )

    def init(seed: int) -> TrainState:
        image = jnp.zeros((1, 8, 8, 1))
        variables = ConvNet().init(jax.random.key(seed), image, train=False)
        params = variables["params"]
        return TrainState(params, variables["batch_stats"], tx.init(params))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(
        state: TrainState, data: Data, indices: chex.Array
    ) -> tuple[TrainState, chex.Array, chex.Array]:
        images, labels = data.train_images[indices], data.train_labels[indices]
        (loss, (batch_stats, logits)), grads = value_and_grad(
            state.params, state.batch_stats, images, labels
        )
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        accuracy = jnp.mean(logits.argmax(-1) == labels)
        return TrainState(params, batch_stats, opt_state), loss, accuracy

    return Program(init, step)


def train(
    program: Program,
    data: Data,
    epochs: int,
    seed: int,
    progress: tqdm,
    after_epoch: Callable[[TrainState], None] | None = None,
) -> TrainState:
    """Train from scratch; wait for the device once per epoch only."""
    state = program.init(seed)
    steps = len(data.train_labels) // BATCH_SIZE
    for k, indices in enumerate(batches(len(data.train_labels), epochs, seed)):
        state, loss, accuracy = program.step(state, data, indices)
        if (k + 1) % steps == 0:
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the loss of seed {seed} is {float(loss)} after epoch "
                    f"{(k + 1) // steps}; lower the learning rate, h or gamma."
                )
            progress.set_postfix_str(
                f"seed {seed}, loss {float(loss):.3f}, accuracy {float(accuracy):.2f}",
                refresh=False,
            )
            progress.update(steps * BATCH_SIZE)
            if after_epoch is not None:
                after_epoch(state)
    return state


@functools.partial(jax.jit, static_argnames="bits")
def evaluate(state: TrainState, data: Data, bits: int) -> chex.Array:
    """Return the test accuracy with weights of so many bits; 32 are the floats."""
    params = state.params
    if bits < 32:
        params = hero_jax.quant.dequantize(hero_jax.quant.quantize(params, bits))
    variables = {"params": params, "batch_stats": state.batch_stats}
    logits: Any = ConvNet().apply(variables, data.test_images, train=False)
    return jnp.mean(logits.argmax(-1) == data.test_labels)


@jax.jit
def measure_curvature(state: TrainState, data: Data) -> Curvature:
    """Return ||Hz|| on the whole training set, noisy labels included."""
    batch = (state.batch_stats, data.train_images, data.train_labels)
    _, g, metrics = hero_jax.hero_value_and_grad(
        loss_fn, h=MEASURED_STEP, gamma=0.0, has_aux=True, return_metrics=True
    )(state.params, *batch)
    del g

    def grad_fn(params: chex.ArrayTree) -> chex.ArrayTree:
        return jax.grad(loss_fn, has_aux=True)(params, *batch)[0]

    z = hero_jax.perturbation.layerwise(state.params, grad_fn(state.params))
    _, Hz = jax.jvp(grad_fn, (state.params,), (z,))
    return Curvature(metrics.hessian_norm, optax.tree.norm(Hz))


def relative_step_times(
    programs: dict[str, Program], data: Data, rounds: int = 15, steps: int = 4
) -> dict[str, float]:
    """Return the median time of a step over that of SGD, taking turns."""
    indices = np.arange(BATCH_SIZE)
    states = {name: program.init(0) for name, program in programs.items()}
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            jax.block_until_ready(states[name])
            start = time.perf_counter()
            for _ in range(steps):
                states[name], *_ = program.step(states[name], data, indices)
            jax.block_until_ready(states[name])
            times[name].append(time.perf_counter() - start)
    medians = {name: float(np.median(seconds)) for name, seconds in times.items()}
    first = next(iter(medians))
    return {name: seconds / medians[first] for name, seconds in medians.items()}


def run(
    methods: dict[str, Method],
    seeds: Sequence[int],
    epochs: int,
    label_noise: float,
    quiet: bool = False,
    weights: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """Train every method from every seed and measure; return numbers for JSON.

    With `weights`, the trained networks are saved in that folder.
    """
    data = {seed: load_data(label_noise, seed) for seed in seeds}
    steps = TRAIN_SIZE // BATCH_SIZE
    programs, results = {}, {}
    for name, method in methods.items():
        programs[name] = make_program(method, epochs * steps)
        with tqdm(
            total=len(seeds) * epochs * steps * BATCH_SIZE,
            desc=f"{name:<12}",
            unit="images",
            unit_scale=True,
            disable=quiet,
        ) as progress:
            try:
                states = [
                    train(programs[name], data[seed], epochs, seed, progress)
                    for seed in seeds
                ]
            except FloatingPointError as error:
                raise FloatingPointError(f"{name}: {error}") from None
        if weights is not None:
            for seed, state in zip(seeds, states, strict=True):
                save_weights(weights, name, seed, state)
        pairs = list(zip(states, data.values(), strict=True))
        curvatures = [measure_curvature(*pair) for pair in pairs]
        results[name] = {
            "settings": method.settings,
            "learning_rate": method.learning_rate,
            "weight_decay": method.weight_decay,
            "accuracy": {
                str(bits): summary([100 * evaluate(*pair, bits) for pair in pairs])
                for bits in BITS
            },
            "hessian_norm": summary([c.finite_difference for c in curvatures]),
            "hessian_norm_exact": summary([c.exact for c in curvatures]),
        }
    for name, ratio in relative_step_times(programs, data[seeds[0]]).items():
        results[name]["relative_step_time"] = ratio
    return results


def save_weights(folder: Path, method: str, seed: int, state: TrainState) -> Path:
    """Write weights and BatchNorm statistics, such as to `sgd_tuned_seed0`."""
    name = re.sub(r"[^a-z0-9]+", "_", method.lower())
    path = folder / f"{name}_seed{seed}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    tree = {"params": state.params, "batch_stats": state.batch_stats}
    hero_jax.quant.save(path, tree)
    return path


def table(results: dict[str, dict[str, Any]]) -> str:
    """Format the results as a Markdown table."""
    titles = ["float" if bits == 32 else f"{bits} bit" for bits in BITS]
    rows = [["method", *titles, f"‖Hz‖, h={MEASURED_STEP:g}", "‖Hz‖ exact", "time"]]
    for name, result in results.items():
        accuracies = [cell(result["accuracy"][str(bits)], 1) for bits in BITS]
        norms = [cell(result[key], 3) for key in ("hessian_norm", "hessian_norm_exact")]
        rows.append([name, *accuracies, *norms, f"{result['relative_step_time']:.2f}"])
    return markdown(rows)


def plot(results: dict[str, dict[str, Any]], title: str) -> Figure:
    """Draw accuracy against bits, one line per method."""
    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    axes = figure.subplots()
    styles = ("o-", "o--", "s-", "^-", "D-")
    for (name, result), style in zip(results.items(), styles, strict=False):
        accuracies = [result["accuracy"][str(bits)] for bits in BITS]
        axes.errorbar(
            range(len(BITS)),
            [x["mean"] for x in accuracies],
            [x["stderr"] or 0.0 for x in accuracies],
            fmt=style,
            capsize=3,
            label=name,
        )
    axes.set_xticks(range(len(BITS)), ["float" if b == 32 else str(b) for b in BITS])
    axes.set(xlabel="bits per weight", ylabel="test accuracy (%)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--label-noise", type=float, default=0.4, help="share of labels redrawn, 0-1")
    add("--seeds", type=int, default=3, help="number of seeds (0, 1, ...)")
    add("--epochs", type=int, default=40)
    add("--out", type=Path, default=Path("quickstart_results"), help="folder to write")
    add(
        "--save-weights", action="store_true", help="write them to the folder 'weights'"
    )
    add("--quiet", action="store_true", help="show no progress bars")
    options = parser.parse_args(arguments)
    check_at_least(parser, options, seeds=1)
    check_training_options(parser, options)
    return options


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the comparison; print the table, write JSON and PNG, return the record."""
    options = parse(arguments)
    start = time.perf_counter()
    results = run(
        METHODS,
        range(options.seeds),
        options.epochs,
        options.label_noise,
        options.quiet,
        options.out / "weights" if options.save_weights else None,
    )
    record = {
        "environment": environment(),
        "label_noise": options.label_noise,
        "seeds": options.seeds,
        "epochs": options.epochs,
        "batch_size": BATCH_SIZE,
        "wall_seconds": round(time.perf_counter() - start, 1),
        "results": results,
    }
    title = f"Digits, {options.label_noise:.0%} label noise, {options.seeds} seed(s)"
    figure = plot(results, title)
    write_json(options.out / "quickstart.json", record)
    write_figure(options.out / "quickstart.png", figure, 150)
    print(table(results))
    print(
        "\nTest accuracy in %, mean ± standard error over seeds; time per step "
        f"relative to SGD.\nWrote quickstart.json and quickstart.png to {options.out} "
        f"({record['wall_seconds']} s)."
    )
    return record


if __name__ == "__main__":
    main()
