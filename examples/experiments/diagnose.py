"""Show what HERO's metrics look like where it does nothing, its work, and too much.

The quick start's network is trained with three lengths of the step h and one gamma; the
metrics are those of the whole training set after each epoch. They tell the three cases
apart, which the training loss does not.

    python -m examples.experiments.diagnose  # about half a minute on 2 cores
"""

import argparse
from collections.abc import Sequence
from typing import Any

import jax
import optax
from matplotlib.figure import Figure

from examples.experiments.common import command_line, digits
from examples.experiments.common.digits import Data, Method, TrainState
from examples.image_classification import results

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
    options: Any = {"h": h, "has_aux": True, "return_metrics": True}
    hero = digits.hero_value_and_grad(digits.loss_fn, gamma=GAMMA, **options)
    (loss, _), whole, metrics = hero(*arguments)
    without = digits.hero_value_and_grad(digits.loss_fn, gamma=0.0, **options)
    _, first_order, _ = without(*arguments)
    penalty = jax.tree.map(lambda a, b: a - b, whole, first_order)
    return {
        "loss": loss,
        "rise": metrics.perturbed_loss - loss,
        "step": h * metrics.perturbation_norm / optax.tree.norm(state.params),
        "gradients": metrics.perturbed_grad_norm / metrics.grad_norm,
        "share": optax.tree.norm(penalty) / metrics.perturbed_grad_norm,
        "hessian_norm": metrics.hessian_norm,
    }


def run(name: str, h: float, options: argparse.Namespace) -> dict[str, Any]:
    """Train from seed 0; return the readings of every epoch and the accuracies."""
    data = digits.load_data(options.label_noise, seed=0)
    steps = options.epochs * (len(data.train_labels) // digits.BATCH_SIZE)
    method = Method(digits.hero_value_and_grad, {"h": h, "gamma": GAMMA})
    program, read = digits.make_program(method, steps), jax.jit(readings)
    history: list[dict[str, Any]] = []
    with digits.progress_bar(f"{name}, h = {h:g}", steps, options.quiet) as progress:
        state = digits.train(
            *(program, data, options.epochs, 0, progress),
            after_epoch=lambda state: history.append(read(h, state, data)),
        )
    accuracy = {b: 100 * float(digits.evaluate(state, data, b)) for b in (32, 4)}
    return {
        "h": h,
        "epochs": {key: [float(x[key]) for x in history] for key in TITLES},
        "test_accuracy": {str(bits): value for bits, value in accuracy.items()},
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
    return results.markdown(rows)


def plot(cases: dict[str, dict[str, Any]]) -> Figure:
    """Draw every reading over the epochs."""
    figure = Figure(figsize=(8.0, 4.8), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True)
    for panel, (name, title) in zip(panels.flat, TITLES.items(), strict=True):
        for case, record in cases.items():
            values = record["epochs"][name]
            label = f"{case} (h = {record['h']:g})"
            panel.plot(range(1, len(values) + 1), values, c=COLORS[case], label=label)
        panel.set(yscale="log", title=title)
        panel.grid(alpha=0.3)
    for panel in panels[1]:
        panel.set_xlabel("epoch")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(cases))
    return figure


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Train the three cases, print the table, write JSON and picture."""
    parser = command_line.training_parser(__doc__, "diagnose_results")
    options = parser.parse_args(arguments)
    cases = {name: run(name, h, options) for name, h in CASES.items()}
    record = {"environment": results.environment(), "gamma": GAMMA}
    record |= {"label_noise": options.label_noise, "seed": 0, "cases": cases}
    results.write_json(options.out / "diagnose.json", record)
    results.write_figure(options.out / "diagnose.png", plot(cases), 150)
    print(table(cases))
    return record


if __name__ == "__main__":
    main()
