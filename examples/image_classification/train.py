"""One training step: the method's gradient, then an ordinary optax chain."""

import functools
import operator
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import hero_jax
from hero_jax import models

from .config import Config
from .pipeline import Pipeline

OUTPUTS = ("loss", "accuracy", "clean accuracy", "gradient norm", "penalty", "h")
"""What a step returns beside the new state, as one float32 array."""

DIRECTIONS: dict[str, Any] = {
    "rounding": hero_jax.perturbation.rounding(bits=4),
}
"""Directions that the library knows by no name."""


class Settings(NamedTuple):
    """Fields of a config that may differ between runs of one program, or be traced."""

    h: chex.Numeric
    gamma: chex.Numeric
    learning_rate: chex.Numeric
    weight_decay: chex.Numeric
    strength: chex.Numeric = 0.0
    share: chex.Numeric = 0.0

    @classmethod
    def of(cls, config: Config) -> "Settings":
        """Return those of a config."""
        return cls(*(getattr(config, name) for name in cls._fields))


class TrainState(NamedTuple):
    """All that changes from step to step.

    Attributes:
      step: micro-batches seen so far.
      params: weights.
      batch_stats: running statistics of BatchNorm, from the clean weights only.
      opt_state: of the optax chain.
      h: of the next step, before warm-up.
    """

    step: chex.Array
    params: chex.ArrayTree
    batch_stats: chex.ArrayTree
    opt_state: optax.OptState
    h: chex.Array


Step = Callable[[TrainState, Any], tuple[TrainState, chex.Array]]


class Program(NamedTuple):
    """The compiled functions of a run; the state that goes in is used up.

    All that comes out lies on the devices as `Devices.fetch` takes it.

    Attributes:
      init: `() -> state`.
      shapes: `() -> state` of shapes and dtypes; `ValueError` where network, data and
        options do not fit each other.
      step: `(state, item) -> (state, outputs [6])`, for one item of the pipeline.
      epoch: `(state, item) -> (state, outputs [steps, 6])`, all steps in one loop, for
        a pipeline that keeps its data on the device.
      schedule: `updates so far -> learning rate`.
    """

    init: Callable[[], TrainState]
    shapes: Callable[[], TrainState]
    step: Step
    epoch: Step
    schedule: optax.Schedule


def make_loss(model: nn.Module) -> Callable[..., Any]:
    """Return `(params, batch_stats, images, labels) -> (loss, (new, logits))`."""

    def loss_fn(
        params: chex.ArrayTree,
        batch_stats: chex.ArrayTree,
        images: chex.Array,
        labels: chex.Array,
    ) -> tuple[chex.Array, tuple[chex.ArrayTree, chex.Array]]:
        logits, new = model.apply(
            {"params": params, "batch_stats": batch_stats},
            images,
            train=True,
            mutable=["batch_stats"],
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), (new["batch_stats"], logits)

    return loss_fn


def make_model(config: Config, pipeline: Pipeline, synchronized: bool) -> nn.Module:
    """Return the network; its BatchNorm is that of all devices if synchronized."""
    return models.create(
        config.model,
        num_classes=pipeline.num_classes,
        dtype=np.dtype(config.dtype),
        axis_name=pipeline.devices.axis_name if synchronized else None,
    )


def warmed_up(value: chex.Numeric, steps: float) -> chex.Numeric | optax.Schedule:
    """Return a schedule that rises to a value, or the value if there are no steps."""
    whole = round(steps)
    return optax.linear_schedule(0.0, value, whole) if whole else value


def make_gamma(
    config: Config, steps_per_epoch: int, gamma: chex.Numeric
) -> chex.Numeric | optax.Schedule:
    """Return the strength of HERO's penalty, a function of the step if it changes."""
    strength = warmed_up(gamma, config.gamma_warmup_epochs * steps_per_epoch)
    if config.penalty_every > 1:
        strength = hero_jax.schedules.every(config.penalty_every, strength)
    return strength


def warmed_up_h(
    config: Config, steps_per_epoch: int, step: chex.Array, h: chex.Array
) -> chex.Array:
    """Return the h of a step: it grows over the first epochs if the config says so."""
    rise = warmed_up(1.0, config.h_warmup_epochs * steps_per_epoch)
    return h * rise(step) if callable(rise) else h


def make_penalty_mask(config: Config) -> Callable[[chex.ArrayTree], chex.ArrayTree]:
    """Return `params -> mask` of the weight tensors that are penalized."""
    pattern = re.compile(config.penalty_layers or "")

    def mask(params: chex.ArrayTree) -> chex.ArrayTree:
        def penalized(path: Any, x: chex.Array) -> bool:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return x.ndim >= 2 and pattern.search(name) is not None

        tree = jax.tree_util.tree_map_with_path(penalized, params)
        if not any(jax.tree.leaves(tree)):
            raise ValueError(
                "penalty_layers must be found in the path of a weight tensor, got "
                f"{config.penalty_layers!r}."
            )
        return tree

    return mask


