"""Show what HERO's metrics look like where it does nothing, its work, and too much.

The quick start's network is trained with three lengths of the step h and one gamma; the
metrics are those of the whole training set after each epoch. They tell the three cases
apart, which the training loss does not.

    python -m examples.experiments.diagnose  # about half a minute on 2 cores

It prints a table of the last epoch, and writes all epochs as JSON and a picture.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from matplotlib.figure import Figure
from tqdm import tqdm

import hero_jax
from examples.experiments.common import digits as quickstart
from examples.experiments.common.command_line import check_training_options
from examples.experiments.common.digits import Data, Method, TrainState
from examples.image_classification.results import (
    environment,
    markdown,
    write_figure,
    write_json,
)

GAMMA = 0.1
CASES = {"nothing": 0.5, "its work": 15.0, "too much": 60.0}
"""What HERO does, and the h that makes it do so; 15 is the quick start's."""
COLORS = {"nothing": "#D55E00", "its work": "#0072B2", "too much": "#555555"}
TITLES = {
    "loss": "loss at W",
    "rise": "L(U) - L(W)",
    "step": "h ‖z‖ / ‖W‖",
    "gradients": "‖∇L(U)‖ / ‖∇L(W)‖",
    "share": "gamma ‖∇G(U)‖ / ‖∇L(U)‖",
    "hessian_norm": "‖Hz‖",
}


def readings(h: float, state: TrainState, data: Data) -> dict[str, Any]:
    """Return what `TITLES` names, on the training set."""
    arguments = state.params, state.batch_stats, data.train_images, data.train_labels

    def hero(gamma: float) -> tuple[Any, Any, hero_jax.Metrics]:
        value_and_grad = hero_jax.hero_value_and_grad(
            quickstart.loss_fn, h=h, gamma=gamma, has_aux=True, return_metrics=True
        )
        (loss, _), gradient, metrics = value_and_grad(*arguments)
        return loss, gradient, metrics

    loss, whole, metrics = hero(GAMMA)
    _, first_order, _ = hero(0.0)
    penalty = jax.tree.map(lambda a, b: a - b, whole, first_order)
    return {
        "loss": loss,
        "rise": metrics.perturbed_loss - loss,
        "step": h * metrics.perturbation_norm / optax.tree.norm(state.params),
        "gradients": metrics.perturbed_grad_norm / metrics.grad_norm,
        "share": optax.tree.norm(penalty) / metrics.perturbed_grad_norm,
        "hessian_norm": metrics.hessian_norm,
    }


def run(h: float, data: Data, epochs: int, progress: tqdm) -> dict[str, Any]:
    """Train from seed 0; return the readings of every epoch and the accuracies."""
    method = Method(hero_jax.hero_value_and_grad, {"h": h, "gamma": GAMMA})
    steps = len(data.train_labels) // quickstart.BATCH_SIZE
    program = quickstart.make_program(method, epochs * steps)
    read = jax.jit(readings)
    history: list[dict[str, Any]] = []
    state = quickstart.train(
        *(program, data, epochs, 0, progress),
        after_epoch=lambda state: history.append(read(h, state, data)),
    )
    return {
        "h": h,
        "epochs": {name: [float(x[name]) for x in history] for name in TITLES},
        "test_accuracy": {
            str(bits): 100 * float(quickstart.evaluate(state, data, bits))
            for bits in (32, 4)
        },
    }


def table(cases: dict[str, dict[str, Any]]) -> str:
    """Format the last epoch."""
    rows = [["", *(f"{name}: h = {case['h']:g}" for name, case in cases.items())]]
    for name, title in TITLES.items():
        last = [case["epochs"][name][-1] for case in cases.values()]
        rows.append([title, *(f"{x:.2g}" for x in last)])
    for bits, title in (("32", "float"), ("4", "4 bits")):
        accuracies = [case["test_accuracy"][bits] for case in cases.values()]
        rows.append([f"test accuracy, {title}", *(f"{x:.1f} %" for x in accuracies)])
    return markdown(rows)


def plot(cases: dict[str, dict[str, Any]]) -> Figure:
    """Draw every reading over the epochs."""
    figure = Figure(figsize=(8.0, 4.8), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True)
    for panel, (name, title) in zip(panels.flat, TITLES.items(), strict=True):
        for case, record in cases.items():
            values = record["epochs"][name]
            panel.plot(
                np.arange(1, len(values) + 1),
                values,
                color=COLORS[case],
                label=f"{case} (h = {record['h']:g})",
            )
        panel.set(yscale="log", title=title)
        panel.grid(alpha=0.3)
    for panel in panels[1]:
        panel.set_xlabel("epoch")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(cases))
    return figure


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Train the three cases, print the table, write JSON and picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--epochs", type=int, default=40)
    add("--label-noise", type=float, default=0.4, help="share of labels redrawn, 0-1")
    add("--out", type=Path, default=Path("diagnose_results"), help="folder to write")
    add("--quiet", action="store_true", help="show no progress bars")
    options = parser.parse_args(arguments)
    check_training_options(parser, options)

    data = quickstart.load_data(options.label_noise, seed=0)
    images = len(data.train_labels) // quickstart.BATCH_SIZE * quickstart.BATCH_SIZE
    cases = {}
    for name, h in CASES.items():
        with tqdm(
            total=images * options.epochs,
            desc=f"h = {h:g}",
            unit="images",
            unit_scale=True,
            disable=options.quiet,
        ) as progress:
            cases[name] = run(h, data, options.epochs, progress)
    record = {
        "environment": environment(),
        "gamma": GAMMA,
        "label_noise": options.label_noise,
        "seed": 0,
        "cases": cases,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "diagnose.json", record)
    write_figure(options.out / "diagnose.png", plot(cases), 150)
    print(table(cases))
    return record


if __name__ == "__main__":
    main()
