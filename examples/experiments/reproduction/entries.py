"""All that the paper's tables and figures need, in the order of what is wanted most.

At the scale "full" they are the paper's, with the settings of the released code. At
the scale "cpu" two cores finish: 2,500 images of CIFAR-10 at 16x16 pixels, 20 epochs of ResNet8. There
is no augmentation, so that SGD learns the training set by heart, as it does with all
images in 200 epochs; with random crops so small a network does not get there.

At the scale "cpu" every method has the same budget of settings (`BUDGET`), which are
judged at full precision and at 4 bits on 2,000 training images that are held out, once
without label noise, and once with 40 % for all rows that have some: each from one seed,
and the best `FINALISTS` of a method from another one, since settings differ by less
than seeds do. The last four settings are the best one of the others with more decay
and a higher learning rate, which help against noise as flatness does. "sgd_recipe" is
SGD with the learning rate and the weight decay of the paper's recipe, not searched.

At the scale "budget" they are ResNet20's on the whole of CIFAR-10, by the paper's
recipe, but for 15 epochs in place of 200: two cores take hours for a row. The settings
were fixed before on smaller tasks, and none is tuned here.
"""

import dataclasses
from typing import Any, Literal

from examples.experiments.sweep.grid import Grid
from examples.image_classification.config import Config, Direction, Method
from examples.image_classification.named import named

Scale = Literal["full", "cpu", "budget"]

BUDGET = 20
"""Settings that each method may try, for rows without noise and for those with it."""

FINALISTS = 3
"""Of them, that are tried from more seeds."""

SEEDS = (0, 1, 2)
FIRST_SEED, MORE_SEEDS = 3, (4,)
"""Of searches and finals."""

CPU = Config(
    dataset="cifar10",
    downsample=2,
    train_size=2500,
    test_size=5000,
    augmentation="none",
    model="resnet8",
    epochs=20,
    batch_size=64,
    h=0.0,
    gamma=0.0,
    strength=0.0,
)
"""Common to all runs at the scale "cpu"; h, gamma and strength are searched."""

FIFTEEN_EPOCHS = Config(epochs=15, bits=(8, 6, 5, 4, 3, 2))
"""Common to all runs at the scale "budget": the paper's recipe, our h and gamma."""

TUNING = dataclasses.replace(CPU, test_size=None, validation_size=2000, bits=(4,))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """Settings of a method to choose from.

    Attributes:
      name: of its folder of results.
      scale: full or cpu.
      config: of all runs.
      grid: what is tried.
      after: if given, the best setting of these searches is kept, but for learning rate
        and weight decay.
    """

    name: str
    scale: Scale
    config: Config
    grid: Grid
    after: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finals:
    """The best settings of some searches, from more seeds.

    Attributes:
      name: of its folder of results.
      scale: full or cpu.
      searches: names.
      config: common to them, but for the direction.
      seeds: beside that of the searches.
      count: how many settings.
    """

    name: str
    scale: Scale
    searches: tuple[str, ...]
    config: Config
    seeds: tuple[int, ...] = MORE_SEEDS
    count: int = FINALISTS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """Runs from several seeds, for a row of a table or a curve of a figure.

    Attributes:
      name: of its file of results.
      scale: full, cpu or budget.
      config: of the runs, but for what was searched, and the seed.
      seeds: of the runs.
      finals: the best setting of these is taken; that of the config if None.
      surface: whether Figure 3 needs its loss surface.
    """

    name: str
    scale: Scale
    config: Config
    seeds: tuple[int, ...]
    finals: str | None = None
    surface: bool = False

    @property
    def shown_in(self) -> str:
        """Which tables and figures of the paper it is for."""
        config = self.config
        if self.scale == "budget":
            return f"seed {self.seeds[0]}"
        if config.label_noise:
            return "Table 2"
        if self.scale == "cpu":
            return "Tables 1 and 3, Figures 1 to 3"
        shown = {
            ("cifar10", "resnet20"): "Table 1, Figures 1 to 3",
            ("cifar10", "mobilenet_v2"): "Tables 1 and 3, Figure 1",
        }
        return shown.get((config.dataset, config.model), "Table 1, Figure 1")


Entry = Search | Finals | Row

