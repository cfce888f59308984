"""Runs that differ in settings and seed, trained by one compiled program.

There are two ways, which give the same numbers but for rounding:

    vmap         one program takes the steps of several runs at once; for accelerators,
                 which a small network leaves idle
    one_by_one   the program takes the steps of one run, and is called for one after
                 another; for CPUs, where `vmap` over weights makes convolutions
                 grouped, 4 to 40 times slower
"""

import collections
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from . import evaluate
from .array_pipeline import ArrayPipeline, Item
from .config import Config
from .grid import Run
from .loop import AHEAD, RunError
from .train import (
    OUTPUTS,
    Settings,
    TrainState,
    make_functions,
    make_model,
    shapes_of,
)

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
            shapes_of(config, lambda: init(jax.random.key(0)))
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
        self._start = self._devices.compile(start)
        self._step = self._devices.compile(step, donate=True)
        self._evaluate = evaluate.make_evaluate(model, pipeline)

    def train(
        self, runs: Sequence[Run], look: Callable[[np.ndarray], None]
    ) -> list[Result | None]:
        """Train and test up to `size` runs.

        Args:
          runs: which.
          look: called with the losses of the runs, at every step.

        Returns:
          For each run its result; None if a quantity was not finite.
        """
        finite = np.full(len(runs), True)
        outputs: collections.deque[np.ndarray] = collections.deque(
            maxlen=self._pipeline.steps
        )
        waiting: collections.deque[jax.Array] = collections.deque()

        def note(values: jax.Array) -> None:
            fetched = np.asarray(self._devices.fetch(values), np.float64)
            outputs.append(fetched.reshape(-1, len(OUTPUTS))[: len(runs)])
            np.logical_and(finite, np.isfinite(outputs[-1]).all(1), out=finite)
            look(outputs[-1][:, 0])

        for state, values in self.steps(runs):  # noqa: B007 - the last one counts
            waiting.append(values)
            if len(waiting) > AHEAD:
                note(waiting.popleft())
            if not finite.any():
                return [None] * len(runs)
        for values in waiting:
            note(values)
        losses = np.mean(outputs, axis=0)[:, 0]
        states = self._apart(self._devices.fetch(state))
        return [
            self._test(state, float(loss)) if good else None
            for state, loss, good in zip(states, losses, finite, strict=False)
        ]

    def steps(self, runs: Sequence[Run]) -> Iterator[tuple[TrainState, jax.Array]]:
        """Yield state and outputs of every step; the next one uses the state up."""
        runs = [*runs, *[runs[-1]] * (self.size - len(runs))]
        pipelines = {run.seed: self._pipeline.with_seed(run.seed) for run in runs}
        dtype = jnp.result_type(float)
        given = self._join(
            [Settings(*(np.asarray(x, dtype) for x in run.settings)) for run in runs]
        )
        state = None
        for epoch in range(self._config.epochs):
            items = {seed: next(x.epoch(epoch)) for seed, x in pipelines.items()}
            item = self._item([items[run.seed] for run in runs])
            state = self._start(item) if state is None else state
            for _ in range(self._pipeline.steps):
                state, outputs = self._step(state, item, given)
                yield state, outputs

    def _item(self, items: Sequence[Item]) -> Item:
        """Stack what depends on the seed; the images are there once."""
        shared, drawn = items[0][:2], [item[2:] for item in items]
        return Item(*shared, *self._join(drawn))

    def _join(self, trees: Sequence[Any]) -> Any:
        if not self._mapped:
            return self._devices.replicate(trees[0])
        stacked = jax.tree.map(lambda *x: np.stack(x), *trees)
        return self._devices.replicate(stacked)

    def _apart(self, tree: Any) -> list[Any]:
        if not self._mapped:
            return [tree]
        return [jax.tree.map(lambda x, k=k: x[k], tree) for k in range(self.size)]

    def _test(self, state: TrainState, train_loss: float) -> Result | None:
        networks = {32: evaluate.variables_of(state)}
        if not all(np.isfinite(x).all() for x in jax.tree.leaves(networks)):
            return None  # the last update went too far
        for bits in self._config.bits:
            networks[bits] = evaluate.quantized(networks[32], bits)
        tested = self._evaluate([*networks.values()])
        if not np.isfinite([result.loss for result in tested]).all():
            return None
        accuracies = (result.accuracy for result in tested)
        return Result(
            train_loss,
            tested[0].loss,
            dict(zip(map(str, networks), accuracies, strict=True)),
        )
