"""The quick start's task for experiments: data, network, methods, training, measures.

`examples/quickstart.py` trains the same networks, digit for digit, and saves them; here
are the parts, for other methods, seeds, splits and measurements. Runs on a CPU dispatch
one jitted step at a time: XLA's convolutions are ten times slower there inside a loop
primitive.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from tqdm import tqdm

import hero_jax
from examples.image_classification.label_noise import symmetric_noise
from examples.image_classification.stepping import take_steps
from examples.image_classification.train import make_loss

NUM_CLASSES = 10
TRAIN_SIZE = 1000
BATCH_SIZE = 128
BITS = (32, 8, 6, 5, 4, 3)
MEASURED_STEP = 5.0
"""h of the finite difference in the reported ||Hz||, the same for all methods."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A drop-in replacement of `jax.value_and_grad`, and SGD's numbers."""

    gradient: Callable[..., Any]
    settings: dict[str, float] = dataclasses.field(default_factory=dict)
    learning_rate: float = 0.1
    weight_decay: float = 1e-4

    def numbers(self) -> dict[str, Any]:
        """Return what is written to JSON of a method."""
        names = ("settings", "learning_rate", "weight_decay")
        return {name: getattr(self, name) for name in names}


hero_value_and_grad = functools.partial(
    hero_jax.hero_value_and_grad, perturbation="layerwise", reduction="sum"
)
"""As the paper's text has it, along Eq. 11."""


def following_loss(loss_fn: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
    """Return the first-order part with an h that follows the loss: the last argument.

    With the metrics comes a third result.
    """

    def value_and_grad(*args: Any) -> Any:
        return hero_jax.hero_value_and_grad(
            loss_fn, h=args[-1], has_aux=has_aux, return_metrics=True
        )(*args[:-1])

    return value_and_grad


METHODS = {
    "SGD": Method(jax.value_and_grad),
    "SGD, tuned": Method(jax.value_and_grad, learning_rate=0.03, weight_decay=1e-2),
    "GRAD-L1": Method(hero_jax.family.grad_l1_value_and_grad, {"strength": 5e-3}),
    "first-order": Method(hero_value_and_grad, {"h": 12.0, "gamma": 0.0}),
    "HERO": Method(hero_value_and_grad, {"h": 15.0, "gamma": 0.1}),
    "first-order, no search": Method(following_loss),
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
    h: chex.Array | None = None  # where it follows the loss


class Program(NamedTuple):
    """What trains by one method; `step` is jitted and returns loss and accuracy."""

    init: Callable[[int], TrainState]
    step: Callable[[TrainState, Data, chex.Array], tuple[TrainState, Any]]


def load_data(label_noise: float, seed: int, validation: int = 0) -> Data:
    """Split the digits and redraw a share of the training labels.

    With `validation`, so many training images are held out and stand in for the test
    set, with their true labels.
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
    """Yield `[steps, BATCH_SIZE]` indices an epoch, without the last partial batch."""
    rng = np.random.default_rng(seed)
    whole = num_examples - num_examples % BATCH_SIZE
    for _ in range(epochs):
        yield rng.permutation(num_examples)[:whole].reshape(-1, BATCH_SIZE)


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
        options: Any = {"conv_general_dilated": self.conv_general_dilated}
        for features, stride in ((16, 1), (32, 2), (32, 1), (64, 2)):
            conv = nn.Conv(features, (3, 3), stride, use_bias=False, **options)
            x = nn.relu(
                nn.BatchNorm(use_running_average=not train, momentum=0.9)(conv(x))
            )
        return nn.Dense(NUM_CLASSES)(x.mean(axis=(1, 2)))


loss_fn = make_loss(ConvNet())
"""`(params, batch_stats, images, labels) -> (cross-entropy, (batch_stats, logits))`."""


def make_optimizer(
    learning_rate: chex.Numeric, weight_decay: chex.Numeric, num_steps: int
) -> optax.GradientTransformation:
    """Return SGD with momentum, weight decay and a cosine schedule."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.sgd(optax.cosine_decay_schedule(learning_rate, num_steps), momentum=0.9),
    )


def init_network(seed: int) -> tuple[chex.ArrayTree, chex.ArrayTree]:
    """Return weights and BatchNorm statistics before training."""
    image = jnp.zeros((1, 8, 8, 1))
    variables = ConvNet().init(jax.random.key(seed), image, train=False)
    return variables["params"], variables["batch_stats"]


def make_program(method: Method, num_steps: int) -> Program:
    """Build the training step: the method's gradient, then an ordinary optax chain."""
    value_and_grad = method.gradient(loss_fn, has_aux=True, **method.settings)
    tx = make_optimizer(method.learning_rate, method.weight_decay, num_steps)

    def init(seed: int) -> TrainState:
        params, batch_stats = init_network(seed)
        h = jnp.float32(1e-3) if method.gradient is following_loss else None
        return TrainState(params, batch_stats, tx.init(params), h)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, data: Data, indices: chex.Array) -> Any:
        args = () if state.h is None else (state.h,)
        return advance(value_and_grad, tx, state, data, indices, *args)

    return Program(init, step)


