"""How long does a run take to reach its first step, with and without cached programs?

    python -m jaxcl.bench start [--config configs/code_search.py] [--rounds 3]

Each round starts the training command twice in a new folder: first with an empty cache of compiled
programs, then with the programs of the first start. The data are prepared beforehand. The clock
stops at the first metrics.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxcl.bench.benchmark_parser import benchmark_parser
from jaxcl.run.metric_writer import read_metrics

__all__ = ["main"]

_TIMEOUT = 600.0


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Time both starts."""
    parser = benchmark_parser("start", __doc__)
    parser.add_argument("--config", default="configs/code_search.py")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse(argv)
    rounds: dict[str, list[float]] = {"nothing compiled": [], "compiled before": []}
    with tempfile.TemporaryDirectory() as prepared:
        first_step(arguments.config, Path(prepared) / "run")  # prepares the data
        for _ in range(arguments.rounds):
            with tempfile.TemporaryDirectory() as folder:
                for name, seconds in rounds.items():
                    seconds.append(first_step(arguments.config, Path(folder) / name))
    return {"shapes": {"config": arguments.config}, "unit": "s", "rounds": rounds, "facts": {}}


def first_step(config: str, workdir: Path) -> float:
    """The seconds from starting a run to its first logged metrics; the run is then killed."""
    command = [sys.executable, "-m", "jaxcl.train", f"--config={config}", f"--workdir={workdir}"]
    start = time.perf_counter()
    run = subprocess.Popen([*command, "--config.run.log_every=1"], stderr=subprocess.DEVNULL)
    try:
        # Metrics of a step are read one step late, so two steps are done by then.
        while not read_metrics(workdir):
            if run.poll() is not None or time.perf_counter() - start > _TIMEOUT:
                raise RuntimeError(f"{' '.join(command)} did not reach a step")
            time.sleep(0.02)
        return time.perf_counter() - start
    finally:
        run.kill()
        run.wait()
