"""Metrics of a run: a JSON line per record, and the same as TensorBoard events."""

import json
from collections.abc import Mapping
from pathlib import Path

import jax
from tensorboardX import SummaryWriter

__all__ = ["MetricWriter", "read_metrics"]


class MetricWriter:
    """Appends records to `metrics.jsonl` and to `tensorboard/`, from the first process only.

    A resumed run first drops the lines behind the step that it resumes from, so that the file
    never tells a step twice. Figures of the clock begin with `time/`, of the compiled program with
    `machine/`; all others are those of an uninterrupted run, to the last bit.

    Args:
      workdir: where the files are.
      step: the step that the run begins or resumes at.
    """

    def __init__(self, workdir: Path, *, step: int):
        self._file = self._events = None
        if jax.process_index() != 0:
            return
        path = Path(workdir) / "metrics.jsonl"
        kept = [record for record in read_metrics(workdir) if record["step"] <= step]
        rewritten = path.with_suffix(".rewritten")
        rewritten.write_text("".join(json.dumps(record) + "\n" for record in kept))
        rewritten.replace(path)
        self._file = path.open("a")
        self._events = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds one record and hands it to the system, so that a killed process loses none."""
        if self._file is None or self._events is None:
            return
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes what is left."""
        for sink in (self._file, self._events):
            if sink is not None:
                sink.close()


def read_metrics(workdir: Path) -> list[dict]:
    """The records of a run so far, oldest first; a line cut short by a crash is left out."""
    path = Path(workdir) / "metrics.jsonl"
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records
