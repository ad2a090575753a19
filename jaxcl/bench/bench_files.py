"""How much time and host memory does it take to open, split and read a file of pairs?

    python -m jaxcl.bench files --rows 1000000 [--folder DIR] [--rounds 1]

The rows are generated JSON lines with a query of 4 words and a key of 12. Each round runs in a new
process, with an empty cache.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxcl.bench.benchmark_parser import benchmark_parser
from jaxcl.host.command_flags import user_path
from jaxcl.host.progress import progress_bar

__all__ = ["generate_pairs", "main", "measure"]

_WORDS = 50_000
_QUERY_WORDS, _KEY_WORDS = 4, 12
_ROWS_AT_ONCE = 10_000


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Measure one number of rows."""
    parser = benchmark_parser("files", __doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--folder", type=user_path, help="a folder for the file and its cache")
    return measure(**vars(parser.parse(argv)))


def measure(*, rows: int, rounds: int, folder: Path | None = None) -> dict[str, Any]:
    """Measure every stage of `files_stages.py`.

    Args:
      rows: the number of rows of the generated file.
      rounds: the number of repetitions.
      folder: the folder for the file and its cache; `None` for a temporary folder.

    Returns:
      The record that `jaxcl.bench` prints, in seconds, with the CPU time and the peak memory of
      each stage.

    Raises:
      RuntimeError: if the measuring process fails.
    """
    seconds: dict[str, list[float]] = {}
    facts: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="jaxcl-bench-", dir=folder) as temporary:
        path = Path(temporary) / "pairs.jsonl"
        generate_pairs(path, rows)
        for number in range(rounds):
            for stage, figures in _run_stages(path, Path(temporary) / f"data-{number}").items():
                seconds.setdefault(stage, []).append(figures["seconds"])
                for what, figure in {"CPU s": "cpu_seconds", "MiB": "mebibytes"}.items():
                    name = f"{what} at most, {stage}"
                    facts[name] = max(facts.get(name, 0.0), figures[figure])
        size = path.stat().st_size / 2**20
    return {
        "shapes": {"rows": rows, "file, MiB": round(size)},
        "unit": "s",
        "rounds": seconds,
        "facts": facts,
    }


def generate_pairs(path: Path, rows: int, *, seed: int = 0) -> None:
    """Write JSON lines with distinct queries and keys of random words.

    Args:
      path: the file.
      rows: the number of lines.
      seed: the seed of the words.
    """
    rng = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlu"))
    words = [
        "".join(letters[rng.integers(12, size=length)]) for length in rng.integers(3, 9, _WORDS)
    ]
    with path.open("w") as file, progress_bar("generating rows", rows) as advance:
        for first in range(0, rows, _ROWS_AT_ONCE):
            count = min(_ROWS_AT_ONCE, rows - first)
            drawn = rng.integers(_WORDS, size=(count, _QUERY_WORDS + _KEY_WORDS)).tolist()
            lines = []
            for row, numbers in enumerate(drawn, first):
                query = " ".join([words[number] for number in numbers[:_QUERY_WORDS]])
                key = " ".join([words[number] for number in numbers[_QUERY_WORDS:]])
                lines.append(f'{{"query": "{query} {row}", "key": "{key} {row}"}}\n')
            file.write("".join(lines))
            advance(count)


def _run_stages(path: Path, data_dir: Path) -> dict[str, dict[str, float]]:
    command = [sys.executable, "-m", "jaxcl.bench.files_stages", str(path), str(data_dir)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {result.stderr.strip()[-500:]}")
    return json.loads(result.stdout)
