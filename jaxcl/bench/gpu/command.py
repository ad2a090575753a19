"""Measures jaxcl on a GPU, part by part, within a given time.

    python -m jaxcl.bench gpu --minutes N [--json FILE] [--only PART,…] [--torch] [--dry-run]

Every part runs in its own processes with its own time limit: a crash, a hang or a failed
compilation loses only one measurement. Results are checked against exact references before they are
timed, and are written to FILE as they arrive. This process never starts a device.
"""

import argparse
import functools
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxcl.bench.benchmark_parser import benchmark_parser
from jaxcl.bench.gpu.jobs import PARTS, Job, jobs_of
from jaxcl.bench.gpu.record import Record
from jaxcl.bench.gpu.sizes import FULL, TINY, Sizes, as_json
from jaxcl.bench.gpu.supervise import run_job
from jaxcl.bench.gpu.table import as_line, as_table
from jaxcl.bench.machine import commit, cpu_model

__all__ = ["main"]

_LEAST_SECONDS = 5.0  # with less, a job is skipped
_RESERVE_SECONDS = 2.0  # for killing the last job and printing the table


class _Stopped(BaseException):
    """A signal asked the command to stop."""


def main(
    argv: Sequence[str], json_file: Path | None = None, *, spent_seconds: float = 0.0
) -> dict[str, Any]:
    """Run the chosen parts, and return the record.

    Args:
      argv: the flags.
      json_file: the file for the record.
      spent_seconds: the seconds that the command has run already, as part of its minutes.

    Raises:
      SystemExit: with 1 if something failed, with 128 plus a signal's number after that signal.
    """
    start = time.monotonic() - spent_seconds
    arguments = _parse(argv)
    nvidia_smi = _nvidia_smi()
    sizes = {"full": FULL, "tiny": TINY}[arguments.sizes or ("full" if nvidia_smi else "tiny")]
    platform = "gpu" if nvidia_smi else "cpu"
    jobs = [
        job
        for job in jobs_of(arguments.only, torch=arguments.torch)
        if not (job.on_cpu and platform == "cpu")
    ]
    seconds = 60 * arguments.minutes
    if arguments.dry_run:
        print(_plan(jobs, sizes, seconds))
        return {"jobs": [job.name for job in jobs]}
    head = {
        "benchmark": "gpu",
        "commit": commit(),
        "cpu": f"{os.cpu_count()} cores of {cpu_model()}",
        "nvidia_smi": nvidia_smi,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": list(argv),
        "sizes": as_json(sizes),
        "seed": secrets.randbelow(2**30),
    }
    record = Record(json_file, head)
    deadline = start + seconds - _RESERVE_SECONDS
    status = 0
    try:
        with _signals_stop():
            _run(
                jobs,
                record,
                deadline,
                platform=platform,
                sizes=sizes,
                torch_python=arguments.torch_python,
                pairs=arguments.pairs,
            )
    except _Stopped as stopped:
        record.interrupt(signal.Signals(stopped.args[0]).name)
        status = 128 + stopped.args[0]
    print(as_table(record.content), flush=True)
    failed = [one for one in record.content["jobs"].values() if one["status"] == "failed"]
    if not status and (failed or record.failures()):
        status = 1
    if status:
        sys.exit(status)
    return record.content


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = benchmark_parser("gpu", __doc__)
    parser.formatter_class = argparse.RawTextHelpFormatter
    parser.add_argument(
        "--minutes", type=float, required=True, help="the time limit of the whole command"
    )
    parser.add_argument(
        "--only",
        type=_parts,
        default=set(PARTS),
        metavar="PART,…",
        help="\n".join(f"{number} {title}" for number, title in PARTS.items()),
    )
    parser.add_argument("--torch", action="store_true", help="compare with PyTorch as well")
    parser.add_argument(
        "--torch-python",
        default=sys.executable,
        help="an interpreter with torch (default: this one)",
    )
    parser.add_argument(
        "--pairs",
        metavar="DIR",
        help="prepared pairs for part 6, from the data_dir of code_pairs;\n"
        "by default, all installed functions are parsed",
    )
    parser.add_argument(
        "--sizes",
        choices=("full", "tiny"),
        help="the sizes to measure (default: full on an NVIDIA GPU, tiny elsewhere)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    arguments = parser.parse(argv)
    if not arguments.minutes > 0:
        parser.error(f"--minutes={arguments.minutes}; give more than 0")
    return arguments


def _parts(text: str) -> set[int]:
    known = {str(number): number for number in PARTS}
    unknown = [part for part in text.split(",") if part.strip() not in known]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"unknown parts {', '.join(unknown)}; use some of {', '.join(known)}"
        )
    return {known[part.strip()] for part in text.split(",")}


