"""Look at the curvature around trained networks, and write a report.

Takes weights that the quick start saved, or folders of finished runs of the training
recipe; without any, trains SGD, first-order-only and HERO on the digits first.

    python -m examples.experiments.curvature_report  # 3 minutes on 2 cores
    python -m examples.experiments.common.digits --save-weights --out out
    python -m examples.experiments.curvature_report out/weights/*_seed0.safetensors
    python -m examples.experiments.curvature_report runs/NAME/seed_0 --data-dir DIR

The report is `report.md` with its pictures beside it: largest and lowest eigenvalue,
trace, ||Hz||, spectrum, the contour of a loss 0.1 higher and its area (Figure 3),
||Hz|| and generalization gap over training where there are metrics (Figure 2), Theorem
3 beside the smallest harmful perturbations, and the sensitivity of every layer to
quantization. The numbers are in `report.json` and, as arrays, `report.npz`.
"""

import argparse
import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from examples.experiments.common import digits as quickstart
from examples.experiments.common import networks
from examples.experiments.common.command_line import (
    check_at_least,
    check_training_options,
)
from examples.image_classification.results import (
    environment,
    write_figure,
    write_json,
    write_text,
)
from hero_jax import quant

from . import figures, text
from .measure import Settings, common_scale, measure, surfaces


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line, and load the networks it names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    networks.add_arguments(parser, "curvature_results")
    add = parser.add_argument
    add(
        "--statistics",
        choices=("running", "batch"),
        default="running",
        help="of BatchNorm: as deployed, or of the images at hand, anew at every point",
    )
    add(
        "--h",
        type=float,
        default=quickstart.MEASURED_STEP,
        help="step of the finite difference in ||Hz||",
    )
    add("--bits", type=int, default=4, help="of the quantization that is looked at")
    add("--loss-increase", type=float, default=0.1, help="c of Theorem 3 and Figure 3")
    add("--images", type=int, default=1000, help="of a run of the recipe")
    add("--surface-images", type=int, default=1000, help="to average surfaces over")
    add("--probes", type=int, default=32, help="of the trace")
    add("--density-steps", type=int, default=40, help="of the spectrum")
    add("--grid", type=int, default=31, help="points along an axis of contours; odd")
    add("--gap-epochs", type=int, default=10, help="last epochs of the gap")
    add("--seed", type=int, default=0, help="of probes and directions")
    options = parser.parse_args(arguments)
    check_training_options(parser, options)
    check_at_least(
        parser,
        options,
        images=1,
        batch_size=1,
        surface_images=1,
        density_steps=1,
        gap_epochs=1,
        probes=2,
    )
    if options.grid < 3 or options.grid % 2 == 0:
        parser.error(f"--grid must be odd, at least 3, got {options.grid}")
    if not 2 <= options.bits <= 8:
        parser.error(f"--bits must be 2 to 8, got {options.bits}")
    for name in ("h", "loss_increase"):
        if not getattr(options, name) > 0.0:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    options.loaded = networks.load_named(parser, options)
    return options


def draw(
    records: list[dict[str, Any]],
    arrays: list[dict[str, np.ndarray]],
    settings: Settings,
) -> dict[str, Figure]:
    """Return the pictures by name."""
    drawn = {
        "contours": figures.contours(records, arrays, settings.loss_increase),
        "slices": figures.slices(records, arrays),
        "perturbation": figures.perturbation(records, arrays),
        "spectrum": figures.spectrum(records, arrays),
        "curves": figures.curves(records, arrays),
        "layers": figures.layers(records, settings.bits),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def report(
    chosen: Sequence[networks.Network], settings: Settings, out: Path
) -> dict[str, Any]:
    """Measure networks, draw, and write all files; return the record."""
    start = time.perf_counter()
    found = [measure(network, settings) for network in chosen]
    scale = common_scale(found)
    records, arrays = [], []
    for network, measured in zip(chosen, found, strict=True):
        around, area = surfaces(network, measured, scale, settings)
        arrays.append(measured.arrays | around)
        records.append(
            measured.record | {"area": area.area, "area_is_closed": area.is_closed}
        )
    record: dict[str, Any] = {
        "environment": environment(),
        "settings": settings._asdict(),
        "networks": records,
        "seconds": round(time.perf_counter() - start, 1),
    }
    drawn = draw(records, arrays, settings)
    for name, figure in drawn.items():
        write_figure(out / f"{name}.png", figure)
    flat: dict[str, Any] = {
        f"{network.name}/{name}": values
        for network, each in zip(chosen, arrays, strict=True)
        for name, values in each.items()
    }
    packed = io.BytesIO()
    np.savez(packed, **flat)
    quant.write_file(out / "report.npz", packed.getvalue())
    write_json(out / "report.json", record)
    words = text.report(records, settings, record["environment"], [*drawn])
    write_text(out / "report.md", words)
    print(words)
    print(f"Wrote report.md to {out} ({record['seconds']} s).")
    return record


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command; return the record."""
    options = parse(arguments)
    chosen = options.loaded
    if not chosen:
        paths = networks.train(
            ("SGD", "first-order", "HERO"),
            options.epochs,
            options.label_noise,
            options.out / "weights",
            options.quiet,
            metrics=True,
        )
        chosen = [networks.of_quickstart(p, options.label_noise) for p in paths]
    settings = Settings(*(getattr(options, name) for name in Settings._fields))
    return report(chosen, settings, options.out)


if __name__ == "__main__":
    main()
