"""Strictness shared by all tests."""

from collections.abc import Iterator

import jax
import jax.experimental
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "standard")
jax.config.update("jax_legacy_prng_key", "error")


@pytest.fixture
def x64() -> Iterator[None]:
    """Run a test in double precision."""
    if hasattr(jax, "enable_x64"):
        context = jax.enable_x64(True)
    else:  # before jax 0.8
        context = jax.experimental.enable_x64()
    with context:
        yield
