"""Quantize trained networks to 8 to 2 bits and draw their accuracy: Figure 1.

Takes the weights that the quick start saves; without any, trains SGD and HERO first
(half a minute on 2 cores). Nothing is retrained: the same float weights are quantized
to each precision, and all precisions of a network run in one program.

    python -m examples.experiments.accuracy_against_bits
    python -m examples.experiments.accuracy_against_bits --all  # all quantizers

    python examples/quickstart.py --out out
    python -m examples.experiments.accuracy_against_bits out/weights/*_seed?.safetensors

Files that differ in the seed alone are averaged.
"""

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from examples.experiments.common import command_line, digits
from examples.experiments.common.comparison import plot_against_bits
from examples.experiments.common.networks import load, make_logits, train
from examples.experiments.common.statistics import cell, summary
from examples.image_classification import results
from hero_jax import quant

BITS = (32, 8, 7, 6, 5, 4, 3, 2)
CALIBRATION_BATCH = 100
MOMENTUM = 0.9  # of the running statistics of `ConvNet`

Accuracies = dict[str, dict[str, list[dict[str, Any]]]]
"""By setting of the quantizer, network and number of bits."""

SETTINGS: dict[str, dict[str, Any]] = {
    "per tensor": {},
    "symmetric": {"scheme": "symmetric"},
    "symmetric, least squares": {"scheme": "symmetric", "calibration": "mse"},
    "least squares": {"calibration": "mse"},
    "99th percentile": {"calibration": "percentile", "percentile": 99.0},
    "per channel": {"axis": -1},
    "groups of 8 channels": {"axis": -1, "group_size": 8},
    "per channel, least squares": {"axis": -1, "calibration": "mse"},
    "per tensor, new BatchNorm statistics": {"stats_fn": True},
}


def stats_fn(params: chex.ArrayTree, images: chex.Array) -> chex.ArrayTree:
    """Return the BatchNorm statistics of one batch, by a pass from those of zero."""
    zeros = jax.tree.map(lambda x: 0 * x, digits.init_network(0)[1])
    variables = {"params": params, "batch_stats": zeros}
    _, new = digits.ConvNet().apply(variables, images, True, mutable="batch_stats")
    return jax.tree.map(lambda x: x / (1.0 - MOMENTUM), new["batch_stats"])


def evaluate(
    trees: Sequence[Any], data: digits.Data, setting: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return the test accuracy in % for each of BITS, over the seeds of a method."""
    options = dict(setting)
    if "stats_fn" in options:
        images = data.train_images
        batches = images.reshape(-1, CALIBRATION_BATCH, *images.shape[1:])
        options |= {"stats_fn": stats_fn, "calibration_images": batches}
    logits_fn = make_logits(digits.ConvNet())
    test = (data.test_images, data.test_labels, BITS)
    accuracies = [
        quant.accuracy_against_bits(
            *(logits_fn, x["params"], *test), batch_stats=x["batch_stats"], **options
        )
        for x in trees
    ]
    return [summary(column) for column in 100.0 * np.array(accuracies).T]


def load_all(paths: Sequence[Path]) -> dict[str, list[Any]]:
    """Read several files; those that differ in the seed alone go together."""
    networks: dict[str, list[Any]] = {}
    for path in paths:
        name = re.sub(r"_seed\d+$", "", path.stem)
        networks.setdefault(name, []).append(load(path))
    return networks


def table(accuracies: Accuracies) -> str:
    """Format the results as a Markdown table, one row per network and setting."""
    titles = ["float" if bits == 32 else f"{bits} bit" for bits in BITS]
    rows = [["network", "quantizer", *titles]]
    for setting, networks in accuracies.items():
        for name, row in networks.items():
            rows.append([name, setting, *(cell(a, 1) for a in row)])
    return results.markdown(rows)


def plot(accuracies: Accuracies) -> Figure:
    """Draw accuracy against bits: a panel per setting, a line per network."""
    columns = min(3, len(accuracies))
    rows = math.ceil(len(accuracies) / columns)
    size = (7.0, 4.2) if len(accuracies) == 1 else (3.6 * columns, 2.8 * rows)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for axes, (setting, networks) in zip(panels, accuracies.items(), strict=False):
        plot_against_bits(axes, networks, BITS)
        axes.set_title(setting, fontsize="medium")
    for axes in panels[len(accuracies) :]:
        axes.remove()
    panels[0].legend()
    figure.supxlabel("bits per weight")
    figure.supylabel("test accuracy (%)")
    figure.suptitle("Digits, weights quantized after training")
    return figure


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = command_line.training_parser(__doc__, "quickstart_results")
    add = parser.add_argument
    add("weights", nargs="*", type=Path, help="files that the quick start saved")
    one_of = f"of the quantizer, may be repeated: {'; '.join(SETTINGS)}"
    add("--setting", choices=SETTINGS, action="append", metavar="NAME", help=one_of)
    add("--all", action="store_true", help="all of these settings")
    options = parser.parse_args(arguments)
    try:
        options.networks = load_all(options.weights)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return options


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure; print the table, write JSON and PNG, return the record."""
    options = parse(arguments)
    if not options.networks:
        numbers = (options.epochs, options.label_noise)
        place = (options.out / "weights", options.quiet)
        options.networks = load_all(train(("SGD", "HERO"), *numbers, *place))
    settings = [*SETTINGS] if options.all else options.setting or ["per tensor"]
    data = digits.load_data(options.label_noise, seed=0)
    accuracies = {
        setting: {
            name: evaluate(trees, data, SETTINGS[setting])
            for name, trees in options.networks.items()
        }
        for setting in tqdm(settings, desc="quantizer", disable=options.quiet)
    }
    record = {"environment": results.environment(), "bits": BITS}
    record |= {"accuracy": accuracies}
    path = options.out / "accuracy_against_bits.json"
    results.write_json(path, record)
    results.write_figure(path.with_suffix(".png"), plot(accuracies), 150)
    print(
        f"{table(accuracies)}\n\nTest accuracy in % on {len(data.test_labels)} images."
        f"\nWrote {path} and the picture beside it."
    )
    return record


if __name__ == "__main__":
    main()
