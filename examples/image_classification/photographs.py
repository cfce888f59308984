"""Photographs of any size, decoded and cut on the host.

The sampling of crops follows the usual recipe for ImageNet (Szegedy et al., Going
Deeper with Convolutions, 2015): 8 to 100 % of the area, aspect ratios of 3/4 to 4/3.
"""

import io
import math

import numpy as np
from PIL import Image

AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)
ATTEMPTS = 10
CENTRE = 0.875
"""Part of the shorter side that evaluation sees: 224 of 256 pixels."""

Box = tuple[float, float, float, float]

UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
"""What Pillow raises for damaged or foreign files."""


def random_crop(data: bytes, size: int, rng: np.random.Generator) -> np.ndarray:
    """Return a random part, mirrored every second time: RGB uint8 `[size, size, 3]`."""
    image = Image.open(io.BytesIO(data))
    result = _resized(image, random_box(*image.size, rng), size)
    return result[:, ::-1] if rng.random() < 0.5 else result


def centre_crop(data: bytes, size: int) -> np.ndarray:
    """Return the central square, 7/8 of the shorter side, as RGB uint8."""
    image = Image.open(io.BytesIO(data))
    return _resized(image, centre_box(*image.size, CENTRE * min(image.size)), size)


def random_box(width: int, height: int, rng: np.random.Generator) -> Box:
    """Return left, upper, right and lower end of a part, in pixels."""
    for _ in range(ATTEMPTS):
        area = width * height * rng.uniform(*AREA)
        aspect = math.exp(rng.uniform(*np.log(ASPECT)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, upper = rng.integers(width - w + 1), rng.integers(height - h + 1)
            return (int(left), int(upper), int(left) + w, int(upper) + h)
    return centre_box(width, height, min(width, height))


def centre_box(width: int, height: int, side: float) -> Box:
    """Return the square of that side in the middle."""
    left, upper = (width - side) / 2, (height - side) / 2
    return (left, upper, left + side, upper + side)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert grey, 16-bit grey, palettes and others; transparency is dropped."""
    if image.mode == "F":
        raise ValueError("images of floats have no known range")
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip to 8
        high_bytes = np.asarray(image).clip(0, 65535).astype(np.uint16) >> 8
        image = Image.fromarray(high_bytes.astype(np.uint8))
    return image.convert("RGB")


def _resized(image: Image.Image, box: Box, size: int) -> np.ndarray:
    """Decode no finer than needed, convert grey and others to RGB, cut and resize."""
    width, height = image.size
    shrink = int(min(box[2] - box[0], box[3] - box[1]) // size)
    if shrink > 1:  # JPEG decoders can leave out the finest detail
        image.draft("RGB", (width // shrink, height // shrink))
    x, y = image.size[0] / width, image.size[1] / height
    corners = (x * box[0], y * box[1], x * box[2], y * box[3])
    cut = to_rgb(image).resize((size, size), Image.Resampling.BILINEAR, corners)
    return np.asarray(cut)
