"""Optimizers, gradients, the step that joins one to another, and trials of it."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import hero_jax
from examples.image_classification.stepping import take_steps
from hero_jax import quant

from . import corpus
from .model import Transformer, make_loss

METHODS = ("plain", "first-order", "HERO")
WARMUP = 0.1
"""Share of the steps in which the learning rate rises."""
PRECISIONS: dict[str, tuple[int, int | None]] = {
    "float": (32, None),
    "8 bit, channel": (8, -1),
    "4 bit, channel": (4, -1),
    "3 bit, channel": (3, -1),
    "4 bit, tensor": (4, None),
    "3 bit, tensor": (3, None),
}
"""Bits, and the axis of channels: a grid per column of each matrix, or per matrix."""


class Settings(NamedTuple):
    """Numbers that a search chooses; arguments of one compiled step."""

    learning_rate: chex.Numeric
    weight_decay: chex.Numeric = 0.0
    h: chex.Numeric = 0.0
    gamma: chex.Numeric = 0.0


class Direction(NamedTuple):
    """Along what the weights are moved, and how."""

    perturbation: str
    reduction: str = "sum"
    warmup: float = 0.0
    """Share of the steps in which h rises from zero."""
    share: float = 0.0
    """Of its lead that the loss may lose by a step, if h follows it."""


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

    def dimensions(path: Any, x: chex.Array) -> Any:
        inner = jax.tree_util.keystr(path).startswith("['block")
        return matrix if inner and x.ndim == 2 else None

    of_tree = functools.partial(jax.tree_util.tree_map_with_path, dimensions)
    return optax.contrib.muon(
        rate,
        weight_decay=decay,
        adam_weight_decay=decay,
        muon_weight_dimension_numbers=of_tree,
    )


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "SGD": sgd,
    "AdamW": lambda rate, decay: optax.adamw(rate, weight_decay=decay),
    "Lion": lambda rate, decay: optax.lion(rate, weight_decay=decay),
    "LAMB": lambda rate, decay: optax.lamb(rate, weight_decay=decay),
    "Muon": muon,
}
"""`(learning rate or schedule, weight decay) -> transformation`."""


def make_program(
    loss_fn: Any,
    optimizer: str,
    method: str,
    num_steps: int,
    direction: Direction,
    untrained_loss: float,
) -> tuple[Any, Any]:
    """Build what trains by one optimizer and method, whatever the settings.

    `untrained_loss` is that of a model that knows nothing.

    Returns:
      `(params, settings) -> state`, of which the weights come first, and
      `(state, tokens, settings) -> (state, loss)`, whose state is donated.
    """
    warmup = max(1, round(WARMUP * num_steps))
    shape = optax.warmup_cosine_decay_schedule(
        1.0 / (warmup + 1), 1.0, warmup, num_steps + 1
    )

    def make_optimizer(settings: Settings) -> optax.GradientTransformation:
        def schedule(count: chex.Numeric) -> chex.Numeric:
            return settings.learning_rate * shape(count)

        return OPTIMIZERS[optimizer](schedule, settings.weight_decay)

    @jax.jit
    def init(params: chex.ArrayTree, settings: Settings) -> Any:
        opt_state = make_optimizer(settings).init(params)
        return params, opt_state, jnp.int32(0), settings.h

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, tokens: chex.Array, settings: Settings) -> Any:
        params, opt_state, count, h = state
        if method == "plain":  # all that the methods differ in
            loss, grads = jax.value_and_grad(loss_fn)(params, tokens)
        else:
            rise = max(1.0, direction.warmup * num_steps)
            hero = hero_jax.hero_value_and_grad(
                loss_fn,
                h=h * jnp.minimum(1.0, (count + 1) / rise),
                gamma=settings.gamma if method == "HERO" else 0.0,
                perturbation=direction.perturbation,
                reduction=direction.reduction,
                return_metrics=True,
            )
            loss, grads, metrics = hero(params, tokens)
            if direction.share:
                h = hero_jax.schedules.next_h(
                    *(h, loss, metrics.perturbed_loss),
                    untrained_loss=untrained_loss,
                    share=direction.share,
                )
        tx = make_optimizer(settings)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, count + 1, h), loss

    return init, step


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained, on which text, how long, and on which text it is judged."""

    model: Transformer
    text: np.ndarray
    held_out: np.ndarray
    num_steps: int
    batch_size: int

    def attempts(
        self,
        optimizer: str,
        method: str,
        direction: Direction,
        cases: Sequence[tuple[Settings, int]],
    ) -> Iterator[dict[str, float] | None]:
        """Train from scratch with each settings and seed.

        Yields:
          Bits per character of the held-out text for every precision of the weight
          matrices, embeddings included; None where the loss was not finite.
        """
        loss_fn = make_loss(self.model)
        frequencies = np.unique(self.text, return_counts=True)[1] / self.text.size
        entropy = -float(np.sum(frequencies * np.log(frequencies)))
        program = make_program(
            loss_fn, optimizer, method, self.num_steps, direction, entropy
        )
        evaluate = jax.jit(loss_fn)
        held_out = corpus.windows(self.held_out, self.model.context)
        total = len(cases) * self.num_steps
        with tqdm(total=total, desc=f"{optimizer}, {method}", disable=None) as bar:
            for settings, seed in cases:
                try:
                    params = self.train(program, settings, seed, bar)
                except FloatingPointError:
                    yield None
                    continue
                grids = {k: rounded(params, *v) for k, v in PRECISIONS.items()}
                losses = {k: float(evaluate(v, held_out)) for k, v in grids.items()}
                yield {k: loss / math.log(2) for k, loss in losses.items()}

    def train(
        self, program: tuple[Any, Any], settings: Settings, seed: int, bar: tqdm
    ) -> chex.ArrayTree:
        """Return weights; the seed decides about the first ones and the batches."""
        numbers = Settings(*(jnp.float32(x) for x in settings))
        model, rng = self.model, np.random.default_rng(seed)
        init, step = program

        def batches() -> Iterator[np.ndarray]:
            for _ in range(self.num_steps):
                yield corpus.batch(self.text, model.context, self.batch_size, rng)

        def look(loss: chex.Array) -> None:
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss of seed {seed} is {float(loss)}.")
            bar.set_postfix_str(f"loss {float(loss):.3f}", refresh=False)
            bar.update()

        params: chex.ArrayTree
        params, *_ = take_steps(
            lambda state, tokens: step(state, tokens, numbers),
            init(init_params(model, seed), numbers),
            batches(),
            look,
        )
        return params


@functools.partial(jax.jit, static_argnums=0)
def init_params(model: Transformer, seed: int) -> chex.ArrayTree:
    """Return the first weights."""
    tokens = jnp.zeros((1, model.context), jnp.int32)
    return model.init(jax.random.key(seed), tokens)["params"]


def rounded(params: chex.ArrayTree, bits: int, axis: int | None) -> chex.ArrayTree:
    """Return weights of so many bits; 32 are the floats."""
    return params if bits == 32 else _rounded(params, jnp.int32(bits), axis)


@functools.partial(jax.jit, static_argnames="axis")
def _rounded(params: chex.ArrayTree, bits: chex.Array, axis: int | None) -> Any:
    return quant.fake_quantize(params, bits, axis=axis)
