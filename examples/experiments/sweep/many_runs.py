"""Runs that differ in settings and seed, trained by one compiled program.

There are two ways, which give the same numbers but for rounding:

    vmap         one program takes the steps of several runs at once; for accelerators,
                 which a small network leaves idle
    one_by_one   the program takes the steps of one run, and is called for one after
                 another; for CPUs, where `vmap` over weights makes convolutions
                 grouped, 4 to 40 times slower
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from examples.image_classification import evaluate
from examples.image_classification.array_pipeline import ArrayPipeline, Item
from examples.image_classification.config import Config
from examples.image_classification.loop import RunError
from examples.image_classification.stepping import take_steps
from examples.image_classification.train import (
    OUTPUTS,
    Settings,
    TrainState,
    make_functions,
    make_model,
    shapes_of,
)

from .grid import Run

Together = Literal["vmap", "one_by_one"]


class Result(NamedTuple):
    """What comes out of a run.

    Attributes:
      train_loss: mean over the steps of the last epoch.
      test_loss: of the last weights.
      accuracy_by_bits: test accuracy, "32" bits for the weights as they are.
    """

    train_loss: float
    test_loss: float
    accuracy_by_bits: dict[str, float]


class ManyRuns:
    """Trains runs whose settings and seeds are arguments of one compiled program.

    Args:
      config: of all runs, but for settings and seed.
      pipeline: their data.
      size: runs that one call takes under "vmap".
      together: "vmap" or "one_by_one".

    Attributes:
      size: runs that one call takes.
      together: as given.
      parameters: trainable numbers of a network.
    """

    def __init__(
        self, config: Config, pipeline: ArrayPipeline, size: int, together: Together
    ) -> None:
        self._config, self._pipeline = config, pipeline
        self._devices = pipeline.devices
        self.together: Together = together
        self._mapped = together == "vmap"
        self.size = size if self._mapped else 1
        model = make_model(config, pipeline, config.normalizes_together)
        init, *_ = make_functions(config, model, pipeline)
        try:
            shapes = shapes_of(config, lambda: init(jax.random.key(0)))
        except ValueError as error:
            raise RunError(str(error)) from None

        def start(item: Item) -> TrainState:
            return init(jax.random.wrap_key_data(item.key))

        def step(
            state: TrainState, item: Item, given: Settings
        ) -> tuple[TrainState, chex.Array]:
            _, step_of, _ = make_functions(config, model, pipeline, given)
            return step_of(state, item)

        if self._mapped:
            axes = Item(images=None, clean_labels=None, labels=0, order=0, key=0)
            start = jax.vmap(start, in_axes=(axes,))
            step = jax.vmap(step, in_axes=(0, axes, 0))

        def epoch(
            state: TrainState, item: Item, given: Settings
        ) -> tuple[TrainState, chex.Array]:
            return lax.scan(
                lambda state, _: step(state, item, given), state, length=pipeline.steps
            )

        self._start = self._devices.compile(start)
        self._step = self._devices.compile(step, donate=True)
        self._epoch = self._devices.compile(epoch, donate=True)
        self._in_one_loop = config.epoch_on_device
        if self._in_one_loop is None:
            self._in_one_loop = jax.default_backend() != "cpu"
        self._evaluate = evaluate.make_evaluate(model, pipeline)
        self._measure = evaluate.make_measure(config, model, pipeline)
        self.parameters = sum(x.size for x in jax.tree.leaves(shapes.params))

    def train(
        self, runs: Sequence[Run], look: Callable[[np.ndarray], None]
    ) -> list[Result | None]:
        """Train and test up to `size` runs.

        Args:
          runs: which.
          look: called with the losses of the runs, for every step.

        Returns:
          For each run its result; None if a quantity was not finite.
        """
        finite = np.full(len(runs), True)
        for state, outputs in self.epochs(runs, look):  # noqa: B007 - the last counts
            np.logical_and(finite, np.isfinite(outputs).all((1, 2)), out=finite)
            if not finite.any():
                return [None] * len(runs)
        losses = outputs.mean(1)[:, 0]
        return [
            self.test(variables, float(loss)) if good else None
            for variables, loss, good in zip(
                self.networks(state, runs), losses, finite, strict=True
            )
        ]

    def epochs(
        self,
        runs: Sequence[Run],
        look: Callable[[np.ndarray], None],
        state: TrainState | None = None,
        first: int = 0,
    ) -> Iterator[tuple[TrainState, np.ndarray]]:
        """Yield the state after every epoch; the next one uses it up.

        Args:
          runs: which, up to `size`.
          look: called with the losses of the runs, for every step.
          state: to go on from; initial weights if None.
          first: epochs that are behind it.

        Yields:
          The state, and outputs of the steps, float64 `[runs, steps, 5]`.
        """
        given = self._given(runs)
        for number in range(first, self._config.epochs):
            item = self._item(runs, number)
            state = self._start(item) if state is None else state
            steps: list[np.ndarray] = []

            def note(values: jax.Array, steps: list[np.ndarray] = steps) -> None:
                fetched = np.asarray(self._devices.fetch(values), np.float64)
                for of_step in fetched.reshape(-1, self.size, len(OUTPUTS)):
                    steps.append(of_step[: len(runs)])
                    look(steps[-1][:, 0])

            if self._in_one_loop:
                state, values = self._epoch(state, item, given)
                note(values)
            else:
                state = take_steps(
                    lambda state, item: self._step(state, item, given),
                    state,
                    itertools.repeat(item, self._pipeline.steps),
                    note,
                )
            yield state, np.stack(steps, axis=1)

    def steps(self, runs: Sequence[Run]) -> Iterator[tuple[TrainState, jax.Array]]:
        """Yield state and outputs of every step; the next one uses the state up."""
        given, state = self._given(runs), None
        for number in range(self._config.epochs):
            item = self._item(runs, number)
            state = self._start(item) if state is None else state
            for _ in range(self._pipeline.steps):
                state, outputs = self._step(state, item, given)
                yield state, outputs

    def shapes(self, runs: Sequence[Run]) -> TrainState:
        """Return the shapes of the state of runs."""
        shapes: TrainState = jax.eval_shape(self._start, self._item(runs, 0))
        return shapes

    def fetch(self, state: TrainState) -> TrainState:
        """Return a copy of the state on the host."""
        fetched: TrainState = self._devices.fetch(state)
        return fetched

    def place(self, state: TrainState) -> TrainState:
        """Bring a state of the host to the device."""
        placed: TrainState = self._devices.replicate(state)
        return placed

    def networks(
        self, state: TrainState, runs: Sequence[Run]
    ) -> list[evaluate.Variables]:
        """Return what the model is applied with, of each run, on the host."""
        state = self.fetch(state)
        states = [state]
        if self._mapped:
            states = [
                jax.tree.map(lambda x, k=k: x[k], state) for k in range(len(runs))
            ]
        return [evaluate.variables_of(x) for x in states]

    def test(self, variables: evaluate.Variables, train_loss: float) -> Result | None:
        """Test a network at every precision; None if a quantity is not finite."""
        networks = {32: variables}
        if not all(np.isfinite(x).all() for x in jax.tree.leaves(variables)):
            return None  # the last update went too far
        for bits in self._config.bits:
            networks[bits] = evaluate.quantized(variables, bits)
        tested = self._evaluate([*networks.values()])
        if not np.isfinite([result.loss for result in tested]).all():
            return None
        accuracies = (result.accuracy for result in tested)
        return Result(
            train_loss,
            tested[0].loss,
            dict(zip(map(str, networks), accuracies, strict=True)),
        )

    def measure(self, variables: evaluate.Variables, run: Run) -> dict[str, float]:
        """Test a network, and measure gradient and curvature on the run's images."""
        (tested,) = self._evaluate([variables])
        items = self._pipeline_of(run).sample(self._config.curvature_batches)
        return {
            "test_loss": tested.loss,
            "test_accuracy": tested.accuracy,
            **self._measure(variables, items),
        }

    def _pipeline_of(self, run: Run) -> ArrayPipeline:
        return self._pipeline.drawn(run.seed, run.label_noise)

    def _given(self, runs: Sequence[Run]) -> Settings:
        dtype = jnp.result_type(float)
        given: Settings = self._join(
            [Settings(*(np.asarray(x, dtype) for x in run.settings)) for run in runs]
        )
        return given

    def _item(self, runs: Sequence[Run], epoch: int) -> Item:
        """Stack what differs between the runs; the images are there once."""
        pipelines = {run[1:]: self._pipeline_of(run) for run in runs}
        items = {key: next(x.epoch(epoch)) for key, x in pipelines.items()}
        each = [items[run[1:]] for run in runs]
        return Item(*each[0][:2], *self._join([item[2:] for item in each]))

    def _join(self, trees: Sequence[Any]) -> Any:
        if not self._mapped:
            return self._devices.replicate(trees[0])
        trees = [*trees, *[trees[-1]] * (self.size - len(trees))]
        stacked = jax.tree.map(lambda *x: np.stack(x), *trees)
        return self._devices.replicate(stacked)
