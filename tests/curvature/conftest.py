"""The written-out problem, made once."""

import pytest

from tests.curvature import dense as problems


@pytest.fixture
def dense(x64: None) -> problems.Dense:
    del x64
    return problems.make()
