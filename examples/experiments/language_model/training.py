"""Optimizers, gradients, and the step that joins one to another."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import hero_jax
from hero_jax import quant

from . import corpus
from .model import Transformer, make_loss

LossFn = Callable[[chex.ArrayTree, chex.Array], chex.Array]

METHODS = ("plain", "first-order", "HERO")
WARMUP = 0.1
"""Share of the steps in which the learning rate rises."""
LOOK_EVERY = 20
"""Steps between two looks at the loss, for which the device is waited for."""


class Settings(NamedTuple):
    """Numbers that a search chooses; arguments of one compiled step.

    Attributes:
      learning_rate: at its peak.
      weight_decay: as the optimizer takes it.
      h: length of HERO's perturbation.
      gamma: strength of its penalty; 0 for first-order-only.
    """

    learning_rate: chex.Numeric
    weight_decay: chex.Numeric = 0.0
    h: chex.Numeric = 0.0
    gamma: chex.Numeric = 0.0


def sgd(rate: Any, decay: chex.Numeric) -> optax.GradientTransformation:
    """Build SGD with momentum and decoupled weight decay."""
    return optax.chain(
        optax.trace(0.9),
        optax.add_decayed_weights(decay),
        optax.scale_by_learning_rate(rate),
    )


def muon(rate: Any, decay: chex.Numeric) -> optax.GradientTransformation:
    """Build Muon for the matrices of the blocks, and AdamW for the rest.

    Its authors advise against orthogonal updates of embeddings and head.
    """
    matrix = optax.contrib.MuonDimensionNumbers()

    def dimensions(params: chex.ArrayTree) -> chex.ArrayTree:
        def of(path: Any, x: chex.Array) -> Any:
            inner = jax.tree_util.keystr(path).startswith("['block")
            return matrix if inner and x.ndim == 2 else None

        return jax.tree_util.tree_map_with_path(of, params)

    return optax.contrib.muon(
        rate,
        weight_decay=decay,
        adam_weight_decay=decay,
        muon_weight_dimension_numbers=dimensions,
    )


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "SGD": sgd,
    "AdamW": lambda rate, decay: optax.adamw(rate, weight_decay=decay),
    "Lion": lambda rate, decay: optax.lion(rate, weight_decay=decay),
    "LAMB": lambda rate, decay: optax.lamb(rate, weight_decay=decay),
    "Muon": muon,
}
"""`(learning rate or schedule, weight decay) -> transformation`."""


def value_and_grad_of(
    method: str, loss_fn: LossFn, settings: Settings, perturbation: str
) -> Callable[..., Any]:
    """Return how a loss becomes a gradient: all that the methods differ in."""
    if method == "plain":
        return jax.value_and_grad(loss_fn)
    h = settings.h
    gamma = settings.gamma if method == "HERO" else 0.0
    return hero_jax.hero_value_and_grad(
        loss_fn, h=h, gamma=gamma, perturbation=perturbation
    )


class TrainState(NamedTuple):
    """All that changes from step to step."""

    params: chex.ArrayTree
    opt_state: optax.OptState


class Program(NamedTuple):
    """Functions that train by one optimizer and method, whatever the settings.

    Attributes:
      init: `(params, settings) -> state`.
      step: `(state, tokens, settings) -> (state, loss)`; the state is donated.
    """

    init: Callable[[chex.ArrayTree, Settings], TrainState]
    step: Callable[[TrainState, chex.Array, Settings], tuple[TrainState, chex.Array]]


def make_program(
    loss_fn: LossFn, optimizer: str, method: str, num_steps: int, perturbation: str
) -> Program:
    """Build the training step: the method's gradient, then the optimizer of optax."""
    warmup = max(1, round(WARMUP * num_steps))
    shape = optax.warmup_cosine_decay_schedule(
        1.0 / (warmup + 1), 1.0, warmup, num_steps + 1
    )

    def make_optimizer(settings: Settings) -> optax.GradientTransformation:
        def schedule(count: chex.Numeric) -> chex.Numeric:
            return settings.learning_rate * shape(count)

        return OPTIMIZERS[optimizer](schedule, settings.weight_decay)

    @jax.jit
    def init(params: chex.ArrayTree, settings: Settings) -> TrainState:
        return TrainState(params, make_optimizer(settings).init(params))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(
        state: TrainState, tokens: chex.Array, settings: Settings
    ) -> tuple[TrainState, chex.Array]:
        value_and_grad = value_and_grad_of(method, loss_fn, settings, perturbation)
        loss, grads = value_and_grad(state.params, tokens)
        updates, opt_state = make_optimizer(settings).update(
            grads, state.opt_state, state.params
        )
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, opt_state), loss

    return Program(init, step)


def train(
    program: Program,
    model: Transformer,
    text: np.ndarray,
    settings: Settings,
    *,
    num_steps: int,
    batch_size: int,
    seed: int,
    progress: tqdm,
) -> chex.ArrayTree:
    """Train from scratch; the seed decides about first weights and batches.

    Returns:
      The weights.

    Raises:
      FloatingPointError: the loss is not finite.
    """
    settings = Settings(*(jnp.float32(x) for x in settings))
    rng = np.random.default_rng(seed)
    state = program.init(init_params(model, seed), settings)
    for k in range(num_steps):
        tokens = corpus.batch(text, model.context, batch_size, rng)
        state, loss = program.step(state, tokens, settings)
        done = k % LOOK_EVERY + 1
        if done == LOOK_EVERY or k + 1 == num_steps:
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the loss of seed {seed} is {float(loss)} after step {k + 1}; "
                    "lower the learning rate, h or gamma."
                )
            progress.set_postfix_str(
                f"seed {seed}, loss {float(loss):.3f}", refresh=False
            )
            progress.update(done * batch_size * model.context)
    return state.params


@functools.partial(jax.jit, static_argnums=0)
def init_params(model: Transformer, seed: int) -> chex.ArrayTree:
    """Return the first weights."""
    tokens = jnp.zeros((1, model.context), jnp.int32)
    return model.init(jax.random.key(seed), tokens)["params"]


class Evaluation:
    """Bits per character of a text, with weights of any precision.

    Attributes:
      windows: of the text, `[N, context + 1]`.
    """

    def __init__(self, model: Transformer, text: np.ndarray) -> None:
        self.windows = corpus.windows(text, model.context)
        self._loss = jax.jit(make_loss(model))

    def __call__(
        self, params: chex.ArrayTree, bits: int = 32, axis: int | None = None
    ) -> float:
        """Evaluate with weight matrices, embeddings included, of so many bits.

        Args:
          params: the weights.
          bits: 32 for the floats.
          axis: -1 for a grid per column of each matrix (output channel, or feature
            of an embedding), None for one per matrix.
        """
        if bits < 32:
            params = _rounded(params, jnp.int32(bits), axis)
        return float(self._loss(params, self.windows)) / math.log(2.0)


@functools.partial(jax.jit, static_argnames="axis")
def _rounded(
    params: chex.ArrayTree, bits: chex.Array, axis: int | None
) -> chex.ArrayTree:
    return quant.fake_quantize(params, bits, axis=axis)
