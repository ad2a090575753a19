"""Does a step on a CPU need the memory that `jaxcl.plan` predicts?

    python -m jaxcl.bench plan [--config FILE] [--batch 256] [--rounds 3]

Each round runs in a new process with one device. It plans, compiles, and then creates the state and
trains a few steps. The growth of its peak memory in these steps is compared with the plan. Needs
Linux (`/proc/self/clear_refs`).
"""

import ctypes
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxcl.bench.benchmark_parser import benchmark_parser
from jaxcl.ops.mesh import put_batch
from jaxcl.plan import make_plan
from jaxcl.run.training import build_training
from jaxcl.settings.config_files import load_config
from jaxcl.settings.read import read_settings
from jaxcl.typing import SIDES

__all__ = ["main"]

_ROWS = 20_000
_STEPS = 3


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Measure every config at every batch size."""
    parser = benchmark_parser("plan", __doc__)
    parser.add_argument("--config", nargs="+", default=["configs/code_search_transformer.py"])
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse(argv)
    rounds: dict[str, list[float]] = {}
    facts: dict[str, Any] = {}
    for _ in range(arguments.rounds):
        for config in arguments.config:
            for size in arguments.batch:
                command = [sys.executable, "-m", "jaxcl.bench.bench_plan", config, str(size)]
                finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                planned, measured = map(float, finished.stdout.split()[-2:])
                name = f"{Path(config).stem}, batch {size:,}"
                rounds.setdefault(f"{name}, planned", []).append(planned)
                rounds.setdefault(f"{name}, taken", []).append(measured)
    for name, figures in list(rounds.items()):
        if name.endswith(", taken"):
            planned = rounds[name.replace("taken", "planned")][0]
            facts[name.replace("taken", "taken/planned")] = float(np.median(figures)) / planned
    return {"shapes": {"rows": _ROWS}, "unit": "MiB", "rounds": rounds, "facts": facts}


def measure(config_file: str, size: int) -> tuple[float, float]:
    """The planned and the measured memory of a step, in MiB."""
    config = load_config(config_file)
    config.global_batch_size = size
    settings = read_settings(config)
    plan = make_plan(settings, jax.devices(), num_rows=_ROWS)
    program = build_training(settings)
    groups = np.zeros(_ROWS, np.int32)
    rng = np.random.default_rng(0)
    batch: dict[str, Any] = {
        side: {
            "tokens": rng.integers(1, 99, (size, getattr(settings.data.max_tokens, side)), np.int32)
        }
        for side in SIDES
    }
    batch |= {name: np.arange(size, dtype=np.int32) for name in ("row", "text", "group")}

    def train() -> None:
        state = program.init(_ROWS, groups)
        for _ in range(_STEPS):
            state, metrics = program.train_step(state, put_batch(batch, program.mesh))
            metrics.loss.block_until_ready()

    train()  # compiles everything
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    train()
    return plan.total / 2**20, _status("VmHWM") - before


def _status(name: str) -> float:
    """A value of /proc/self/status, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 2**10
    raise OSError(f"/proc/self/status has no {name}; measure on Linux")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    print(*measure(sys.argv[1], int(sys.argv[2])))
