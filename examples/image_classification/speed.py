"""Images per second of the input pipeline alone, of the step alone, and of both.

    python -m examples.image_classification.speed CONFIG [the options of a run]

If both together are slower than the step alone, more `--workers` may help.
"""

import dataclasses
import itertools
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax

from .__main__ import parse
from .config import Config
from .pipeline import Pipeline
from .results import markdown
from .run import open_pipeline
from .train import make_model, make_program

LEAST_STEPS = 30
"""So many that a few batches which workers have ready do not count."""


def measure(config: Config, pipeline: Pipeline, steps: int) -> dict[str, float]:
    """Return images per second, after a first step that is not counted.

    Args:
      config: of the run.
      pipeline: its data.
      steps: how many are timed.
    """
    model = make_model(config, pipeline, config.normalizes_together)
    program = make_program(config, model, pipeline)
    epochs = itertools.count()
    items = itertools.chain.from_iterable(map(pipeline.epoch, epochs))
    first = next(items)
    state = program.init()

    def rate(source: Any, train: bool) -> float:
        nonlocal state
        if train:
            state, _ = program.step(state, first)  # compiles, the first time
        jax.block_until_ready(state)
        start = time.perf_counter()
        for item in itertools.islice(source, steps):
            if train:
                state, _ = program.step(state, item)
            else:
                jax.block_until_ready(item)
        jax.block_until_ready(state)
        return steps * config.micro_batch / (time.perf_counter() - start)

    return {
        "input pipeline alone": rate(items, train=False),
        "step alone": rate(itertools.repeat(first), train=True),
        "both": rate(items, train=True),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure over an epoch, or a few short ones, and print a table."""
    config, options = parse(sys.argv[1:] if arguments is None else arguments)
    if options.distributed:
        raise SystemExit("error: speed measures one process: leave out --distributed.")
    config = dataclasses.replace(config, epochs=max(3 * LEAST_STEPS, config.epochs))
    with open_pipeline(config, options) as pipeline:
        rates = measure(config, pipeline, max(pipeline.steps, LEAST_STEPS))
    print(
        f"{config.model}, {config.method}, {'x'.join(map(str, pipeline.image_shape))} "
        f"images, batch {config.micro_batch}, {options.workers} workers, "
        f"{pipeline.devices.count} x {jax.devices()[0].device_kind}, "
        f"jax {jax.__version__}\n"
    )
    rows = [["what", "images/s"], *([k, f"{v:.0f}"] for k, v in rates.items())]
    print(markdown(rows))


if __name__ == "__main__":
    main()
