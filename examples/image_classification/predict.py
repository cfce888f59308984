"""Tell what a trained network sees in images.

    python -m examples.image_classification.predict RUN IMAGES

RUN is the folder of a run, with weights.safetensors and weights.json. IMAGES are files,
folders with images at any depth, or data sets such as `mine.npz` or `digits`, of which
the test images are taken. Every image is a line of three columns, with tabs between
them: name, class, probability. Images that do not fit, or are damaged, are named and
left out.
"""

import dataclasses
import io
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from PIL import Image

import hero_jax

from . import datasets, mosaics, photographs
from .datasets import Arrays, Files
from .errors import DatasetError
from .logbook import discard_output, prepare_streams, tell
from .pipeline import Facts, standardized

BATCH = 100


class Network:
    """A trained network of a run, and what `weights.json` says about its images.

    `facts` say how an image is prepared, and what the classes are called.
    `DatasetError` if the folder lacks the files, or they are damaged.
    """

    facts: Facts

    def __init__(self, run: Path) -> None:
        try:
            record = json.loads((run / "weights.json").read_text(encoding="utf-8"))
            self._variables = hero_jax.quant.load(run / "weights.safetensors")
            self.facts = Facts(**{name: record[name] for name in Facts._fields})
            height, width, channels = self.facts.image_shape
            factor = self.facts.downsample
            self._shape = (height * factor, width * factor, channels)
            model = hero_jax.models.create(
                record["model"],
                num_classes=len(self.facts.classes),
                dtype=np.dtype(record["dtype"]),
            )

            def probabilities(variables: Any, images: chex.Array) -> chex.Array:
                images = standardized(images, self.facts.mean, self.facts.std)
                logits: Any = model.apply(variables, images, train=False)
                return jax.nn.softmax(jnp.asarray(logits, jnp.float32))

            self._probabilities = jax.jit(probabilities)
            one = jax.ShapeDtypeStruct((1, height, width, channels), np.uint8)
            jax.eval_shape(probabilities, self._variables, one)
        except Exception as error:  # of files, JSON, safetensors, Flax and JAX
            reason = (str(error).splitlines() or [""])[0]
            raise DatasetError(
                f"{run} must be the folder of a finished run, with weights.safetensors "
                f"and weights.json that fit: {type(error).__name__}: {reason}"
            ) from None

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Return the probability of every class, float32 `[B, K]`.

        Images are uint8 `[B, H, W, C]`, as in the arrays that the network was trained
        on, or as :meth:`prepared` returns them; `ValueError` if not.
        """
        if images.dtype != np.uint8 or images.shape[1:] != self._shape:
            raise ValueError(
                f"images must be uint8 {['B', *self._shape]}, as in training, got "
                f"{images.dtype} {[*images.shape]}."
            )
        whole = Arrays(images, np.zeros(len(images), np.int32))
        small = datasets.downsampled(whole, self.facts.downsample).images
        return np.asarray(self._probabilities(self._variables, small))

    def prepared(self, data: bytes) -> np.ndarray:
        """Decode a file as the run decoded its test images, to uint8 `[H, W, C]`.

        Raises one of :data:`photographs.UNREADABLE`.
        """
        if self.facts.crop < 1.0:
            return photographs.centre_crop(data, self._shape[0])
        image: Image.Image = Image.open(io.BytesIO(data))
        height, width, channels = self._shape
        if image.size != (width, height) or (channels == 1 and image.mode != "L"):
            raise ValueError(
                f"images must have {width}x{height} pixels, {channels} channels, as in "
                f"training, got {image.width}x{image.height}, mode {image.mode}."
            )
        pixels = np.asarray(image if channels == 1 else photographs.to_rgb(image))
        return pixels.reshape(self._shape)


def images_of(
    network: Network, name: str, data_dir: Path | None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield name and content of the images that can be read, and tell of the others."""
    path = Path(name).expanduser()
    if path.is_dir() and not mosaics.found(path):
        paths = datasets.image_files(path)
        data: Any = Files([(x.relative_to(path), 0) for x in paths], str(path))
    elif path.suffix.lower() in datasets.IMAGE_SUFFIXES:
        data = Files([(path, 0)], "")
    else:
        data = datasets.load(name, data_dir=data_dir).test
    if isinstance(data, Arrays):
        yield from ((f"test[{k}]", image) for k, image in enumerate(data.images))
        return
    files: Files = data
    some = False
    for k in range(len(files)):
        try:
            image = network.prepared(files.read(k)[0])
        except photographs.UNREADABLE as error:
            tell(f"left out: {files.name(k)}: {error}")
            continue
        some = True
        yield files.name(k), image
    if not some:
        raise DatasetError(f"no images that can be read in {name}.")


@dataclasses.dataclass(frozen=True)
class Command:
    """What the command line says.

    Attributes:
      run: folder of a run.
      images: files, folders with images, or data sets.
      data_dir: where TensorFlow data sets lie; their own default if None.
    """

    run: tyro.conf.Positional[Path]
    images: tyro.conf.Positional[tuple[str, ...]]
    data_dir: Path | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    prepare_streams("backslashreplace")  # names may be no UTF-8
    command = tyro.cli(
        Command,
        prog=f"python -m {__package__}.predict",
        description=__doc__,
        args=arguments,
    )
    if not command.images:
        tell("error: name IMAGES, too: files, folders or data sets.")
        return 2
    try:
        network = Network(command.run)
        for name in command.images:
            images = images_of(network, name, command.data_dir)
            while some := [*itertools.islice(images, BATCH)]:
                titles, pixels = zip(*some, strict=True)
                for title, row in zip(titles, network(np.stack(pixels)), strict=True):
                    label = int(row.argmax())
                    print(title, network.facts.classes[label], row[label], sep="\t")
                sys.stdout.flush()
    except BrokenPipeError:  # of `| head`, which has seen enough
        discard_output()
    except (DatasetError, ImportError, OSError, ValueError) as error:
        tell(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
