"""Choose the bits of every layer by its sensitivity, and write a report.

Takes weights that were saved on the digits, or folders of finished runs of the training
recipe; without any, trains SGD and HERO on the digits first.

    python -m examples.experiments.mixed_precision  # 2 minutes on 2 cores
    python -m examples.experiments.mixed_precision --within 1  # a point lost
    python -m examples.experiments.mixed_precision --bytes 12000 --group-size 4
    python examples/quickstart.py --out out
    python -m examples.experiments.mixed_precision out/weights/*_seed?.safetensors
    python -m examples.experiments.mixed_precision runs/NAME/seed_0 --data-dir DIR

Sensitivity is measured on training images in six ways: by the largest eigenvalue of
each layer's Hessian (HAWQ), its mean and spread over parts of the data (Q-BERT), the
average trace (HAWQ-V2), the quadratic form along the real error, that with gradient and
terms between layers (pairwise), and the loss itself. Allocations by each, and by greedy
descent, are tested beside uniform precision. Written are `report.md`, `pareto.png`,
`mixed_precision.json`, and for every network `NAME.mixed.safetensors`.
Networks whose names differ in the seed alone are averaged.
"""

import argparse
import re
from collections.abc import Sequence
from typing import Any

from examples.experiments.common import networks
from examples.experiments.common.command_line import at_least
from examples.experiments.common.networks import Network
from examples.image_classification.results import (
    environment,
    write_figure,
    write_json,
    write_text,
)
from hero_jax import mixed_precision, quant

from . import report
from .measure import MEASURES, Measured, accuracy, measure, measure_activations

METHODS = ("SGD", "HERO")
BUDGETS = (2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0)
SETTINGS = (
    *("choices", "budgets", "average_bits", "images", "batch_size", "probes", "steps"),
    *("allocations", "time_limit", "grid", "activations", "seed"),
)
"""Options that go into the record."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = networks.networks_parser(__doc__, "mixed_precision_results")
    add = parser.add_argument
    add("--measure", choices=MEASURES, default="measured", help="for the file's bits")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--average-bits", type=float, default=3.5, help="of the file")
    size.add_argument("--bytes", type=int, help="of the file's layers, at most")
    size.add_argument(
        "--within",
        type=float,
        metavar="POINTS",
        help="of accuracy on the training images that the smallest file may lose",
    )
    add("--choices", type=int, nargs="+", default=(2, 3, 4, 5, 6, 8), help="of bits")
    add("--group-size", type=int, help="output channels that share a grid (Q-BERT)")
    add("--probes", type=at_least(2), default=16, help="of the trace of each layer")
    add(
        "--steps",
        type=at_least(1),
        default=10,
        help="of Lanczos, for a layer's eigenvalue",
    )
    add(
        "--allocations",
        type=at_least(3),
        default=100,
        help="random ones, for correlation",
    )
    add("--time-limit", type=float, default=20.0, help="seconds for pairs of layers")
    without = "leave out the tables of the activations' precision"
    add("--no-activations", dest="activations", action="store_false", help=without)
    options = parser.parse_args(arguments)
    options.choices = tuple(sorted({*options.choices}))
    least, most = options.choices[0], options.choices[-1]
    if not 2 <= least < most <= 8:
        parser.error(f"--choices must be two or more of 2 to 8, got {options.choices}")
    if not least <= options.average_bits <= most:
        parser.error(
            f"--average-bits must be {least} to {most}, as --choices are, got "
            f"{options.average_bits:g}"
        )
    if options.within is not None and options.within < 0:
        parser.error(f"--within must be at least 0, got {options.within:g}")
    by_size = options.within is not None or options.bytes is not None
    if by_size and options.measure == "pairwise":
        parser.error(
            "--within and --bytes need a frontier, which pairwise does not have"
        )
    budgets = {b for b in (*BUDGETS, options.average_bits) if least <= b <= most}
    options.budgets = sorted(budgets)
    groups = options.group_size
    options.grid = {} if groups is None else {"axis": -1, "group_size": groups}
    return options


def choose(
    network: Network, measured: Measured, options: argparse.Namespace
) -> mixed_precision.Allocation:
    """Return the allocation of the file: by average bits, accuracy or bytes."""
    name = options.measure
    if options.bytes is None and options.within is None:
        at: int = options.budgets.index(options.average_bits)
        return measured.chosen[name][at]
    frontier = measured.frontiers[name]
    if options.bytes is not None:
        return frontier.within(options.bytes, unit="bytes")

    def on_training_images(bits: Any) -> float:
        return float(accuracy(network, options, [bits], *network.train)[0])

    least = on_training_images(32) - options.within - 1e-4  # of rounding
    try:
        smallest = mixed_precision.smallest_accurate
        return smallest(frontier, on_training_images, least).allocation
    except ValueError:
        print(f"{network.name}: nothing loses so little; the file is the largest.")
        return frontier.within(float(options.choices[-1]))


def examine(network: Network, options: argparse.Namespace) -> dict[str, Any]:
    """Measure a network, write its file, and return all that the report says."""
    images, labels = (x[: options.images] for x in network.train)
    network = network._replace(train=(images, labels))
    measured = measure(network, options)
    allocation = choose(network, measured, options)
    stem = network.name.replace("/", "_").strip("._")
    path = options.out / f"{stem}.mixed.safetensors"
    params = quant.quantize(network.params, allocation.bits, **options.grid)
    tree = {"params": params, "batch_stats": network.batch_stats}
    quant.save(path, tree)
    read = quant.dequantize(quant.load(path, like=tree))["params"]
    read_network = network._replace(params=read)
    record = measured.record
    record["file"] = {
        "name": path.name,
        "measure": options.measure,
        "bits": allocation.bits,
        "bytes": path.stat().st_size,
        "layer_bytes": allocation.bytes,
        "average_bits": allocation.average_bits,
        "accuracy": float(accuracy(read_network, options, [32], *network.test)[0]),
    }
    if options.activations:
        record["activations"] = measure_activations(network, options, allocation.bits)
    return record


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command; return the record."""
    options = parse(arguments)
    groups: dict[str, list[dict[str, Any]]] = {}
    for network in networks.load_or_train(options, METHODS):
        group = re.sub(r"[_/]seed_?\d+$", "", network.name)
        groups.setdefault(group, []).append(examine(network, options))
    result = {
        "environment": environment(),
        "settings": {name: getattr(options, name) for name in SETTINGS},
        "networks": groups,
    }
    write_figure(options.out / "pareto.png", report.pareto(groups))
    write_json(options.out / "mixed_precision.json", result)
    words = report.words(groups, options, result["environment"])
    write_text(options.out / "report.md", words)
    print(words)
    print(f"Wrote report.md to {options.out}.")
    return result


if __name__ == "__main__":
    main()
