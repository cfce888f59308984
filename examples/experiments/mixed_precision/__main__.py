"""Give every layer of trained networks its own number of bits, by their sensitivity.

Takes weights that the quick start saved, or folders of finished runs of the training
recipe; without any, trains SGD and HERO on the digits first.

    python -m examples.experiments.mixed_precision  # 2 minutes on 2 cores
    python -m examples.experiments.mixed_precision --within 1  # a point of accuracy lost
    python -m examples.experiments.mixed_precision --bytes 12000 --group-size 4
    python -m examples.experiments.common.digits --save-weights --out out
    python -m examples.experiments.mixed_precision out/weights/{sgd,hero}_seed?.safetensors
    python -m examples.experiments.mixed_precision runs/NAME/seed_0 --data-dir DIR

Sensitivity is measured on training images in six ways: by the largest eigenvalue of
each layer's Hessian (HAWQ), its mean and spread over parts of the data (Q-BERT), the
average trace (HAWQ-V2), the quadratic form along the real error, that with gradient and
terms between layers (pairwise), and the loss itself. Allocations by each, and by greedy
descent, are tested beside uniform precision. Written are `report.md` with its pictures,
`mixed_precision.json`, and for every network `NAME.mixed.safetensors`.
Networks whose names differ in the seed alone are averaged; those that were examined
before, with the same settings, are taken from the folder.
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import hero_jax
from examples.experiments.common import networks
from examples.experiments.common.command_line import (
    check_at_least,
    check_training_options,
)
from examples.experiments.common.networks import Network
from examples.image_classification.results import (
    environment,
    write_figure,
    write_json,
    write_text,
)
from hero_jax import mixed_precision, quant

from . import activations, figures, text, weights
from .weights import MEASURES, Measured, Settings

TRAINED = ("SGD", "HERO")
BUDGETS = (2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line, and load the networks it names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    networks.add_arguments(parser, "mixed_precision_results")
    add = parser.add_argument
    add("--measure", choices=MEASURES, default="measured", help="for the file's bits")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--average-bits", type=float, default=3.5, help="of the file's layers"
    )
    size.add_argument("--bytes", type=int, help="the whole file takes at most so many")
    size.add_argument(
        "--within",
        type=float,
        metavar="POINTS",
        help="the smallest file that loses at most so many points of accuracy on the "
        "calibration images",
    )
    add("--choices", type=int, nargs="+", default=(2, 3, 4, 5, 6, 8), help="of bits")
    add("--scheme", choices=("affine", "symmetric"), help="of the quantizer")
    add("--calibration", choices=("minmax", "percentile", "mse"), help="of its ranges")
    add("--per-channel", action="store_true", help="one grid per output channel")
    add("--group-size", type=int, help="output channels that share a grid (Q-BERT)")
    add("--images", type=int, default=1000, help="to calibrate with")
    add("--test-images", type=int, default=2000, help="of a run of the recipe")
    add("--probes", type=int, default=16, help="of the trace of each layer")
    add("--steps", type=int, default=10, help="of Lanczos, for a layer's eigenvalue")
    add("--allocations", type=int, default=100, help="random ones, for correlation")
    add("--time-limit", type=float, default=20.0, help="seconds for pairs of layers")
    add("--no-activations", action="store_true", help="look at weights alone")
    add(
        "--activation-images",
        type=int,
        default=250,
        help="of the batch they are seen on",
    )
    add("--seed", type=int, default=0, help="of probes and random allocations")
    options = parser.parse_args(arguments)
    check_training_options(parser, options)
    check_at_least(
        parser,
        options,
        images=1,
        test_images=1,
        batch_size=1,
        steps=1,
        activation_images=1,
        probes=2,
        allocations=3,
    )
    options.choices = tuple(sorted({*options.choices}))
    if not all(2 <= b <= 8 for b in options.choices) or len(options.choices) < 2:
        parser.error(f"--choices must be two or more of 2 to 8, got {options.choices}")
    if not options.choices[0] <= options.average_bits <= options.choices[-1]:
        parser.error(
            f"--average-bits must be {options.choices[0]} to {options.choices[-1]}, "
            f"as --choices are, got {options.average_bits:g}"
        )
    if options.within is not None and options.within < 0:
        parser.error(f"--within must be at least 0, got {options.within:g}")
    if options.within is not None and options.measure == "pairwise":
        parser.error("--within needs the whole frontier, which pairwise has not")
    if options.bytes is not None and options.measure == "pairwise":
        parser.error("--bytes needs the whole frontier, which pairwise has not")
    options.loaded = networks.load_named(parser, options, options.test_images)
    return options


def _settings(options: argparse.Namespace) -> Settings:
    """Return what is measured."""
    grid: dict[str, Any] = {
        name: getattr(options, name)
        for name in ("scheme", "calibration")
        if getattr(options, name) is not None
    }
    if options.per_channel or options.group_size is not None:
        grid["axis"] = -1
    if options.group_size is not None:
        grid["group_size"] = options.group_size
    least, most = options.choices[0], options.choices[-1]
    budgets = {b for b in (*BUDGETS, options.average_bits) if least <= b <= most}
    return Settings(
        choices=options.choices,
        budgets=tuple(sorted(budgets)),
        target=options.average_bits,
        images=options.images,
        batch_size=options.batch_size,
        probes=options.probes,
        steps=options.steps,
        allocations=options.allocations,
        time_limit=options.time_limit,
        grid=grid,
        activations=not options.no_activations,
        activation_images=options.activation_images,
        seed=options.seed,
        quiet=options.quiet,
    )


def choose(
    network: Network,
    measured: Measured,
    settings: Settings,
    options: argparse.Namespace,
) -> mixed_precision.Allocation:
    """Return the allocation of the file: by average bits, accuracy or bytes."""
    name = options.measure
    if name == "pairwise":
        at = settings.budgets.index(options.average_bits)
        row = measured.record["allocations"][name][at]
        bits = dict(zip(measured.sizes, row["bits"], strict=True))
        return mixed_precision.Allocation(**(row | {"bits": bits}))
    frontier = measured.frontiers[name]
    if options.bytes is not None:
        if name in measured.found:
            found = measured.found[name]
            frontier = mixed_precision.pareto_frontier(
                found.layers, measured.sizes, found.choices
            )
        return within_file(network, frontier, settings, options.bytes)
    if options.within is None:
        return frontier.within(options.average_bits)
    images, labels = weights.calibration(network, settings)

    def accuracy(bits: Any) -> float:
        return float(weights.accuracy(network, settings, [bits], images, labels)[0])

    (in_float,) = weights.accuracy(network, settings, [32], images, labels)
    least = in_float - options.within - 1e-4  # of rounding
    try:
        return mixed_precision.smallest_accurate(frontier, accuracy, least).allocation
    except ValueError:
        print(f"{network.name}: nothing loses so little; the file is the largest.")
        largest: mixed_precision.Allocation = frontier[-1]
        return largest


def quantized(network: Network, settings: Settings, bits: dict[str, int]) -> Any:
    """Return what goes into the file."""
    params = quant.quantize(network.params, bits, **settings.grid)
    return {"params": params, "batch_stats": network.batch_stats}


def within_file(
    network: Network,
    frontier: mixed_precision.Frontier,
    settings: Settings,
    budget: int,
) -> mixed_precision.Allocation:
    """Return the least sensitive allocation whose file has at most so many bytes.

    The header's length depends a little on the allocation: what it takes more than was
    reckoned is saved in the next attempt.

    Raises:
      ValueError: not even the smallest allocation is within the budget.
    """
    rest, smallest = 0, int(frontier.bytes.min())
    while True:
        within = max(budget - rest, smallest)
        allocation = frontier.within(within, unit="bytes")
        size = quant.file_size(quantized(network, settings, allocation.bits))
        if size <= budget:
            return allocation
        if within == smallest:
            raise ValueError(f"budget must be at least {size} bytes, got {budget}.")
        rest += size - budget


def write_file(
    network: Network,
    allocation: mixed_precision.Allocation,
    settings: Settings,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Write the quantized network, and return what the report says of it."""
    name = f"{stem(network)}.mixed.safetensors"
    path = options.out / name
    tree = quantized(network, settings, allocation.bits)
    quant.save(path, tree)
    read = network._replace(
        params=quant.dequantize(quant.load(path, like=tree))["params"]
    )
    tested = weights.accuracy(read, settings, [32], *network.test)
    return {
        "name": name,
        "measure": options.measure,
        "bits": allocation.bits,
        "bytes": path.stat().st_size,
        "sha256": _sha(path),
        "layer_bytes": allocation.bytes,
        "average_bits": allocation.average_bits,
        "accuracy": float(tested[0]),
    }


