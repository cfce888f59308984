"""What a step of HERO moves: the share of its norm by which a tensor moves, by kind.

    python -m examples.experiments.directions.moves  # four minutes on 2 cores

Networks at their initial weights, for one batch of 64 random images and labels. Medians
over the tensors of a kind; beside them the kernels' share of `||z||^2`, and how long
the penalty's part of the gradient is, relative to all of it.
"""

import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax

import hero_jax
from examples.experiments.common.command_line import folder, make_parser
from examples.image_classification import results
from examples.image_classification.stopping import command
from hero_jax import leaves, models, perturbation, quant

from .tasks import FOLDER

SIZES = {"resnet20": 32, "resnet8": 16}


STEPS: dict[str, dict[str, Any]] = {
    "layerwise, h = 1": {
        "perturbation": "layerwise",
        "reduction": "sum",
        "h": 1.0,
        "gamma": 0.1,
    },
    "released code (adaptive, mean)": {
        "perturbation": "adaptive",
        "reduction": "mean",
        "h": 0.5,
        "gamma": 5.0,
    },
    "normalized (SAM), h = 0.05": {
        "perturbation": "normalized",
        "h": 0.05,
        "gamma": 0.0,
    },
    "relative, h = 0.02": {
        "perturbation": "relative",
        "reduction": "norm",
        "h": 0.02,
        "gamma": 0.5,
    },
    "rounding to 4 bits, h = 1": {
        "perturbation": perturbation.rounding(bits=4),
        "reduction": "norm",
        "h": 1.0,
        "gamma": 0.5,
    },
}
"""Arguments of `hero_value_and_grad`."""


def measure(name: str, seed: int) -> dict[str, dict[str, float]]:
    """Return what each step moves of a network, and what rounding to 4 bits moves."""
    size, keys = SIZES[name], jax.random.split(jax.random.key(seed), 3)
    images = jax.random.normal(keys[0], (64, size, size, 3))
    labels = jax.random.randint(keys[1], (64,), 0, 10)
    model = models.create(name, num_classes=10)
    variables = model.init(keys[2], images[:1], train=False)

    def loss_fn(params: Any) -> Any:
        logits, _ = model.apply(
            {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean()

    params = variables["params"]
    g = jax.jit(jax.grad(loss_fn))(params)
    kinds = np.array([leaf.kind for leaf in jax.tree.leaves(leaves.describe(params))])

    def norms(tree: Any) -> np.ndarray:
        return np.array([np.linalg.norm(x) for x in jax.tree.leaves(tree)])

    lengths = norms(params)

    def medians(step: np.ndarray) -> dict[str, float]:
        shares = {}
        for kind in ("kernel", "normalization"):
            of_kind = (kinds == kind) & (lengths > 0)  # biases begin as zeros
            shares[kind] = float(np.median(step[of_kind] / lengths[of_kind]))
        part = (step[kinds == "kernel"] ** 2).sum() / (step**2).sum()
        return shares | {"kernels": float(part)}

    rows = {}
    for title, step in STEPS.items():
        hero = hero_jax.hero_value_and_grad(loss_fn, **step, return_metrics=True)
        _, grads, metrics = jax.jit(hero)(params)
        moved = perturbation.share_moved(
            params, g, h=step["h"], perturbation=step["perturbation"]
        )
        rows[title] = medians(norms(moved) * lengths)
        share = metrics.penalty_grad_norm / optax.tree.norm(grads)
        rows[title]["penalty"] = float(share)
    rounded = quant.dequantize(quant.quantize(params, bits=4))
    rows["rounding to 4 bits itself"] = medians(
        norms(jax.tree.map(lambda a, b: a - b, params, rounded))
    )
    return rows


def table(rows: dict[str, dict[str, float]]) -> str:
    """Format the rows of a network."""
    titles = ["step", "kernel", "scale", "kernels' part of ‖z‖²", "penalty's part"]
    lines = [titles]
    for title, row in rows.items():
        names = ("kernel", "normalization", "kernels", "penalty")
        cells = [
            f"{100 * row[x]:.{3 if row[x] > 0.995 else 2}g} %" if x in row else ""
            for x in names
        ]
        lines.append([title, *cells])
    return results.markdown(lines)


@command
def main(arguments: Sequence[str]) -> None:
    """Print the tables and write `moves.json`."""
    parser = make_parser(__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=folder, default=str(FOLDER))
    options = parser.parse_args(arguments)
    networks = {name: measure(name, options.seed) for name in SIZES}
    for name, rows in networks.items():
        print(f"\n{name}\n\n{table(rows)}")
    record = {"environment": results.environment(), "seed": options.seed}
    results.write_json(options.results / "moves.json", record | {"networks": networks})


if __name__ == "__main__":
    sys.exit(main())
