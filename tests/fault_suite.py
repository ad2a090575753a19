"""Injects faults into training runs at random moments, and checks that nothing is lost.

    python -m tests.fault_suite --faults 200 --report tests/fault_report.json [--workers 2]

Each run gets a few faults and is restarted with the same command until it ends. It is then compared
with an undisturbed run: the rows of every batch, all saved and restored states bit for bit, all
metrics and all ranks. Runs that resume on other devices sum in another order: their rows must be
equal, and their metrics equal to within 1e-4.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import functools
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxcl.configs.code_search import get_config

from jaxcl.bench.machine import commit
from jaxcl.data.code_pairs import prepare_code_pairs
from jaxcl.host.files import write_whole
from jaxcl.host.processes import PEER_LOST
from tests import fault_worker
from tests.helpers import unclocked

FORKS = multiprocessing.get_context("forkserver")
ROOT = Path(__file__).parents[1]
STEPS, EVERY = 160, 8
SMOKE = [
    f"--config.steps={STEPS}",
    f"--config.run.checkpoint_every={EVERY}",
    "--config.run.log_every=1",
]
CODE = (
    "--config.data.vocabulary_size=1000",
    "--config.model.dim=16",
    "--config.evaluation.methods=('dense',)",
)
IMAGES = ("--config.data.images.size=16", f"--config.run.evaluate_every={STEPS // 2}")
# All kinds of memory: a bank, a momentum encoder, mined negatives, assigned batches.
REMEMBERING = (
    *CODE,
    "--config.assignment.name=gcbs",
    "--config.assignment.gcbs.refresh_every=30",
    "--config.assignment.gcbs.picture=False",
    "--config.negatives.bank.kind=instance",
    "--config.negatives.tiers.stratified=16",
    "--config.negatives.mined.refresh_every=20",
    "--config.negatives.momentum_encoder.initial=0.9",
)


class Shape(NamedTuple):
    """The number of processes of a run, and of devices of each."""

    processes: int = 1
    devices: int = 1


class Setting(NamedTuple):
    """The arguments of a run, the kinds of faults that it gets, and its config file."""

    arguments: tuple[str, ...]
    shape: Shape
    kinds: tuple[str, ...]
    config: str = "code_search"


ALONE = (
    *("SIGKILL", "SIGKILL in a save", "SIGTERM", "SIGINT", "SIGHUP"),
    *("file cut", "file missing", "bit flipped", "disk full"),
    *("small file", "checkpoints gone", "token table", "closed pipe"),
)
TOGETHER = (
    *("SIGTERM to one of two", "SIGHUP to one of two", "SIGKILL to one of two"),
    *("file cut, two", "file missing, two", "disagreement", "port in use"),
)
OTHERS = ("other devices", "other processes")
OF_IMAGES = (*(kind for kind in ALONE if kind != "token table"), "image checks")
SETTINGS = {
    "plain": Setting(CODE, Shape(), ALONE),
    "remembering": Setting(REMEMBERING, Shape(), ALONE),
    "two processes": Setting(CODE, Shape(2, 1), TOGETHER),
    "moved": Setting(CODE, Shape(1, 4), OTHERS),
    "simclr": Setting(IMAGES, Shape(), OF_IMAGES, "simclr"),
    "moco": Setting(IMAGES, Shape(), OF_IMAGES, "moco"),
    "image text": Setting(IMAGES, Shape(), (*ALONE, "image checks"), "image_text"),
    "images, two processes": Setting(IMAGES, Shape(2, 1), TOGETHER, "simclr"),
}
TURNS = (
    *("plain", "remembering", "plain", "two processes"),
    *("plain", "moved", "remembering", "plain"),
)
"""The settings of consecutive runs, repeated in this order. `--settings` chooses others, such as
those with images."""

FAULTS_OF_A_RUN = 5


class Wrong(AssertionError):
    """A run lost data, or reported something wrong."""


class Tally:
    """Counts of faults and failures over all workers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
        self.failures: list[dict[str, str]] = []

    def add(self, kind: str, what: str, count: int = 1) -> None:
        """Increase a count."""
        with self._lock:
            self.counts[kind][what] += count

    def fail(self, **what: str) -> None:
        """Record a failure."""
        with self._lock:
            self.failures.append(what)

    def longest(self, kind: str, what: str, seconds: float) -> None:
        """Record the maximum of some seconds."""
        with self._lock:
            self.counts[kind][what] = max(self.counts[kind][what], math.ceil(seconds))

    @property
    def injected(self) -> int:
        """The number of injected faults."""
        with self._lock:
            return sum(counts["injected"] for counts in self.counts.values())


