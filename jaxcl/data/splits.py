"""The splits of a run, as its config names them: of one data set, or of several concatenated."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxcl.data.row_ranges import RowRange, check_held_out
from jaxcl.data.sources import PairSource, checked_rows, open_pairs
from jaxcl.typing import Int

__all__ = ["ConcatenatedPairs", "data_set_names", "open_splits"]

FIRST = "first"
"""What `data.name` is called among the data sets that are concatenated."""

_KNOWN = {"name", "splits", "query_field", "key_field", "group_field", "metadata_fields"}


class ConcatenatedPairs:
    """Rows of several data sets, one behind the other.

    A row's `"group"` is that of its own data set, so that equal numbers of two mean nothing:
    `distinct_groups` tells them apart.

    Args:
      data_sets: in order.

    Example:
      >>> from jaxcl.data.sources import InMemoryPairs
      >>> pairs = ConcatenatedPairs([InMemoryPairs(["a"], ["b"]), InMemoryPairs(["c"], ["d"])])
      >>> pairs.read([1]), pairs.data_set_of_row.tolist()
      ([{'query': 'c', 'key': 'd'}], [0, 1])
    """

    def __init__(self, data_sets: Sequence[PairSource]) -> None:
        self._data_sets = tuple(data_sets)
        self._edges = np.cumsum([0, *map(len, data_sets)])

    def __len__(self) -> int:
        return int(self._edges[-1])

    @property
    def data_set_of_row(self) -> Int[np.ndarray, " n"]:
        """The number of each row's data set."""
        return np.repeat(np.arange(len(self._data_sets), dtype=np.int32), np.diff(self._edges))

    @property
    def fingerprint(self) -> str:
        """Names exactly these rows."""
        lines = "\n".join(one.fingerprint for one in self._data_sets)
        return f"concatenated:{hashlib.sha256(lines.encode()).hexdigest()}"

    @property
    def row_ranges(self) -> tuple[RowRange, ...]:
        """The rows of all data sets as ranges of files."""
        return tuple(rows for one in self._data_sets for rows in one.row_ranges)

    def read(self, rows: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
        """Returns one dict per row number, in the order given."""
        numbers = np.array(checked_rows(rows, num_rows=len(self)), np.int64)
        found: list[dict[str, Any]] = [{}] * len(numbers)
        data_set = np.searchsorted(self._edges, numbers, side="right") - 1
        for number in np.unique(data_set):
            wanted = np.nonzero(data_set == number)[0]
            records = self._data_sets[number].read(numbers[wanted] - self._edges[number])
            for place, record in zip(wanted, records, strict=True):
                found[place] = record
        return found

    def distinct_groups(self, group: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Groups by which no two data sets share one.

        Those of the first data set keep their numbers; those of each other one follow, in their
        order.

        Args:
          group: all rows', each as its own data set numbers them.

        Raises:
          ValueError: if there are too many for int32.
        """
        distinct = np.array(group, np.int64)
        for begin, end in zip(self._edges[1:-1], self._edges[2:], strict=True):
            following = np.unique(distinct[begin:end], return_inverse=True)[1]
            distinct[begin:end] = distinct[:begin].max() + 1 + following
        if distinct.max() >= 2**31:
            raise ValueError(
                f"the groups of concatenated data sets go up to {distinct.max()}, since each one's "
                "follow those before it; give the first smaller numbers, below 2^31 with all others"
            )
        return distinct.astype(np.int32)


def open_splits(config: ConfigDict, name: str, *, data_dir: Path) -> dict[str, PairSource]:
    """Open the splits of a run; nothing is prepared.

    Args:
      config: `config.data`.
      name: the data set, instead of `config.name`: a TFDS name, or the folder of a prepared one.
      data_dir: where TFDS names are looked up.

    Returns:
      Role -> its pairs. Where `config.concatenated` has a split for a role, its rows follow.

    Raises:
      ValueError: if a data set, a split or a field is unknown, a split is empty, or a role other
        than `"train"` has rows that `"train"` has.
    """
    own = config.to_dict()
    found = {role: [_opened(own, name, split, data_dir)] for role, split in own["splits"].items()}
    settings = {role: [f"data.splits.{role}={split!r}"] for role, split in own["splits"].items()}
    for other, options in _concatenated(config).items():
        where = f"data.concatenated.{other}"
        _check(where, other, options, own)
        for role, split in options["splits"].items():
            try:
                found[role].append(_opened(options, options["name"], split, data_dir))
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
            settings[role].append(f"{where}.splits.{role}={split!r}")
    check_held_out(
        {
            role: [
                (setting, source.row_ranges)
                for setting, source in zip(settings[role], sources, strict=True)
            ]
            for role, sources in found.items()
        }
    )
    return {
        role: one[0] if len(one) == 1 else ConcatenatedPairs(one) for role, one in found.items()
    }


def data_set_names(config: ConfigDict) -> tuple[str, ...]:
    """The data sets of a run's training rows by name, in order: `"first"`, then the others."""
    others = _concatenated(config).items()
    return (FIRST, *(name for name, one in others if "train" in (one.get("splits") or ())))


def _check(where: str, name: str, options: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raises a `ValueError` for options of a data set that cannot follow that of the run."""
    if name == FIRST:
        raise ValueError(f"{where}: {FIRST!r} is what data.name is called; choose another name")
    if unknown := set(options) - _KNOWN:
        raise ValueError(f"{where} has {sorted(unknown)}; it takes {sorted(_KNOWN)}")
    splits = options.get("splits")
    if not options.get("name") or not isinstance(splits, Mapping) or not splits:
        raise ValueError(
            f"{where} needs a name, of a data set or its folder, and splits, role -> split, such "
            "as {'train': 'train'}"
        )
    if options["name"] == "code_pairs":
        raise ValueError(
            f"{where}.name='code_pairs' is made for data.name alone; give the folder of prepared "
            "ones, as some run's data.json names it"
        )
    if (options.get("group_field") is None) != (own.get("group_field") is None):
        raise ValueError(
            f"{where}.group_field={options.get('group_field')!r}, but data.group_field="
            f"{own.get('group_field')!r}: rows without a group would all be of one; give both one, "
            "or neither"
        )
    for role in splits:
        if role not in own["splits"]:
            raise ValueError(
                f"{where}.splits has {role!r}; data.splits has {', '.join(own['splits'])}, which "
                "rows can follow"
            )
        if role != "train" and (missing := _metadata(own) - _metadata(options)):
            raise ValueError(
                f"{where}.metadata_fields lacks {sorted(missing)}, which the evaluation of "
                f"{role!r} may read; give them, or leave {role!r} out of its splits"
            )


def _concatenated(config: ConfigDict) -> dict[str, Any]:
    others = config.get("concatenated") or ConfigDict()
    for name, options in others.items():
        if not isinstance(options, ConfigDict):
            raise ValueError(
                f"data.concatenated.{name}={options!r}; it is a ConfigDict with a name and splits"
            )
    return dict(sorted(others.to_dict().items()))


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
