"""What is trained, and which settings every method may try."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from examples.experiments.sweep import grid as grids
from examples.experiments.sweep.grid import Grid, Row
from examples.image_classification.config import Config

from . import tabular

FOLDER = Path(__file__).parents[2] / "results" / "directions"
BITS = (8, 4, 3, 2)
DIGITS_TASKS = ("digits", "digits_noise40")
"""The tasks whose settings, best of both, are tried on all others."""

# Learning rates and weight decays are those of all methods but "SGD, tuned", which
# finds these best for the digits where labels are right.
DIGITS = Config(
    learning_rate=0.2,
    weight_decay=0.002,
    dataset="digits",
    augmentation="none",
    model="resnet8",
    epochs=20,
    h_warmup_epochs=2,
    bits=BITS,
    validation_size=250,
)
SMALL_CIFAR = dataclasses.replace(
    DIGITS,
    dataset="cifar10",
    downsample=2,
    train_size=2500,
    test_size=5000,
    validation_size=500,
    batch_size=64,
)
TABLE = tabular.Table(
    learning_rate=0.05,
    weight_decay=0.002,
    dataset="digits",
    validation_size=200,
    epochs=40,
    h_warmup_epochs=4,
    batch_size=50,
    bits=BITS,
)

TASKS: dict[str, Config] = {
    "digits": DIGITS,
    "digits_noise40": dataclasses.replace(DIGITS, label_noise=0.4),
    "cifar": SMALL_CIFAR,
    "cifar_noise40": dataclasses.replace(SMALL_CIFAR, label_noise=0.4),
    "cifar_noise80": dataclasses.replace(SMALL_CIFAR, label_noise=0.8),
    "mobilenet_noise40": dataclasses.replace(
        DIGITS,
        label_noise=0.4,
        model="mobilenet_v2",
        batch_size=32,
        learning_rate=0.1,
    ),
    "mlp_digits_noise40": dataclasses.replace(TABLE, label_noise=0.4),
    "deep_mlp_digits_noise40": dataclasses.replace(TABLE, label_noise=0.4, hidden=8),
    "mlp_breast_cancer_noise40": dataclasses.replace(
        TABLE, dataset="breast_cancer", label_noise=0.4, validation_size=70
    ),
}


def seeds_of(task: Config) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the seeds of searches and those of tests: more where runs cost little."""
    if isinstance(task, tabular.Table):
        return tuple(range(10, 15)), tuple(range(10))
    return (3,), (0, 1, 2)


@dataclasses.dataclass(frozen=True)
class Method:
    """Config fields of a method, and the settings that it may try.

    Attributes:
      fields: what differs from the task's config, but for numbers.
      grid: of the numbers, with the task's learning rate and weight decay unless it
        has several; None if there is nothing to search.
      like: the method whose best setting this one takes, in place of a search.
      epochs: how many times those of the task.
    """

    fields: dict[str, Any]
    grid: Grid | None = None
    like: str | None = None
    epochs: int = 1

    def config(self, task: Config) -> Config:
        """Return the config of its runs; what the method does not have is zero."""
        zeros: dict[str, Any] = dict.fromkeys(("h", "gamma", "strength"), 0.0)
        config = dataclasses.replace(task, epochs=self.epochs * task.epochs, **zeros)
        return dataclasses.replace(config, **self.fields)

    def search(self, task: Config) -> Grid:
        """Return the settings that it may try on a task."""
        assert self.grid is not None
        grid = self.grid.of_method(self.fields["method"])
        grid = dataclasses.replace(grid, seeds=seeds_of(task)[0])
        if self.tuned:
            return grid
        fields: dict[str, Any] = {
            "learning_rate": (task.learning_rate,),
            "weight_decay": (task.weight_decay,),
        }
        if task.dataset == "cifar10" or task.model == "mobilenet_v2":  # dear
            # Half as many, h in octaves for all.
            fields["gamma"] = grid.gamma[:1]
            fields["h"] = grid.h[:: 3 - len(grid.gamma)]
            fields["share"] = grid.share[::2]
        return dataclasses.replace(grid, **fields)

    @property
    def tuned(self) -> bool:
        """Whether it has a learning rate and weight decay of its own."""
        return self.grid is not None and len(self.grid.learning_rate) > 1


