"""Real processes on this machine: their results, and how they stop and fail together."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from jaxcl.host.processes import (
    HEARTBEAT_SECONDS,
    PEER_LOST,
    PeerError,
    first_of_all,
    leave_for,
    start_processes,
)
from jaxcl.run.metric_writer import read_metrics
from tests.helpers import bits, final_state, unclocked
from tests.models.pretrained.tiny import write_tiny_static

ROOT = Path(__file__).parents[2]
STEPS = 12
# Assigned batches and mined negatives. At this learning rate, parameters do not change, so that
# rounding errors, which depend on how devices are grouped, cannot change a selection.
CHOOSING = [
    "--config.assignment.name=gcbs",
    "--config.assignment.gcbs.refresh_every=4",
    "--config.assignment.gcbs.picture=False",
    "--config.negatives.bank.kind=instance",
    "--config.negatives.tiers.stratified=16",
    "--config.negatives.mined.refresh_every=6",
    "--config.negatives.momentum_encoder.initial=0.9",
    "--config.optimizer.learning_rate=1e-30",
]

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")


def environment(devices: int, **more: str) -> dict[str, str]:
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    return os.environ | {"JAX_PLATFORMS": "cpu", "NPROC": "32", "XLA_FLAGS": flags} | more


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Run:
    """A run of one or several processes; the last process gets further arguments."""

    def __init__(self, arguments: list[str], *, processes: int, devices: int, last: tuple = ()):
        numbers = range(processes)
        together = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}"}
        together["JAX_NUM_PROCESSES"] = str(processes)
        self.processes = [
            subprocess.Popen(
                [*arguments, *(last if i == processes - 1 else ())],
                cwd=ROOT,
                env=environment(
                    devices, **(together | {"JAX_PROCESS_ID": str(i)} if processes > 1 else {})
                ),
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            for i in numbers
        ]

    def wait(self, *, timeout: float = 300) -> tuple[list[int], list[str]]:
        """Wait for the end, or kill all processes; return exit codes and outputs."""
        try:
            outputs = [one.communicate(timeout=timeout)[0] for one in self.processes]
        finally:
            for one in self.processes:
                one.kill()
        return [one.returncode for one in self.processes], outputs

    def finish(self) -> list[str]:
        codes, outputs = self.wait()
        assert not any(codes), "\n".join(outputs)
        return outputs

    def wait_for_step(self, workdir: Path, step: int) -> None:
        self.wait_for(lambda: any(record["step"] >= step for record in read_metrics(workdir)))

    def wait_for(self, there: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 200
        while not there():
            assert time.monotonic() < deadline, "timed out"
            assert all(one.poll() is None for one in self.processes), self.wait()
            time.sleep(0.02)


@pytest.fixture(scope="session")
def command(smoke_command):
    def arguments(workdir: Path, *more: str) -> list[str]:
        settings = [f"--config.steps={STEPS}", "--config.run.checkpoint_every=4"]
        return [*smoke_command(workdir), *settings, "--config.evaluation.methods=('dense',)", *more]

    return arguments


@pytest.fixture(scope="session")
def one(command, tmp_path_factory):
    """The workdir of one process with four devices."""
    workdir = tmp_path_factory.mktemp("one-process")
    Run(command(workdir), processes=1, devices=4).finish()
    return workdir


@pytest.fixture(scope="session")
def two(command, tmp_path_factory):
    """The workdir of an uninterrupted run by a script: two processes with two devices each."""
    workdir = tmp_path_factory.mktemp("two-processes")
    _, _, _, *arguments = command(workdir)  # without the interpreter and the module
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # the script's python
    finished = subprocess.run(
        ["launch/local_processes.sh", "2", *arguments],
        cwd=ROOT,
        env=os.environ | {"PATH": path, "DEVICES": "2"},
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return workdir


def assert_close_runs(workdir: Path, other: Path, *, tolerance: float) -> None:
    ours, theirs = unclocked(workdir), unclocked(other)
    assert [list(record) for record in ours] == [list(record) for record in theirs]
    values = [[list(record.values()) for record in records] for records in (ours, theirs)]
    for (here, there), record in zip(zip(*values, strict=True), ours, strict=True):
        np.testing.assert_allclose(here, there, rtol=tolerance, err_msg=str(record["step"]))


def test_processes_train_as_one(one, two):
    assert_same_runs(two, one)


@pytest.mark.slow
def test_processes_select_and_stop_as_one(command, tmp_path):
    pairs = [f"parse a date {i},return {i} days,{i % 7}" for i in range(20)]
    (tmp_path / "sts.csv").write_text("\n".join(["text1,text2,score", *pairs]) + "\n")
    more = [
        f"--config.evaluation.sets.dev={tmp_path / 'sts.csv'}",
        "--config.evaluation.best_metric=dev/spearman",
        "--config.evaluation.patience=2",
        "--config.evaluation.min_delta=2",  # no correlation can increase by more
        "--config.run.evaluate_every=3",
    ]
    alone, several = tmp_path / "alone", tmp_path / "several"
    for workdir, (processes, devices) in {alone: (1, 4), several: (2, 2)}.items():
        outputs = Run(command(workdir, *more), processes=processes, devices=devices).finish()
        assert sum("stopped early after 9 of 12 steps" in one for one in outputs) == 1
    assert_close_runs(several, alone, tolerance=1e-4)
    results = [json.loads((one / "results.json").read_text()) for one in (several, alone)]
    for name in ("steps", "stopped_early"):
        assert results[0][name] == results[1][name], name
    assert results[0]["best"]["step"] == results[1]["best"]["step"]
    ours, theirs = (one["sets"]["dev"] for one in results)
    assert ours["fingerprint"] == theirs["fingerprint"]
    assert ours["metrics"] == pytest.approx(theirs["metrics"], rel=1e-4)
    kept = [sorted(one.name for one in (run / "checkpoints").iterdir()) for run in (alone, several)]
    assert kept[0] == kept[1]


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(4, 1), (2, 4), (4, 2)])
def test_any_number_of_processes_and_devices_trains_as_one(command, tmp_path, processes, devices):
    alone, several = tmp_path / "alone", tmp_path / "several"
    Run(command(alone), processes=1, devices=processes * devices).finish()
    Run(command(several), processes=processes, devices=devices).finish()
    assert_same_runs(several, alone)


@pytest.mark.slow
def test_parameters_sharded_over_processes_train_and_resume_as_replicated_ones(command, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    wide = "--config.model.dim=32"  # otherwise, the table is too small to be sharded
    Run(command(whole, wide), processes=1, devices=4).finish()
    Run(command(cut, wide, "--config.run.mesh.fsdp=4"), processes=2, devices=2).finish()
    assert_same_runs(cut, whole)
    shutil.rmtree(cut / "checkpoints" / str(STEPS))
    (said,) = Run(command(cut, wide), processes=1, devices=4).finish()
    assert "resumes from step 8" in said
    assert_same_runs(cut, whole)


def assert_same_runs(workdir: Path, other: Path) -> None:
    """Compare losses, gradient norms and retrieval at each step, then the newest checkpoints."""
    assert len(read_metrics(workdir)) >= STEPS
    assert_close_runs(workdir, other, tolerance=1e-5)
    ours, theirs = (
        jax.tree_util.tree_leaves_with_path(final_state(each, step=STEPS))
        for each in (workdir, other)
    )
    for (path, leaf), (_, leaf_there) in zip(ours, theirs, strict=True):
        name = jax.tree_util.keystr(path)
        if "key" in name:
            assert bits(leaf) == bits(leaf_there), name
        else:
            # Adam divides by the size of a gradient. If that is tiny, rounding of sums in another
            # order can change a step (2e-3) noticeably; this may happen to one value in a thousand.
            np.testing.assert_allclose(leaf, leaf_there, atol=1e-5, err_msg=name)
            assert np.isclose(leaf, leaf_there, rtol=1e-7, atol=1e-6).mean() > 0.999, name
    with np.load(workdir / "ranks.npz") as ours, np.load(other / "ranks.npz") as theirs:
        for name in theirs.files:
            np.testing.assert_array_equal(ours[name], theirs[name])


@pytest.mark.slow
def test_assigned_batches_and_mined_negatives_are_the_same(command, tmp_path):
    runs = []
    for processes, devices in ((1, 4), (2, 2)):
        workdir = tmp_path / str(processes)
        Run(command(workdir, *CHOOSING), processes=processes, devices=devices).finish()
        runs.append(workdir)
    assert_close_runs(*runs, tolerance=1e-5)
    records = read_metrics(runs[0])
    assert {record["step"] for record in records if "assignment/gap" in record} == {4, 8}
    assert any("mined/rank" in record for record in records)
    # Started by two processes and finished by one, with the same rows and banks.
    shutil.rmtree(runs[1] / "checkpoints" / str(STEPS))
    (said,) = Run(command(runs[1], *CHOOSING), processes=1, devices=4).finish()
    assert "resumes from step 8" in said
    assert_close_runs(*runs, tolerance=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(1, 2), (1, 4), (4, 1)])
def test_a_run_resumes_with_other_processes_and_devices(command, two, tmp_path, processes, devices):
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints" / str(STEPS))
    outputs = Run(command(tmp_path), processes=processes, devices=devices).finish()
    assert "resumes from step 8" in outputs[0]
    assert_close_runs(tmp_path, two, tolerance=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["seed=1", "steps=13", "run.checkpoint_every=5"])
def test_processes_that_disagree_stop_before_the_first_step(command, tmp_path, setting):
    last = (f"--config.{setting}",)
    codes, outputs = Run(command(tmp_path / "run"), processes=2, devices=1, last=last).wait()
    assert codes == [1, 1], outputs
    name, _, value = setting.partition("=")
    for output in outputs:
        assert re.search(rf"error: the processes of this run disagree: {name} is \d+ in", output)
        assert f"{value} in process 1" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_one_stops_all_at_the_same_step(command, two, tmp_path, number):
    # No checkpoint is due before the end, so a checkpoint must come from the signal.
    rarely = command(tmp_path, "--config.run.checkpoint_every=1000")
    run = Run(rarely, processes=2, devices=2)
    run.wait_for(lambda: (tmp_path / "data.json").exists())  # the run may end within a second
    run.processes[1].send_signal(number)
    codes, outputs = run.wait()
    assert codes == [128 + signal.SIGTERM] * 2, "\n".join(outputs)
    steps = [int(re.search(r"stopped at step (\d+)", output)[1]) for output in outputs]
    assert steps[0] == steps[1] < STEPS
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [str(steps[0])]
    assert (
        f"resumes from step {steps[0]}"
        in Run(command(tmp_path), processes=2, devices=2).finish()[0]
    )
    assert_same_bits(tmp_path, two)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others_and_the_run_resumes(command, two, tmp_path, victim):
    run = Run(command(tmp_path), processes=2, devices=2)
    run.wait_for_step(tmp_path, 6)
    run.processes[victim].kill()
    killed = time.monotonic()
    codes, outputs = run.wait()
    assert time.monotonic() - killed < HEARTBEAT_SECONDS + 30
    assert codes[victim] == -signal.SIGKILL
    # JAX may notice first, and abort.
    assert codes[1 - victim] in (PEER_LOST, -signal.SIGABRT), outputs[1 - victim]
    if codes[1 - victim] == PEER_LOST:
        assert "start all of them again" in outputs[1 - victim]
    else:
        assert "another task died" in outputs[1 - victim]
    Run(command(tmp_path), processes=2, devices=2).finish()
    assert_same_bits(tmp_path, two)


@pytest.mark.slow
def test_processes_mine_as_one(two, tmp_path):
    mined = []
    for processes, devices in ((1, 4), (2, 2)):
        workdir, out = tmp_path / f"{processes}", tmp_path / f"{processes}.npz"
        shutil.copytree(two, workdir)
        arguments = ["--workdir", str(workdir), "--out", str(out), "--rank-range", "1:40"]
        Run(
            [sys.executable, "-m", "jaxcl.mine", *arguments], processes=processes, devices=devices
        ).finish()
        mined.append(dict(np.load(out)))
    one, several = mined
    assert one.keys() == several.keys()
    assert (one["rows"] >= 0).all()
    for name in ("rows", "ranks", "source"):
        np.testing.assert_array_equal(several[name], one[name])
    np.testing.assert_allclose(several["teacher_scores"], one["teacher_scores"], atol=1e-6)


@pytest.mark.slow
def test_processes_mine_a_corpus_as_one(tmp_path, monkeypatch):
    write_tiny_static(tmp_path / "model")
    texts = [f"{n % 7} {n % 11} {n % 23}" for n in range(300)]
    pairs = [{"query": f"{text} 5", "key": text} for text in texts[:50]]
    for name, records in (("pairs", pairs), ("corpus", [{"text": text} for text in texts])):
        lines = "".join(f"{json.dumps(record)}\n" for record in records)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    mined = []
    for processes, devices in ((1, 4), (2, 2)):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"cache-{processes}"))
        out = tmp_path / f"{processes}.jsonl"
        arguments = [
            *("--model", str(tmp_path / "model"), "--queries", str(tmp_path / "pairs.jsonl")),
            *("--corpus", str(tmp_path / "corpus.jsonl"), "--output", str(out)),
            *("--rank-range", "1:40"),
        ]
        command = [sys.executable, "-m", "jaxcl.mine", *arguments]
        Run(command, processes=processes, devices=devices).finish()
        mined.append([json.loads(line) for line in out.read_text().splitlines()])
    one, several = mined
    assert len(one) == 50
    assert all(len(line["negatives"]) == 7 for line in one)
    for ours, theirs in zip(one, several, strict=True):
        scores = ours.pop("teacher_scores"), theirs.pop("teacher_scores")
        assert ours == theirs
        for kind in ("positives", "negatives"):
            np.testing.assert_allclose(*(part[kind] for part in scores), atol=1e-5)


def assert_same_bits(workdir: Path, other: Path) -> None:
    ours, theirs = (
        jax.tree_util.tree_leaves_with_path(final_state(w, step=STEPS)) for w in (workdir, other)
    )
    for (path, leaf), (_, leaf_there) in zip(ours, theirs, strict=True):
        assert bits(leaf) == bits(leaf_there), jax.tree_util.keystr(path)
    assert unclocked(workdir) == unclocked(other)
    assert json.loads((workdir / "results.json").read_text()) == json.loads(
        (other / "results.json").read_text()
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "several processes need all three"),
        ({"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_PROCESS_ID": "0"}, "num_processes=None"),
        (
            {
                "JAX_COORDINATOR_ADDRESS": "host:1",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": "2",
            },
            "process_id=2 of num_processes=2; processes are numbered from 0",
        ),
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES='two'; it must be a number"),
    ],
)
def test_incomplete_process_settings_are_named(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        start_processes(environment=given)


@pytest.fixture
def initialized(monkeypatch):
    """The arguments of each call of `jax.distributed.initialize`."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given, **_: calls.append(given))
    return calls


