"""Small images of one size, as tiles of a few large lossless pictures.

A folder in this form has `meta.json`, such as

    {"classes": ["airplane", ...], "mosaic_columns": 50,
     "splits": {"train": {"num_examples": 50000, "images_sha256": "61be...",
                          "labels_sha256": "a29f..."}, ...}}

and for each split the pictures `train-00.webp`, `train-01.webp`, ... with so many tiles
a row, read row by row, and `train-labels.npy`. The checksums are those of the pixels,
as bytes `[N, H, W, 3]`, and of the labels, as bytes `[N]`. CIFAR-10 takes 97 MB, a
good half of its size in an `.npz` file.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


class MosaicError(Exception):
    """A folder of mosaics is malformed; the message says how."""


def found(root: Path) -> bool:
    """Return whether a folder is meant to hold mosaics."""
    meta = root / "meta.json"
    return meta.is_file() and b"mosaic_columns" in meta.read_bytes()


def read(root: Path) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], list[str]]:
    """Read the splits "train" and "test".

    Returns:
      By split images, uint8 `[N, H, W, 3]`, and labels `[N]`; the names of the classes.

    Raises:
      MosaicError: a file is missing or malformed.
    """
    try:
        meta = json.loads((root / "meta.json").read_text(encoding="utf-8"))
        columns, classes = int(meta["mosaic_columns"]), [*map(str, meta["classes"])]
        facts = {split: meta["splits"][split] for split in ("train", "test")}
        splits = {split: _split(root, split, columns, facts[split]) for split in facts}
    except MosaicError:
        raise
    except KeyError as error:
        raise MosaicError(f"{root / 'meta.json'} has no {error}.") from None
    except Exception as error:  # whatever damaged files make Pillow and NumPy raise
        raise MosaicError(
            f"{root} cannot be read: {str(error) or type(error).__name__}"
        ) from None
    return splits, classes


def _split(
    root: Path, split: str, columns: int, facts: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    paths = sorted(
        root.glob(f"{split}-[0-9]*.webp"), key=lambda path: (len(path.name), path.name)
    )
    if not paths:
        raise MosaicError(f"no pictures {root / split}-00.webp and so on.")
    images = np.concatenate([_tiles(path, columns) for path in paths])
    labels = np.load(root / f"{split}-labels.npy", allow_pickle=False)
    images = images[: facts["num_examples"]]  # the last row may not be full
    if not len(images) == len(labels) == facts["num_examples"]:
        raise MosaicError(
            f"{root} must have {facts['num_examples']} images and labels to {split}, "
            f"got {len(images)} and {len(labels)}: is a picture missing?"
        )
    for name, array in (("images", images), ("labels", labels.astype(np.uint8))):
        if hashlib.sha256(array.tobytes()).hexdigest() != facts[f"{name}_sha256"]:
            raise MosaicError(
                f"{root}: the {split} {name} do not match their checksum."
            )
    return images, labels


def _tiles(path: Path, columns: int) -> np.ndarray:
    """Cut a picture into squares, row by row."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    size = pixels.shape[1] // max(columns, 1)
    if columns < 1 or size * columns != pixels.shape[1] or pixels.shape[0] % size:
        raise MosaicError(
            f"{path} must be rows of {columns} squares, got "
            f"{pixels.shape[1]}x{pixels.shape[0]} pixels."
        )
    grid = pixels.reshape(-1, size, columns, size, 3).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(grid).reshape(-1, size, size, 3)
