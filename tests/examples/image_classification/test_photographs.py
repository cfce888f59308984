"""Crops of photographs: what is cut out, in which size, from files of which kind."""

import io

import numpy as np
import pytest
from PIL import Image

from examples.image_classification import photographs


def encoded(image, kind="PNG"):
    data = io.BytesIO()
    image.save(data, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return data.getvalue()


def ramp(width, height):
    """Red is the column and green the row, over the whole range."""
    columns = np.broadcast_to(np.linspace(0, 255, width), (height, width))
    rows = np.broadcast_to(np.linspace(0, 255, height)[:, None], (height, width))
    pixels = np.stack([columns, rows, 0 * rows], axis=-1)
    return Image.fromarray(pixels.round().astype(np.uint8))


def test_the_centre_is_seven_eighths_of_the_shorter_side():
    crop = photographs.centre_crop(encoded(ramp(400, 200)), 50)
    assert crop.shape == (50, 50, 3)
    # 175 of 400 columns around 200, 175 of 200 rows around 100; the outermost pixels
    # are 1.75 pixels in from the ends. One level of rounding, one of half pixels.
    column, row = crop[25, :, 0].astype(float), crop[:, 25, 1].astype(float)
    ends = np.array([200 - 87.5 + 1.75, 200 + 87.5 - 1.75]) / 400 * 255
    np.testing.assert_allclose(column[[0, -1]], ends, atol=2.0)
    ends = np.array([100 - 87.5 + 1.75, 100 + 87.5 - 1.75]) / 200 * 255
    np.testing.assert_allclose(row[[0, -1]], ends, atol=2.0)
    assert np.all(np.diff(column) > 0)


@pytest.mark.parametrize("size", [(500, 375), (100, 900), (8, 8)])
def test_random_parts_have_the_usual_areas_and_shapes(size):
    rng = np.random.default_rng(0)
    boxes = np.array([photographs.random_box(*size, rng) for _ in range(2000)])
    left, upper, right, lower = boxes.T
    assert left.min() >= 0
    assert upper.min() >= 0
    assert right.max() <= size[0]
    assert lower.max() <= size[1]
    w, h = right - left, lower - upper
    assert np.all(w >= 1)
    if size == (500, 375):
        area = w * h / (size[0] * size[1])
        # Rounding to whole pixels moves the smallest ones by about a percent.
        assert 0.078 < area.min() < 0.1
        assert 0.9 < area.max() <= 1.0
        # Areas from 0.08 to 1 and aspects from 3/4 to 4/3, of which a part fits in.
        draws = rng.uniform([0.08, np.log(3 / 4)], [1, np.log(4 / 3)], (100_000, 2))
        w_squared, h_squared = (draws[:, 0] * np.exp(s * draws[:, 1]) for s in (1, -1))
        fits = (w_squared <= 500 / 375) & (h_squared <= 375 / 500)
        expected = draws[fits, 0]
        error = expected.std() / np.sqrt(len(area))
        assert abs(area.mean() - expected.mean()) < 5 * error
        ratio = np.log(w / h)
        assert np.abs(ratio).max() < np.log(4 / 3) + 0.02
        assert ratio.std() > 0.1
        assert len({*map(tuple, boxes)}) > 1900


def test_random_crops_are_flipped_every_second_time():
    data, rng = encoded(ramp(300, 300)), np.random.default_rng(0)
    crops = [photographs.random_crop(data, 16, rng).astype(int) for _ in range(400)]
    flipped = sum(crop[8, 0, 0] > crop[8, -1, 0] for crop in crops)
    assert abs(flipped - 200) < 50  # the standard deviation is 10
    assert all(np.all(np.diff(crop[:, 8, 1]) >= -1) for crop in crops)  # never upside


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA"])
def test_other_kinds_of_images_become_rgb(mode):
    image = ramp(64, 64).convert(mode)
    data = encoded(image, "TIFF" if mode == "CMYK" else "PNG")
    crop = photographs.centre_crop(data, 32)
    assert crop.shape == (32, 32, 3)
    assert crop.dtype == np.uint8
    if mode == "L":
        assert np.all(crop == crop[..., :1])
        assert len(np.unique(crop)) > 10


def test_sixteen_bits_become_eight():
    levels = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    crop = photographs.centre_crop(encoded(Image.fromarray(levels)), 64)
    plain = Image.fromarray((levels >> 8).astype(np.uint8))
    expected = photographs.centre_crop(encoded(plain), 64)
    np.testing.assert_array_equal(crop, expected)
    assert np.ptp(crop) > 200


def test_decoding_coarsely_loses_next_to_nothing():
    """A large JPEG is decoded at a fraction of its size, cut at the same place."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (12, 16, 3), np.uint8)
    image = Image.fromarray(blocks).resize((1600, 1200), Image.Resampling.BICUBIC)
    jpeg = photographs.centre_crop(encoded(image, "JPEG"), 100).astype(float)
    exact = photographs.centre_crop(encoded(image), 100).astype(float)
    # A shift by one pixel of the result would cost 6 levels on average.
    assert np.abs(jpeg - exact).mean() < 1.5
    assert np.abs(jpeg[:, 1:] - exact[:, :-1]).mean() > 4.0


@pytest.mark.parametrize("damage", [b"", b"no image", None])
def test_damage_raises_what_the_pipeline_skips(damage):
    data = encoded(ramp(99, 99), "JPEG")[:500] if damage is None else damage
    with pytest.raises(photographs.UNREADABLE):
        photographs.random_crop(data, 16, np.random.default_rng(0))
