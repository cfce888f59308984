"""Quantize trained networks to 8 to 2 bits and draw their accuracy: Figure 1.

Takes the weights that the quick start saves; without any, trains SGD and HERO first
(half a minute on 2 cores). Nothing is retrained: the same float weights are quantized
to each precision, and all precisions of a network run in one program.

    python -m examples.experiments.accuracy_against_bits
    python -m examples.experiments.accuracy_against_bits --all  # every setting of the quantizer

    python -m examples.experiments.common.digits --save-weights --out out
    python -m examples.experiments.accuracy_against_bits out/weights/*_seed?.safetensors

The result is a table, the same numbers as JSON, and a picture. Files that differ in the
seed alone are averaged.
"""

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from examples.experiments.common import digits as quickstart
from examples.experiments.common.command_line import check_training_options
from examples.experiments.common.digits import ConvNet, Data
from examples.experiments.common.networks import load, logits_fn, train
from examples.experiments.common.statistics import cell, summary
from examples.image_classification.results import (
    environment,
    markdown,
    write_figure,
    write_json,
)
from hero_jax import quant

BITS = (32, 8, 7, 6, 5, 4, 3, 2)
TRAINED_METHODS = ("SGD", "HERO")
CALIBRATION_BATCH = 100
MOMENTUM = 0.9
"""Of the running statistics of `ConvNet`."""

Results = dict[str, dict[str, list[dict[str, Any]]]]
"""Setting of the quantizer, network, number of bits: mean and standard error."""

SETTINGS: dict[str, dict[str, Any]] = {
    "per tensor": {},
    "symmetric": {"scheme": "symmetric"},
    "symmetric, least squares": {"scheme": "symmetric", "calibration": "mse"},
    "least squares": {"calibration": "mse"},
    "99th percentile": {"calibration": "percentile", "percentile": 99.0},
    "per channel": {"axis": -1},
    "groups of 8 channels": {"axis": -1, "group_size": 8},
    "per channel, least squares": {"axis": -1, "calibration": "mse"},
    "per tensor, new BatchNorm statistics": {"reestimate": True},
}


def stats_fn(params: chex.ArrayTree, images: chex.Array) -> chex.ArrayTree:
    """Return the BatchNorm statistics of one batch by itself.

    A training pass from statistics of zero leaves (1 - momentum) times those of the
    batch.
    """
    shapes = jax.eval_shape(
        lambda: ConvNet().init(jax.random.key(0), images, train=False)
    )
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes["batch_stats"])
    _, new = ConvNet().apply(
        {"params": params, "batch_stats": zeros},
        images,
        train=True,
        mutable=["batch_stats"],
    )
    return jax.tree.map(lambda x: x / (1.0 - MOMENTUM), new["batch_stats"])


def evaluate(
    trees: Sequence[Any], data: Data, setting: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return the test accuracy in % for each of BITS, over the seeds of a method."""
    options = {k: v for k, v in setting.items() if k != "reestimate"}
    if setting.get("reestimate"):
        images = data.train_images
        whole = len(images) // CALIBRATION_BATCH * CALIBRATION_BATCH
        options["stats_fn"] = stats_fn
        options["calibration_images"] = images[:whole].reshape(
            -1, CALIBRATION_BATCH, *images.shape[1:]
        )
    accuracies = [
        quant.accuracy_against_bits(
            logits_fn,
            tree["params"],
            data.test_images,
            data.test_labels,
            BITS,
            batch_stats=tree["batch_stats"],
            **options,
        )
        for tree in trees
    ]
    return [summary(column) for column in 100.0 * np.array(accuracies).T]


def load_all(paths: Sequence[Path]) -> dict[str, list[Any]]:
    """Read several files; those that differ in the seed alone go together."""
    networks: dict[str, list[Any]] = {}
    for path in paths:
        name = re.sub(r"_seed\d+$", "", path.stem)
        networks.setdefault(name, []).append(load(path))
    return networks


def table(results: Results) -> str:
    """Format the results as a Markdown table, one row per network and setting."""
    titles = ["float" if bits == 32 else f"{bits} bit" for bits in BITS]
    rows = [["network", "quantizer", *titles]]
    for setting, networks in results.items():
        for name, accuracies in networks.items():
            rows.append([name, setting, *(cell(a, 1) for a in accuracies)])
    return markdown(rows)


def plot(results: Results, title: str) -> Figure:
    """Draw accuracy against bits: a panel per setting, a line per network."""
    columns = min(3, len(results))
    rows = math.ceil(len(results) / columns)
    size = (7.0, 4.2) if len(results) == 1 else (3.6 * columns, 2.8 * rows)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    styles = ("o-", "D-", "s-", "^-", "v-", "x-")
    for axes, (setting, networks) in zip(panels, results.items(), strict=False):
        for i, (name, accuracies) in enumerate(networks.items()):
            axes.errorbar(
                range(len(BITS)),
                [a["mean"] for a in accuracies],
                [a["stderr"] or 0.0 for a in accuracies],
                fmt=styles[i % len(styles)],
                markersize=4,
                capsize=2,
                label=name,
            )
        axes.set_xticks(range(len(BITS)), ["fp", *map(str, BITS[1:])])
        axes.set_title(setting, fontsize="medium")
        axes.grid(alpha=0.3)
    for axes in panels[len(results) :]:
        axes.remove()
    panels[0].legend()
    figure.supxlabel("bits per weight")
    figure.supylabel("test accuracy (%)")
    figure.suptitle(title)
    return figure


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("weights", nargs="*", type=Path, help="files that the quick start saved")
    add("--setting", choices=SETTINGS, action="append", help="of the quantizer")
    add("--all", action="store_true", help="all settings of the quantizer")
    add("--label-noise", type=float, default=0.4, help="in training, if there is any")
    add("--epochs", type=int, default=40, help="of training, if there is any")
    add("--out", type=Path, default=Path("quickstart_results"), help="folder to write")
    add("--quiet", action="store_true", help="show no progress bars")
    options = parser.parse_args(arguments)
    check_training_options(parser, options)
    try:
        options.networks = load_all(options.weights)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return options


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure; print the table, write JSON and PNG, return the record."""
    options = parse(arguments)
    if not options.networks:
        folder = options.out / "weights"
        paths = train(
            TRAINED_METHODS, options.epochs, options.label_noise, folder, options.quiet
        )
        options.networks = load_all(paths)
    settings = [*SETTINGS] if options.all else options.setting or ["per tensor"]
    data = quickstart.load_data(options.label_noise, seed=0)
    results = {
        setting: {
            name: evaluate(trees, data, SETTINGS[setting])
            for name, trees in options.networks.items()
        }
        for setting in tqdm(settings, desc="quantizer", disable=options.quiet)
    }
    record = {
        "environment": environment(),
        "bits": BITS,
        "accuracy": results,
    }
    name = "accuracy_against_bits"
    figure = plot(results, "Digits, weights quantized after training")
    write_json(options.out / f"{name}.json", record)
    write_figure(options.out / f"{name}.png", figure, 150)
    print(table(results))
    print(
        f"\nTest accuracy in % on {len(data.test_labels)} images.\n"
        f"Wrote {name}.json and {name}.png to {options.out}."
    )
    return record


if __name__ == "__main__":
    main()