def make_value_and_grad(
    config: Config,
    loss_fn: Callable[..., Any],
    pipeline: Pipeline,
    settings: Settings | None = None,
) -> Any:
    """Return `(step, h, *args of the loss) -> (value, gradient, metrics)`.

    Loss and gradient are those of the whole micro-batch, BatchNorm statistics and
    logits those of a device. The metrics are HERO's, or None of other methods. Settings
    replace those of the config.
    """
    settings = settings or Settings.of(config)
    axis, m = pipeline.devices.axis_name, config.examples_per_perturbation

    def over_parts(make: Callable[..., Any], **options: Any) -> Any:
        """Let all images, or as many as the config says, share a perturbation."""
        if m is None or not config.has_parts:
            return make(axis_name=axis, **options)
        parts = hero_jax.parts.in_parts(
            make(axis_name=None, **options), m, batch_argnums=(2, 3), has_aux=True
        )
        if axis is None:
            return parts
        return hero_jax.parts.averaged(parts, axis, has_aux=True)

    if config.method in ("hero", "first_order"):
        gamma = make_gamma(config, pipeline.steps, settings.gamma)
        make = functools.partial(
            hero_jax.hero_value_and_grad,
            loss_fn,
            perturbation=DIRECTIONS.get(config.perturbation, config.perturbation),
            reduction=config.reduction,
            perturb_mask=make_perturb_mask(config),
            penalty_mask=make_penalty_mask(config),
            hvp="exact" if config.hvp == "exact" else hero_jax.FiniteDifference(),
            hvp_loss_fn=make_hvp_loss(config, loss_fn, pipeline),
            has_aux=True,
            return_metrics=True,
        )

        def hero(step: chex.Array, h: chex.Numeric, *args: Any) -> Any:
            if isinstance(settings.h, float) and settings.h == 0.0:
                h = 0.0  # known now: the plain gradient

            def with_gamma(gamma: chex.Numeric) -> Any:
                return over_parts(make, h=h, gamma=gamma)(*args)

            if config.method == "first_order" or not callable(gamma):
                return with_gamma(gamma if config.method == "hero" else 0.0)
            now = gamma(step)  # leave out the product where a schedule is zero
            return lax.cond(now != 0, with_gamma, lambda _: with_gamma(0.0), now)

        return hero
    # Of strength 0: the plain gradient, with the same means over devices and parts.
    plain = over_parts(
        functools.partial(
            hero_jax.family.grad_l1_value_and_grad,
            loss_fn,
            strength=settings.strength if config.method == "grad_l1" else 0.0,
            has_aux=True,
        )
    )
    return lambda _step, _h, *args: (*plain(*args), None)


def next_h(
    h: chex.Array,
    loss: chex.Array,
    metrics: hero_jax.Metrics | None,
    classes: int,
    share: chex.Numeric,
) -> chex.Array:
    """Return that of the next step: the same, unless it follows the loss."""
    if metrics is None or (isinstance(share, float) and share == 0.0):
        return h
    following = hero_jax.schedules.next_h(
        h, loss, metrics.perturbed_loss, untrained_loss=np.log(classes), share=share
    )
    return jnp.where(share > 0.0, following, h)


def make_perturb_mask(config: Config) -> Any:
    """Return what `config.moved` says: which leaves; None is up to the direction."""
    if config.moved == "others":
        return lambda params: jax.tree.map(
            operator.not_, hero_jax.leaves.weights(params)
        )
    return {"all": True, "weights": hero_jax.leaves.weights, None: None}[config.moved]


def make_hvp_loss(
    config: Config, loss_fn: Callable[..., Any], pipeline: Pipeline
) -> Callable[..., Any] | None:
    """Return the loss over the evenly spaced images of HERO's product, if not all."""
    count = config.hvp_examples
    if count is None:
        return None
    if pipeline.devices.axis_name is not None and not config.has_parts:
        count //= pipeline.devices.count

    def spaced(x: chex.Array) -> chex.Array:  # of sharded images, from every device
        return x.reshape(count, -1, *x.shape[1:])[:, 0]

    return lambda params, batch_stats, images, labels: loss_fn(
        params, batch_stats, spaced(images), spaced(labels)
    )


def make_schedule(
    config: Config, updates: int, learning_rate: chex.Numeric
) -> optax.Schedule:
    """Return `updates so far -> learning rate`: a rise, if any, then half a cosine."""
    warmup = min(round(updates * config.warmup_epochs / config.epochs), updates - 1)
    cosine = optax.cosine_decay_schedule(learning_rate, updates - warmup)
    if not warmup:
        return cosine
    rise = optax.linear_schedule(0.0, learning_rate, warmup)
    return optax.join_schedules([rise, cosine], [warmup])


