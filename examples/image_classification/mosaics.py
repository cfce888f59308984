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

import numpy as np
from PIL import Image


def found(root: Path) -> bool:
    """Return whether a folder is meant to hold mosaics."""
    meta = root / "meta.json"
    return meta.is_file() and b"mosaic_columns" in meta.read_bytes()


def read(root: Path) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], list[str]]:
    """Read the splits "train" and "test": images, labels; and names of the classes.

    Raises `ValueError` where a file is missing, or does not match, or whatever NumPy
    and Pillow raise.
    """
    meta = json.loads((root / "meta.json").read_text(encoding="utf-8"))
    columns, splits = int(meta["mosaic_columns"]), {}
    for split in ("train", "test"):
        facts = meta["splits"][split]
        paths = sorted(
            root.glob(f"{split}-[0-9]*.webp"), key=lambda path: (len(path.name), path)
        )
        if not paths:
            raise ValueError(f"no pictures {split}-00.webp and so on")
        images = np.concatenate([_tiles(path, columns) for path in paths])
        images = images[: facts["num_examples"]]  # the last row may not be full
        labels = np.load(root / f"{split}-labels.npy", allow_pickle=False)
        if not len(images) == len(labels) == facts["num_examples"]:
            raise ValueError(
                f"it must have {facts['num_examples']} images and labels to {split}, "
                f"got {len(images)} and {len(labels)}: is a picture missing?"
            )
        for name, array in (("images", images), ("labels", labels.astype(np.uint8))):
            if hashlib.sha256(array.tobytes()).hexdigest() != facts[f"{name}_sha256"]:
                raise ValueError(f"the {split} {name} do not match their checksum")
        splits[split] = images, labels
    return splits, [*map(str, meta["classes"])]


def _tiles(path: Path, columns: int) -> np.ndarray:
    """Cut a picture into squares, row by row."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    size = pixels.shape[1] // max(columns, 1)
    if columns < 1 or size * columns != pixels.shape[1] or pixels.shape[0] % size:
        raise ValueError(
            f"{path} must be rows of {columns} squares, got "
            f"{pixels.shape[1]}x{pixels.shape[0]} pixels"
        )
    grid = pixels.reshape(-1, size, columns, size, 3).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(grid).reshape(-1, size, size, 3)
