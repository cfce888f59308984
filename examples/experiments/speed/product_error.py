"""How far the cheaper products with the Hessian are from the exact one.

    python -m examples.experiments.speed.product_error  # 4 minutes
    python -m examples.experiments.speed.product_error --npz cifar10.npz

ResNet20 is trained by 200 steps of SGD. On three batches of 128 images, v is what HERO
multiplies with the Hessian at U = W + hz: the difference of the gradients of the weight
tensors. `(grad L(U + e v) - grad L(U)) / e`, for a range of steps e, and the product
over parts of the batch are compared with the exact H(U) v. Errors are
`||a - Hv|| / ||Hv||`; medians over the batches. Without `--npz` (x_train, y_train)
the images are scikit-learn's digits, enlarged to 32x32.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from sklearn.datasets import load_digits
from tqdm import tqdm

import hero_jax
from examples.image_classification.train import make_loss
from hero_jax import models

from .harness import report, speed_parser

STEPS = tuple(float(f"{10.0**e:.1e}") for e in np.arange(-6.0, -0.9, 0.5))
PARTS = (2, 4, 8)
TRAINING_STEPS, BATCH, BATCHES = 200, 128, 3
GAMMA = 1e6
"""So large that the gradient without penalty does not round the product away."""


def load_npz(path: Path | None, count: int | None = None) -> tuple[Any, Any]:
    """Return standardized images `[N, H, W, C]` and labels; the digits if no path."""
    if path is None:
        digits = load_digits()
        images = np.kron(digits.images, np.ones((1, 4, 4)))[..., None]
        labels = digits.target
    else:
        with np.load(path, allow_pickle=False) as data:
            images, labels = data["x_train"][:count], data["y_train"][:count].ravel()
    images = images.astype(np.float32)
    axes = (0, 1, 2)
    return (images - images.mean(axes)) / images.std(axes), labels.astype(np.int32)


def train(model: Any, images: Any, labels: Any) -> Any:
    """Return weights and BatchNorm statistics after some steps of SGD."""
    value_and_grad = jax.value_and_grad(make_loss(model), has_aux=True)
    tx = optax.sgd(optax.linear_schedule(0.0, 0.1, 50), momentum=0.9)
    init = jax.jit(functools.partial(model.init, train=False))
    variables = init(jax.random.key(0), images[:1])

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, x: Any, y: Any) -> Any:
        params, stats, opt_state = state
        (_, (stats, _)), grads = value_and_grad(params, stats, x, y)
        updates, opt_state = tx.update(grads, opt_state)
        return optax.apply_updates(params, updates), stats, opt_state

    params, stats = variables["params"], variables["batch_stats"]
    state: Any = (params, stats, tx.init(params))
    rng = np.random.default_rng(0)
    for _ in tqdm(range(TRAINING_STEPS), desc="training", disable=None):
        rows = rng.choice(len(images), BATCH, replace=False)
        state = step(state, images[rows], labels[rows])
    return state[:2]


def make_product(loss_fn: Any, difference: bool = False, part: int = 1) -> Any:
    """Return the jitted `(step, *args) -> HERO's product`, flat.

    It is the difference that the penalty makes to the gradient, over twice gamma.
    """

    def of_part(params: Any, stats: Any, x: Any, y: Any) -> Any:
        return loss_fn(params, stats, x[::part], y[::part])

    @jax.jit
    def product(step: Any, *args: Any) -> Any:
        hvp = hero_jax.FiniteDifference(step) if difference else "exact"
        options: Any = {"h": 5.0, "has_aux": True, "hvp": hvp}
        options |= {"perturbation": "layerwise", "reduction": "sum"}
        if part > 1:
            options["hvp_loss_fn"] = of_part

        def gradient(gamma: float) -> Any:
            f = hero_jax.hero_value_and_grad(loss_fn, gamma=gamma, **options)
            return ravel_pytree(f(*args)[1])[0]

        return (gradient(GAMMA) - gradient(0.0)) / (2 * GAMMA)

    return product


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure; print a table and return the record."""
    parser = speed_parser(__doc__)
    parser.add_argument("--npz", type=Path, help="x_train and y_train")
    options = parser.parse_args(arguments)
    images, labels = load_npz(options.npz)
    model = models.create("resnet20", num_classes=10)
    state = train(model, images, labels)
    loss_fn = make_loss(model)
    exact, difference = make_product(loss_fn), make_product(loss_fn, difference=True)
    ways = {f"difference, step {e:.1e}": (difference, e) for e in STEPS}
    ways |= {f"product over 1/{k}": (make_product(loss_fn, part=k), 0.0) for k in PARTS}
    errors: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for i in tqdm(range(BATCHES), desc="measuring", disable=None):
        chosen = slice(i * BATCH, (i + 1) * BATCH)
        args = (*state, images[chosen], labels[chosen])
        expected = np.asarray(exact(0.0, *args))
        for name, (product, step) in ways.items():
            actual = np.asarray(product(step, *args))
            length = np.linalg.norm(expected)
            error = np.linalg.norm(actual - expected) / length
            cosine = actual @ expected / (np.linalg.norm(actual) * length)
            errors[name].append((float(error), float(cosine)))
    rows = [["", "relative error", "cosine"]]
    for name, values in errors.items():
        error, cosine = np.median(values, axis=0)
        rows.append([name, f"{error:.2g}", f"{cosine:.3f}"])
    return report(rows, options.out, relative_error_and_cosine=errors)


if __name__ == "__main__":
    main()
