"""What determines the numbers of a run, typed and checked."""

import dataclasses
import json
import math
import re
import tomllib
import typing
from pathlib import Path
from typing import Any, Literal

Augmentation = Literal["none", "crop_flip", "resized_crop"]
Direction = Literal[
    "layerwise",
    "adaptive",
    "normalized",
    "relative",
    "rounding",
]
DType = Literal["float32", "bfloat16"]
Method = Literal["hero", "first_order", "grad_l1", "sgd"]
Model = Literal["resnet20", "mobilenet_v2", "vgg19_bn", "resnet18", "resnet8"]
Moved = Literal["all", "weights", "others"]
Optimizer = Literal["sgd", "adamw"]
Product = Literal["exact", "finite_difference"]
Reduction = Literal["sum", "mean", "norm"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """All that determines the numbers of a run.

    The defaults are the paper's recipe, but for HERO's: see `docs/choosing.md`.

    Attributes:
      dataset: "digits" (part of scikit-learn), a name of TensorFlow Datasets such as
        "cifar10", "cifar100" or "imagenet2012", an `.npz` file with x_train, y_train,
        x_test and y_test, a folder with train/CLASS/IMAGE and val/CLASS/IMAGE, or one
        of mosaics (see `mosaics.py`).
      train_size: use so many training images, the same ones for every seed.
      test_size: use so many test images.
      validation_size: hold out so many training images and test on them instead; for
        choosing h and gamma.
      label_noise: share of the training labels that are replaced by a uniform draw over
        all classes.
      augmentation: "crop_flip" pads by 4, crops and flips images of one size, which
        are held on the device; "resized_crop" decodes files of any size in worker
        processes and cuts out random parts; "none" takes images as they are.
      image_size: height and width after a resized crop, in pixels.
      downsample: average squares of so many pixels a side, once and for all; for images
        of one size, where there is no accelerator.
      model: network; resnet8 is a small one for trying things out.
      dtype: in which the network computes; weights and gradients stay float32.
      method: how the loss becomes a gradient.
      h: length of HERO's and first_order's step, in units of z; with a share, where it
        begins, at most 0.01.
      share: the part of the lead, the loss of an untrained network minus the loss, that
        a step may cost; h then follows the loss (`hero_jax.schedules.next_h`). 0 leaves
        h as it is.
      gamma: strength of HERO's penalty.
      perturbation: direction z; with "relative" h is the share of its norm by which a
        kernel moves, "layerwise" is the paper's Eq. 11, "rounding" that of 4 bits.
      moved: along z: "all", the "weights" that get quantized, or the "others"; None
        leaves it to the direction.
      reduction: how the penalty sums up the differences of gradients; "sum" is the
        paper's text.
      hvp: HERO's product with the Hessian, or a difference of gradients in its place,
        which is cheaper and remembers no layers, but errs for networks with rectifiers.
      hvp_examples: take the product over so many images of a micro-batch only; all of
        them if None. Several devices share them out.
      penalty_every: penalize at every so many micro-batches only, as much more.
      h_warmup_epochs: let the step grow from zero over so many epochs.
      gamma_warmup_epochs: let the penalty grow from zero over so many epochs.
      penalty_layers: penalize only the weight tensors in whose path, like
        "BasicBlock_8/Conv_0/kernel", this regular expression is found; all if None.
      strength: of GRAD-L1's penalty.
      examples_per_perturbation: m of m-sharpness: every m images of a micro-batch have
        a perturbation, a penalty and BatchNorm statistics of their own; all of them
        together if None. The numbers do not depend on how many devices there are.
      synchronized_batch_norm: whether BatchNorm takes its statistics over the images of
        all devices that share a perturbation; if not, each device has its own, and the
        numbers depend on how many there are.
      epochs: passes over the training images.
      batch_size: images per update of the weights; the last partial batch of an epoch
        is left out.
      accumulation: micro-batches per update, of batch_size / accumulation images each,
        which save memory. Every micro-batch gets a perturbation and BatchNorm
        statistics of its own.
      optimizer: what follows the gradient, of any method. AdamW wants a learning_rate
        of its own, such as 0.001, and a larger weight_decay, such as 0.05.
      learning_rate: at the start; it falls to zero along a cosine.
      warmup_epochs: let the learning rate rise from zero over so many epochs first.
      momentum: of SGD, and of AdamW's mean of gradients.
      weight_decay: times the weights, added to the gradient; of AdamW to the step.
      clip_norm: largest norm of the gradient, before weight decay; no limit if None.
      bits: precisions of the weights at which the test accuracy is measured.
      curvature_h: step of the finite difference in the reported ||Hz||, the same for
        all methods.
      curvature_batches: training batches over which ||Hz|| is averaged, the same in
        every epoch.
      epoch_on_device: run an epoch as one loop on the device; None: on accelerators.
      seed: of weights, order, augmentation and label noise.
    """

    dataset: str = "cifar10"
    train_size: int | None = None
    test_size: int | None = None
    validation_size: int | None = None
    label_noise: float = 0.0
    augmentation: Augmentation = "crop_flip"
    image_size: int = 224
    downsample: int = 1
    model: Model = "resnet20"
    dtype: DType = "float32"
    method: Method = "hero"
    h: float = 0.02
    share: float = 0.0
    gamma: float = 0.5
    perturbation: Direction = "relative"
    moved: Moved | None = None
    reduction: Reduction = "norm"
    hvp: Product = "exact"
    hvp_examples: int | None = None
    penalty_every: int = 1
    h_warmup_epochs: float = 0.0
    gamma_warmup_epochs: float = 0.0
    penalty_layers: str | None = None
    strength: float = 1e-3
    examples_per_perturbation: int | None = None
    synchronized_batch_norm: bool = True
    epochs: int = 200
    batch_size: int = 128
    accumulation: int = 1
    optimizer: Optimizer = "sgd"
    learning_rate: float = 0.1
    warmup_epochs: float = 0.0
    momentum: float = 0.9
    weight_decay: float = 1e-4
    clip_norm: float | None = None
    bits: tuple[int, ...] = (8, 6, 5, 4, 3)
    curvature_h: float = 0.5
    curvature_batches: int = 4
    epoch_on_device: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise `ValueError` or `TypeError` where a field is out of range."""
        for name, kind in typing.get_type_hints(type(self)).items():
            object.__setattr__(self, name, _checked(name, getattr(self, name), kind))
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                limit = f"at least {low}" if high == math.inf else f"{low} to {high}"
                limit = "positive" if low == _POSITIVE else limit
                raise ValueError(f"{name} must be {limit}, got {value}.")
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"accumulation must divide batch_size={self.batch_size}, got "
                f"{self.accumulation}."
            )
        if self.optimizer == "adamw" and self.learning_rate > 0.02:
            raise ValueError(
                "learning_rate must be at most 0.02 with optimizer='adamw', whose "
                f"steps are about as long (0.001 is usual), got {self.learning_rate}."
            )
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs must be below epochs={self.epochs}, got "
                f"{self.warmup_epochs}."
            )
        m = self.examples_per_perturbation
        if m is not None and self.micro_batch % m:
            raise ValueError(
                "examples_per_perturbation must divide the micro-batch of "
                f"{self.micro_batch} images, got {m}."
            )
        n = self.hvp_examples
        if n is not None and (m or self.micro_batch) % n:
            raise ValueError(
                f"hvp_examples must divide the {m or self.micro_batch} images that "
                f"share a perturbation, got {n}."
            )
        if self.share and self.method in ("hero", "first_order"):
            if self.perturbation != "relative":
                raise ValueError(
                    f"share must be 0 with perturbation={self.perturbation!r}, got "
                    f"{self.share}."
                )
            if self.h > 0.01:
                raise ValueError(
                    "h must be at most 0.01 with a share, where it only begins, got "
                    f"{self.h}: for a fixed h, share must be 0."
                )
            if self.h_warmup_epochs:
                raise ValueError(
                    "h_warmup_epochs must be 0 with a share, got "
                    f"{self.h_warmup_epochs}."
                )
        if self.hvp == "finite_difference" and self.dtype == "bfloat16":
            raise ValueError(
                "hvp must be 'exact' with dtype='bfloat16', which rounds the step of a "
                "difference away, got 'finite_difference'."
            )
        if self.penalty_layers is not None:
            try:
                re.compile(self.penalty_layers)
            except re.error as error:
                raise ValueError(
                    "penalty_layers must be a regular expression, got "
                    f"{self.penalty_layers!r}: {error}."
                ) from None
        if len(set(self.bits)) < len(self.bits):
            raise ValueError(f"bits must differ from each other, got {self.bits}.")
        if self.epoch_on_device and self.augmentation == "resized_crop":
            raise ValueError(
                "epoch_on_device must be False with augmentation='resized_crop', which "
                "decodes images on the host, got True."
            )
        if self.downsample > 1 and self.augmentation == "resized_crop":
            raise ValueError(
                "downsample must be 1 with augmentation='resized_crop', which scales "
                f"images to image_size, got {self.downsample}."
            )
        if not self.dataset:
            raise ValueError("dataset must be a name or a path, got ''.")
        for bits in self.bits:
            if not (2 <= bits <= 8 or bits == 16):
                raise ValueError(f"bits must be 2 to 8, or 16, got {bits}.")

    @property
    def micro_batch(self) -> int:
        """Images that go through the network at once."""
        return self.batch_size // self.accumulation

    @property
    def has_parts(self) -> bool:
        """Whether images that go through at once have several perturbations."""
        return self.examples_per_perturbation not in (None, self.micro_batch)

    @property
    def normalizes_together(self) -> bool:
        """Whether BatchNorm takes its statistics over all devices in training."""
        return self.synchronized_batch_norm and not self.has_parts


_POSITIVE = math.ulp(0.0)
_COUNTS = (
    *("train_size", "test_size", "validation_size", "hvp_examples", "penalty_every"),
    *("examples_per_perturbation", "epochs", "batch_size", "accumulation"),
    "curvature_batches",
)
_AMOUNTS = (
    *(
        "h",
        "h_warmup_epochs",
        "gamma",
        "gamma_warmup_epochs",
        "strength",
        "learning_rate",
    ),
    *("warmup_epochs", "weight_decay"),
)
_RANGES = {
    **dict.fromkeys(_COUNTS, (1, math.inf)),
    **dict.fromkeys(_AMOUNTS, (0, math.inf)),
    **dict.fromkeys(("clip_norm", "curvature_h"), (_POSITIVE, math.inf)),
    **dict.fromkeys(("label_noise", "share"), (0, 1)),
    "image_size": (8, 4096),
    "downsample": (1, 32),
    "momentum": (0, 1),
    "seed": (0, 2**32 - 1),
}
_IN_WORDS = {
    bool: "true or false",
    float: "a finite number",
    int: "an integer",
    str: "a string",
}


def _checked(name: str, value: Any, kind: Any) -> Any:
    """Return the value as the type of its field, or raise `TypeError`."""
    options = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        if value not in options:
            raise ValueError(f"{name} must be one of {[*options]}, got {value!r}.")
        return value
    if typing.get_origin(kind) is tuple:
        if isinstance(value, (list, tuple)):
            return tuple(_checked(name, item, int) for item in value)
    elif type(None) in options:
        return None if value is None else _checked(name, value, options[0])
    elif kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    elif type(value) is kind and kind is not float:
        return value
    wanted = _IN_WORDS.get(kind, "a list of integers")
    raise TypeError(f"{name} must be {wanted}, got {value!r}.")


def load(path: Path) -> Config:
    """Read a TOML file; fields that it leaves out have their defaults.

    Raises `ValueError` or `TypeError` where it is no TOML file, or a field is wrong.
    """
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a TOML file: {error}") from None
    known = {field.name for field in dataclasses.fields(Config)}
    if unknown := sorted(fields.keys() - known):
        raise ValueError(
            f"{path} has unknown fields {unknown}; known are {sorted(known)}."
        )
    try:
        return Config(**fields)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path}: {error}") from None


def dumps(config: Config) -> str:
    """Write all fields as TOML, but for those that are None."""
    fields = dataclasses.asdict(config)
    return "".join(
        f"{name} = {json.dumps(value, ensure_ascii=False)}\n"
        for name, value in fields.items()
        if value is not None
    )


def differences(before: dict[str, Any], config: Config) -> list[str]:
    """Tell which fields of a config were others before."""
    return [
        f"{name} was {before[name]!r}, now {value!r}"
        for name, value in dataclasses.asdict(config).items()
        if before[name] != value
    ]
