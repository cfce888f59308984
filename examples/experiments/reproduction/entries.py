"""The rows of the paper's tables and figures, in the order of what is wanted most.

At the scale "cpu" two cores finish: 2,500 images of CIFAR-10 at 16x16 pixels, 20 epochs
of ResNet8. There is no augmentation, so that SGD learns the training set by heart, as
it does with all images in 200 epochs; with random crops so small a network does not get
there. The settings are searched (`tuning.py`), once without label noise, and once with
40 % for all rows that have some. "sgd_recipe" is SGD with the learning rate and the
weight decay of the paper's recipe, not searched.

At the scale "budget" the rows are ResNet20's on the whole of CIFAR-10, by the paper's
recipe, but for 15 epochs in place of 200: two cores take hours for a row. The settings
were fixed before on smaller tasks, and none is tuned here.

At the scale "full" the rows are the paper's, with our setting of HERO, and one with
that of the released code.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any, Literal

from examples.image_classification import results
from examples.image_classification.config import Config, Method
from examples.image_classification.named import named

Scale = Literal["full", "cpu", "budget"]

COMMAND = "python -m examples.experiments.reproduction"

METHODS: tuple[Method, ...] = ("hero", "first_order", "grad_l1", "sgd")
SEEDS = (0, 1, 2)

EQ_11: dict[str, Any] = {"perturbation": "layerwise", "reduction": "sum"}
"""Direction and penalty of the paper's text."""

CPU = Config(
    **EQ_11,
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

FIFTEEN_EPOCHS = Config(**EQ_11, h=2.0, gamma=0.1, epochs=15, bits=(8, 6, 5, 4, 3, 2))
"""Common to all runs at the scale "budget": the paper's recipe."""

_OURS = {"perturbation": "relative", "reduction": "norm", "gamma": 0.5}
_FIXED = {"h_warmup_epochs": 1.5}
RECOMMENDED: dict[str, dict[str, Any]] = {
    "first_order_share": {"method": "first_order", "h": 0.001, "share": 0.3},
    "hero_relative": _FIXED | {"method": "hero", "h": 0.02},
    "first_order_relative": _FIXED | {"method": "first_order", "h": 0.04},
}
"""What we would begin with."""

RELEASED: dict[str, Any] = {"perturbation": "adaptive", "reduction": "mean"}
"""The released code's direction and penalty."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """Runs from several seeds, for a row of a table or a curve of a figure.

    Attributes:
      name: of its file of results.
      scale: whose folder that is in.
      config: of the runs, but for what was searched, and the seed.
      seeds: of the runs.
      tuned: the condition under which the settings are searched, if they are.
      surface: whether Figure 3 needs the loss surface of the first seed.
    """

    name: str
    scale: Scale
    config: Config
    seeds: tuple[int, ...] = SEEDS
    tuned: Literal["clean", "noise40"] | None = None
    surface: bool = False

    def path(self, folder: Path) -> Path:
        """Return the file of its results."""
        return folder / self.scale / f"{self.name}.json"

    def where(self, options: argparse.Namespace) -> dict[str, Any]:
        """Return where its data lie, as options of a sweep or a run."""
        names = ("data_dir", "download", "quiet")
        place = options.dataset if self.config.dataset == "cifar10" else None
        return {x: getattr(options, x) for x in names} | {"dataset_path": place}

    def described(self, options: argparse.Namespace, config: Config) -> dict[str, Any]:
        """Return what its record begins with; the command names no folders."""
        words = [COMMAND, "--scale", self.scale, "--only", self.name]
        words += ["--dataset", "DATA"] if options.dataset else ["--data-dir", "DIR"]
        if options.host_devices is not None:
            words += ["--host-devices", str(options.host_devices)]
        environment = results.environment() | {"command": " ".join(words)}
        return {"environment": environment, "config": dataclasses.asdict(config)}


def rows() -> list[Row]:
    """Return all, those of the scale "cpu" first, then those of "budget"."""
    return [*_cpu_rows(), *_budget_rows(), *_full_rows()]


def _cpu_rows() -> list[Row]:
    methods: dict[str, Method] = {x: x for x in METHODS} | {"sgd_recipe": "sgd"}
    return [
        Row(
            name=f"{name}_noise{noise}" if noise else name,
            scale="cpu",
            config=dataclasses.replace(CPU, method=method, label_noise=noise / 100),
            tuned=None if name == "sgd_recipe" else "noise40" if noise else "clean",
            surface=not noise and name in ("hero", "first_order", "sgd"),
        )
        for noise in (0, 20, 40, 60, 80)
        for name, method in methods.items()
    ]


def _budget_rows() -> list[Row]:
    """Return the rows of 15 epochs, one run each."""

    def row(name: str, noise: int = 0, seed: int = 0, **fields: Any) -> Row:
        fields = {"method": name} | fields | {"label_noise": noise / 100}
        return Row(
            name=f"{name}_noise{noise}" if noise else name,
            scale="budget",
            config=dataclasses.replace(FIFTEEN_EPOCHS, **fields),
            seeds=(seed,),
            surface=seed == 0,
        )

    def ours(name: str, noise: int, seed: int = 0) -> Row:
        return row(name, noise, seed, **_OURS | RECOMMENDED[name])

    eq_11: tuple[Method, ...] = ("first_order", "hero")
    return [
        *(row("sgd", noise) for noise in (0, 40)),
        *(row("sgd_decay", x, method="sgd", weight_decay=5e-4) for x in (0, 40)),
        *(ours(name, noise) for noise in (40, 0) for name in RECOMMENDED),
        *(row(name, noise) for noise in (0, 40) for name in eq_11),
        row("released", 40, method="hero", h=0.5, gamma=5.0, **RELEASED),
        row("grad_l1"),
        *(row("sgd", noise, seed=1) for noise in (0, 40)),
        *(ours(name, noise, 1) for noise in (40, 0) for name in RECOMMENDED),
        row("sgd", 80),
        *(ours(name, 80) for name in RECOMMENDED),
    ]


def _full_rows() -> list[Row]:
    """Return the rows of the paper, by the names of their configs."""
    four, paper = ("hero", "first_order", "sgd", "grad_l1"), ("hero", "sgd", "grad_l1")
    noises = ("_noise60", "_noise80", "_noise40", "_noise20")
    names = [f"cifar10_resnet20_{x}{noise}" for noise in ("", *noises) for x in four]
    names.insert(4, "cifar10_resnet20_released")
    names += [f"cifar10_mobilenet_v2_{x}" for x in four]
    names += [f"cifar10_mobilenet_v2_{x}{noise}" for noise in noises for x in paper]
    others = ["cifar10_vgg19_bn", "imagenet2012_resnet18"]
    others[1:1] = [f"cifar100_{x}" for x in ("resnet20", "mobilenet_v2", "vgg19_bn")]
    names += [f"{network}_{x}" for network in others for x in paper]
    return [
        Row(
            name=name,
            scale="full",
            config=named(name),
            seeds=(0,) if name.startswith("imagenet") else SEEDS,
            surface=name in ("cifar10_resnet20_hero", "cifar10_resnet20_sgd"),
        )
        for name in names
    ]