class Started:
    """The processes of one start, forked from a process that has imported everything."""

    def __init__(
        self,
        workdir: Path,
        log: Path,
        data_dir: Path,
        setting: Setting,
        shape: Shape,
        *,
        last_arguments: tuple[str, ...] = (),
        port: int | None = None,
    ):
        arguments = [f"--config={ROOT / 'configs' / setting.config}.py:smoke", *SMOKE]
        arguments += [*setting.arguments, f"--workdir={workdir}"]
        arguments += [f"--config.run.data_dir={data_dir}"]
        if setting.config == "code_search":
            arguments.append(f"--config.data.name={_pairs(data_dir)}")
        if port is None:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
        each = [arguments] * (shape.processes - 1) + [[*arguments, *last_arguments]]
        self.outputs = outputs_of(log, shape.processes)
        self.processes = [
            FORKS.Process(
                target=fault_worker.run,
                args=(each[number], _environment(shape, port, number), log, output),
            )
            for number, output in enumerate(self.outputs)
        ]
        for one in self.processes:
            one.start()

    @property
    def running(self) -> bool:
        """Whether all processes run."""
        return all(one.is_alive() for one in self.processes)

    def send(self, number: int, *, to: int = 0) -> None:
        """Send a signal to one of them, unless it has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.processes[to].pid, number)

    def wait(self, timeout: float = 400) -> tuple[list[int], list[str]]:
        """Wait for the end; return exit codes and outputs."""
        deadline = time.monotonic() + timeout
        for one in self.processes:
            one.join(max(0.1, deadline - time.monotonic()))
        hangs = any(one.is_alive() for one in self.processes)
        for one in self.processes:
            one.kill()
            one.join()
        outputs = [
            path.read_text(errors="replace") if path.is_file() else "" for path in self.outputs
        ]
        if hangs:
            raise Wrong(f"it hangs: {outputs}")
        return [one.exitcode for one in self.processes], outputs


def outputs_of(log: Path, processes: int) -> list[Path]:
    """The files that hold the output of each process."""
    return [log.with_name(f"{log.stem}.output-{number}") for number in range(processes)]


@functools.cache
def _pairs(data_dir: Path) -> Path:
    """The data of all runs, unaffected by newly installed packages; a copied folder has them."""
    for copied in (data_dir / "code_pairs").glob("*"):
        return copied
    return prepare_code_pairs(data_dir, **get_config("smoke").data.code_pairs).directory


def _environment(shape: Shape, port: int, number: int) -> dict[str, str]:
    flags = f"--xla_force_host_platform_device_count={shape.devices}"
    found = {"XLA_FLAGS": flags}
    if shape.processes > 1:
        found |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}"}
        found |= {"JAX_NUM_PROCESSES": str(shape.processes), "JAX_PROCESS_ID": str(number)}
    return found


class Trial:
    """One run, from its first start to its end, with faults in between."""

    def __init__(self, place: Path, name: str, reference: Path, rng: random.Random, tally: Tally):
        self.setting, self.reference, self.rng, self.tally = SETTINGS[name], reference, rng, tally
        self.place, self.workdir, self.log = place, place / "run", place / "log.jsonl"
        self.data_dir = reference.parent / "data"
        self.shape = self.setting.shape

    def start(self, **changes: Any) -> Started:
        """Start the run with its command; changes are for the last process, or the port."""
        return Started(self.workdir, self.log, self.data_dir, self.setting, self.shape, **changes)

    def run(self, kinds: list[str]) -> None:
        """Inject these faults one after the other, then let the run end."""
        mounted = "disk full" in kinds
        self.workdir.mkdir(parents=True)
        if {"token table", "image checks"} & set(kinds):  # other runs read the shared files
            self.data_dir = self.place / "data"
            shutil.copytree(self.reference.parent / "data", self.data_dir)
        if mounted:
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", "size=16m", "none", self.workdir], check=True
            )
        try:
            for kind in kinds:
                if _newest(self.workdir) < STEPS and BREAKS[kind](self, kind):
                    self.tally.add(kind, "injected")
            codes, outputs = self.start().wait()
            if any(codes):
                raise Wrong(f"exit codes {codes} at the end: {outputs}")
            exact = self.setting.kinds != OTHERS
            found = compare(self.workdir, self.log, self.reference, exact=exact)
            for what, count in found.items():
                self.tally.add("all", what, count)
        finally:
            if mounted:
                subprocess.run(["umount", "-l", self.workdir], check=True)

    def wait_for_moment(self, started: Started, *, checkpoints: int = 0) -> bool:
        """Wait for a random moment of the run; return `False` if it ends before.

        With `checkpoints`, this number of checkpoints exists at that moment.
        """
        begun = _newest(self.workdir)
        if not checkpoints and self.rng.random() < 0.3:  # perhaps while it starts
            return _sleep(started, self.rng.uniform(0.2, 8))
        goal = min(begun + self.rng.randrange(0, STEPS // 3), STEPS - 2 * EVERY)
        while _newest(self.workdir) <= max(goal, begun) or len(_steps(self.workdir)) < checkpoints:
            if not started.running:
                return False
            time.sleep(0.005)
        return _sleep(started, self.rng.uniform(0, 0.3))

    def signal(self, kind: str) -> bool:
        """Send a signal to the only process."""
        number = getattr(signal, kind.split()[0])
        started = self.start()
        if not self.wait_for_moment(started):
            started.wait()
            return False
        if kind == "SIGKILL in a save" and not self.wait_for_save(started):
            started.wait()
            return False
        started.send(number)
        (code,), (output,) = started.wait()
        if code == 0:
            return False  # it had finished
        # While Python starts, there is no handler yet.
        if code not in (-number, 128 + number) or ("Traceback" in output and "jaxcl/" in output):
            raise Wrong(f"{kind}: exit code {code}: {output}")
        return True

    def wait_for_save(self, started: Started) -> bool:
        """Wait until a checkpoint is being written."""
        while not any((self.workdir / "checkpoints").glob("*tmp*")):
            if not started.running:
                return False
            time.sleep(0.0005)
        return _sleep(started, self.rng.uniform(0, 0.02))

    def damage(self, kind: str) -> bool:
        """Stop the run, damage the newest checkpoint, and restart the run."""
        started = self.start()
        if not self.wait_for_moment(started, checkpoints=2):
            started.wait()
            return False
        if not self.ended_by_sigterm(started):
            return False
        newest = _newest(self.workdir)
        files = (self.workdir / "checkpoints" / str(newest)).rglob("*")
        victim = self.rng.choice(sorted(path for path in files if path.is_file()))
        content = bytearray(victim.read_bytes())
        if kind.startswith("file cut"):
            content = content[: self.rng.randrange(len(content))]
        elif kind.startswith("bit flipped"):
            content[self.rng.randrange(len(content))] ^= 1 << self.rng.randrange(8)
        if kind.startswith("file missing"):
            victim.unlink()
        else:
            victim.write_bytes(content)
        # The next start must cope with the damage; it is stopped again if it has not ended.
        restarted = self.start()
        stopped = self.wait_for_moment(restarted)
        if stopped:
            restarted.send(signal.SIGTERM)
        codes, outputs = restarted.wait()
        ends = (0, 128 + signal.SIGTERM, -signal.SIGTERM, PEER_LOST, -signal.SIGABRT)
        if codes[0] not in ends[:3] or codes[-1] not in ends:
            raise Wrong(f"{kind} of {victim}: exit codes {codes}: {outputs}")
        said = f"the checkpoint of step {newest} is damaged" in outputs[0]
        went_on = re.search(r"(?:resumes from step|has completed its) (\d+)", outputs[0])
        if went_on and int(went_on[1]) != newest and not said:
            raise Wrong(f"{kind} of {victim}: fell back and did not say so: {outputs}")
        if kind.startswith(("file cut", "file missing")) and went_on and not said:
            raise Wrong(f"{kind} of {victim}: it was not seen: {outputs}")
        if went_on:
            self.tally.add(kind, "fell back and said so" if said else "harmless")
        return True

    def stop(self, *, checkpoints: int = 1) -> bool:
        """Start the run, and stop it at a random moment, with everything saved."""
        started = self.start()
        if not self.wait_for_moment(started, checkpoints=checkpoints):
            started.wait()
            return False
        return self.ended_by_sigterm(started)

    def ended_by_sigterm(self, started: Started) -> bool:
        """Send SIGTERM; return whether it stopped the run, with everything saved."""
        started.send(signal.SIGTERM)
        codes, outputs = started.wait()
        trained = f"{STEPS}/{STEPS}" in outputs[0]  # there is nothing left to save
        if any(codes) and not trained and codes != [128 + signal.SIGTERM] * len(codes):
            raise Wrong(f"SIGTERM: exit codes {codes}: {outputs}")
        return any(codes)

    def harm_small_file(self, kind: str) -> bool:
        """Damage a small file of a stopped run: the run resumes unchanged, or names the file."""
        if not self.stop():
            return False
        names = ("config.json", "data.json", "run.json", "tokenizer.json", "metrics.jsonl")
        names = (*names, "checkpoints.sizes.json", "images.json")  # a run has most of these
        names = tuple(name for name in names if (self.workdir / name).is_file())
        path = self.workdir / self.rng.choice(names)
        whole = path.read_bytes()
        if path.name == "metrics.jsonl":  # the only copy of its records
            damaged = whole + self.rng.choice((b"\xff\xfe\n", b"[]\n", b'{"step": ', b"5\n"))
        else:
            cut = whole[: self.rng.randrange(len(whole))]
            damaged = self.rng.choice((cut, b"", b"[]", b"{}", b"5", b"null"))
        path.write_bytes(damaged)
        started = self.start()
        if self.wait_for_moment(started):
            started.send(signal.SIGTERM)
        (code,), (output,) = started.wait()
        if code == 1:
            self.check_refused(kind, code, output, path.name)
            path.write_bytes(whole)
        elif code not in (0, 128 + signal.SIGTERM, -signal.SIGTERM):
            raise Wrong(f"{kind}, {path.name}: exit code {code}: {output}")
        self.tally.add(kind, f"{path.name} {'refused' if code == 1 else 'healed or harmless'}")
        return True

    def lose_checkpoints(self, kind: str) -> bool:
        """Remove all checkpoints, as if a volume were unmounted, and put them back."""
        if not self.stop():
            return False
        checkpoints, away = self.workdir / "checkpoints", self.place / "away"
        shutil.move(checkpoints, away)  # the workdir may be on a separate volume
        if self.rng.random() < 0.5:
            checkpoints.mkdir()  # the empty mount point
        (code,), (output,) = self.start().wait()
        self.check_refused(kind, code, output, "checkpoints")
        if checkpoints.exists():
            checkpoints.rmdir()
        shutil.move(away, checkpoints)
        return True

    def harm_table(self, kind: str) -> bool:
        """Damage a file of a token table or of the check of images: the run rebuilds it."""
        if not self.stop():
            return False
        folder = self.data_dir / {"token table": "tokens", "image checks": "images"}[kind]
        tables = [path for path in folder.rglob("*") if path.is_file()]
        path = self.rng.choice(sorted(path for path in tables if path.stat().st_size))
        content = bytearray(path.read_bytes())
        if self.rng.random() < 0.5:
            content[self.rng.randrange(len(content))] ^= 1 << self.rng.randrange(8)
        else:
            content = content[: self.rng.randrange(len(content))]
        path.write_bytes(content)
        self.tally.add(kind, path.suffix)
        return True

    def close_pipe(self, kind: str) -> bool:
        """Close the pipe that the run writes to: training continues."""
        (pipe,) = outputs_of(self.log, 1)
        pipe.unlink(missing_ok=True)
        os.mkfifo(pipe)
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        started = self.start()
        moment = self.wait_for_moment(started)
        os.close(reader)
        before = _newest(self.workdir)
        if moment:
            _sleep(started, self.rng.uniform(0.5, 3))
            started.send(signal.SIGTERM)
        (code,), _ = started.wait()
        pipe.unlink()
        if code not in (0, 128 + signal.SIGTERM, -signal.SIGTERM) or _newest(self.workdir) < before:
            raise Wrong(f"{kind}: exit code {code}")
        return moment

    def disagree(self, kind: str) -> bool:
        """Start two processes that differ in a setting: both name it, and no step is trained."""
        setting = self.rng.choice(
            ("seed=1", "optimizer.learning_rate=1.0", f"steps={STEPS + 1}", "run.log_every=7")
        )
        before = _newest(self.workdir)
        codes, outputs = self.start(last_arguments=(f"--config.{setting}",)).wait()
        name = setting.partition("=")[0]
        if codes != [1, 1] or not all("disagree" in one and name in one for one in outputs):
            raise Wrong(f"{kind} of {setting}: exit codes {codes}: {outputs}")
        if _newest(self.workdir) != before:
            raise Wrong(f"{kind} of {setting}: a step was trained")
        return True

    def take_port(self, kind: str) -> bool:
        """Start two processes on a port that is in use: both end with an error."""
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            server.listen()
            codes, outputs = self.start(port=server.getsockname()[1]).wait()
        if codes[0] != 1 or codes[1] not in (1, PEER_LOST) or "error: " not in outputs[0]:
            raise Wrong(f"{kind}: exit codes {codes}: {outputs}")
        return True

    def check_refused(self, kind: str, code: int, output: str, name: str) -> None:
        """Raise `Wrong` unless a start ended with one error line that names a file."""
        said = [line for line in output.splitlines() if line.startswith("error: ")]
        if code != 1 or len(said) != 1 or name not in said[0] or "Traceback" in output:
            raise Wrong(f"{kind} of {name}: exit code {code}: {output}")

    def fill_disk(self, kind: str) -> bool:
        """Leave no space for the next checkpoint; free it once the run has ended."""
        started = self.start()
        if not self.wait_for_moment(started, checkpoints=1):
            started.wait()
            return False
        ballast = self.workdir / "ballast"
        free = shutil.disk_usage(self.workdir).free
        left = self.rng.randrange(0, 200_000)
        # Full already, which closing the file may be the first to notice.
        with contextlib.suppress(OSError), ballast.open("wb") as file:
            file.write(bytes(max(0, free - left)))
        (code,), (output,) = started.wait()
        ballast.unlink()
        if code == 0:
            return False
        said = [line for line in output.splitlines() if line.startswith("error: ")]
        if code != 1 or not any("space" in line for line in said):
            raise Wrong(f"{kind}: exit code {code}: {output}")
        if "Traceback" in output:
            self.tally.add(kind, "with a library's own traceback besides")
        return True

    def signal_one(self, kind: str) -> bool:
        """Signal one of two processes: both end, at the same step if the signal is not SIGKILL."""
        started = self.start()
        if not self.wait_for_moment(started, checkpoints=1):
            started.wait()
            return False
        victim = self.rng.randrange(2)
        started.send(getattr(signal, kind.split()[0]), to=victim)
        begun = time.monotonic()
        codes, outputs = started.wait()
        seconds = time.monotonic() - begun
        if not any(codes) or f"{STEPS}/{STEPS}" in outputs[0]:
            return False  # everything was trained and saved
        if not kind.startswith("SIGKILL"):
            steps = {
                match for text in outputs for match in re.findall(r"stopped at step (\d+)", text)
            }
            if codes != [128 + signal.SIGTERM] * 2 or len(steps) != 1:  # JAX forwards it as SIGTERM
                raise Wrong(f"{kind}: exit codes {codes}, steps {steps}: {outputs}")
        else:
            if codes[1 - victim] not in (PEER_LOST, -signal.SIGABRT):
                raise Wrong(f"{kind}: exit codes {codes}: {outputs}")
            self.tally.longest(kind, "seconds until the other ended, at most", seconds)
        return True

    def move(self, kind: str) -> bool:
        """Kill the run, and resume it with other devices or processes."""
        started = self.start()
        moment = self.wait_for_moment(started, checkpoints=1)
        for one in started.processes:
            one.kill()
        started.wait()
        others = [Shape(1, 1), Shape(1, 2), Shape(1, 4), Shape(1, 8)]
        if kind == "other processes":
            others = [Shape(2, 1), Shape(2, 2)]
        self.shape = self.rng.choice([shape for shape in others if shape != self.shape])
        return moment


BREAKS: dict[str, Callable[[Trial, str], bool]] = {
    **dict.fromkeys(("SIGKILL", "SIGKILL in a save", "SIGTERM", "SIGINT", "SIGHUP"), Trial.signal),
    **dict.fromkeys(("file cut", "file missing", "bit flipped"), Trial.damage),
    **dict.fromkeys(("file cut, two", "file missing, two"), Trial.damage),
    **dict.fromkeys(
        [kind for kind in TOGETHER if kind.endswith("to one of two")], Trial.signal_one
    ),
    **dict.fromkeys(OTHERS, Trial.move),
    "disk full": Trial.fill_disk,
    "small file": Trial.harm_small_file,
    "checkpoints gone": Trial.lose_checkpoints,
    "token table": Trial.harm_table,
    "image checks": Trial.harm_table,
    "closed pipe": Trial.close_pipe,
    "disagreement": Trial.disagree,
    "port in use": Trial.take_port,
}


def compare(workdir: Path, log: Path, reference: Path, *, exact: bool) -> dict[str, int]:
    """Compare a run with the undisturbed run.

    Args:
      workdir: the folder of the run.
      log: the log of its workers, over all starts.
      reference: the workdir of the undisturbed run, with its log next to it.
      exact: whether states and metrics must be equal bit for bit.

    Returns:
      The number of compared rows, states and records.

    Raises:
      Wrong: if anything differs.
    """
    ours, theirs = read_log(log), read_log(reference.with_name(f"{reference.name}.jsonl"))
    for step in range(1, STEPS + 1):
        # A batch may be prefetched and read again; the last one was trained on.
        if ours["rows"][step][-1] != theirs["rows"][step][-1]:
            raise Wrong(f"step {step} has other rows")
    states = 0
    for step, digests in ours["saved"].items():
        wanted = theirs["saved"].get(step, digests[:1])[-1]
        if exact and set(digests) != {wanted}:
            raise Wrong(f"the state saved at step {step} is another one")
        states += len(digests)
    for step, digests in ours["restored"].items():
        if not set(digests) <= set(ours["saved"][step]):
            raise Wrong(f"the state restored at step {step} was never saved")
        states += len(digests)
    records, wanted_records = unclocked(workdir), unclocked(reference)
    if [record["step"] for record in records] != [record["step"] for record in wanted_records]:
        raise Wrong("metrics are missing, or there twice")
    for record, wanted_record in zip(records, wanted_records, strict=True):
        close = {
            name: math.isclose(record[name], wanted_record[name], rel_tol=1e-4, abs_tol=1e-4)
            for name in {"loss", "gradient_norm", "temperature"} & set(wanted_record)
        }
        same = record == wanted_record if exact else all(close.values())
        if not same:
            raise Wrong(f"metrics of step {record['step']} differ: {record} {wanted_record}")
    if exact:
        if (workdir / "results.json").read_text() != (reference / "results.json").read_text():
            raise Wrong("results.json differs")
        data, wanted_data = (
            json.loads((one / "data.json").read_text())["fingerprints"]
            for one in (workdir, reference)
        )
        if data != wanted_data:
            raise Wrong(f"fingerprints of data differ: {data} {wanted_data}")
        with np.load(workdir / "ranks.npz") as ranks, np.load(reference / "ranks.npz") as wanted:
            if any(not np.array_equal(ranks[name], wanted[name]) for name in wanted.files):
                raise Wrong("ranks differ")
    rows = sum(len(ours["rows"][step][-1]) for step in range(1, STEPS + 1))
    return {"runs": 1, "rows held": rows, "states held": states, "records held": len(records)}


def read_log(path: Path) -> dict[str, dict[int, list]]:
    """Read a worker's log: kind -> step -> its entries, in order."""
    found: dict[str, dict[int, list]] = {
        kind: collections.defaultdict(list) for kind in ("rows", "saved", "restored")
    }
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # killed while it was writing
            continue
        for kind in found:
            if kind in record:
                found[kind][record["step"]].append(record[kind])
    return found