_GRIDS: dict[Method, dict[Direction, Grid]] = {
    "hero": {
        "layerwise": Grid(h=(1, 2), gamma=(0.01, 0.1, 0.5, 1)),
        "adaptive": Grid(h=(1, 2), gamma=(0.01, 0.1, 0.5, 1)),
    },
    "first_order": {
        "layerwise": Grid(h=(0.5, 1, 1.5, 2, 3, 5, 10, 20)),
        "adaptive": Grid(h=(0.2, 0.5, 1, 1.5, 2, 3, 4, 8)),
    },
    "grad_l1": {
        "layerwise": Grid(
            learning_rate=(0.1, 0.2),
            strength=(1e-4, 3e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2, 3e-2),
        )
    },
    "sgd": {
        "layerwise": Grid(
            learning_rate=(0.05, 0.1, 0.2, 0.4), weight_decay=(1e-4, 5e-4, 2e-3, 5e-3)
        )
    },
}
"""16 settings for each method."""

_MORE: dict[Method, Grid] = {
    method: Grid(learning_rate=(0.1, 0.2), weight_decay=(2e-3, 5e-3))
    for method in _GRIDS
} | {"sgd": Grid(learning_rate=(0.2, 0.4), weight_decay=(1e-2, 2e-2))}
"""Four more, from the best of those on."""

_OF_ROWS: dict[str, Method] = {method: method for method in _GRIDS} | {
    "sgd_recipe": "sgd"
}
"""Methods of the rows at the scale "cpu"."""

_CONDITIONS = {"clean": 0.0, "noise40": 0.4}

_CPU_NOISES = (0.0, 0.2, 0.4, 0.6, 0.8)


def entries() -> list[Entry]:
    """Return all, those of the scale "cpu" first, then those of "budget"."""
    return [
        *_cpu_searches(),
        *_cpu_finals(),
        *_cpu_rows(),
        *_released(),
        *_wider(),
        *_budget_rows(),
        *_full_rows()[:4],
        *_full_searches(),
        *_full_rows()[4:],
    ]


def _cpu_searches() -> list[Search]:
    searches = []
    for kind, noise in _CONDITIONS.items():
        for method, grids in _GRIDS.items():
            config = dataclasses.replace(TUNING, method=method, label_noise=noise)
            first = [
                Search(
                    name=f"{kind}_{method}" + (f"_{x}" if len(grids) > 1 else ""),
                    scale="cpu",
                    config=dataclasses.replace(config, perturbation=x),
                    grid=_of_seed(grid, method),
                )
                for x, grid in grids.items()
            ]
            more = Search(
                name=f"{kind}_{method}_more",
                scale="cpu",
                config=config,
                grid=_of_seed(_MORE[method], method),
                after=tuple(x.name for x in first),
            )
            searches += [*first, more]
    return searches


def _of_seed(grid: Grid, method: Method) -> Grid:
    return dataclasses.replace(grid, seeds=(FIRST_SEED,)).of_method(method)


def _cpu_finals() -> list[Finals]:
    names = [search.name for search in _cpu_searches()]
    return [
        Finals(
            name=f"{kind}_{method}_finals",
            scale="cpu",
            searches=tuple(x for x in names if x.startswith(f"{kind}_{method}")),
            config=dataclasses.replace(TUNING, method=method, label_noise=noise),
        )
        for kind, noise in _CONDITIONS.items()
        for method in _GRIDS
    ]


def _cpu_rows() -> list[Row]:
    return [
        Row(
            name=f"{name}_noise{100 * noise:.0f}" if noise else name,
            scale="cpu",
            config=dataclasses.replace(
                CPU,
                method=method,
                label_noise=noise,
            ),
            seeds=SEEDS,
            finals=None
            if name == "sgd_recipe"
            else f"{'noise40' if noise else 'clean'}_{name}_finals",
            surface=not noise and name in ("hero", "first_order", "sgd"),
        )
        for noise in _CPU_NOISES
        for name, method in _OF_ROWS.items()
    ]


def _released() -> list[Search]:
    """Return HERO with the settings of the released code, which nothing needs."""
    return [
        Search(
            name=f"released_{kind}",
            scale="cpu",
            config=dataclasses.replace(
                TUNING,
                method="hero",
                perturbation="adaptive",
                reduction="mean",
                label_noise=noise,
            ),
            grid=dataclasses.replace(
                Grid(h=(0.5,), gamma=(5.0,)), seeds=(FIRST_SEED, *MORE_SEEDS)
            ).of_method("hero"),
        )
        for kind, noise in _CONDITIONS.items()
    ]


