"""Real processes, killed at random moments: the same command ends with the same bits."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from jaxcl.run.metric_writer import read_metrics
from tests.helpers import bits, final_state, unclocked

ROOT = Path(__file__).parents[1]
STEPS = 60
EVERY = 3

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")


@pytest.fixture(scope="session")
def command(smoke_command):
    """The arguments that start or resume the run of a workdir."""

    def arguments(workdir: Path) -> list[str]:
        return [
            *smoke_command(workdir),
            f"--config.steps={STEPS}",
            f"--config.run.checkpoint_every={EVERY}",
            "--config.run.evaluate_every=20",
        ]

    return arguments


def start(arguments: list[str]) -> subprocess.Popen:
    """Start a process with one CPU device, in a new process group."""
    # It uses the trainer's cache of programs, since a killed process may leave half a file.
    others = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        arguments,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def newest_step(workdir: Path) -> int:
    """The newest complete checkpoint on disk."""
    names = (path.name for path in (workdir / "checkpoints").glob("*"))
    return max((int(name) for name in names if name.isdigit()), default=0)


def wait_for_progress(process: subprocess.Popen, workdir: Path, *, beyond: int) -> None:
    """Wait for a checkpoint after step `beyond`, or for the end of the process."""
    deadline = time.monotonic() + 120
    while newest_step(workdir) <= beyond and process.poll() is None:
        assert time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.01)


def assert_same_run(workdir: Path, other: Path) -> None:
    ours, theirs = final_state(workdir, step=STEPS), final_state(other, step=STEPS)
    for (path, leaf), leaf_there in zip(
        jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True
    ):
        assert bits(leaf) == bits(leaf_there), jax.tree_util.keystr(path)
    assert unclocked(workdir) == unclocked(other)
    assert (workdir / "results.json").read_text() == (other / "results.json").read_text()
    for name in ("data.json", "tokenizer.json"):
        assert (workdir / name).read_text() == (other / name).read_text()


@pytest.fixture(scope="session")
def uninterrupted(command, tmp_path_factory):
    """The workdir of an uninterrupted process."""
    workdir = tmp_path_factory.mktemp("uninterrupted-process")
    finish(start(command(workdir)))
    records = unclocked(workdir)
    assert [record["step"] for record in records if "loss" in record] == list(range(1, STEPS + 1))
    return workdir


def kill_and_resume(command, workdir: Path, *, kills: int, seed: int) -> None:
    print(f"seed {seed}")
    moments = random.Random(seed)
    killed = 0
    for _ in range(kills):
        before = newest_step(workdir)
        process = start(command(workdir))
        wait_for_progress(process, workdir, beyond=before)
        time.sleep(moments.uniform(0, 0.5))
        process.kill()
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        print(f"killed with {newest_step(workdir)} saved, after {before}")
    assert killed > 0, "the process always ended before it could be killed"
    finish(start(command(workdir)))


def test_a_killed_process_resumes_to_the_same_bits(command, uninterrupted, tmp_path):
    kill_and_resume(command, tmp_path, kills=2, seed=0)
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_process_killed_repeatedly_resumes_to_the_same_bits(
    command, uninterrupted, tmp_path, seed
):
    kill_and_resume(command, tmp_path, kills=12, seed=seed)
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.slow
def test_a_process_killed_before_it_saved_anything_begins_again(command, uninterrupted, tmp_path):
    moments = random.Random(4)
    for _ in range(8):
        process = start(command(tmp_path))
        time.sleep(moments.uniform(0.1, 6.0))
        process.kill()
        process.communicate()
    finish(start(command(tmp_path)))
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.slow
def test_a_terminated_process_saves_its_step_and_resumes(command, uninterrupted, tmp_path):
    # No checkpoint is due before the end, so a checkpoint must come from the signal.
    rarely = [*command(tmp_path), "--config.run.checkpoint_every=1000"]
    process = start(rarely)
    while len(read_metrics(tmp_path)) < 5 and process.poll() is None:
        time.sleep(0.01)
    process.terminate()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, output
    step = newest_step(tmp_path)
    assert 5 <= step < STEPS
    assert "SIGTERM received: saving, then stopping" in output
    assert f"stopped at step {step}; the same command resumes from there" in output
    assert "Traceback" not in output
    assert f"resumes from step {step}" in finish(start(command(tmp_path)))
    assert_same_run(tmp_path, uninterrupted)
