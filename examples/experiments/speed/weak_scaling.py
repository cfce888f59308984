"""Images per second against the number of devices, each with its own share of images.

The steps are those of examples/image_classification, on random images, with as many
images per device however many devices there are: in the ideal case every device keeps
the pace of one alone. All steps are compiled first and then take turns.

    python -m examples.experiments.speed.weak_scaling --model resnet20 --batch 128  # all devices
    python -m examples.experiments.speed.weak_scaling --host-devices 8  # on a CPU

With `--host-devices`, the cores of a CPU pass for so many devices. They have no more
cores than before, so the images per second of all of them together can at best stay the
same; what they lose is what sharing costs.

The ways to use the devices:

    jit         the compiler distributes the program; one perturbation for all images
    pmap        the same, with means that the program takes itself
    pmap local  one perturbation for the images of each device (m-sharpness)

It prints the least time over the rounds as images per second, those per device relative
to the smallest number of devices, and how many operations across devices the compiled
step has, those of BatchNorm included.
"""

import argparse
import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import numpy as np

from examples.image_classification import devices as devices_of
from examples.image_classification.config import Config
from examples.image_classification.pipeline import Batch
from examples.image_classification.results import markdown
from examples.image_classification.train import make_model, make_program

WAYS = ("jit", "pmap", "pmap local")
METHODS = {
    "SGD": "sgd",
    "GRAD-L1": "grad_l1",
    "first-order": "first_order",
    "HERO": "hero",
}
COLLECTIVE = re.compile(
    r" (?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\("
)


class RandomImages:
    """As much of a pipeline as a training step asks for."""

    num_classes = 10
    steps = 1

    def __init__(self, devices: devices_of.Devices, images: int, size: int) -> None:
        self.devices = devices
        self.image_shape = (size, size, 3)
        rng = np.random.default_rng(0)
        self.item = devices.assemble(
            (
                rng.normal(size=(images, *self.image_shape)).astype(np.float32),
                rng.integers(0, self.num_classes, images, np.int32),
            )
        )

    def batch(self, item: Any, step: chex.Array) -> Batch:
        """Return the share of a device, the same at every step."""
        del step
        images, labels = item
        return Batch(images, labels, labels)


class Result(NamedTuple):
    """Of one number of devices.

    Attributes:
      seconds: of a step, at least.
      collectives: operations across devices in a step.
    """

    seconds: float
    collectives: int


def measure(
    network: str,
    method: str,
    way: str,
    counts: Sequence[int],
    batch: int,
    size: int,
    rounds: int,
) -> dict[int, Result]:
    """Time a training step.

    Args:
      network: as in hero_jax.models.
      method: as in Config.
      way: one of `WAYS`.
      counts: numbers of devices.
      batch: images per device.
      size: height and width of the images.
      rounds: how often to time a step.

    Returns:
      What each number of devices takes.
    """
    steps, states, items, collectives = {}, {}, {}, {}
    for count in counts:
        devices = devices_of.choose("jit" if way == "jit" else "pmap", count)
        pipeline: Any = RandomImages(devices, count * batch, size)
        config = Config(
            model=network,  # type: ignore[arg-type]
            method=method,  # type: ignore[arg-type]
            batch_size=count * batch,
            examples_per_perturbation=batch if way == "pmap local" else None,
        )
        model = make_model(config, pipeline, config.normalizes_together)
        program: Any = make_program(config, model, pipeline)
        state, items[count] = program.init(), pipeline.item
        steps[count] = program.step.lower(state, items[count]).compile()
        # A mean over a single device is none.
        found = COLLECTIVE.findall(steps[count].as_text()) if count > 1 else ()
        collectives[count] = len(found)
        states[count], _ = steps[count](state, items[count])

    seconds: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(rounds):
        for count, step in steps.items():
            jax.block_until_ready(states[count])
            start = time.perf_counter()
            states[count], _ = step(states[count], items[count])
            jax.block_until_ready(states[count])
            seconds[count].append(time.perf_counter() - start)
    return {count: Result(min(seconds[count]), collectives[count]) for count in counts}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, nargs="+", help="default: 1, 2, 4, ...")
    parser.add_argument("--host-devices", type=int, help="make a CPU pass for so many")
    parser.add_argument("--model", default="resnet8", help="as in hero_jax.models")
    parser.add_argument("--size", type=int, default=32, help="height and width")
    parser.add_argument("--batch", type=int, default=32, help="images per device")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--method", choices=METHODS, nargs="+", default=["SGD", "HERO"])
    parser.add_argument("--way", choices=WAYS, nargs="+", default=WAYS)
    options = parser.parse_args(arguments)
    if options.host_devices is not None:
        if options.host_devices < 1:
            parser.error(f"--host-devices must be positive, got {options.host_devices}")
        jax.config.update("jax_num_cpu_devices", options.host_devices)
    available = jax.device_count()
    counts = options.devices or [
        2**k for k in range(available.bit_length()) if 2**k <= available
    ]
    if not all(1 <= count <= available for count in counts):
        parser.error(f"--devices must be 1 to {available}, got {counts}")
    print(
        f"{options.model}, {options.size}x{options.size} images, {options.batch} per "
        f"device, float32, {available} x {jax.devices()[0].device_kind}, "
        f"jax {jax.__version__}\n"
    )
    titles = ["method", "way", "devices", "images/s", "per device", "collectives"]
    rows = [titles]
    for method in options.method:
        for way in options.way:
            results = measure(
                options.model,
                METHODS[method],
                way,
                counts,
                options.batch,
                options.size,
                options.rounds,
            )
            paces = {k: options.batch / result.seconds for k, result in results.items()}
            for count, result in results.items():
                rows.append(
                    [
                        method,
                        way,
                        str(count),
                        f"{count * paces[count]:.0f}",
                        f"{paces[count] / paces[counts[0]]:.2f}",
                        str(result.collectives),
                    ]
                )
    print(markdown(rows))


if __name__ == "__main__":
    main()
