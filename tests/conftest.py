"""Eight CPU devices for every test, annotations that are checked, programs that are kept."""

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

# Enlarges XLA's thread pool: eight devices whose collectives wait for each other can otherwise
# starve on two cores. It must be set before jax starts.
os.environ.setdefault("NPROC", "32")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# LLVM's optimisations would take a third of the tests' time. XLA's own stay; a level that is set,
# too.
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 " + os.environ.get("XLA_FLAGS", "")

# What one test compiles another need not, in this process or in those that it starts. Workers have
# a folder each, since one may read what another has written half.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxcl-tests-compiled-")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

collect_ignore = ["losses/values"]  # scripts that need packages of others


@pytest.fixture(scope="session", autouse=True)
def _eight_devices() -> None:
    assert jax.device_count() == 8, "jax started before tests/conftest.py asked for 8 devices"


@pytest.fixture
def x64():
    """Float64 for the length of a test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def smoke_command(tmp_path_factory):
    """What trains a small code search, of pairs that all such runs of this process share.

    `(workdir) -> arguments` of a new process; more of them may follow.
    """
    from configs.code_search import get_config
    from jaxcl.data.code_pairs import prepare_code_pairs

    config = Path(__file__).parents[1] / "configs" / "code_search.py"
    data_dir = tmp_path_factory.getbasetemp() / "data"
    of_smoke = get_config("smoke").data.code_pairs
    pairs = prepare_code_pairs(data_dir, **of_smoke).directory

    def arguments(workdir: Path) -> list[str]:
        return [
            *(sys.executable, "-m", "jaxcl.train", f"--config={config}:smoke"),
            f"--workdir={workdir}",
            f"--config.data.name={pairs}",
            "--config.data.vocabulary_size=1000",
            "--config.model.dim=16",
            f"--config.run.data_dir={data_dir}",
            "--config.run.log_every=1",
        ]

    return arguments
