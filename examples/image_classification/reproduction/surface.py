"""The loss around the weights of a run, for Figure 3."""

from typing import Any

import jax
import numpy as np
import optax

from hero_jax import landscape

from .. import evaluate
from ..array_pipeline import ArrayPipeline
from ..config import Config
from ..train import make_model

POINTS = 21
"""Along each of two filter-normalized random directions, from -1 to 1."""

IMAGES = 500
"""Training images that the loss is a mean over."""


def measure(
    config: Config, pipeline: ArrayPipeline, variables: evaluate.Variables
) -> dict[str, Any]:
    """Return coordinates and the loss on a grid, with the statistics of the weights.

    Args:
      config: of the run.
      pipeline: its data, with its labels.
      variables: what it came to.
    """
    model = make_model(config, pipeline, synchronized=True)
    item = pipeline.sample(1)[0]
    images, labels = item.images[:IMAGES], item.labels[:IMAGES]

    def loss_fn(params: Any, batch_stats: Any, images: Any, labels: Any) -> Any:
        logits: Any = model.apply(
            {"params": params, "batch_stats": batch_stats},
            pipeline.standardized(images),
            train=False,
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    params = variables["params"]
    directions = [
        landscape.filter_normalized(landscape.random_direction(key, params), params)
        for key in jax.random.split(jax.random.key(0))
    ]
    axis = np.linspace(-1.0, 1.0, POINTS, dtype=np.float32)
    batch_stats = variables["batch_stats"]
    surface = landscape.loss_surface(
        loss_fn, params, directions, [axis, axis], batch_stats, images, labels
    )
    return {
        "axis": [round(float(x), 6) for x in axis],
        "images": len(labels),
        "loss": [[float(f"{x:.5g}") for x in row] for row in np.asarray(surface)],
    }
