"""A folder of mosaics, written by hand."""

import hashlib
import json

import numpy as np
from PIL import Image


def write(folder, images, labels, columns=4, per_picture=8):
    """Write splits of square images, uint8 `[N, H, W, 3]`, as lossless pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    splits = {}
    for split in images:
        size = images[split].shape[1]
        for k in range(0, len(images[split]), per_picture):
            tiles = images[split][k : k + per_picture]
            rows = -(-len(tiles) // columns)
            picture = np.zeros((rows * size, columns * size, 3), np.uint8)
            for place, tile in enumerate(tiles):
                y, x = divmod(place, columns)
                picture[y * size : (y + 1) * size, x * size : (x + 1) * size] = tile
            path = folder / f"{split}-{k // per_picture:02d}.webp"
            Image.fromarray(picture).save(path, lossless=True)
        np.save(folder / f"{split}-labels.npy", labels[split])
        splits[split] = {"num_examples": len(images[split])} | {
            f"{name}_sha256": hashlib.sha256(x.tobytes()).hexdigest()
            for name, x in (
                ("images", np.ascontiguousarray(images[split])),
                ("labels", labels[split].astype(np.uint8)),
            )
        }
    classes = [*map(str, range(max(map(max, labels.values())) + 1))]
    meta = {"classes": classes, "mosaic_columns": columns, "splits": splits}
    (folder / "meta.json").write_text(json.dumps(meta))