def _wider() -> list[Search]:
    """Return more of HERO's h and gamma, to look at; nothing is chosen from it."""
    lengths: dict[Direction, tuple[float, ...]] = {
        "layerwise": (0.5, 5.0),
        "adaptive": (0.2, 0.5),
    }
    return [
        Search(
            name=f"wider_{kind}_{direction}",
            scale="cpu",
            config=dataclasses.replace(
                TUNING, method="hero", perturbation=direction, label_noise=noise
            ),
            grid=_of_seed(Grid(h=h, gamma=(0.01, 0.1, 1.0, 5.0)), "hero"),
        )
        for kind, noise in _CONDITIONS.items()
        for direction, h in lengths.items()
    ]


def _budget_rows() -> list[Row]:
    """Return the rows of 15 epochs, one run each, the most wanted first."""
    sgd, first_order, hero = (
        {"method": method} for method in ("sgd", "first_order", "hero")
    )
    decayed = sgd | {"weight_decay": 5e-4}
    released = hero | {
        "perturbation": "adaptive",
        "reduction": "mean",
        "h": 0.5,
        "gamma": 5.0,
    }

    def row(name: str, fields: dict[str, Any], noise: int = 0, seed: int = 0) -> Row:
        config = dataclasses.replace(
            FIFTEEN_EPOCHS, label_noise=noise / 100.0, **fields
        )
        return Row(
            name=f"{name}_noise{noise}" if noise else name,
            scale="budget",
            config=config,
            seeds=(seed,),
            surface=seed == 0,
        )

    return [
        *(row("sgd", sgd, noise) for noise in (0, 40)),
        *(row("sgd_decay", decayed, noise) for noise in (0, 40)),
        row("first_order", first_order),
        row("hero", hero),
        row("first_order", first_order, 40),
        row("hero", hero, 40),
        row("released", released, 40),
        row("grad_l1", {"method": "grad_l1"}),
        *(row("sgd", sgd, noise, seed=1) for noise in (0, 40)),
        *(row("first_order", first_order, noise, seed=1) for noise in (0, 40)),
        *(row("hero", hero, noise, seed=1) for noise in (0, 40)),
        row("sgd", sgd, 80),
        row("first_order", first_order, 80),
        row("hero", hero, 80),
    ]


def _full_searches() -> list[Search]:
    """Return a grid around the settings that two cores found best, for ResNet20.

    Each run has a seventh of the epochs; all of a grid fit on an accelerator at once.
    """
    grids: dict[Direction, tuple[float, ...]] = {
        "layerwise": (1.0, 2.0, 5.0),
        "adaptive": (0.5, 1.0, 2.0),
    }
    return [
        Search(
            name=f"cifar10_resnet20_hero_{direction}_noise{noise}",
            scale="full",
            config=dataclasses.replace(
                named("cifar10_resnet20_hero"),
                perturbation=direction,
                reduction="sum",
                label_noise=noise / 100.0,
                validation_size=5000,
                epochs=30,
                bits=(4,),
            ),
            grid=Grid(h=h, gamma=(0.0, 0.01, 0.1, 0.5), seeds=(FIRST_SEED,)).of_method(
                "hero"
            ),
        )
        for noise in (0, 60)
        for direction, h in grids.items()
    ]


def _full_rows() -> list[Row]:
    """Return the rows of the paper, with the settings of the released code."""
    methods = ("hero", "first_order", "sgd", "grad_l1")
    names = [f"cifar10_resnet20_{x}" for x in methods]
    names += [f"cifar10_resnet20_{x}_noise{n}" for n in (60, 80) for x in methods]
    names += [f"cifar10_resnet20_{x}_noise{n}" for n in (40, 20) for x in methods]
    names += [f"cifar10_mobilenet_v2_{x}" for x in methods]
    papers = ("hero", "sgd", "grad_l1")
    names += [
        f"cifar10_mobilenet_v2_{x}_noise{n}" for n in (60, 80, 40, 20) for x in papers
    ]
    names += [f"cifar10_vgg19_bn_{x}" for x in papers]
    for model in ("resnet20", "mobilenet_v2", "vgg19_bn"):
        names += [f"cifar100_{model}_{x}" for x in papers]
    names += [f"imagenet2012_resnet18_{x}" for x in papers]
    return [
        Row(
            name=name,
            scale="full",
            config=named(_released_name(name)),
            seeds=(0,) if name.startswith("imagenet") else SEEDS,
            surface=name in ("cifar10_resnet20_hero", "cifar10_resnet20_sgd"),
        )
        for name in names
    ]


def _released_name(name: str) -> str:
    """Return the name of the config with the settings of the released code."""
    name = name.replace("_first_order", "_released_first_order")
    return name.replace("_hero", "_released")
