"""How do bytes between devices and the host's time grow with devices and processes?

    python -m jaxcl.bench scaling [--batch 1024] [--dim 256] [--processes 1 2 4] [--steps 60]

Bytes that come in to a device for one loss and its gradient are read off the compiled program of 2,
4 and 8 devices, by ring and by gather: of a batch that stays as large, and of one that grows with
the devices. Then a small run is trained by several processes of this machine, with one device each
and a batch that grows with them. What is timed is the host's part of a step, as the run writes it,
and the time that the first process's main thread had a core, which no busy neighbour changes.
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
"""Gradients that are summed in little time, so that the host's part is no small one."""


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Counts the bytes, and times the hosts."""
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
    with tempfile.TemporaryDirectory() as place:
        for number in range(arguments.rounds + 1):
            for processes in arguments.processes:
                say(f"round {number} of {arguments.rounds}: {processes} processes")
                workdir = Path(place) / f"{number}-{processes}"
                parts = _trained(arguments.config, workdir, processes, arguments.steps)
                if number:  # the first one compiles
                    for part, seconds in parts.items():
                        name = f"{part}, {processes} processes"
                        rounds.setdefault(name, []).append(1e3 * seconds)
    shapes = {"batch": arguments.batch, "dim": arguments.dim, "rows a process": _ROWS_OF_A_PROCESS}
    return {"shapes": shapes, "unit": "ms", "rounds": rounds, "facts": facts}


def _received(devices: int, size: int, dim: int, *, exchange: str) -> float:
    """Bytes that come in to a device."""
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
    """Seconds of a step by part, in the first process; the median of the later half."""
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
    seen = []  # (step, seconds of work in the first process's main thread)
    while started[0].poll() is None:
        if len(written := read_metrics(workdir)) > 0:
            seen.append((written[-1]["step"], _worked(started[0].pid)))
        time.sleep(0.02)
    codes = [one.wait() for one in started]
    if any(codes):
        raise RuntimeError(f"the run of {processes} processes failed")
    records = [one for one in read_metrics(workdir) if one["step"] > steps / 2]
    (first, begun), *_, (last, ended) = [one for one in seen if steps / 4 < one[0] < steps]
    return {"host's own work": (ended - begun) / (last - first)} | {
        part: statistics.median(
            one[f"time/step_{part}_seconds"] for one in records if "time/step_host_seconds" in one
        )
        for part in ("host", "input", "device")
    }


def _worked(process: int) -> float:
    """Seconds that its main thread had a core; Linux alone says so."""
    return 1e-9 * int(Path(f"/proc/{process}/task/{process}/schedstat").read_text().split()[0])
