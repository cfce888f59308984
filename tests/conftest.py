"""Strictness shared by all tests, eight devices, and a store of compiled programs."""

import os
from collections.abc import Iterator

import jax
import jax.experimental
import psutil
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "standard")
jax.config.update("jax_legacy_prng_key", "error")


def pytest_configure(config: pytest.Config) -> None:
    """Compile fast tests by XLA's emitters of before 2025, in half the time.

    Slow tests have the compiler that users have. JAX 0.12 does not know the flag.
    """
    if jax.__version_info__ < (0, 11) and "not slow" in config.option.markexpr:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the documents' pages as slow: some of them train."""
    for item in items:
        if item.path.parent.name == "docs":
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def x64() -> Iterator[None]:
    """Run a test in double precision."""
    if hasattr(jax, "enable_x64"):
        context = jax.enable_x64(True)
    else:  # before jax 0.8
        context = jax.experimental.enable_x64()
    with context:
        yield


@pytest.fixture(scope="module", autouse=True)
def programs(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compile in a hurry what runs for milliseconds, and free what became too much.

    Single operations are the same in many modules, so their programs are kept. The
    examples train networks, and are compiled as users have them, unless a module says
    `IN_A_HURRY = True`.
    """
    in_a_hurry = "examples" not in request.path.parts
    in_a_hurry = getattr(request.module, "IN_A_HURRY", in_a_hurry)
    jax.config.update("jax_disable_most_optimizations", in_a_hurry)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    if psutil.Process().memory_info().rss > 1.5e9:
        jax.clear_caches()


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(
    tmp_path_factory: pytest.TempPathFactory, worker_id: str
) -> Iterator[None]:
    """Share compiled programs among tests, and with the commands that they start."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "compiled"
    names = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in names.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
        os.environ.pop(name.upper())
