"""What eigenvalue and trace cost, in gradients and in seconds.

    python -m examples.experiments.speed.curvature  # ResNet20, 1,000 images of noise
    python -m examples.experiments.speed.curvature --npz cifar10.npz

Over the same images: one gradient, one product with the Hessian, the largest eigenvalue
to a relative residual of 1e-3 with the fewest steps of 10, 20 and 40, and the trace by
16 probes, and by 8 probes after a deflation by 8. The weights are initial ones: the
cost does not depend on them, but the residual and the standard errors do.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from examples.experiments.common.command_line import at_least
from examples.experiments.common.networks import make_loss
from examples.experiments.common.turns import clock
from hero_jax import curvature, models

from .harness import report, speed_parser
from .product_error import load_npz

STEPS = (10, 20, 40)
ENOUGH = 1e-3


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure; print the table and return the record."""
    parser = speed_parser(__doc__)
    add = parser.add_argument
    add("--images", type=at_least(1), default=1000)
    add("--size", type=at_least(1), default=32, help="of random images")
    add("--batch-size", type=at_least(1), default=250)
    add("--npz", type=Path, help="file with x_train and y_train")
    options = parser.parse_args(arguments)
    if options.npz is None:
        shape = (options.images, options.size, options.size, 3)
        images: Any = jax.random.normal(jax.random.key(0), shape)
        labels: Any = jax.numpy.arange(options.images) % 10
    else:
        images, labels = load_npz(options.npz, options.images)
    model = models.create("resnet20", num_classes=10)
    init = jax.jit(functools.partial(model.init, train=False))
    variables = init(jax.random.key(0), images[:1])
    loss, params = make_loss(model, "running"), variables["params"]
    args = (variables["batch_stats"], images, labels)
    chunks: Any = {"batch_size": options.batch_size, "batch_argnums": (2, 3)}

    def call(function: Any, *first: Any, **settings: Any) -> tuple[float, Any]:
        program = functools.partial(
            function, loss, params, *first, *args, **settings, **chunks
        )
        clock(program)  # compiles
        return clock(program)

    gradient = min(call(curvature.loss_and_gradient)[0] for _ in range(3))
    rows = [["", "products", "s", "gradients", "result"]]
    rows.append(["gradient", "0", f"{gradient:.2f}", "1.0", ""])
    record: dict[str, dict[str, Any]] = {}

    def add_row(what: str, products: int, seconds: float, result: str) -> None:
        ratio = seconds / gradient
        rows.append([what, str(products), f"{seconds:.2f}", f"{ratio:.1f}", result])
        record[what] = {"products": products, "seconds": seconds}
        record[what] |= {"gradients": ratio, "result": result}

    add_row("Hessian-vector product", 1, call(curvature.hvp, params)[0], "")
    for steps in STEPS:
        seconds, top = call(curvature.top_eigenvalues, steps=steps)
        value, residual = top.values[0], top.residuals[0]
        text = f"{value:.5g}, residual {residual:.1g}"
        add_row(f"top_eigenvalues, {steps} steps", steps + 1, seconds, text)
        if residual <= ENOUGH * abs(value):
            break
    for probes, deflation in ((16, 0), (8, 8)):
        settings = {"num_samples": probes, "deflation": deflation}
        seconds, trace = call(curvature.trace, **settings)
        text = f"{trace.whole.value:.4g} ± {trace.whole.stderr:.2g}"
        what = f"trace, {probes} probes, deflation {deflation}"
        add_row(what, probes + deflation, seconds, text)
    return report(rows, options.out, gradient_seconds=gradient, rows=record)


if __name__ == "__main__":
    main()
