"""The prompts of rows, where data sets that are concatenated have different ones."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxcl.data.negative_lists import NegativeTexts
from jaxcl.data.sources import PairSource
from jaxcl.data.splits import ConcatenatedPairs
from jaxcl.settings.derived import data_sets_of
from jaxcl.settings.sections import DataSettings, SidePrompts
from jaxcl.typing import SIDES, Int

__all__ = ["RowPrompts", "prompt_of", "row_prompts"]


class RowPrompts(NamedTuple):
    """The prompts of a split whose data sets do not all have the same.

    Attributes:
      settings: of each data set, the name of the setting with its prompts, for messages.
      ends: of each data set, the number after its last row.
      prompts: side -> the prompt of each data set.
    """

    settings: tuple[str, ...]
    ends: Int[np.ndarray, " s"]
    prompts: Mapping[str, tuple[str, ...]]

    def data_set(self, rows: Int[np.ndarray, " b"]) -> Int[np.ndarray, " b"]:
        """The number of each row's data set."""
        return np.searchsorted(self.ends, rows, side="right")

    def parts(self, first: int, stop: int) -> Iterator[tuple[int, slice]]:
        """The data sets of consecutive rows: the number of each, and its part of these rows.

        Example:
          >>> prompts = RowPrompts(("a", "b"), np.array([3, 9]), {"query": ("", "q: ")})
          >>> list(prompts.parts(2, 5))
          [(0, slice(0, 1, None)), (1, slice(1, 3, None))]
        """
        begin = 0
        for number, end in enumerate(self.ends.tolist()):
            if begin < stop and first < end:
                yield number, slice(max(begin, first) - first, min(end, stop) - first)
            begin = end

    def spread(self, offsets: Int[np.ndarray, " _"]) -> "RowPrompts":
        """The prompts of a ragged table.

        Args:
          offsets: for each row, the number of the table's first text that belongs to it, and the
            number of all texts at the end.
        """
        return self._replace(ends=offsets[self.ends])

    def own(self, data: DataSettings, number: int) -> DataSettings:
        """The settings of a run with the prompts of one data set, for readers of its texts."""
        prompts = SidePrompts(**{side: ones[number] for side, ones in self.prompts.items()})
        return data._replace(prompts=prompts)

    def described(self, sides: tuple[str, ...]) -> dict[str, Any]:
        """What the tokens of these sides depend on, in JSON types."""
        return {"ends": self.ends.tolist()} | {side: list(self.prompts[side]) for side in sides}


def row_prompts(data: DataSettings, role: str, source: PairSource) -> RowPrompts | None:
    """The prompts of a split's rows; `None` if all rows have those of the run.

    Args:
      data: the run's settings.
      role: the split's role, such as `"train"`.
      source: the rows of that split, as `open_splits` returns them, or the negatives of the
        training rows.
    """
    if isinstance(source, NegativeTexts):
        of_rows = row_prompts(data, "train", source.rows)
        return of_rows and of_rows.spread(source.offsets)
    data_sets = data_sets_of(data, role)
    prompts = {
        side: tuple(prompt_of(data, one.prompts, side) for one in data_sets.values())
        for side in SIDES
    }
    if all(len(set(ones)) <= 1 for ones in prompts.values()):
        return None
    assert isinstance(source, ConcatenatedPairs)  # there are several data sets
    settings = tuple(f"{setting}.prompts" for setting in data_sets)
    return RowPrompts(settings, np.cumsum(source.sizes), prompts)


def prompt_of(data: DataSettings, prompts: SidePrompts, side: str) -> str:
    """The prompt of a side of a data set, with the run's for `None`."""
    own = getattr(prompts, side)
    return (getattr(data.prompts, side) if own is None else own) or ""
