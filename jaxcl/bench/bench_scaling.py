"""How do communication and host time grow with the number of devices and processes?

    python -m jaxcl.bench scaling [--batch 1024] [--dim 256] [--processes 1 2 4] [--steps 60]

The bytes that a device receives for one loss and its gradient are read from the compiled program
for 2, 4 and 8 devices, by ring and by gather, for a batch of constant size and for one that grows
with the devices. Then several processes on this machine train a small run, with one device each and
a batch that grows with their number. The benchmark reports the host's part of a step from the run's
metrics, and the CPU time of process 0's main thread, which does not depend on the machine's load.
"""

import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxcl.bench.benchmark_parser import benchmark_parser
from jaxcl.cost.program_cost import traffic
from jaxcl.host.progress import say
from jaxcl.losses import infonce_loss
from jaxcl.ops.mesh import batch_sharding, make_mesh
from jaxcl.ops.pairs import EXCHANGES
from jaxcl.run.metric_writer import read_metrics

__all__ = ["main"]

_DEVICES = (2, 4, 8)
_ROWS_OF_A_PROCESS = 64
_SMALL = ("--config.model.dim=16", "--config.data.vocabulary_size=1000")
"""A small model, whose gradients are summed fast, so that the host's part is large."""


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Count the bytes, and time the hosts."""
    parser = benchmark_parser("scaling", __doc__)
    parser.add_argument("--batch", type=int, default=1_024)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--config", default="configs/code_search.py:smoke")
    arguments = parser.parse(argv)
    jax.config.update("jax_num_cpu_devices", max(_DEVICES))
    facts = {}
    for exchange in EXCHANGES:
        for devices in _DEVICES:
            for name, size in (("equal", arguments.batch), ("growing", arguments.batch * devices)):
                received = _received(devices, size, arguments.dim, exchange=exchange)
                facts[f"KiB, {exchange}, {name} batch, {devices} devices"] = received / 2**10
    rounds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.rounds + 1):
            for processes in arguments.processes:
                say(f"round {number} of {arguments.rounds}: {processes} processes")
                workdir = Path(folder) / f"{number}-{processes}"
                parts = _trained(arguments.config, workdir, processes, arguments.steps)
                if number:  # the first step compiles
                    for part, seconds in parts.items():
                        name = f"{part}, {processes} processes"
                        rounds.setdefault(name, []).append(1e3 * seconds)
    shapes = {"batch": arguments.batch, "dim": arguments.dim, "rows a process": _ROWS_OF_A_PROCESS}
    return {"shapes": shapes, "unit": "ms", "rounds": rounds, "facts": facts}


def _received(devices: int, size: int, dim: int, *, exchange: str) -> float:
    """The bytes that a device receives."""
    mesh = make_mesh({"data": devices}, devices=jax.devices()[:devices])
    rows = PartitionSpec("data")

    def local(queries: jax.Array, keys: jax.Array) -> jax.Array:
        return infonce_loss(queries, keys, temperature=0.05, axis_name="data", exchange=exchange)

    loss = jax.shard_map(local, mesh=mesh, in_specs=(rows, rows), out_specs=rows)
    gradient = jax.jit(jax.grad(lambda x, y: loss(x, y).mean(), argnums=(0, 1)))
    side = jax.ShapeDtypeStruct((size, dim), jnp.float32, sharding=batch_sharding(mesh))
    program = gradient.lower(side, side).compile().as_text()
    assert program is not None
    return traffic(program).interconnect


def _trained(config: str, workdir: Path, processes: int, steps: int) -> dict[str, float]:
    """Seconds of a step by part, in process 0; the median over the second half of the run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "jaxcl.train", f"--config={config}", f"--workdir={workdir}"]
    command += [
        f"--config.steps={steps}",
        f"--config.global_batch_size={_ROWS_OF_A_PROCESS * processes}",
        *_SMALL,
        "--config.run.log_every=1",
        "--config.evaluation.methods=('dense',)",
        f"--config.run.evaluate_every={steps}",
        f"--config.run.checkpoint_every={steps}",
    ]
    started = []
    for number in range(processes):
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "NPROC": "32", "XLA_FLAGS": ""}
        if processes > 1:
            environment |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}"}
            environment |= {"JAX_NUM_PROCESSES": f"{processes}", "JAX_PROCESS_ID": f"{number}"}
        started.append(subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL))
    seen = []  # (step, CPU seconds of process 0's main thread)
    while started[0].poll() is None:
        if len(written := read_metrics(workdir)) > 0:
            seen.append((written[-1]["step"], _worked(started[0].pid)))
        time.sleep(0.02)
    codes = [one.wait() for one in started]
    if any(codes):
        raise RuntimeError(f"the run of {processes} processes failed")
    records = [one for one in read_metrics(workdir) if one["step"] > steps / 2]
    (first, start), *_, (last, end) = [one for one in seen if steps / 4 < one[0] < steps]
    return {"host's own work": (end - start) / (last - first)} | {
        part: statistics.median(
            one[f"time/step_{part}_seconds"] for one in records if "time/step_host_seconds" in one
        )
        for part in ("host", "input", "device")
    }


def _worked(process: int) -> float:
    """CPU seconds of a process's main thread, on Linux."""
    return 1e-9 * int(Path(f"/proc/{process}/task/{process}/schedstat").read_text().split()[0])
