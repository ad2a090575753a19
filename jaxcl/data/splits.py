"""The splits of a run, as its config names them: of one data set, or of several that are joined."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxcl.data.sources import PairSource, checked_rows, open_pairs
from jaxcl.typing import Int

__all__ = ["JoinedPairs", "open_splits", "part_names"]

FIRST = "first"
"""The part that `data.name` is, of the rows that are joined."""

_KNOWN = {"name", "splits", "query_field", "key_field", "group_field", "metadata_fields"}


class JoinedPairs:
    """Rows of several sources end to end.

    A row's `"group"` is that of its own source: equal numbers of two sources mean nothing.

    Args:
      parts: the sources, in order.

    Example:
      >>> from jaxcl.data.sources import InMemoryPairs
      >>> joined = JoinedPairs([InMemoryPairs(["a"], ["b"]), InMemoryPairs(["c"], ["d"])])
      >>> joined.read([1]), joined.part.tolist()
      ([{'query': 'c', 'key': 'd'}], [0, 1])
    """

    def __init__(self, parts: Sequence[PairSource]) -> None:
        self._parts = tuple(parts)
        self._edges = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self._edges[-1])

    @property
    def part(self) -> Int[np.ndarray, " n"]:
        """The number of each row's source."""
        return np.repeat(np.arange(len(self._parts), dtype=np.int32), np.diff(self._edges))

    @property
    def fingerprint(self) -> str:
        """Names exactly these rows."""
        parts = "\n".join(part.fingerprint for part in self._parts)
        return f"joined:{hashlib.sha256(parts.encode()).hexdigest()}"

    def read(self, rows: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
        """Returns one dict per row number, in the order given."""
        numbers = np.array(checked_rows(rows, num_rows=len(self)), np.int64)
        found: list[dict[str, Any]] = [{}] * len(numbers)
        part = np.searchsorted(self._edges, numbers, side="right") - 1
        for number in np.unique(part):
            wanted = np.nonzero(part == number)[0]
            records = self._parts[number].read(numbers[wanted] - self._edges[number])
            for place, record in zip(wanted, records, strict=True):
                found[place] = record
        return found


def open_splits(config: ConfigDict, name: str, *, data_dir: Path) -> dict[str, PairSource]:
    """Opens the splits of a run; nothing is made.

    Args:
      config: `config.data`.
      name: the data set, in place of `config.name`: a TFDS name, or the folder of a prepared one.
      data_dir: where TFDS names are looked up.

    Returns:
      Role -> its pairs. Where `config.joined` has a split for a role, its rows follow.

    Raises:
      ValueError: if a data set, a split or a field is unknown, or a split is empty.
    """
    own = config.to_dict()
    parts = {role: [_opened(own, name, split, data_dir)] for role, split in own["splits"].items()}
    for joined, options in _joined(config).items():
        where = f"data.joined.{joined}"
        if unknown := set(options) - _KNOWN:
            raise ValueError(f"{where} has {sorted(unknown)}; it takes {sorted(_KNOWN)}")
        if not options.get("name") or not options.get("splits"):
            raise ValueError(
                f"{where} needs a name, of a data set or its folder, and splits, role -> split, "
                "such as {'train': 'train'}"
            )
        for role, split in options["splits"].items():
            if role not in parts:
                raise ValueError(
                    f"{where}.splits has {role!r}; data.splits has {', '.join(parts)}, which rows "
                    "can join"
                )
            if role != "train" and (missing := _metadata(own) - _metadata(options)):
                raise ValueError(
                    f"{where}.metadata_fields lacks {sorted(missing)}, which the evaluation of "
                    f"{role!r} may read; give them, or leave {role!r} out of its splits"
                )
            parts[role].append(_opened(options, options["name"], split, data_dir))
    return {role: one[0] if len(one) == 1 else JoinedPairs(one) for role, one in parts.items()}


def part_names(config: ConfigDict) -> tuple[str, ...]:
    """The data sets of a run's training rows by name, in order: `"first"`, then those joined."""
    joined = _joined(config).items()
    return (FIRST, *(one for one, options in joined if "train" in (options.get("splits") or ())))


def _joined(config: ConfigDict) -> Mapping[str, Any]:
    return dict(sorted(config.get("joined", ConfigDict()).to_dict().items()))


def _metadata(options: Mapping[str, Any]) -> set[str]:
    return set(options.get("metadata_fields") or ())


def _opened(options: Mapping[str, Any], name: str, split: str, data_dir: Path) -> PairSource:
    return open_pairs(
        name,
        split,
        data_dir=data_dir,
        query_field=options.get("query_field") or "query",
        key_field=options.get("key_field") or "key",
        group_field=options.get("group_field"),
        metadata_fields=tuple(options.get("metadata_fields") or ()),
    )
