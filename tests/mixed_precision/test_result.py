"""Totals of allocations, and their misuse."""

import numpy as np
import pytest

from hero_jax import mixed_precision

FOUND = mixed_precision.Sensitivity(
    (2, 4), {"a": np.array([1.0, 10.0]), "b": np.array([100.0, 1000.0])}
)


def test_total_adds_layers_and_each_pair_once():
    assert FOUND.total({"b": 4, "a": 2}) == 1001.0
    pairs = np.arange(16.0).reshape(2, 2, 2, 2)
    assert FOUND._replace(interactions=pairs).total({"a": 2, "b": 4}) == 1001.0 + 3.0


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        ({"a": 2}, r"same layers: \['b'\]"),
        ({"a": 2, "b": 3}, r"not in tuple"),
    ],
)
def test_misuse_is_named(bits, message):
    with pytest.raises(ValueError, match=message):
        FOUND.total(bits)
