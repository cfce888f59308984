"""How far the cheaper products with the Hessian are from the exact one.

A network is trained by SGD for some steps. On a few batches, v is what HERO multiplies
with the Hessian at U = W + hz: the difference of the gradients of the weight tensors.
`(grad L(U + e v) - grad L(U)) / e`, for a range of steps e, and the product over parts
of the batch are compared with the exact H(U) v.

    python -m examples.experiments.speed.product_error  # 4 minutes
    python -m examples.experiments.speed.product_error --npz cifar10.npz --out product_error.json

Without `--npz` (x_train, y_train) the images are scikit-learn's digits, enlarged to
32x32. Errors are `||a - Hv|| / ||Hv||`; medians over the batches.
"""

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from tqdm import tqdm

import hero_jax
from examples.image_classification.results import environment, markdown, write_json
from examples.image_classification.train import make_loss
from hero_jax import models

STEPS = tuple(float(f"{10.0**e:.1e}") for e in np.arange(-6.0, -0.9, 0.5))
PARTS = (2, 4, 8)


def load_images(path: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Return standardized images `[N, H, W, C]` and labels."""
    if path is None:
        digits = load_digits()
        images = np.kron(digits.images, np.ones((1, 4, 4)))[..., None]
        labels = digits.target
    else:
        with np.load(path, allow_pickle=False) as data:
            images, labels = data["x_train"], data["y_train"].ravel()
    images = images.astype(np.float32)
    axes = (0, 1, 2)
    return (images - images.mean(axes)) / images.std(axes), labels.astype(np.int32)


def train(model: Any, images: Any, labels: Any, steps: int, batch: int) -> Any:
    """Return weights and BatchNorm statistics after some steps of SGD."""
    loss_fn = make_loss(model)
    tx = optax.sgd(optax.linear_schedule(0.0, 0.1, 50), momentum=0.9)
    variables = jax.jit(functools.partial(model.init, train=False))(
        jax.random.key(0), images[:1]
    )
    params, stats = variables["params"], variables["batch_stats"]

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, x: Any, y: Any) -> Any:
        params, stats, opt_state = state
        (loss, (stats, _)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            params, stats, x, y
        )
        updates, opt_state = tx.update(grads, opt_state)
        return (optax.apply_updates(params, updates), stats, opt_state), loss

    state: Any = (params, stats, tx.init(params))
    rng = np.random.default_rng(0)
    for _ in (bar := tqdm(range(steps), desc="training")):
        rows = rng.choice(len(images), batch, replace=False)
        state, loss = step(state, images[rows], labels[rows])
        bar.set_postfix(loss=f"{float(loss):.3f}")
    return state[:2]


def over_every(k: int, loss_fn: Any, params: Any, stats: Any, x: Any, y: Any) -> Any:
    """Return the loss over every k-th example."""
    return loss_fn(params, stats, x[::k], y[::k])


def make_product(loss_fn: Any, difference: bool = False, **options: Any) -> Any:
    """Return the jitted `(step, *args) -> HERO's product`, flat.

    Twice gamma times the product is the difference that the penalty makes; gamma is so
    large that the gradient without penalty does not round it away.
    """
    gamma = 1e6

    @jax.jit
    def product(step: Any, *args: Any) -> Any:
        hvp = hero_jax.FiniteDifference(step) if difference else "exact"

        def gradient(gamma: float) -> Any:
            return hero_jax.hero_value_and_grad(
                loss_fn,
                gamma=gamma,
                has_aux=True,
                hvp=hvp,
                **options,
            )(*args)[1]

        with_penalty, without = gradient(gamma), gradient(0.0)
        return jnp.concatenate(
            [
                (a - b).ravel() / (2 * gamma)
                for a, b in zip(
                    *map(jax.tree.leaves, (with_penalty, without)), strict=True
                )
            ]
        )

    return product


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure; print a table and return the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--npz", type=Path, help="x_train and y_train")
    parser.add_argument("--model", default="resnet20", help="as in hero_jax.models")
    parser.add_argument("--steps", type=int, default=200, help="of SGD beforehand")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--h", type=float, default=5.0)
    parser.add_argument("--perturbation", default="layerwise")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    if options.batch < 1 or options.batch % max(PARTS):
        parser.error(
            f"--batch must be a multiple of {max(PARTS)}, of which parts are taken, "
            f"got {options.batch}."
        )
    images, labels = load_images(options.npz)
    if not 1 <= options.batches <= len(images) // options.batch:
        parser.error(
            f"--batches must be 1 to {len(images) // options.batch}, of "
            f"{options.batch} from {len(images)} images, got {options.batches}."
        )
    model = models.create(options.model, num_classes=10)
    params, stats = train(model, images, labels, options.steps, options.batch)
    loss_fn = make_loss(model)
    settings = {"h": options.h, "perturbation": options.perturbation}
    exact = make_product(loss_fn, **settings)
    difference = make_product(loss_fn, difference=True, **settings)
    ways = {
        f"difference, step {step:.1e}": functools.partial(difference, step)
        for step in STEPS
    }
    for k in PARTS:
        some = functools.partial(over_every, k, loss_fn)
        part = make_product(loss_fn, hvp_loss_fn=some, **settings)
        ways[f"product over 1/{k}"] = functools.partial(part, STEPS[0])
    errors: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    with tqdm(total=options.batches * len(ways), desc="measuring") as bar:
        for index in range(options.batches):
            rows = slice(index * options.batch, (index + 1) * options.batch)
            args = (params, stats, images[rows], labels[rows])
            expected = np.asarray(exact(STEPS[0], *args))
            for name, way in ways.items():
                actual = np.asarray(way(*args))
                lengths = np.linalg.norm(actual), np.linalg.norm(expected)
                error = np.linalg.norm(actual - expected) / lengths[1]
                cosine = actual @ expected / np.prod(lengths)
                errors[name].append((float(error), float(cosine)))
                bar.update()
    medians = {name: np.median(values, axis=0) for name, values in errors.items()}
    rows_ = [["", "relative error", "cosine"]]
    rows_ += [[name, f"{e:.2g}", f"{c:.3f}"] for name, (e, c) in medians.items()]
    print(markdown(rows_))
    record = {
        "environment": environment(),
        "options": {k: str(v) for k, v in vars(options).items() if k != "out"},
        "relative_error_and_cosine": errors,
    }
    if options.out is not None:
        write_json(options.out, record)
    return record


if __name__ == "__main__":
    main()
