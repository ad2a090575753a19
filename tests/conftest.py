"""Eight CPU devices, checked annotations and a compilation cache for all tests."""

import atexit
import gc
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

# Enlarges XLA's thread pool: on two cores, eight devices whose collectives wait for each other can
# otherwise starve. It must be set before JAX starts.
os.environ.setdefault("NPROC", "32")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# LLVM's optimisations would take a third of the tests' time. XLA's own optimisations stay on. A
# level in XLA_FLAGS takes precedence.
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 " + os.environ.get("XLA_FLAGS", "")

# Tests and the processes that they start share compiled programs. Each worker has its own folder,
# since a worker might read a half-written file of another.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxcl-tests-compiled-")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

# Processes that are started without that variable also cache their programs there.
os.environ["XDG_CACHE_HOME"] = os.environ["JAX_COMPILATION_CACHE_DIR"]

import jax
import jaxtyping
import pytest

jax.config.update("jax_num_cpu_devices", 8)
atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

# Tracing makes many objects that live as long as a program; looking for cycles among them so often
# would take a twentieth of the tests' time.
gc.set_threshold(50_000, 20, 100)

# Shells make background programs ignore Ctrl-C; the tests' processes would inherit this.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

collect_ignore = [  # scripts for environments with other packages
    "evaluation/sentence_transformers_evaluators.py",
    "losses/values",
    "models/image_values",
    "models/pretrained/reference",
    "roundtrip_peft.py",
    "roundtrip_sentence_transformers.py",
    "run/encoded/make_vectors.py",
]


@pytest.fixture(scope="session", autouse=True)
def _eight_devices() -> None:
    assert jax.device_count() == 8, "jax started before tests/conftest.py asked for 8 devices"


@pytest.fixture(scope="module", autouse=True)
def _freeze_objects() -> None:
    """Exclude the millions of objects of compiled programs from garbage collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def nothing_left_behind():
    """Collect the remains of a failed load here, so that the next test gets no warning."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture
def x64():
    """Enable float64 during a test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def unchecked_annotations():
    """Turn off the checks of annotations during a test, as in a user's program."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def smoke_pairs(tmp_path_factory) -> Path:
    """The folder with the pairs of the smoke config, parsed once for all workers.

    A run that names this folder does not hash all packages.
    """
    from jaxcl.configs.code_search import get_config

    from jaxcl.data.code_pairs import prepare_code_pairs

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    return prepare_code_pairs(folder / "data", **get_config("smoke").data.code_pairs).directory


@pytest.fixture(scope="session")
def smoke_command(smoke_pairs):
    """`(workdir) -> arguments` of a process that trains a small code search; append more flags."""
    config = Path(__file__).parents[1] / "configs" / "code_search.py"

    def arguments(workdir: Path) -> list[str]:
        return [
            *(sys.executable, "-m", "jaxcl.train", f"--config={config}:smoke"),
            f"--workdir={workdir}",
            f"--config.data.name={smoke_pairs}",
            "--config.data.vocabulary_size=1000",
            "--config.model.dim=16",
            f"--config.run.data_dir={smoke_pairs.parents[1]}",
            "--config.run.log_every=1",
        ]

    return arguments
