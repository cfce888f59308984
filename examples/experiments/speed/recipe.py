"""Images per second of the input pipeline alone, of the step alone, and of both.

    python -m examples.experiments.speed.recipe CONFIG [the options of a run]

The step alone trains on one batch that is ready. If the time of both together is far
from being that of the step, more `--workers` may help. With several devices the step
includes what is done to images on the devices.
"""

import copy
import dataclasses
import itertools
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax

from examples.image_classification import devices
from examples.image_classification.__main__ import parse
from examples.image_classification.config import Config
from examples.image_classification.pipeline import Pipeline
from examples.image_classification.run import open_pipeline
from examples.image_classification.stopping import checked_arguments, command
from examples.image_classification.train import make_model, make_program

from .harness import machine, report

LEAST_STEPS = 30
"""So many that a few batches which workers have ready do not count."""


def measure(config: Config, pipeline: Pipeline, steps: int) -> dict[str, float]:
    """Return images per second over so many steps, after one that is not counted."""
    model = make_model(config, pipeline, config.normalizes_together)
    program = make_program(config, model, pipeline)
    items = itertools.chain.from_iterable(map(pipeline.epoch, itertools.count()))
    first = next(items)
    state = program.init()
    alone, ready = program.step, first
    if pipeline.devices.count == 1:
        ready = jax.jit(pipeline.batch)(first, state.step)
        prepared = copy.copy(pipeline)
        prepared.batch = lambda item, step: item  # type: ignore[method-assign]  # noqa: ARG005
        alone = make_program(config, model, prepared).step

    def rate(source: Any, step: Any = None, warm_up: Any = None) -> float:
        nonlocal state
        if step is not None:
            state, _ = step(state, warm_up)  # compiles, the first time
        jax.block_until_ready(state)
        start = time.perf_counter()
        for item in itertools.islice(source, steps):
            if step is None:
                jax.block_until_ready(item)
            else:
                state, _ = step(state, item)
        jax.block_until_ready(state)
        return steps * config.micro_batch / (time.perf_counter() - start)

    return {
        "input pipeline alone": rate(items),
        "step alone": rate(itertools.repeat(ready), alone, ready),
        "both": rate(items, program.step, first),
    }


@command
def main(arguments: Sequence[str]) -> None:
    """Measure over an epoch, or a few short ones, and print a table."""
    with checked_arguments():
        program = "python -m examples.experiments.speed.recipe"
        config, options = parse(arguments, program, __doc__ or "")
        if options.distributed:
            raise ValueError("--distributed must be left out: one process is measured.")
    devices.divide_host(options.host_devices)
    config = dataclasses.replace(config, epochs=max(3 * LEAST_STEPS, config.epochs))
    with open_pipeline(config, options) as pipeline:
        rates = measure(config, pipeline, max(pipeline.steps, LEAST_STEPS))
    print(
        f"{config.model}, {config.method}, {'x'.join(map(str, pipeline.image_shape))} "
        f"images, batch {config.micro_batch}, {options.workers} workers, "
        f"{pipeline.devices.count} of {machine()}\n"
    )
    report([["what", "images/s"], *([k, f"{v:.0f}"] for k, v in rates.items())])
    share = rates["both"] / rates["step alone"]
    print(f"\nOf the time of both, {min(share, 1):.1%} is that of the step.")


if __name__ == "__main__":
    sys.exit(main())
