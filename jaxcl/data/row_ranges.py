"""Ranges of rows in files, to compare training rows with held-out rows without reading them.

TFDS knows which range of each file a split takes.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

__all__ = ["RowRange", "check_held_out", "shared_rows"]

TRAIN = "train"


class RowRange(NamedTuple):
    """Consecutive rows of one file.

    Attributes:
      file: the name of the file, for messages.
      identities: names of the file's content, path and inode. Two files that share one of them are
        the same file, or copies.
      start, stop: the number of the first row, and one more than the number of the last row.
    """

    file: str
    identities: frozenset[str]
    start: int
    stop: int


def check_held_out(parts: Mapping[str, Sequence[tuple[str, Sequence[RowRange]]]]) -> None:
    """Reject held-out rows that are also trained on.

    Held-out roles may share rows with each other.

    Args:
      parts: role -> the parts of the split: for each part, the setting that names it, and its rows.

    Raises:
      ValueError: if another role shares rows with `"train"`.
    """
    training = parts.get(TRAIN, ())
    for role, held_out in parts.items():
        if role == TRAIN:
            continue
        for setting, ranges in held_out:
            for train_setting, train_ranges in training:
                if (shared := next(shared_rows(ranges, train_ranges), None)) is not None:
                    raise ValueError(
                        f"{setting} holds out rows that {train_setting} trains on: rows "
                        f"{shared.start} to {shared.stop - 1} of {shared.file} are in both; give "
                        "splits without common rows, such as 'train[:95%]' and 'train[95%:]'"
                    )


def shared_rows(ranges: Sequence[RowRange], others: Sequence[RowRange]) -> Iterator[RowRange]:
    """The rows that two sources have in common, as ranges of the first source's files.

    Example:
      >>> file = frozenset({"content of a"})
      >>> first, second = RowRange("a", file, 0, 95), RowRange("a", file, 90, 100)
      >>> [(shared.start, shared.stop) for shared in shared_rows([first], [second])]
      [(90, 95)]
    """
    by_identity: dict[str, list[RowRange]] = {}
    for other in others:
        for identity in other.identities:
            by_identity.setdefault(identity, []).append(other)
    for part in ranges:
        for identity in sorted(part.identities):
            for other in by_identity.get(identity, ()):
                start, stop = max(part.start, other.start), min(part.stop, other.stop)
                if start < stop:
                    yield part._replace(start=start, stop=stop)
