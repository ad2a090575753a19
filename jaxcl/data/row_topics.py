"""Each training row's topic, from a file that `python -m jaxcl.topics` or anybody else wrote."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxcl.data.row_files import check_same_rows, read_arrays
from jaxcl.typing import Int

__all__ = ["RowTopics", "read_topics"]


class RowTopics(NamedTuple):
    """The topics of the training rows.

    Attributes:
      topic: of each row, a number.
      fingerprint: of the file.
    """

    topic: Int[np.ndarray, " n"]
    fingerprint: str


def read_topics(path: Path, *, num_rows: int, source: str | None = None) -> RowTopics:
    """Reads an `.npz` with `topic`, an integer for each row of the split.

    Where it has a `source`, the fingerprint of the split, that must be the one given.

    Raises:
      ValueError: for a file that is missing, damaged, or not of this split.
    """
    path = Path(path).expanduser()
    found, fingerprint = read_arrays(path, setting="data.topics")
    if "topic" not in found:
        raise ValueError(f"data.topics={path} has no topic; it has {', '.join(found)}")
    check_same_rows(path, found, source, setting="data.topics")
    topic = found["topic"]
    if topic.shape != (num_rows,) or not np.issubdtype(topic.dtype, np.integer):
        raise ValueError(
            f"data.topics={path}: topic is {topic.dtype}{list(topic.shape)}; wanted are integers, "
            f"[{num_rows}]"
        )
    if topic.min() < -(2**31) or topic.max() >= 2**31:
        raise ValueError(f"data.topics={path}: topics must fit into int32")
    return RowTopics(topic.astype(np.int32), fingerprint)