BUDGET = 12
"""Settings that every method may try; on CIFAR-10 and by MobileNetV2, half of them."""


def _octaves(first: float, count: int, per_octave: int = 1) -> tuple[float, ...]:
    return tuple(float(f"{first * 2 ** (k / per_octave):.4g}") for k in range(count))


def _first_order(direction: str, first: float, **fields: Any) -> Method:
    fields |= {"method": "first_order", "perturbation": direction}
    return Method(fields, _grid(_octaves(first, BUDGET, 2), (0.0,)))


def _hero(
    direction: str, first: float, reduction: str, gamma: tuple[float, ...]
) -> Method:
    fields = {"method": "hero", "perturbation": direction, "reduction": reduction}
    return Method(fields, _grid(_octaves(first, BUDGET // len(gamma)), gamma))


def _grid(h: tuple[float, ...], gamma: tuple[float, ...]) -> Grid:
    return Grid(h=h, gamma=gamma)


_RELATIVE = {"method": "first_order", "perturbation": "relative", "h_warmup_epochs": 0}
_FOLLOWING = _RELATIVE | {"h": 0.001}
_SHARES = tuple(k / 20 for k in range(1, BUDGET + 1))

METHODS: dict[str, Method] = {
    "SGD": Method({"method": "sgd"}),
    "SGD, tuned": Method(
        {"method": "sgd"},
        Grid(
            h=(0.0,),
            gamma=(0.0,),
            learning_rate=(0.025, 0.1, 0.2, 0.4),
            weight_decay=(5e-4, 2e-3, 5e-3),
        ),
    ),
    "SAM": _first_order("normalized", 0.04),
    "first-order, layerwise": _first_order("layerwise", 1.0),
    "HERO, layerwise": _hero("layerwise", 1.0, "sum", (0.5, 0.05)),
    "first-order, relative": _first_order("relative", 0.01),
    "HERO, relative": _hero("relative", 0.01, "norm", (0.5, 1.0)),
    "first-order, rounding": _first_order("rounding", 0.02),
    "HERO, rounding": _hero("rounding", 0.02, "norm", (0.5, 1.0)),
    "first-order, adaptive": _first_order("adaptive", 0.1),
    "first-order, layerwise, weights": _first_order("layerwise", 2.0, moved="weights"),
    "first-order, layerwise, others": _first_order("layerwise", 0.5, moved="others"),
    "first-order, relative, all": _first_order("relative", 0.005, moved="all"),
    "first-order, relative, no warm-up": _first_order(
        "relative", 0.005, h_warmup_epochs=0
    ),
    "first-order, h = 0.04": Method(_RELATIVE | {"h": 0.04}),
    "first-order, share": Method(
        _FOLLOWING, Grid(h=(0.001,), gamma=(0.0,), share=_SHARES)
    ),
    "first-order, share 0.3": Method(_FOLLOWING | {"share": 0.3}),
    "HERO, share 0.3": Method(
        _FOLLOWING | {"method": "hero", "gamma": 0.5, "share": 0.3}
    ),
    "SGD, 4 times the epochs": Method({"method": "sgd"}, epochs=4),
}
METHODS |= {
    f"{name}, 2 times the epochs": Method(METHODS[name].fields, like=name, epochs=2)
    for name in ("first-order, layerwise", "first-order, relative")
}


def read(folder: Path, task: str) -> dict[str, Any]:
    """Return the record of a task, empty if there is none."""
    path = folder / f"{task}.json"
    if not path.exists():
        return {"search": {}, "test": {}, "transfer": {}}
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def best(name: str, task: str, *records: dict[str, Any]) -> Row | None:
    """Return the setting with the best score on the images held out.

    Of several records, by the mean score over them; None before a search is over.
    """
    grid = METHODS[name].search(TASKS[task])
    searched = [
        grids.summarize(grid, record["search"].get(name, [])) for record in records
    ]
    if any(len(summaries) < len(grid.settings()) for summaries in searched):
        return None

    def mean(k: int) -> float:
        scores = [summaries[k]["score"] for summaries in searched]
        return (
            -math.inf if None in scores else float(np.mean([x["mean"] for x in scores]))
        )

    top = max(range(len(searched[0])), key=mean)
    return None if mean(top) == -math.inf else searched[0][top]
