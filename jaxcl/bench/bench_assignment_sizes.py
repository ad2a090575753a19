"""How long does `assign` take to compile and search if the number of rows changes between calls?

    python -m jaxcl.bench assignment_sizes [--rows N …] [--dim N] [--batch N] [--preset NAME]
        [--rounds N] [--json FILE]

One process assigns random embeddings of each number of rows, in the given order. The first call
compiles unless an earlier number of rows compiled the same search; later calls use another seed.
"""

import time
from collections.abc import Sequence
from typing import Any

from jaxcl.assignment import PRESETS, assign
from jaxcl.bench.bench_assignment import drawn
from jaxcl.bench.benchmark_parser import benchmark_parser

__all__ = ["main"]


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Time the first and the later calls for each number of rows."""
    parser = benchmark_parser("assignment_sizes", __doc__)
    parser.add_argument(
        "--rows",
        type=int,
        nargs="+",
        default=[1_000, 3_000, 3_001, 10_000],
        help="numbers of rows (default: 1000 3000 3001 10000)",
    )
    parser.add_argument("--dim", type=int, default=64, help="features (default: 64)")
    parser.add_argument("--batch", type=int, default=64, help="rows of a batch (default: 64)")
    parser.add_argument(
        "--preset", choices=PRESETS, default="light", help="the preset (default: light)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="calls after the first (default: 3)")
    arguments = parser.parse(argv)
    if min(*arguments.rows, arguments.dim, arguments.batch, arguments.rounds) < 1:
        parser.error("--rows, --dim, --batch and --rounds must be at least 1")
    rounds: dict[str, list[float]] = {}
    facts: dict[str, float] = {}
    for num_rows in arguments.rows:
        sides = drawn(num_rows, arguments.dim)
        seconds = []
        for seed in range(1 + arguments.rounds):
            start = time.perf_counter()
            assign(
                *sides, block_size=arguments.batch, seed=seed, settings=PRESETS[arguments.preset]
            )
            seconds.append(time.perf_counter() - start)
        facts[f"s of the first call, {num_rows:,} rows"], *rounds[f"{num_rows:,} rows"] = seconds
    shapes = {"dim": arguments.dim, "batch": arguments.batch, "preset": arguments.preset}
    return {"shapes": shapes, "unit": "s", "rounds": rounds, "facts": facts}
