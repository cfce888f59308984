"""Configs by name: the networks and data sets of the paper, by its recipe.

The names are DATASET_MODEL_METHOD[_noiseNN], such as "cifar10_resnet20_hero_noise40"
with 40 % of the labels redrawn. "hero" and "first_order" have our h, gamma, direction
and reduction (docs/choosing.md says why): that of first_order follows the loss, that of
hero grows over the first tenth of training. "released" and "released_first_order" have
those of the authors' code, with the h of the paper. The strength of GRAD-L1 is a guess:
the paper searched it, without saying what came out.

A TOML file, one's own or a sample in `configs`, has a name as well: its path, or
"digits" for `configs/digits.toml`.
"""

import difflib
import functools
from pathlib import Path
from typing import Any

from .config import Config, load

SAMPLES = Path(__file__).parent / "configs"

_SMALL = ("resnet20", "mobilenet_v2", "vgg19_bn")
_MODELS = {"cifar10": _SMALL, "cifar100": _SMALL, "imagenet2012": ("resnet18",)}
_NOISES = (0, 20, 40, 60, 80)
_RELEASED = {"perturbation": "adaptive", "reduction": "mean", "gamma": 5.0}
_METHODS: dict[str, dict[str, Any]] = {
    "hero": {"method": "hero"},
    "first_order": {"method": "first_order", "h": 0.001, "share": 0.3},
    "grad_l1": {"method": "grad_l1"},
    "sgd": {"method": "sgd"},
    "released": _RELEASED | {"method": "hero"},
    "released_first_order": {"method": "first_order", "perturbation": "adaptive"},
}
_IMAGENET = {
    "augmentation": "resized_crop",
    "image_size": 224,
    "epochs": 100,
    "batch_size": 256,
}


@functools.cache
def _configs() -> dict[str, Config]:
    configs = {}
    for dataset, models in _MODELS.items():
        for model in models:
            for method, settings in _METHODS.items():
                for noise in _NOISES:
                    fields: dict[str, Any] = {"dataset": dataset, "model": model}
                    fields |= settings | {"label_noise": noise / 100}
                    if dataset == "imagenet2012":
                        fields |= _IMAGENET
                    if method == "hero":
                        epochs = fields.get("epochs", Config.epochs)
                        fields["h_warmup_epochs"] = epochs / 10
                    if method.startswith("released"):
                        fields["h"] = 0.5 if dataset == "cifar10" else 1.0
                    end = f"_noise{noise}" if noise else ""
                    configs[f"{dataset}_{model}_{method}{end}"] = Config(**fields)
    return configs


def names() -> list[str]:
    """Return the names in the table."""
    return [*_configs()]


def named(name: str) -> Config:
    """Return the config of a name in the table, a sample, or the path of a TOML file.

    Raises `FileNotFoundError`, and what :func:`load` does.
    """
    for path in (Path(name), SAMPLES / f"{name}.toml"):
        if path.is_file():
            return load(path)
    if name in _configs():
        return _configs()[name]
    known = [*sorted(path.stem for path in SAMPLES.glob("*.toml")), *names()]
    near = difflib.get_close_matches(name, known, n=3) or known[:3]
    raise FileNotFoundError(
        f"no config {name!r}: neither a TOML file nor a name such as "
        f"{', '.join(near)} (DATASET_MODEL_METHOD[_noiseNN])."
    )