@pytest.mark.parametrize(
    "alone",
    [
        {},
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"TPU_WORKER_HOSTNAMES": "localhost"},
        {"TPU_WORKER_HOSTNAMES": "WARNING: could not determine names, please set them"},
    ],
)
def test_one_process_starts_nothing(alone, initialized):
    start_processes(environment=alone)
    assert initialized == []


@pytest.mark.parametrize(
    ("environment", "asked"),
    [
        ({"SLURM_STEP_NUM_TASKS": "16"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, False),
        ({"TPU_WORKER_HOSTNAMES": "host-0.pod,host-1.pod"}, False),
        ({}, True),
    ],
)
def test_on_a_cluster_jax_finds_the_processes(environment, asked, initialized):
    start_processes(environment=environment, asked=asked)
    assert initialized == [(None, None, None)]


def test_the_given_processes_are_joined(initialized):
    start_processes(coordinator="host:1", num_processes=3, process_id=2, environment={})
    given = {"JAX_COORDINATOR_ADDRESS": "host:2", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "0"}
    start_processes(environment=given)
    assert initialized == [("host:1", 3, 2), ("host:2", 4, 0)]


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (jax.errors.JaxRuntimeError("UNKNOWN: Gloo: connection reset"), PEER_LOST, "another one"),
        (PeerError("process 1 has failed"), PEER_LOST, "process 1 has failed"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 20G of 16G"), 1, "out of device memory"),
        (jax.errors.JaxRuntimeError("INVALID_ARGUMENT: no such thing"), 1, "INVALID_ARGUMENT"),
        (KeyError("a mistake"), 1, "a mistake"),
    ],
    ids=["connection", "peer", "memory", "argument", "mistake"],
)
def test_only_a_lost_process_asks_for_another_start(error, code, said, monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as left:
        leave_for(error)
    assert left.value.code == code
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("theirs", [[], [4], [4, 8, 12, 16]])
def test_every_process_restores_the_step_that_process_0_finds(theirs, monkeypatch):
    sent = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda x: sent.append(x) or x)
    assert first_of_all([4, 8]) == [4, 8]

    def receive(ours):  # with different shapes, JAX would wait forever
        assert np.shape(ours) == np.shape(sent[0])
        return sent.pop(0)

    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", receive)
    assert first_of_all(theirs) == [4, 8]


def test_a_mistake_of_one_process_alone_keeps_its_class():
    with pytest.raises(KeyError):
        leave_for(KeyError("a mistake"))


def test_processes_that_do_not_meet_are_an_error_in_a_line(monkeypatch):
    def unreachable(*_, **__):
        raise RuntimeError("DEADLINE_EXCEEDED:\n no answer")

    monkeypatch.setattr(jax.distributed, "initialize", unreachable)
    with pytest.raises(ValueError, match=r"cannot connect to each other .* no answer$"):
        start_processes(coordinator="host:1", num_processes=2, process_id=1, environment={})
