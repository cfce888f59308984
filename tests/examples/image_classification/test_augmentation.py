"""Crops and flips on the device against every crop and flip that numpy can make."""

import itertools

import jax
import numpy as np

from examples.image_classification.augmentation import PADDING, crop_and_flip, draw


def test_every_image_is_one_of_its_crops_and_all_crops_occur():
    image = np.random.default_rng(0).integers(1, 256, (7, 5, 2), np.uint8)
    padded = np.pad(image, ((PADDING, PADDING), (PADDING, PADDING), (0, 0)))
    crops = {}
    for i, j, flip in itertools.product(range(9), range(9), (False, True)):
        crop = padded[i : i + 7, j : j + 5]
        crops[(crop[:, ::-1] if flip else crop).tobytes()] = (i, j, flip)
    assert len(crops) == 162
    size = 4000
    images = np.broadcast_to(image, (size, *image.shape))
    result = np.asarray(jax.jit(crop_and_flip)(draw(jax.random.key(0), size), images))
    assert result.dtype == np.uint8
    seen = [crops[each.tobytes()] for each in result]
    # 25 of each on average: none is missing but with probability 162 exp(-25).
    assert set(seen) == set(crops.values())
    # 2,000 flips with a standard deviation of 32.
    assert abs(sum(flip for *_, flip in seen) - size / 2) < 160


def test_the_key_decides():
    images = np.random.default_rng(0).integers(0, 256, (8, 9, 9, 1), np.uint8)
    one, again, other = (
        np.asarray(crop_and_flip(draw(jax.random.key(k), 8), images)) for k in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, again)
    assert np.any(one != other)
