"""Symmetric label noise."""

import numpy as np

from examples.image_classification.label_noise import symmetric_noise


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
