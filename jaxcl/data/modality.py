"""The Protocol of modalities: how the values of a side, such as texts, become inputs."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np

from jaxcl.data.sources import PairSource
from jaxcl.data.table import Table
from jaxcl.host.paths import AnyPath
from jaxcl.settings.data_sections import DataSettings
from jaxcl.typing import Array, Int, PyTree

__all__ = ["Modality", "Reader", "Split"]

Reader: TypeAlias = Callable[[Sequence[Any]], PyTree]
"""A function from values of a side, such as texts, to an encoder's inputs, arrays `[n, …]`."""


class Split(NamedTuple):
    """The role of some rows, the sides to read, and the folder for files.

    Attributes:
      role: the split's role, such as `"train"`.
      sides: the sides that have this modality.
      data_dir: the folder that runs share; files there are named after their content.
    """

    role: str
    sides: tuple[str, ...]
    data_dir: Path


@runtime_checkable
class Modality(Protocol):
    """A kind of content, such as texts or images.

    Attributes:
      files: names of the files that `prepare` writes to the workdir.
    """

    files: tuple[str, ...]

    def usable(self, data: DataSettings, source: PairSource, split: Split) -> PairSource:
        """The rows of a data set whose values on the split's sides can be read.

        Args:
          data: the run's settings.
          source: the rows of one data set.
          split: the rows' role, and the sides to read.
        """

    def prepare(
        self, data: DataSettings, train: PairSource, sides: tuple[str, ...], workdir: AnyPath
    ) -> None:
        """Write the files on which these sides' inputs depend to the workdir, if missing."""

    def open_table(
        self, data: DataSettings, source: PairSource, split: Split, workdir: AnyPath
    ) -> Table:
        """The table of a split, with the sides that have this modality."""

    def reader(self, data: DataSettings, side: str, workdir: AnyPath) -> Reader:
        """The function that turns values of a side, as a source returns them, into inputs."""

    def fingerprint(self, workdir: AnyPath) -> str:
        """A hash of everything that turns values into inputs: as long as it is the same, equal
        values give equal inputs."""

    def changed(self, workdir: AnyPath) -> str:
        """Explain that `fingerprint` has changed since the run was trained, and what to do."""

    def encoder_argument(self, data: DataSettings, side: str) -> Any:
        """The first argument of an encoder of this modality."""

    def spec(self, data: DataSettings, side: str) -> PyTree:
        """The shapes and types of one row's input, like `Table.spec`, without opening the data."""

    def random_inputs(
        self, data: DataSettings, side: str, rng: np.random.Generator, num_rows: int
    ) -> PyTree:
        """Random inputs of a side, for checks and measurements."""

    def length(self, data: DataSettings, side: str) -> int:
        """The number of positions in one row's input, such as tokens, which determines its cost."""

    def count(self, inputs: PyTree) -> Int[Array, ""]:
        """The number of positions in a batch's inputs, without padding."""
