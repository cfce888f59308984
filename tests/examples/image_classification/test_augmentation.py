"""Crops and flips against all that numpy can make; label noise."""

import itertools

import jax
import numpy as np

from examples.image_classification.array_pipeline import PADDING, crop_and_flip, draw
from examples.image_classification.label_noise import symmetric_noise

IN_A_HURRY = True
"""What is compiled here runs once."""


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


def test_a_share_is_redrawn_over_all_classes():
    size = 100_000
    chosen, labels = symmetric_noise(size, 10, 0.4, np.random.default_rng(0))
    assert len(set(chosen)) == len(chosen) == len(labels) == 40_000
    assert chosen.min() >= 0
    assert chosen.max() < size
    # 4,000 of each class, binomial with a standard deviation of 60: five of them.
    np.testing.assert_allclose(np.bincount(labels), 4000, atol=300)
    # The examples are drawn from everywhere: 20,000 of each half, deviation below 100.
    assert abs(np.sum(chosen < size // 2) - 20_000) < 500


def test_no_noise_and_nothing_but_noise():
    assert len(symmetric_noise(50, 3, 0.0, np.random.default_rng(0))[0]) == 0
    chosen, _ = symmetric_noise(50, 3, 1.0, np.random.default_rng(0))
    np.testing.assert_array_equal(np.sort(chosen), np.arange(50))
