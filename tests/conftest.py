"""Eight CPU devices for every test, and annotations that are checked."""

import os

# Enlarges XLA's thread pool: eight devices whose collectives wait for each other can otherwise
# starve on two cores. It must be set before jax starts.
os.environ.setdefault("NPROC", "32")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)

collect_ignore = ["losses/values"]  # scripts that need packages of others


@pytest.fixture(scope="session", autouse=True)
def _eight_devices() -> None:
    assert jax.device_count() == 8, "jax started before tests/conftest.py asked for 8 devices"


@pytest.fixture
def x64():
    """Float64 for the length of a test."""
    with jax.enable_x64(True):
        yield
