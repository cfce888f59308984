"""Bisection against trying all."""

import numpy as np
import pytest

from hero_jax import mixed_precision

CHOICES = (2, 4, 8)
ROWS = {"a": [9.0, 1.0, 0.0], "b": [2.0, 0.5, 0.0], "c": [3.0, 0.7, 0.1]}
FRONTIER = mixed_precision.pareto_frontier(ROWS, {"a": 10, "b": 31, "c": 50}, CHOICES)


def accuracy(bits):
    """Grows with every weight's bits."""
    return 0.5 + (10 * bits["a"] + 31 * bits["b"] + 50 * bits["c"]) / 2000


@pytest.mark.parametrize("k", range(len(FRONTIER)))
def test_finds_the_smallest_in_few_steps(k):
    least = accuracy(FRONTIER[k].bits)
    found = mixed_precision.smallest_accurate(FRONTIER, accuracy, least)
    assert found.allocation == FRONTIER[k]
    assert found.accuracy == least
    assert len(found.tried) <= np.ceil(np.log2(len(FRONTIER))) + 1


def test_what_is_found_is_enough_even_if_accuracy_is_not_monotone():
    rng = np.random.default_rng(0)
    for _ in range(20):
        noise = {a.bytes: rng.uniform(0.0, 0.5) for a in FRONTIER}
        noisy = lambda bits, n=noise: n[
            next(a.bytes for a in FRONTIER if a.bits == bits)
        ]
        noise[FRONTIER[-1].bytes] = 1.0
        found = mixed_precision.smallest_accurate(FRONTIER, noisy, 0.25)
        position = [a.bits for a in FRONTIER].index(found.allocation.bits)
        assert found.tried[position] == found.accuracy >= 0.25
        assert position == 0 or found.tried[position - 1] < 0.25


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"least": 2.0}, ValueError, r"'a': 8.* has accuracy 0.864, and 2.0 is wanted"),
    ],
)
def test_misuse_is_named(change, error, message):
    arguments = {"frontier": FRONTIER, "accuracy_fn": accuracy, "least": 0.5} | change
    with pytest.raises(error, match=message):
        mixed_precision.smallest_accurate(**arguments)
