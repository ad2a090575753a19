"""The parts in their order, and the processes that each part consists of."""

import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

__all__ = ["PARTS", "Job", "jobs_of"]

PARTS: Mapping[int, str] = {
    1: "smoke",
    2: "pallas_gpu parity",
    3: "loss speed",
    4: "training step",
    5: "assignment and nearest neighbours",
    6: "programs",
}
"""Parts by number."""

_HERE = Path(__file__).parent


class Job(NamedTuple):
    """One process.

    Attributes:
      part: number of the part in `PARTS`; 0 for the machine and its ceilings.
      name: unique among all jobs.
      program: a module with `measure_all(recorder, spec)`, or a script that needs PyTorch.
      weight: the job's share of the remaining time, relative to the weights of the jobs after it.
      measurement_seconds: the time limit of a single measurement.
      on_cpu: whether the job runs on the host's CPU, for comparison.
    """

    part: int
    name: str
    program: str
    weight: float
    measurement_seconds: float
    on_cpu: bool = False

    @property
    def needs_torch(self) -> bool:
        return self.program.endswith("_torch.py")

    def command(self, spec_file: Path, *, torch_python: str) -> list[str]:
        """The command that starts the job."""
        if self.needs_torch:
            return [torch_python, str(_HERE / self.program), str(spec_file)]
        return [sys.executable, "-m", "jaxcl.bench.gpu.worker", str(spec_file)]


_JOBS = (
    Job(0, "machine", "ceilings", 1.5, 60.0),
    Job(0, "machine, PyTorch", "ceilings_torch.py", 1.5, 60.0),
    Job(1, "smoke", "smoke", 2.0, 60.0),
    Job(2, "parity", "kernel_parity", 2.0, 45.0),
    Job(3, "loss", "loss_speed", 3.0, 60.0),
    Job(3, "loss, PyTorch", "loss_speed_torch.py", 1.5, 90.0),
    Job(4, "step", "step_speed", 4.0, 120.0),
    Job(4, "step, PyTorch", "step_speed_torch.py", 3.0, 120.0),
    Job(5, "search", "search_speed", 3.0, 120.0),
    Job(5, "search, CPU", "search_speed", 1.0, 120.0, on_cpu=True),
    Job(6, "programs", "programs", 3.0, 600.0),
)


def jobs_of(parts: Collection[int], *, torch: bool) -> list[Job]:
    """The jobs of some parts, in order, with or without the PyTorch jobs.

    Example:
      >>> [job.name for job in jobs_of({1, 3}, torch=False)]
      ['machine', 'smoke', 'loss']
    """
    return [job for job in _JOBS if job.part in (0, *parts) and (torch or not job.needs_torch)]