def make_optimizer(
    config: Config, steps: int, settings: Settings | None = None
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Return the chain behind the gradient, and its learning rate.

    Gradients are accumulated behind HERO: each micro-batch has its own perturbation,
    and the chain sees the mean of the micro-batches' gradients.
    """
    settings = settings or Settings.of(config)
    updates = steps // config.accumulation
    schedule = make_schedule(config, updates, settings.learning_rate)
    clip = optax.identity()
    if config.clip_norm is not None:
        clip = optax.clip_by_global_norm(config.clip_norm)
    if config.optimizer == "adamw":
        adamw = optax.adamw(
            schedule, config.momentum, weight_decay=settings.weight_decay
        )
        tx = optax.chain(clip, adamw)
    else:
        decay = optax.add_decayed_weights(settings.weight_decay)
        tx = optax.chain(clip, decay, optax.sgd(schedule, momentum=config.momentum))
    if config.accumulation == 1:
        return tx, schedule
    multi = optax.MultiSteps(tx, every_k_schedule=config.accumulation)
    return multi.gradient_transformation(), schedule


def make_functions(
    config: Config,
    model: nn.Module,
    pipeline: Pipeline,
    settings: Settings | None = None,
) -> tuple[
    Callable[[chex.PRNGKey], TrainState],
    Step,
    optax.Schedule,
]:
    """Return `key -> state`, `(state, item) -> (state, outputs)` and the schedule.

    Pure functions, for use in a program of the pipeline's devices. Settings, if any,
    replace those of the config.
    """
    devices, classes = pipeline.devices, pipeline.num_classes
    settings = settings or Settings.of(config)
    value_and_grad = make_value_and_grad(config, make_loss(model), pipeline, settings)
    tx, schedule = make_optimizer(config, config.epochs * pipeline.steps, settings)

    def init(key: chex.PRNGKey) -> TrainState:
        images = jnp.zeros((1, *pipeline.image_shape))
        variables = model.init(key, images, train=False)
        params = variables["params"]
        batch_stats, opt_state = variables["batch_stats"], tx.init(params)
        h = jnp.asarray(settings.h, jnp.float32)
        return TrainState(jnp.int32(0), params, batch_stats, opt_state, h)

    def step(state: TrainState, item: Any) -> tuple[TrainState, chex.Array]:
        batch = pipeline.batch(item, state.step)
        h = warmed_up_h(config, pipeline.steps, state.step, state.h)
        (loss, (batch_stats, logits)), grads, metrics = value_and_grad(
            state.step,
            h,
            state.params,
            state.batch_stats,
            batch.images,
            batch.labels,
        )
        if config.has_parts:  # outputs of all parts
            batch_stats = jax.tree.map(lambda x: x.mean(0), batch_stats)
            logits = logits.reshape(-1, logits.shape[-1])
        predicted = logits.argmax(-1)
        batch_stats, accuracy, clean_accuracy = devices.mean(
            (
                batch_stats,
                jnp.mean(predicted == batch.labels),
                jnp.mean(predicted == batch.clean_labels),
            )
        )
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        of_hero = (metrics.penalty, h) if metrics else (0.0, 0.0)
        outputs = jnp.stack(
            [loss, accuracy, clean_accuracy, optax.tree.norm(grads), *of_hero]
        )
        h = next_h(state.h, loss, metrics, classes, settings.share)
        return TrainState(state.step + 1, params, batch_stats, opt_state, h), outputs

    return init, step, schedule


def shapes_of(config: Config, init: Callable[[], TrainState]) -> TrainState:
    """Return the shapes of the state; `ValueError` if config and data do not fit."""
    try:
        shapes: TrainState = jax.eval_shape(init)
    except ValueError as error:
        raise ValueError(f"{config.model} does not fit the data: {error}") from None
    make_penalty_mask(config)(shapes.params)
    return shapes


def make_program(config: Config, model: nn.Module, pipeline: Pipeline) -> Program:
    """Build the functions that train a model on the data of a pipeline."""
    devices = pipeline.devices
    pure_init, step, schedule = make_functions(config, model, pipeline)
    init = jax.jit(pure_init)

    def epoch(state: TrainState, item: Any) -> tuple[TrainState, chex.Array]:
        return lax.scan(
            lambda state, _: step(state, item), state, length=pipeline.steps
        )

    key = jax.random.key(config.seed)

    return Program(
        lambda: devices.replicate(init(key)),
        lambda: shapes_of(config, lambda: init(key)),
        devices.compile(step, donate=True),
        devices.compile(epoch, donate=True),
        schedule,
    )