def advance(
    value_and_grad: Callable[..., Any],
    tx: optax.GradientTransformation,
    state: TrainState,
    data: Data,
    indices: chex.Array,
    *args: Any,
) -> tuple[TrainState, Any]:
    """Return the new state, and loss and accuracy; the gradient takes the arguments."""
    images, labels = data.train_images[indices], data.train_labels[indices]
    (loss, (batch_stats, logits)), grads, *metrics = value_and_grad(
        state.params, state.batch_stats, images, labels, *args
    )
    h = state.h
    if metrics:
        h = hero_jax.schedules.next_h(
            h, loss, metrics[0].perturbed_loss, untrained_loss=np.log(NUM_CLASSES)
        )
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    accuracy = jnp.mean(logits.argmax(-1) == labels)
    return TrainState(params, batch_stats, opt_state, h), (loss, accuracy)


def progress_bar(title: str, num_steps: int, quiet: bool) -> tqdm:
    """Return a bar of the images to come."""
    total = num_steps * BATCH_SIZE
    options = {"unit": "images", "unit_scale": True, "disable": quiet}
    return tqdm(total=total, desc=f"{title:<16}", **options)


def train(
    program: Program,
    data: Data,
    epochs: int,
    seed: int,
    progress: tqdm,
    after_epoch: Callable[[TrainState], None] | None = None,
) -> TrainState:
    """Train from scratch.

    Raises:
      FloatingPointError: the loss is not finite.
    """
    state = program.init(seed)
    outputs: list[Any] = []
    for epoch, steps in enumerate(batches(len(data.train_labels), epochs, seed)):
        state = take_steps(
            lambda state, indices: program.step(state, data, indices),
            *(state, steps, outputs.append),
        )
        loss, accuracy = map(float, outputs[-1])
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss of seed {seed} is {loss} after epoch {epoch + 1}; lower the "
                "learning rate, h or gamma."
            )
        progress.set_postfix_str(
            f"seed {seed}, loss {loss:.3f}, accuracy {accuracy:.2f}", refresh=False
        )
        progress.update(steps.size)
        if after_epoch is not None:
            after_epoch(state)
    return state


@functools.partial(jax.jit, static_argnames="bits")
def evaluate(state: TrainState, data: Data, bits: int) -> chex.Array:
    """Return the test accuracy with weights of so many bits; 32 are the floats."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    if bits < 32:
        quantized = hero_jax.quant.quantize(state.params, bits)
        variables["params"] = hero_jax.quant.dequantize(quantized)
    logits: Any = ConvNet().apply(variables, data.test_images, train=False)
    return jnp.mean(logits.argmax(-1) == data.test_labels)


@jax.jit
def measure_curvature(state: TrainState, data: Data) -> tuple[chex.Array, chex.Array]:
    """Return two readings of ||Hz|| on the training set, with z of Eq. 11.

    The first is `||grad L(W + hz) - grad L(W)|| / h`, h = MEASURED_STEP: the mean
    curvature on the way, which the penalty is about. The second is the one at W. It
    vanishes where every label is learnt by heart, however steep the surroundings.
    """
    batch = (state.batch_stats, data.train_images, data.train_labels)
    _, _, metrics = hero_value_and_grad(
        loss_fn, h=MEASURED_STEP, gamma=0.0, has_aux=True, return_metrics=True
    )(state.params, *batch)

    def grad_fn(params: chex.ArrayTree) -> chex.ArrayTree:
        return jax.grad(loss_fn, has_aux=True)(params, *batch)[0]

    z = hero_jax.perturbation.layerwise(state.params, grad_fn(state.params))
    _, Hz = jax.jvp(grad_fn, (state.params,), (z,))
    return metrics.hessian_norm, optax.tree.norm(Hz)


def save_weights(folder: Path, method: str, seed: int, state: TrainState) -> Path:
    """Write weights and BatchNorm statistics, such as to `sgd_tuned_seed0`."""
    name = re.sub(r"[^a-z0-9]+", "_", method.lower())
    path = folder / f"{name}_seed{seed}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    tree = {"params": state.params, "batch_stats": state.batch_stats}
    hero_jax.quant.save(path, tree)
    return path
