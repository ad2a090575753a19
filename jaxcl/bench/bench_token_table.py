"""How much memory and time does it take to build a large token table, and to resume a run with it?

    python -m jaxcl.bench token_table [--rows 1000000] [--stages build open start resume]
    python -m jaxcl.bench token_table --stages files start resume

Rows of three words are generated as they are read. Each stage is a process: `build` makes the token
table, `open` opens it and reads a batch, `start` trains a small model on it for two steps, and
`resume` continues that run. `files` writes the rows as JSON lines, and reads and splits them; the
stages after it train on that file, and `start` builds the token table.

The same stages with 10,000 rows measure the memory that does not depend on the number of rows, such
as the memory of JAX and its programs.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxcl.bench.benchmark_parser import benchmark_parser
from jaxcl.bench.token_table_stage import ROWS_VARIABLE, STAGES

__all__ = ["main", "measure"]

_FEW_ROWS = 10_000
_DEFAULT = ["build", "open", "start", "resume"]


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Measure the stages in `--stages`."""
    parser = benchmark_parser("token_table", __doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--stages", nargs="+", choices=[*STAGES], default=_DEFAULT)
    arguments = parser.parse(argv)
    return measure(arguments.rows, stages=arguments.stages)


def measure(num_rows: int, *, stages: Sequence[str], few_rows: int = _FEW_ROWS) -> dict[str, Any]:
    """Measure some stages, in order.

    Args:
      num_rows: the number of training rows.
      stages: names in `STAGES`.
      few_rows: the number of rows of a small table, whose peak memory is subtracted.

    Returns:
      The record that `jaxcl.bench` prints, with times in seconds.

    Raises:
      RuntimeError: if a stage fails.
    """
    rounds: dict[str, list[float]] = {}
    facts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="jaxcl-bench-") as folder:
        for stage in stages:
            few = _run(stage, few_rows, Path(folder) / "few")
            many = _run(stage, num_rows, Path(folder) / "many")
            seconds = many["seconds"]
            facts |= {name: seconds.pop(name) for name in [*seconds] if name == "distinct texts"}
            rounds |= {name: [value] for name, value in seconds.items()}
            facts[f"{stage}: CPU seconds"] = many["cpu"]
            facts[f"{stage}: peak MiB with {few_rows:,} rows"] = round(few["peak"])
            facts[f"{stage}: MiB above that"] = round(many["peak"] - few["peak"])
    return {"shapes": {"rows": num_rows}, "unit": "s", "rounds": rounds, "facts": facts}


def _run(stage: str, num_rows: int, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "jaxcl.bench.token_table_stage", stage, str(folder)]
    environment = os.environ | {ROWS_VARIABLE: str(num_rows)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed; its errors are above")
    return json.loads(done.stdout.splitlines()[-1])
