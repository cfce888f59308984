"""Test accuracy at any precision, and the curvature around the weights."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import hero_jax

from .config import Config
from .errors import DatasetError
from .pipeline import EvaluationBatch, Pipeline
from .train import TrainState, make_loss

Variables = dict[str, chex.ArrayTree]


class Evaluation(NamedTuple):
    """Cross-entropy and share of right answers, over all readable test images."""

    loss: float
    accuracy: float


def make_evaluate(
    model: nn.Module, pipeline: Pipeline
) -> Callable[[Sequence[Variables]], list[Evaluation]]:
    """Return a function that tests several networks in one pass over the data.

    Of the last batch only the real images count. The devices share out each batch.
    """
    devices = pipeline.devices.sharded

    def totals(variables: Variables, item: Any) -> chex.Array:
        def of_batch(batch: EvaluationBatch) -> chex.Array:
            images = pipeline.standardized(batch.images)
            logits: Any = model.apply(variables, images, train=False)
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits, batch.labels
            )
            correct = logits.argmax(-1) == batch.labels
            each = jnp.stack([losses, correct, jnp.ones_like(losses)])
            return jnp.where(batch.real, each, 0.0).sum(1)

        return lax.map(of_batch, pipeline.test_batches(item)).sum(0)

    compiled = devices.compile(totals)

    def evaluate(networks: Sequence[Variables]) -> list[Evaluation]:
        parts: list[list[chex.Array]] = []
        networks = devices.replicate([*networks])
        for item in pipeline.test_items():
            parts.append([compiled(variables, item) for variables in networks])
            jax.block_until_ready(parts[-2:-1])  # one item ahead, not all of them
        sums = np.sum(np.asarray(parts, np.float64), axis=0)
        if not sums[0, 2]:
            raise DatasetError("none of the test images can be read.")
        return [Evaluation(float(a / n), float(b / n)) for a, b, n in sums]

    return evaluate


def variables_of(state: TrainState) -> Variables:
    """Return what the model is applied with, of a state on the host."""
    return {"params": state.params, "batch_stats": state.batch_stats}


def quantized(variables: Variables, bits: int, axis: int | None = None) -> Variables:
    """Return the network with weights of so many bits, still as floats.

    Tensors have one grid each, or one for every index along an axis: -1 for channels.
    """
    params = hero_jax.quant.fake_quantize(variables["params"], bits, axis=axis)
    return variables | {"params": params}


def make_measure(
    config: Config, model: nn.Module, pipeline: Pipeline
) -> Callable[..., dict[str, float]]:
    """Return a function that measures gradient and curvature on a few batches.

    The same for all methods: z of Eq. 11, a step of `curvature_h`, and in every epoch
    the first training batches, with noisy labels, of the first epoch.
    """
    devices = pipeline.devices
    value_and_grad = hero_jax.hero_value_and_grad(
        make_loss(model),
        h=config.curvature_h,
        gamma=0.0,
        perturbation="layerwise",
        has_aux=True,
        return_metrics=True,
        axis_name=devices.axis_name,
    )
    items = pipeline.sample(config.curvature_batches)

    def of_batch(variables: Variables, item: Any, step: chex.Array) -> chex.Array:
        batch = pipeline.batch(item, step)
        *_, metrics = value_and_grad(
            variables["params"], variables["batch_stats"], batch.images, batch.labels
        )
        return jnp.stack([metrics.hessian_norm, metrics.penalty, metrics.grad_norm])

    compiled = devices.compile(of_batch)
    steps = [devices.replicate(np.int32(k)) for k in range(len(items))]

    def measure(variables: Variables) -> dict[str, float]:
        pairs = zip(items, steps, strict=True)
        values = [compiled(variables, item, step) for item, step in pairs]
        means = np.mean(np.asarray(devices.fetch(values), np.float64), axis=0)
        names = ("hessian_norm", "penalty", "grad_norm")
        return dict(zip(names, map(float, means), strict=True))

    return measure
