"""Measures jaxcl and, in turn, the alternatives that a user might pick.

    python -m jaxcl.bench loss --json loss.json --rounds 3

Each benchmark is a module whose `main(argv)` measures and returns a record:

    shapes   the sizes that were measured
    unit     the unit of all values in `rounds`
    rounds   name -> one value per round; every round measures all names once
    facts    further values: compile seconds, shares, checks

This module adds the commit, the device and the versions, prints a table, and writes a JSON file.
`gpu` has a table and a JSON file of a different form (`jaxcl.bench.gpu`).
"""

import importlib
import importlib.metadata
import json
import os
import platform
import statistics
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxcl.bench.machine import commit, cpu_model
from jaxcl.host.command_flags import CommandParser, user_path
from jaxcl.host.output import check_output

BENCHMARKS = (
    "alternatives",
    "assignment",
    "assignment_sizes",
    "bank",
    "duplicates",
    "embedding_bag",
    "encode",
    "fashion_mnist",
    "files",
    "finetune",
    "gpu",
    "grad_cache",
    "images",
    "lengths",
    "loss",
    "nearest",
    "plan",
    "scaling",
    "sentences",
    "start",
    "static",
    "token_table",
    "train_step",
    "transformer_step",
)
"""Names of the benchmarks. Only the module of the chosen one is imported."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run one benchmark and return its record, which is also written to the JSON file."""
    parser = CommandParser("jaxcl.bench", __doc__, passes_on=True)
    parser.add_argument("benchmark", choices=BENCHMARKS, help="add --help for its flags")
    parser.add_argument("--json", type=user_path, metavar="FILE", help="where to write the record")
    arguments = parser.parse(argv)
    if arguments.benchmark == "gpu":  # it runs without most of jaxcl's dependencies
        from jaxcl.bench.gpu import command

        spent = command.process_age() if argv is None else 0.0
        return command.main(arguments.rest, arguments.json, spent_seconds=spent)
    from jaxcl.host.command import run_command

    return run_command(parser, _run, argv, trains=True)


def _run(arguments: Namespace) -> dict[str, Any]:
    name, json_file = arguments.benchmark, arguments.json
    measured = importlib.import_module(f"jaxcl.bench.bench_{name}").main(arguments.rest)
    record = {
        "benchmark": name,
        **environment(),
        **measured,
        "summary": {name: summary(figures) for name, figures in measured["rounds"].items()},
    }
    print(as_table(record))
    if json_file:
        json_file.write_text(json.dumps(record, indent=2) + "\n")
    check_output()
    return record


def summary(figures: Sequence[float]) -> dict[str, float]:
    """The median, minimum and maximum of the rounds."""
    return {"median": statistics.median(figures), "min": min(figures), "max": max(figures)}


def environment() -> dict[str, Any]:
    """The commit, device and versions that a measurement depends on."""
    device = jax.devices()[0]
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    return {
        "commit": commit(),
        "device": f"{jax.device_count()} of kind {device.device_kind}",
        "cpu": f"{os.cpu_count()} cores of {cpu_model()}",
        "versions": {
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in packages},
        },
    }


def as_table(record: Mapping[str, Any]) -> str:
    """Format the record as a table."""
    width = max(map(len, [*record["summary"], *record["facts"]]))
    head = f"{record['benchmark']} · {record['device']} · {record['cpu']} · {record['commit']}"
    shapes = ", ".join(f"{name} {value}" for name, value in record["shapes"].items())
    lines = [head, shapes, "", f"{record['unit']:{width}}  {'median':>12} {'min':>12} {'max':>12}"]
    for name, row in record["summary"].items():
        figures = " ".join(f"{_short(row[column]):>12}" for column in ("median", "min", "max"))
        lines.append(f"{name:{width}}  {figures}")
    lines.append("")
    lines += [f"{name:{width}}  {_short(fact):>12}" for name, fact in record["facts"].items()]
    return "\n".join(lines)


def _short(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    main()