def examine(
    network: Network, settings: Settings, options: argparse.Namespace
) -> dict[str, Any]:
    """Measure a network, write its file, and return all that the report says."""
    measured = weights.measure(network, settings)
    allocation = choose(network, measured, settings, options)
    record = measured.record
    record["file"] = write_file(network, allocation, settings, options)
    if settings.activations:
        record["activations"] = activations.measure(network, settings, allocation.bits)
    return record


def look_up(
    network: Network, settings: Settings, options: argparse.Namespace
) -> dict[str, Any]:
    """Return the record of a network that was examined before, or examine it.

    A run that was killed goes on with the networks that are missing.
    """
    path = options.out / "networks" / f"{stem(network)}.json"
    file = options.out / f"{stem(network)}.mixed.safetensors"
    digest = hashlib.sha256()
    data = (network.train, network.test)
    for x in jax.tree.leaves((network.params, network.batch_stats, data)):
        digest.update(np.asarray(x).tobytes())
    asked = {
        "settings": {k: v for k, v in settings._asdict().items() if k != "quiet"},
        "file": [getattr(options, name) for name in _OF_FILE],
        "weights and data": digest.hexdigest(),
        "version": hero_jax.__version__,
    }
    asked = json.loads(json.dumps(asked))
    if path.exists() and file.exists():
        known: dict[str, Any] = json.loads(path.read_text())
        if known["asked"] == asked and known["found"]["file"]["sha256"] == _sha(file):
            return dict(known["found"])
    found = examine(network, settings, options)
    write_json(path, {"asked": asked, "found": found})
    return dict(json.loads(path.read_text())["found"])


