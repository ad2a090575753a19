"""Formats the record as tables."""

import statistics
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxcl.bench.gpu.jobs import PARTS

__all__ = ["as_line", "as_table"]

Result = Mapping[str, Any]


class _Column(NamedTuple):
    title: str
    text: Callable[[Result], str]


def as_table(record: Mapping[str, Any]) -> str:
    """The machine, results by part, failures, and everything that was cut short or skipped."""
    lines = [*_head(record), ""]
    for part, title in {0: "ceilings", **PARTS}.items():
        results = [one for one in record["results"] if one["part"] == part]
        if results:
            lines += [f"{part}. {title}" if part else title, *_rows(results), ""]
    failures = [one for one in record["results"] if one.get("kind", "time") != "time"]
    if failures:
        lines.append("failures (in full in the JSON file)")
        lines += [f"  {one['job']}: {one['name']}: {_last_line(one['error'])}" for one in failures]
        lines.append("")
    shortened = _shortened(record)
    lines += ["shortened or skipped", *shortened] if shortened else ["nothing was shortened"]
    if "interrupted" in record:
        lines.append(f"interrupted: {record['interrupted']}")
    lines.append(_NOTES)
    return "\n".join(lines)


def as_line(result: Result) -> str:
    """A line for a new result."""
    if result["status"] == "skip":
        return f"{result['name']}: skipped, {result['why']}"
    if result["status"] == "failure":
        return f"{result['name']}: FAILED, {_last_line(result['error'])}"
    figures = (f"{column.title} {text}" for column in _COLUMNS if (text := column.text(result)))
    return f"{result['name']}: {', '.join(figures)}"


_NOTES = """
TFLOP/s do not count recomputation: 2·B²·d for a forward pass of the loss and three times that
with gradients; all matmuls of a training step, three times. Share: of the measured bf16 product of
the same framework. MFU: of the data sheet's dense bf16 rate. GB/s:
memory traffic of the compiled program, as jaxcl.cost.program_cost reads it, and its share of the
measured copy. Peak: of the allocator, "≤" where an earlier measurement of the process may have set
it; program: arguments, results and temporaries of the compiled program."""


def _head(record: Mapping[str, Any]) -> list[str]:
    lines = [f"jaxcl on a GPU · {record['commit']} · {record['cpu']}"]
    lines.append(f"nvidia-smi: {record['nvidia_smi'] or 'no NVIDIA GPU'}")
    for name, machine in record["machine"].items():
        versions = " ".join(f"{package} {one}" for package, one in machine["versions"].items())
        device = f"{machine['devices']} × {machine['device_kind']}"
        lines.append(f"{name}: {device}; {versions}")
    return lines


def _rows(results: list[Result]) -> list[str]:
    done = [one for one in results if one["status"] == "ok"]
    columns = [column for column in _COLUMNS if any(column.text(one) for one in done)]
    table = [["", *(column.title for column in columns)]] if done else []
    for one in results:
        if one["status"] == "ok":
            table.append([one["name"], *(column.text(one) for column in columns)])
        else:
            table.append([one["name"], f"({_WHY_NOT[one.get('kind', 'skip')]})"])
    names = max(len(row[0]) for row in table)
    full_rows = [row for row in table if len(row) == len(columns) + 1]
    widths = [max(len(row[number + 1]) for row in full_rows) for number in range(len(columns))]
    lines = []
    for name, *cells in table:
        if len(cells) == len(columns):
            cells = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        lines.append("  " + "  ".join([name.ljust(names), *cells]).rstrip())
    return lines


_WHY_NOT = {
    "check": "failed its check",
    "memory": "does not fit",
    "error": "failed",
    "process": "killed or crashed",
    "time": "cut short",
    "skip": "skipped",
}


def _shortened(record: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, job in record["jobs"].items():
        skipped = [one for one in record["results"] if one["job"] == name]
        skipped = [one for one in skipped if one["status"] == "skip"]
        if job["status"] == "skipped":
            lines.append(f"  part {job['part']}, {name}: skipped, {job['why']}")
        elif job["status"] != "complete":
            lines.append(
                f"  part {job['part']}, {name}: {job['status']} (limit {job['limit_s']:.0f} s)"
            )
        lines += [
            f"  part {job['part']}, {name}: no {one['name']}: {one['why']}" for one in skipped
        ]
    return lines


def _last_line(text: str) -> str:
    """The line with the error in a traceback, or how a dead process ended."""
    lines = text.strip().splitlines() or [""]
    line = lines[-1] if lines[0].startswith("Traceback") else lines[0]
    return line if len(line) <= 200 else f"{line[:200]}…"


def _time(result: Result) -> str:
    for unit in ("ms", "s"):
        if unit in result:
            low, high = min(result[unit]), max(result[unit])
            spread = f" ({low:.3g}-{high:.3g})" if len(result[unit]) > 1 else ""
            return f"{statistics.median(result[unit]):.4g} {unit}{spread}"
    return ""


def _number(name: str, form: str, scale: float = 1) -> Callable[[Result], str]:
    return lambda result: format(scale * result[name], form) if name in result else ""


def _peak(result: Result) -> str:
    if "peak_mib" not in result:
        return ""
    return f"{'≤' if result['peak_is_bound'] else ''}{result['peak_mib']:,.0f}"


def _errors(result: Result) -> str:
    errors = result.get("errors", {})
    return f"{max(errors.values()):.1e}" if errors else ""


def _facts(result: Result) -> str:
    facts = result.get("facts", {})
    return " ".join(
        f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}"
        for name, value in facts.items()
    )


_COLUMNS = (
    _Column("time", _time),
    _Column("TFLOP/s", _number("tflops", ".4g")),
    _Column("share", _number("share_of_product", ".0%")),
    _Column("MFU", _number("mfu", ".0%")),
    _Column("GB/s", _number("gb_per_s", ",.0f")),
    _Column("share of copy", _number("share_of_copy", ".0%")),
    _Column("pairs/s", _number("pairs_per_s", ",.0f")),
    _Column("queries/s", _number("queries_per_s", ",.0f")),
    _Column("peak MiB", _peak),
    _Column("program MiB", _number("program_mib", ",.0f")),
    _Column("compile s", _number("compile_s", ".1f")),
    _Column("error", _errors),
    _Column("", _facts),
)
