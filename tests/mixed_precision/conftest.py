"""The written-out problem of the curvature tests, and errors of its weights."""

import pytest

from hero_jax import mixed_precision
from tests.curvature import dense as problems

CHOICES = (2, 3, 5)


@pytest.fixture
def dense(x64: None) -> problems.Dense:
    del x64
    return problems.make()


@pytest.fixture
def errors(dense: problems.Dense) -> mixed_precision.Errors:
    return mixed_precision.weight_errors(dense.params, CHOICES)