def check_epochs(reference: Path) -> int:
    """Count the epochs of the undisturbed run; check that each row is in each of them once.

    In a run of less than an epoch, no row may be there twice.
    """
    rows_of = read_log(reference.with_name(f"{reference.name}.jsonl"))["rows"]
    rows = np.concatenate([rows_of[step][-1] for step in range(1, STEPS + 1)])
    num_rows = int(rows.max()) + 1
    epochs = len(rows) // num_rows
    counts = np.bincount(rows[: max(epochs, 1) * num_rows], minlength=num_rows)
    if (counts > max(epochs, 1)).any():  # in whole epochs, a row that is lost means one too many
        raise Wrong("a row was lost or repeated within an epoch")
    return epochs


def _steps(workdir: Path) -> list[int]:
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return sorted(int(name) for name in names if name.isdigit())


def _newest(workdir: Path) -> int:
    return max(_steps(workdir), default=0)


def _sleep(started: Started, seconds: float) -> bool:
    """Wait for some seconds; return whether the run still runs."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and started.running:
        time.sleep(0.002)
    return started.running


def run_suite(
    faults: int,
    *,
    workers: int,
    seed: int,
    names: tuple[str, ...] = TURNS,
    only: tuple[str, ...] = tuple(BREAKS),
) -> dict[str, Any]:
    """Inject faults of some kinds into runs of these settings in turn; return the report."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "NPROC": "32"}
    FORKS.set_forkserver_preload(["tests.fault_worker"])
    tally, begun = Tally(), time.monotonic()
    place = Path(tempfile.mkdtemp(prefix="faults-"))
    os.environ["XDG_CACHE_HOME"] = str(place / "cache")
    references = {}
    for name in dict.fromkeys(names):
        reference = references[name] = place / name.replace(" ", "-")
        log, setting = reference.with_name(f"{reference.name}.jsonl"), SETTINGS[name]
        codes, outputs = Started(reference, log, place / "data", setting, setting.shape).wait()
        if any(codes):
            raise Wrong(f"the undisturbed run: exit codes {codes}: {outputs}")
    epochs = check_epochs(next(iter(references.values())))

    def work(number: int) -> None:
        name, rng = names[number % len(names)], random.Random(f"{seed} {number}")
        kinds = [kind for kind in SETTINGS[name].kinds if kind in only]
        if os.geteuid() != 0:
            kinds = [kind for kind in kinds if kind != "disk full"]
        chosen = [rng.choice(kinds) for _ in range(FAULTS_OF_A_RUN)]
        trial = Trial(place / f"trial-{number}", name, references[name], rng, tally)
        try:
            trial.run(chosen)
            shutil.rmtree(trial.place)
        except Exception as error:  # any error is a finding
            what = f"{type(error).__name__}: {error}"[:4_000]
            print(f"{name}, {', '.join(chosen)}, {trial.place}: {what}", flush=True)
            tally.fail(setting=name, kinds=", ".join(chosen), place=str(trial.place), error=what)

    number = 0
    waiting: set[concurrent.futures.Future] = set()
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        while True:
            while tally.injected < faults and len(waiting) < workers and len(tally.failures) < 20:
                waiting.add(pool.submit(work, number))
                number += 1
            if not waiting:
                break
            _, waiting = concurrent.futures.wait(waiting, return_when="FIRST_COMPLETED")
            print(
                f"{time.monotonic() - begun:6.0f} s: {tally.injected} faults, "
                f"{tally.counts['all']['runs']} runs, {len(tally.failures)} failures",
                flush=True,
            )
    if not tally.failures:
        shutil.rmtree(place)
    counts = {kind: dict(found) for kind, found in sorted(tally.counts.items())}
    held = counts.pop("all", {})
    return {
        "faults": tally.injected,
        "by kind": counts,
        **held,
        "whole epochs in which each row was once": epochs,
        "failures": tally.failures,
        "seconds": round(time.monotonic() - begun),
        "seed": seed,
        "commit": commit(),
        "machine": f"{os.cpu_count()} cores, Python {platform.python_version()}, "
        f"jax {importlib.metadata.version('jax')}",
    }


def main() -> None:
    """Append to the report, and fail if a run lost anything."""
    parser = argparse.ArgumentParser(prog="python -m tests.fault_suite")
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=TURNS)
    parser.add_argument("--kinds", nargs="+", choices=BREAKS, default=list(BREAKS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    found = run_suite(
        arguments.faults,
        workers=arguments.workers,
        seed=arguments.seed,
        names=tuple(arguments.settings),
        only=tuple(arguments.kinds),
    )
    before = json.loads(arguments.report.read_text()) if arguments.report.exists() else []
    write_whole(arguments.report, json.dumps([*before, found], indent=2) + "\n")
    sys.exit(bool(found["failures"]))


if __name__ == "__main__":
    main()
