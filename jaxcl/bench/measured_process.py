"""Measure the time and the memory of a function in a separate process.

This module imports only the standard library, so that scripts of other environments can import it.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["serve"]


def serve(call: Callable[[], Sequence[float]], facts: dict[str, Any]) -> None:
    """Print the facts, then answer each line of standard input with a measurement.

    Each answer is a line of JSON: the seconds and CPU seconds of one call, the growth of the peak
    memory in MB since before the first call, and the numbers that the call returned, which should
    agree between all programs that compute the same thing.

    Args:
      call: computes once, and returns a few numbers when it has finished. The first call, which
        may initialise a library, is measured like the others.
      facts: a first line to print, such as versions.
    """
    print(json.dumps(facts), flush=True)
    # Linux resets the peak of the resident memory, so that imports and preparation do not count.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    for _ in sys.stdin:
        start, cpu_start = time.perf_counter(), time.process_time()
        values = call()
        answer = {
            "seconds": time.perf_counter() - start,
            "CPU seconds": time.process_time() - cpu_start,
            "MB": (_status("VmHWM") - before) / 1e6,
            "values": list(values),
        }
        print(json.dumps(answer), flush=True)


def _status(name: str) -> int:
    """Bytes, from the line of this name in `/proc/self/status`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {name}")
