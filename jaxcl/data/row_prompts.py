"""The prompts of rows when concatenated data sets have different prompts."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxcl.data.negative_lists import NegativeTexts
from jaxcl.data.sources import PairSource
from jaxcl.data.splits import ConcatenatedPairs
from jaxcl.settings.data_sections import DataSettings, SidePrompts
from jaxcl.settings.derived import data_sets_of
from jaxcl.typing import SIDES, Int

__all__ = ["RowPrompts", "prompt_of", "row_prompts"]


class RowPrompts(NamedTuple):
    """The prompts of a split whose data sets have different prompts.

    Attributes:
      settings: for each data set, the name of the setting with its prompts, for messages.
      ends: for each data set, one more than the number of its last row.
      prompts: side -> the prompt of each data set.
    """

    settings: tuple[str, ...]
    ends: Int[np.ndarray, " s"]
    prompts: Mapping[str, tuple[str, ...]]

    def data_set(self, rows: Int[np.ndarray, " b"]) -> Int[np.ndarray, " b"]:
        """The index of each row's data set."""
        return np.searchsorted(self.ends, rows, side="right")

    def parts(self, first: int, stop: int) -> Iterator[tuple[int, slice]]:
        """Split consecutive rows by data set: yield each data set's index and slice of the rows.

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
        """These prompts for a table that holds any number of texts for each row.

        Args:
          offsets: for each row, the number of its first text in the table; at the end, the number
            of all texts.
        """
        return self._replace(ends=offsets[self.ends])

    def apply(self, data: DataSettings, number: int) -> DataSettings:
        """The run's data settings, with the prompts of the data set at index `number`."""
        prompts = SidePrompts(**{side: texts[number] for side, texts in self.prompts.items()})
        return data._replace(prompts=prompts)

    def described(self, sides: tuple[str, ...]) -> dict[str, Any]:
        """The prompts of these sides and the rows that they belong to, in JSON types."""
        return {"ends": self.ends.tolist()} | {side: list(self.prompts[side]) for side in sides}


def row_prompts(data: DataSettings, role: str, source: PairSource) -> RowPrompts | None:
    """The prompts of a split's rows; `None` if they are the same for all rows.

    Args:
      data: the run's settings.
      role: the split's role, such as `"train"`.
      source: the rows of that split, as `open_splits` returns them, or the negatives of the
        training rows.
    """
    if isinstance(source, NegativeTexts):
        train_prompts = row_prompts(data, "train", source.rows)
        return train_prompts and train_prompts.spread(source.offsets)
    data_sets = data_sets_of(data, role)
    prompts = {
        side: tuple(prompt_of(data, data_set.prompts, side) for data_set in data_sets.values())
        for side in SIDES
    }
    if all(len(set(texts)) <= 1 for texts in prompts.values()):
        return None
    assert isinstance(source, ConcatenatedPairs)  # there are several data sets
    settings = tuple(f"{setting}.prompts" for setting in data_sets)
    return RowPrompts(settings, np.cumsum(source.sizes), prompts)


def prompt_of(data: DataSettings, prompts: SidePrompts, side: str) -> str:
    """The prompt of one side of a data set; a prompt of `None` stands for the run's prompt."""
    prompt = getattr(prompts, side)
    return (getattr(data.prompts, side) if prompt is None else prompt) or ""
