"""Ranges of rows in files, to compare training rows with held-out rows without reading them.

TFDS knows the range of each file that a split takes.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

__all__ = ["RowRange", "check_held_out", "shared_rows"]

TRAIN = "train"


class RowRange(NamedTuple):
    """Consecutive rows of one file.

    Attributes:
      file: its name, for messages.
      identities: names of the file's content, path and inode. Two files that share one of them are
        the same file, or copies.
      start, stop: the first row, and the one after the last.
    """

    file: str
    identities: frozenset[str]
    start: int
    stop: int


def check_held_out(parts: Mapping[str, Sequence[tuple[str, Sequence[RowRange]]]]) -> None:
    """Refuse held-out rows that are trained on.

    Held-out roles may share rows with each other.

    Args:
      parts: role -> the parts that it reads, each as the setting that names it, and its rows.

    Raises:
      ValueError: if a role other than `"train"` shares rows with it.
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
                        "splits without a common row, such as 'train[:95%]' and 'train[95%:]'"
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
    for one in ranges:
        for identity in sorted(one.identities):
            for other in by_identity.get(identity, ()):
                start, stop = max(one.start, other.start), min(one.stop, other.stop)
                if start < stop:
                    yield one._replace(start=start, stop=stop)