def _sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


_OF_FILE = ("measure", "average_bits", "bytes", "within")


def stem(network: Network) -> str:
    """Return the name of a network as one of a file."""
    return network.name.replace("/", "_").strip("._")


def check(
    chosen: Sequence[Network], settings: Settings, options: argparse.Namespace
) -> None:
    """End the command, before all work, where no file could be written."""
    stems = [stem(network) for network in chosen]
    if len({*stems}) < len(stems):
        sys.exit(f"networks must have names of their own, got {stems}")
    for network in chosen:
        least = dict.fromkeys(
            mixed_precision.layer_sizes(network.params, settings.choices),
            settings.choices[0],
        )
        size = quant.file_size(quantized(network, settings, least))
        if options.bytes is not None and options.bytes < size:
            sys.exit(
                f"--bytes must be at least {size:,}, the file of {network.name} with "
                f"{settings.choices[0]} bits in all layers; got {options.bytes:,}"
            )


def group_of(name: str) -> str:
    """Return the name without its seed."""
    return re.sub(r"[_/]seed_?\d+$", "", name)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command; return the record."""
    options = parse(arguments)
    (options.out / "networks").mkdir(parents=True, exist_ok=True)
    chosen = options.loaded
    if not chosen:
        folder = options.out / "weights"
        paths = networks.train(
            TRAINED, options.epochs, options.label_noise, folder, options.quiet
        )
        chosen = [networks.of_quickstart(p, options.label_noise) for p in paths]
    settings = _settings(options)
    check(chosen, settings, options)
    groups: dict[str, list[dict[str, Any]]] = {}
    for network in chosen:
        record = look_up(network, settings, options)
        groups.setdefault(group_of(network.name), []).append(record)
    drawn = {
        "pareto": figures.pareto(groups),
        "predictions": figures.predictions(groups, settings.target),
        "allocations": figures.allocations(
            groups, options.average_bits, [*settings.budgets]
        ),
        "activations": figures.activations(groups, [*settings.budgets]),
    }
    pictures = {name: figure for name, figure in drawn.items() if figure is not None}
    for name, figure in pictures.items():
        write_figure(options.out / f"{name}.png", figure)
    result = {
        "environment": environment(),
        "settings": settings._asdict(),
        "networks": groups,
    }
    write_json(options.out / "mixed_precision.json", result)
    words = text.report(groups, settings, result["environment"], [*pictures])
    write_text(options.out / "report.md", words)
    print(words)
    print(f"Wrote report.md to {options.out}.")
    return result


if __name__ == "__main__":
    main()
