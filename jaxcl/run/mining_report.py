"""Report mined negatives: figures, a table for the terminal, and examples to read."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import rich.table

from jaxcl.host.files import write_whole
from jaxcl.host.paths import AnyPath
from jaxcl.host.printable import printable
from jaxcl.negatives.hard_negatives import HardNegatives
from jaxcl.negatives.mining import MiningRule

__all__ = [
    "Example",
    "example_rows",
    "json_digest",
    "mined_figures",
    "report_table",
    "rule_record",
    "write_reports",
]

_EXAMPLES = 10


class Example(NamedTuple):
    """A query with its positives and negatives, for a person to inspect.

    Attributes:
      query: text of the query.
      positives: texts of the positives.
      positive_score: similarity of the least similar positive.
      negatives: (rank, similarity, text) of each negative.
    """

    query: str
    positives: Sequence[str]
    positive_score: float
    negatives: Sequence[tuple[int, float, str]]


def mined_figures(mined: HardNegatives) -> dict[str, int | float]:
    """Count negatives and average their similarities.

    Raises:
      ValueError: if there are no negatives.
    """
    present = mined.rows >= 0
    counts = present.sum(1)
    if not present.any():
        raise ValueError("the rule leaves no negatives; widen the ranks, or lower the margin")
    scores, ranks = mined.scores[present], mined.ranks[present]
    positives = np.broadcast_to(mined.positive_scores[:, None], present.shape)[present]
    return {
        "queries": len(counts),
        "negatives": int(counts.sum()),
        "queries with all negatives": int((counts == mined.rows.shape[1]).sum()),
        "queries without negatives": int((counts == 0).sum()),
        "masked as false negatives": int(np.sum(mined.masked, dtype=np.int64)),
        "mean similarity of the positive": _mean(mined.positive_scores),
        "mean similarity of a negative": _mean(scores),
        "mean margin to the positive": _mean(positives - scores),
        "negatives more similar than the positive": int((scores > positives).sum()),
        "mean rank": _mean(ranks),
    }


def rule_record(rule: MiningRule) -> dict[str, Any]:
    """A mining rule in JSON types, without limits that are not set."""
    record = rule._asdict() | {"rank_range": list(rule.rank_range)}
    limits = ("min_score", "max_score")
    return {
        name: value for name, value in record.items() if name not in limits or value is not None
    }


def json_digest(content: Any) -> str:
    """Compute a digest, of 12 hexadecimal digits, of a value in JSON types."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def report_table(report: Mapping[str, Any]) -> rich.table.Table:
    """Make a table of the figures in a report, for the terminal."""
    table = rich.table.Table("mined", "", show_header=False)
    for name, value in report.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            table.add_row(name, f"{value:,.3f}" if isinstance(value, float) else f"{value:,}")
    return table


def example_rows(num_queries: int, seed: int) -> list[int]:
    """Draw the numbers of a few random queries to show as examples."""
    return np.random.default_rng(seed).permutation(num_queries)[:_EXAMPLES].tolist()


def write_reports(output: AnyPath, report: Mapping[str, Any], examples: Iterable[Example]) -> None:
    """Write a report and examples next to the mined file: `.report.json` and `.examples.md`."""
    write_whole(output.with_suffix(".report.json"), json.dumps(report, indent=2) + "\n")
    lines = ["# Examples of mined negatives", ""]
    for example in examples:
        lines += [f"## {_one_line(example.query)}", ""]
        lines += [f"- **positive** ({example.positive_score:.3f})"]
        lines += [f"  `{_one_line(text)}`" for text in example.positives]
        for rank, score, text in example.negatives:
            lines.append(f"- rank {rank} ({score:.3f}) `{_one_line(text)}`")
        lines.append("")
    write_whole(output.with_suffix(".examples.md"), printable("\n".join(lines)))


def _one_line(text: str, width: int = 160) -> str:
    line = " ".join(text.split()).replace("`", "'")
    return line if len(line) <= width else line[: width - 1] + "…"


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values, dtype=np.float64))
