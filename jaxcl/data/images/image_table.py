"""The images of a split, decoded when a batch needs them."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxcl.data.images.decoding import BadImage, ImageRule, decode_image
from jaxcl.data.images.image_threads import in_threads, num_threads
from jaxcl.data.source_fields import read_fields, row_place
from jaxcl.data.sources import PairSource
from jaxcl.typing import Int, UInt8

__all__ = ["ImageTable", "decode_images", "image_spec"]

_ROWS_AT_ONCE = 16
"""The largest number of rows that are read, or decoded by one thread, at a time."""


class ImageTable:
    """The rows of a split as images.

    Args:
      source: the rows; the values of the sides are image files or uint8 arrays.
      rule: the rule for decoding an image to an array.
      group: each row's group.
      text: a number per row, shared by rows with equal query images or equal key images.
      both_equal: whether both sides of every row have the same image. It is then decoded once for
        both.
      threads: the number of threads that decode; `None` for one per core.
    """

    def __init__(
        self,
        source: PairSource,
        rule: ImageRule,
        *,
        group: Int[np.ndarray, " n"],
        text: Int[np.ndarray, " n"],
        both_equal: bool = False,
        threads: int | None = None,
    ) -> None:
        self._source, self._rule, self._threads = source, rule, threads
        self._group, self._text = group, text
        self._both_equal = both_equal
        # The rows and images of the last batch, for its other side. Replaced as a whole, because
        # several threads may read the table.
        self._last: tuple[str, bytes, np.ndarray] | None = None

    @property
    def num_rows(self) -> int:
        """The number of rows in the split."""
        return len(self._group)

    def labels(self, rows: Int[np.ndarray, "*b"]) -> dict[str, Int[np.ndarray, "*b"]]:
        """The labels of the given rows: `"row"`, `"text"`, `"group"`."""
        return {"row": rows.astype(np.int32), "text": self._text[rows], "group": self._group[rows]}

    def side(self, side: str, rows: Int[np.ndarray, " b"]) -> dict[str, UInt8[np.ndarray, "b ..."]]:
        """One side's images of the given rows.

        Raises:
          ValueError: if an image cannot be decoded; the message names its row and file.
        """
        if not self._both_equal:
            return {"image": self._decoded(side, rows)}
        last, numbers = self._last, np.asarray(rows, np.int64).tobytes()
        if last is not None and last[0] != side and last[1] == numbers:
            self._last = None  # frees the memory
            return {"image": last[2]}
        images = self._decoded(side, rows)
        self._last = (side, numbers, images)
        return {"image": images}

    def spec(self, side: str) -> dict[str, jax.ShapeDtypeStruct]:
        """The shape and type of one row of a side."""
        return image_spec(self._rule)

    def _decoded(self, side: str, rows: Int[np.ndarray, " b"]) -> UInt8[np.ndarray, "b s s 3"]:
        def values() -> Iterator[Any]:
            for first in range(0, len(rows), _ROWS_AT_ONCE):
                part = rows[first : first + _ROWS_AT_ONCE]
                yield from (record[side] for record in read_fields(self._source, part, (side,)))

        def fail(position: int, error: BadImage) -> ValueError:
            row_name = row_place(self._source, side, int(rows[position]))
            return ValueError(
                f"the image of the {side} in {row_name} cannot be decoded: {error}; its file has "
                "changed since it was checked"
            )

        return _decoded(values(), len(rows), self._rule, fail, self._threads)


def decode_images(values: Sequence[Any], rule: ImageRule) -> UInt8[np.ndarray, "n s s 3"]:
    """Decode images in worker threads.

    Args:
      values: image files as `bytes`, PIL images or uint8 arrays.
      rule: the rule for decoding an image to an array.

    Raises:
      ValueError: if an image cannot be decoded.
    """

    def fail(position: int, error: BadImage) -> ValueError:
        return ValueError(f"the image at position {position:,} cannot be decoded: {error}")

    return _decoded(iter(values), len(values), rule, fail, None)


def image_spec(rule: ImageRule) -> dict[str, jax.ShapeDtypeStruct]:
    """The shape and type of an image that is decoded by this rule."""
    return {"image": jax.ShapeDtypeStruct((rule.size, rule.size, 3), np.uint8)}


def _decoded(
    values: Iterator[Any], count: int, rule: ImageRule, fail: Any, threads: int | None
) -> UInt8[np.ndarray, "n s s 3"]:
    images = np.empty((count, rule.size, rule.size, 3), np.uint8)

    def decode(part: list[tuple[int, Any]]) -> None:
        for position, value in part:
            try:
                images[position] = decode_image(value, rule)
            except BadImage as error:
                raise fail(position, error) from error

    numbered = enumerate(values)
    at_once = max(1, min(_ROWS_AT_ONCE, count // (4 * (threads or num_threads()))))
    parts = iter(lambda: list(itertools.islice(numbered, at_once)), [])
    for _ in in_threads(decode, parts, threads=threads):
        pass
    return images
