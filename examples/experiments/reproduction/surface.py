"""The loss around the weights of a run: Figure 3, and the largest eigenvalue."""

from typing import Any

import jax
import numpy as np
import optax

from examples.image_classification import evaluate
from examples.image_classification.config import Config
from examples.image_classification.pipeline import Pipeline
from examples.image_classification.train import make_model
from hero_jax import curvature, landscape

POINTS = 21
"""Along each of two filter-normalized random directions, from -1 to 1."""

IMAGES = 500
"""Training images that the loss is a mean over."""

AT_ONCE = 125
"""Of these, that a product with the Hessian takes at once."""


def measure(
    config: Config, pipeline: Pipeline, variables: evaluate.Variables, surface: bool
) -> tuple[dict[str, float], dict[str, Any]]:
    """Return the largest eigenvalue of the Hessian, and the surface, if wanted."""
    model = make_model(config, pipeline, synchronized=True)
    item = pipeline.sample(1)[0]
    images, labels = (np.asarray(x)[:IMAGES] for x in (item.images, item.labels))
    params, batch_stats = variables["params"], variables["batch_stats"]

    def loss_fn(params: Any, images: Any, labels: Any) -> Any:
        logits: Any = model.apply(
            {"params": params, "batch_stats": batch_stats},
            pipeline.standardized(images),
            train=False,
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    data = (images, labels)
    top = curvature.top_eigenvalues(
        loss_fn, params, *data, batch_size=AT_ONCE, batch_argnums=(1, 2)
    )
    eigenvalue = {
        "value": float(f"{top.values[0]:.5g}"),
        "residual": float(f"{top.residuals[0]:.2g}"),
        "images": len(labels),
    }
    if not surface:
        return eigenvalue, {}
    directions = [
        landscape.filter_normalized(landscape.random_direction(key, params), params)
        for key in jax.random.split(jax.random.key(0))
    ]
    axis = np.linspace(-1.0, 1.0, POINTS, dtype=np.float32)
    losses = landscape.loss_surface(loss_fn, params, directions, [axis, axis], *data)
    rounded = [[float(f"{x:.5g}") for x in row] for row in np.asarray(losses)]
    where = {"axis": [round(float(x), 6) for x in axis], "images": len(labels)}
    return eigenvalue, {"surface": where | {"loss": rounded}}
