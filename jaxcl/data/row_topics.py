"""Each training row's topic, from a file that `python -m jaxcl.topics` or another program wrote."""

from typing import NamedTuple

import numpy as np

from jaxcl.data.row_checks import checked_int32
from jaxcl.data.row_files import Column, read_arrays
from jaxcl.data.sources import PairSource
from jaxcl.host.paths import AnyPath, as_path
from jaxcl.typing import Int

__all__ = ["RowTopics", "read_topics"]


class RowTopics(NamedTuple):
    """The topics of the training rows.

    Attributes:
      topic: a number for each row.
      fingerprint: the sha256 of the file.
    """

    topic: Int[np.ndarray, " n"]
    fingerprint: str


def read_topics(
    path: AnyPath, *, num_rows: int, source: str | None = None, pairs: PairSource | None = None
) -> RowTopics:
    """Read an `.npz` with `topic`, an integer for each row of the split.

    `jaxcl.data.row_files.read_arrays` explains how rows are matched, and which files it refuses.
    """
    path = as_path(path)
    columns = {"topic": Column("integers", (num_rows,))}
    read = read_arrays(path, columns, setting="data.topics", source=source, pairs=pairs)
    topic = checked_int32(read.arrays["topic"], what=f"data.topics={path}: topic")
    return RowTopics(topic, read.fingerprint)
