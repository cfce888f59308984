"""Runs that differ in settings and seed, trained by one compiled program.

There are two ways, which give the same numbers but for rounding:

    vmap         one program takes the steps of several runs at once; for accelerators,
                 which a small network leaves idle
    one_by_one   the program takes the steps of one run, and is called for one after
                 another; for CPUs, where `vmap` over weights makes convolutions
                 grouped, 4 to 40 times slower
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from examples.image_classification import evaluate
from examples.image_classification.array_pipeline import ArrayPipeline, Item
from examples.image_classification.config import Config
from examples.image_classification.errors import RunError
from examples.image_classification.stepping import take_steps
from examples.image_classification.train import (
    Settings,
    TrainState,
    make_functions,
    make_model,
    shapes_of,
)

from .grid import Run

Together = Literal["vmap", "one_by_one"]


class Result(NamedTuple):
    """What comes out of a run; None of one in which a quantity was not finite.

    "32" bits are the weights as they are; the training loss is that of the last epoch.
    """

    accuracy_by_bits: dict[str, float] | None = None
    validation_loss: float | None = None
    train_loss: float | None = None


class ManyRuns:
    """Trains runs whose settings and seeds are arguments of one compiled program.

    Attributes:
      size: runs that one call takes; `size` of the arguments under "vmap".
      step: compiled, `(state, item, settings) -> (state, outputs)`; uses the state up.
    """

    def __init__(
        self, config: Config, pipeline: ArrayPipeline, size: int, together: Together
    ) -> None:
        self._config, self._pipeline = config, pipeline
        self._devices = pipeline.devices
        self._mapped = together == "vmap"
        self.size = size if self._mapped else 1
        model = make_model(config, pipeline, config.normalizes_together)
        init, *_ = make_functions(config, model, pipeline)
        try:
            shapes_of(config, lambda: init(jax.random.key(0)))
        except ValueError as error:
            raise RunError(str(error)) from None

        def start(item: Item, settings: Settings) -> TrainState:
            init, *_ = make_functions(config, model, pipeline, settings)
            return init(jax.random.wrap_key_data(item.key))

        def step(
            state: TrainState, item: Item, settings: Settings
        ) -> tuple[TrainState, chex.Array]:
            _, step_of, _ = make_functions(config, model, pipeline, settings)
            return step_of(state, item)

        if self._mapped:
            axes = Item(images=None, clean_labels=None, labels=0, order=0, key=0)
            start = jax.vmap(start, in_axes=(axes, 0))
            step = jax.vmap(step, in_axes=(0, axes, 0))

        self._start = self._devices.compile(start)
        self.step = self._devices.compile(step, donate=True)
        self._evaluate = evaluate.make_evaluate(model, pipeline)

    def train(
        self, runs: Sequence[Run], look: Callable[[np.ndarray], None]
    ) -> list[Result]:
        """Train and test up to `size` runs; `look` at their losses after every step."""
        dtype = jnp.result_type(float)
        settings: Settings = self._join(
            [Settings(*(np.asarray(x, dtype) for x in run.settings)) for run in runs]
        )
        item = self._item(runs, 0)
        state = self._start(item, settings)
        finite = np.full(len(runs), True)
        for number in range(self._config.epochs):
            item = self._item(runs, number) if number else item
            steps: list[np.ndarray] = []

            def note(values: jax.Array, steps: list[np.ndarray] = steps) -> None:
                outputs = np.asarray(self._devices.fetch(values), np.float64)
                steps.append(outputs.reshape(self.size, -1)[: len(runs)])
                look(steps[-1][:, 0])

            state = take_steps(
                lambda state, item: self.step(state, item, settings),
                state,
                itertools.repeat(item, self._pipeline.steps),
                note,
            )
            finite &= np.isfinite(steps).all((0, 2))
            if not finite.any():
                return [Result()] * len(runs)
        losses = np.mean(steps, axis=0)[:, 0]
        fetched = self._devices.fetch(state)
        results = []
        for k, (loss, good) in enumerate(zip(losses, finite, strict=True)):
            of_run = fetched
            if self._mapped:
                of_run = jax.tree.map(lambda x, k=k: x[k], fetched)
            variables = evaluate.variables_of(of_run)
            results.append(self._test(variables, float(loss)) if good else Result())
        return results

    def _test(self, variables: evaluate.Variables, train_loss: float) -> Result:
        """Test a network at every precision."""
        if not all(np.isfinite(x).all() for x in jax.tree.leaves(variables)):
            return Result()  # the last update went too far
        networks = {"32": variables}
        for bits in self._config.bits:
            networks[str(bits)] = evaluate.quantized(variables, bits)
        tested = self._evaluate([*networks.values()])
        if not np.isfinite([x.loss for x in tested]).all():
            return Result()
        accuracies = (x.accuracy for x in tested)
        by_bits = dict(zip(networks, accuracies, strict=True))
        return Result(by_bits, tested[0].loss, train_loss)

    def _item(self, runs: Sequence[Run], epoch: int) -> Item:
        """Stack what differs between the runs; the images are there once."""
        items = {
            seed: next(self._pipeline.drawn(seed).epoch(epoch))
            for seed in dict.fromkeys(run.seed for run in runs)
        }
        each = [items[run.seed] for run in runs]
        return Item(*each[0][:2], *self._join([item[2:] for item in each]))

    def _join(self, trees: Sequence[Any]) -> Any:
        if not self._mapped:
            return self._devices.replicate(trees[0])
        trees = [*trees, *[trees[-1]] * (self.size - len(trees))]
        stacked = jax.tree.map(lambda *x: np.stack(x), *trees)
        return self._devices.replicate(stacked)
