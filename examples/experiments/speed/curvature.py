"""What eigenvalue and trace cost, in gradients and in seconds.

    python -m examples.experiments.speed.curvature  # ResNet20, 1,000 images
    python -m examples.experiments.speed.curvature --npz cifar10.npz    # of that file

Everything is over the same images: one gradient, one product with the Hessian, the
largest eigenvalue to a relative residual of 1e-3 with the fewest steps of 10, 20 and
40, and the trace by 16 probes, and by 8 probes after a deflation by 8. The weights are
initial ones, unless a run of the training recipe is named; the cost does not depend on
them, but the residual and the standard errors do.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from examples.experiments.common.networks import make_loss
from examples.image_classification.results import environment, markdown, write_json
from hero_jax import curvature, models, quant

STEPS = (10, 20, 40)
ENOUGH = 1e-3


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="resnet20")
    add("--images", type=int, default=1000)
    add("--size", type=int, default=32, help="of random images")
    add("--batch-size", type=int, default=250)
    add("--npz", type=Path, help="file with x_train and y_train, instead of noise")
    add("--weights", type=Path, help="weights.safetensors of a run with 10 classes")
    add("--out", type=Path, help="JSON file to write")
    return parser.parse_args(arguments)


def load_images(options: argparse.Namespace) -> tuple[Any, Any]:
    """Return standardized images and labels."""
    if options.npz is None:
        shape = (options.images, options.size, options.size, 3)
        images = jax.random.normal(jax.random.key(0), shape)
        return images, jnp.arange(options.images) % 10
    with np.load(options.npz, allow_pickle=False) as file:
        images = file["x_train"][: options.images].astype(np.float32)
        labels = file["y_train"][: options.images].reshape(-1).astype(np.int32)
    standardized = (images - images.mean((0, 1, 2))) / images.std((0, 1, 2))
    return jnp.asarray(standardized), jnp.asarray(labels)


def seconds(function: Callable[[], Any], repeats: int = 1) -> tuple[Any, float]:
    """Return the result and the least time of a call, after one that compiles."""
    result = jax.block_until_ready(function())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    return result, min(times)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure; print the table and return the record."""
    options = parse(arguments)
    model = models.create(options.model, num_classes=10)
    images, labels = load_images(options)
    variables = jax.jit(lambda key: model.init(key, images[:1], train=False))(
        jax.random.key(0)
    )
    if options.weights is not None:
        like = jax.eval_shape(lambda: variables)
        variables = quant.load(options.weights, like=dict(like))
    params = variables["params"]
    problem: Any = (make_loss(model, "running"), params)
    args = (variables["batch_stats"], images, labels)
    chunks: Any = {"batch_size": options.batch_size, "batch_argnums": (2, 3)}

    _, gradient = seconds(
        lambda: curvature.loss_and_gradient(*problem, *args, **chunks), repeats=3
    )
    rows = [["", "products", "s", "gradients", "result"]]
    record: dict[str, Any] = {"environment": environment(), "rows": {}}

    def add(what: str, products: int, function: Callable[[], Any], show: Any) -> Any:
        result, elapsed = seconds(function)
        gradients = elapsed / gradient
        rows.append(
            [what, str(products), f"{elapsed:.2f}", f"{gradients:.1f}", show(result)]
        )
        record["rows"][what] = {
            "products": products,
            "seconds": elapsed,
            "gradients": gradients,
            "result": show(result),
        }
        return result

    record["gradient_seconds"] = gradient
    rows.append(["gradient", "0", f"{gradient:.2f}", "1.0", ""])
    add(
        "Hessian-vector product",
        1,
        lambda: curvature.hvp(*problem, params, *args, **chunks),
        lambda _: "",
    )
    for steps in STEPS:
        top = add(
            f"top_eigenvalues, {steps} steps",
            steps + 1,
            lambda steps=steps: curvature.top_eigenvalues(  # type: ignore[misc]
                *problem, *args, steps=steps, **chunks
            ),
            lambda top: f"{top.values[0]:.5g}, residual {top.residuals[0]:.1g}",
        )
        if top.residuals[0] <= ENOUGH * abs(top.values[0]):
            break
    for probes, deflation in ((16, 0), (8, 8)):
        add(
            f"trace, {probes} probes, deflation {deflation}",
            probes + deflation,
            lambda probes=probes, deflation=deflation: (
                curvature.trace(  # type: ignore[misc]
                    *problem, *args, num_samples=probes, deflation=deflation, **chunks
                ).whole
            ),
            lambda trace: f"{trace.value:.4g} ± {trace.stderr:.2g}",
        )
    print(markdown(rows))
    if options.out is not None:
        write_json(options.out, record)
    return record


if __name__ == "__main__":
    main()
