"""What tests of several examples need."""

from collections.abc import Iterator

import pytest

from tests.examples.image_classification import small


@pytest.fixture
def small_network() -> Iterator[None]:
    """Train a network that is quick to compile, in place of any other."""
    with small.in_place():
        yield
