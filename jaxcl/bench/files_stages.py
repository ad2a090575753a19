"""Measures the time and the host memory of opening, splitting and reading a file of pairs.

`jaxcl.bench files` runs this in a new process: `python -m jaxcl.bench.files_stages FILE DATA_DIR`.
It prints a JSON object, stage -> figures. Memory is the growth of the process's own allocations
(`RssAnon`) since jaxcl was imported. Pages of mapped files are not counted, since the kernel can
reclaim them when other processes need memory.
"""

import contextlib
import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jaxcl.data.pair_files import FilePairs, open_pair_files
from jaxcl.settings.data_sections import DataSet

__all__ = ["main", "run_stages"]

_BATCH, _BATCHES = 1024, 100
_SPLITS = {"train": "rest", "validation": "train[:5%]"}
_SECONDS_BETWEEN_SAMPLES = 0.01


class _Meter:
    """Measures stages; `figures` holds the time and the peak memory of each."""

    def __init__(self) -> None:
        self.figures: dict[str, dict[str, float]] = {}
        self._before = _allocated()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        ended = threading.Event()
        peak = 0

        def sample() -> None:
            nonlocal peak
            while not ended.wait(_SECONDS_BETWEEN_SAMPLES):
                peak = max(peak, _allocated())

        sampler = threading.Thread(target=sample, daemon=True)
        sampler.start()
        start, cpu_start = time.perf_counter(), time.process_time()
        yield
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        ended.set()
        sampler.join()
        mebibytes = (max(peak, _allocated()) - self._before) / 2**20
        self.figures[name] = {
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "mebibytes": mebibytes,
        }


def _allocated() -> int:
    """Bytes of memory that the process has allocated and touched."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon; measure on Linux")


def run_stages(path: Path, data_dir: Path) -> dict[str, dict[str, float]]:
    """Measure each stage in turn.

    Args:
      path: a file of pairs with columns `query` and `key`.
      data_dir: the folder for the cache.

    Returns:
      Stage -> `"seconds"`, `"cpu_seconds"` and `"mebibytes"`.
    """
    data_set = DataSet(str(path), _SPLITS)
    meter = _Meter()
    with meter.stage("read and check the file"):
        open_pair_files(data_set, "validation", data_dir=data_dir)
    sources: dict[str, FilePairs] = {}
    with meter.stage("open and split again"):
        for role in _SPLITS:
            sources[role] = open_pair_files(data_set, role, data_dir=data_dir)
    train = sources["train"]
    rng = np.random.default_rng(0)
    with meter.stage(f"{_BATCHES} random batches of {_BATCH}"):
        for _ in range(_BATCHES):
            train.read(rng.integers(len(train), size=_BATCH))
    with meter.stage("all training rows in order"):
        for first in range(0, len(train), 4096):
            train.read(np.arange(first, min(first + 4096, len(train))))
    return meter.figures


def main() -> None:
    """Measure the file in the first argument; the second is the folder for its cache."""
    path, data_dir = map(Path, sys.argv[1:])
    print(json.dumps(run_stages(path, data_dir)))


if __name__ == "__main__":
    main()
