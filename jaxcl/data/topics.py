"""Each training row's topic, from a file that `python -m jaxcl.topics` or anybody else wrote."""

import hashlib
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

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
    try:
        content = path.read_bytes()
        with np.load(path) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except (OSError, EOFError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"data.topics={path} cannot be read: {error}") from error
    if "topic" not in found:
        raise ValueError(f"data.topics={path} has no topic; it has {', '.join(found)}")
    if source is not None and str(found.get("source", source)) != source:
        raise ValueError(
            f"data.topics={path} was made from other rows ({found['source']}) than the training "
            f"split's ({source}); make it from these"
        )
    topic = found["topic"]
    if topic.shape != (num_rows,) or not np.issubdtype(topic.dtype, np.integer):
        raise ValueError(
            f"data.topics={path}: topic is {topic.dtype}{list(topic.shape)}; wanted are integers, "
            f"[{num_rows}]"
        )
    if topic.min() < -(2**31) or topic.max() >= 2**31:
        raise ValueError(f"data.topics={path}: topics must fit into int32")
    return RowTopics(topic.astype(np.int32), hashlib.sha256(content).hexdigest())
