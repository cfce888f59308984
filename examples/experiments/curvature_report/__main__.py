"""Look at the curvature around trained networks, and write a report.

Takes weights that were saved on the digits, or folders of finished runs of the training
recipe; without any, trains SGD, HERO's first-order part and HERO on the digits first.

    python -m examples.experiments.curvature_report  # 3 minutes on 2 cores
    python examples/quickstart.py --out out
    python -m examples.experiments.curvature_report out/weights/*_seed0.safetensors
    python -m examples.experiments.curvature_report runs/NAME/seed_0 --data-dir DIR

The report is `report.md` with a picture beside it: largest and lowest eigenvalue,
trace, ||Hz||, the contour of a loss 0.1 higher and its area (Figure 3), the
generalization gap where there are metrics of the training, and Theorem 3 beside the
smallest harmful perturbations. The numbers are in `report.json`.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.experiments.common import networks
from examples.image_classification.results import (
    environment,
    write_figure,
    write_json,
    write_text,
)

from .measure import Settings, measure, surfaces
from .report import contours, words

METHODS = ("SGD", "first-order", "HERO")
OPTIONS = ("statistics", "h", "bits", "batch_size", "seed", "quiet")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = networks.networks_parser(__doc__, "curvature_results")
    add = parser.add_argument
    add(
        "--statistics",
        choices=("running", "batch"),
        default="running",
        help="of BatchNorm: as deployed, or of the images at hand, anew at every point",
    )
    add("--h", type=float, default=5.0, help="step of the finite difference in ||Hz||")
    add("--bits", type=int, default=4, help="of the quantization that is looked at")
    options = parser.parse_args(arguments)
    if not 2 <= options.bits <= 8:
        parser.error(f"--bits must be 2 to 8, got {options.bits}")
    if not options.h > 0.0:
        parser.error(f"--h must be above 0, got {options.h}")
    return options


def report(
    chosen: Sequence[networks.Network], settings: Settings, out: Path
) -> dict[str, Any]:
    """Measure networks, draw, and write all files; return the record."""
    start = time.perf_counter()
    measured = [measure(network, settings) for network in chosen]
    scale = max(numbers.reach for numbers in measured)  # all are in view
    records, drawn = [], []
    for network, numbers in zip(chosen, measured, strict=True):
        around, area = surfaces(network, numbers, scale, settings)
        drawn.append(around)
        shape = {"area": area.area, "area_is_closed": area.is_closed}
        records.append(numbers.record | shape)
    record: dict[str, Any] = {
        "environment": environment(),
        "settings": settings._asdict(),
        "networks": records,
        "seconds": round(time.perf_counter() - start, 1),
    }
    figure = contours(records, drawn, settings.loss_increase)
    write_figure(out / "contours.png", figure)
    write_json(out / "report.json", record)
    text = words(records, settings, record["environment"])
    write_text(out / "report.md", text)
    print(text)
    print(f"Wrote report.md to {out} ({record['seconds']} s).")
    return record


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command; return the record."""
    options = parse(arguments)
    chosen = networks.load_or_train(options, METHODS, metrics=True)
    settings = Settings(**{name: getattr(options, name) for name in OPTIONS})
    return report(chosen, settings, options.out)


if __name__ == "__main__":
    main()
