"""Assign rows to batches, as a function of the step and of an order that is refreshed periodically.

`assign` orders pairs by their embeddings. `AssignedRows` cuts batches from such an order step by
step, and `epoch_batches` cuts an epoch into batches. `uniform_rows`, `OnePerLabel` and
`SourcedRows` need no embeddings; `assign_topics` clusters rows into topics for `SourcedRows`.
"""

from jaxcl.assignment.conflicts import count_conflicts
from jaxcl.assignment.epochs import (
    Assigned,
    AssignedRows,
    epoch_batches,
    epoch_rows,
    random_to_hard,
    visited,
)
from jaxcl.assignment.gap import GapReport, make_gap_measure, measure_gap, sample_batches
from jaxcl.assignment.gcbs import Ordered, assign, assign_topics, make_order
from jaxcl.assignment.gcbs_settings import GRAPHS, METHODS, PRESETS, Gcbs
from jaxcl.assignment.one_per_label import OnePerLabel
from jaxcl.assignment.sourced import SourcedRows
from jaxcl.assignment.uniform import uniform_rows

__all__ = [
    "GRAPHS",
    "METHODS",
    "PRESETS",
    "Assigned",
    "AssignedRows",
    "GapReport",
    "Gcbs",
    "OnePerLabel",
    "Ordered",
    "SourcedRows",
    "assign",
    "assign_topics",
    "count_conflicts",
    "epoch_batches",
    "epoch_rows",
    "make_gap_measure",
    "make_order",
    "measure_gap",
    "random_to_hard",
    "sample_batches",
    "uniform_rows",
    "visited",
]
