"""Checks that the processes of a run agree on values such as settings and versions."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

__all__ = ["check_processes_agree"]


def check_processes_agree(values: Mapping[str, Any]) -> None:
    """Check that values are equal in all processes of a run.

    Args:
      values: name -> this process's value, in JSON types.

    Raises:
      ValueError: in every process, with the names whose values differ and the processes that have
        each value.
    """
    if jax.process_count() == 1:
        return
    different = _disagreements(_gathered(json.loads(json.dumps(values))))
    if different:
        raise ValueError(
            f"the processes of this run disagree: {'; '.join(different)}. Start all of them by the "
            "same command, with the same packages and one shared --workdir"
        )


def _disagreements(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """List the names whose values differ, with the processes that have each value."""
    different = []
    for name in sorted({name for report in reports for name in report}):
        processes: dict[str, list[int]] = {}
        for process, report in enumerate(reports):
            processes.setdefault(json.dumps(report.get(name)), []).append(process)
        if len(processes) > 1:
            each = [f"{value} in {_numbered(numbers)}" for value, numbers in processes.items()]
            different.append(f"{name} is {' and '.join(each)}")
    return different


def _numbered(processes: Sequence[int]) -> str:
    if len(processes) == 1:
        return f"process {processes[0]}"
    listed = ", ".join(map(str, processes[:8])) + (", …" if len(processes) > 8 else "")
    return f"processes {listed}"


def _gathered(values: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The values of all processes, in order."""
    encoded = np.frombuffer(json.dumps(values).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array(len(encoded), np.int32))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(encoded)] = encoded
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]