def _run(
    jobs: Sequence[Job],
    record: Record,
    deadline: float,
    *,
    platform: str,
    sizes: Sizes,
    torch_python: str,
    pairs: str | None,
) -> None:
    """Run the jobs in order; time that a job leaves unused goes to later jobs."""
    with tempfile.TemporaryDirectory(prefix="jaxcl-gpu-") as scratch:
        for number, job in enumerate(jobs):
            limit = _limits(jobs[number:], deadline - time.monotonic())[0]
            if limit < _LEAST_SECONDS:
                record.skip(job, "no time left")
                continue
            print(f"== part {job.part}, {job.name}: up to {limit:.0f} s", flush=True)
            record.start(job, limit_s=limit)
            directory = Path(scratch) / str(number)
            directory.mkdir()
            outcome = run_job(
                job.command(directory / "spec.json", torch_python=torch_python),
                {
                    "program": job.program,
                    "platform": "cpu" if job.on_cpu else platform,
                    "sizes": as_json(sizes),
                    "seed": record.content["seed"],
                    "pairs": pairs,
                },
                directory,
                seconds=limit,
                measurement_seconds=job.measurement_seconds,
                environment=_environment(job, rehearsal=sizes.name == "tiny" and platform == "cpu"),
                on_event=functools.partial(_report, record, job),
            )
            record.end(job, outcome)
            if outcome.status == "failed":
                print(outcome.log, flush=True)


def _report(record: Record, job: Job, event: Mapping[str, Any]) -> None:
    result = record.add(job, event)
    if result is not None:
        print(f"  {as_line(result)}", flush=True)


def _limits(jobs: Sequence[Job], seconds: float) -> list[float]:
    """The time limit of each job, in seconds, if all jobs use their time."""
    total_weight = sum(job.weight for job in jobs)
    return [seconds * job.weight / total_weight for job in jobs]


def _environment(job: Job, *, rehearsal: bool) -> dict[str, str]:
    """A job's environment, in which JAX does not preallocate memory."""
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}
    if rehearsal:  # LLVM's optimisations would take most of its time
        flags = environment.get("XLA_FLAGS", "")
        environment["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=0"
    if job.on_cpu:
        environment["JAX_PLATFORMS"] = "cpu"
    return environment


def _plan(jobs: Sequence[Job], sizes: Sizes, seconds: float) -> str:
    limits = _limits(jobs, seconds - _RESERVE_SECONDS)
    lines = [f"{seconds / 60:g} minutes, sizes: {sizes.name}"]
    lines += [
        f"  part {job.part}, {job.name}: up to {limit:.0f} s, {job.measurement_seconds:.0f} s "
        "per measurement; unused time goes to the next"
        for job, limit in zip(jobs, limits, strict=True)
    ]
    for name, value in sizes._asdict().items():
        shown = "; ".join(cell.name for cell in value) if name == "cells" else value
        lines.append(f"  {name}: {shown}")
    return "\n".join(lines)


def process_age() -> float:
    """Seconds since this process started, including its imports; 0 if the system does not say."""
    try:
        stat = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return 0.0
    return max(0.0, uptime - int(stat[19]) / os.sysconf("SC_CLK_TCK"))


@contextmanager
def _signals_stop() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into an exception that ends the running job."""

    def stop(number: int, frame: Any) -> None:
        raise _Stopped(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _nvidia_smi() -> str | None:
    """The name, memory and driver of the GPUs; `None` without a GPU."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = "--query-gpu=name,memory.total,driver_version"
    try:
        finished = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return "; ".join(finished.stdout.strip().splitlines()) or None
