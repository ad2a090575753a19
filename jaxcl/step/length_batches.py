"""Embed texts in batches of similar length, each padded to its own width.

There are two widths per doubling of the length, or four for many texts, which are worth compiling
more programs. Batches come in few sizes, which also limits the number of programs.
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from jaxcl.ops.mesh import fetch
from jaxcl.typing import Float, Int, PyTree

__all__ = ["LengthBatch", "embed_batches", "length_batches", "padded_width"]

_LEAST_WIDTH = 8


class LengthBatch(NamedTuple):
    """A batch of rows to embed.

    Attributes:
      rows: row numbers.
      num_rows: number of rows, including padding rows; a multiple of the number of devices.
      width: number of tokens of each row, including padding.
    """

    rows: Int[np.ndarray, " b"]
    num_rows: int
    width: int


def padded_width(length: int, longest: int | None = None, *, per_doubling: int = 2) -> int:
    """The smallest allowed width for a text.

    Args:
      length: number of tokens of the text.
      longest: the encoder's maximum number of tokens; `None` without a limit.
      per_doubling: number of widths between two powers of two, itself a power of two.

    Example:
      >>> [padded_width(length) for length in (0, 8, 9, 13, 17, 100)]
      [8, 8, 12, 16, 24, 128]
      >>> padded_width(100, per_doubling=4), padded_width(100, longest=105)
      (112, 105)
    """
    length = max(length, _LEAST_WIDTH)
    step = max((1 << (length - 1).bit_length()) // (2 * per_doubling), 1)
    width = -(-length // step) * step
    return width if longest is None else min(width, longest)


def length_batches(
    lengths: Int[np.ndarray, " n"],
    *,
    multiple: int,
    batch_tokens: int,
    batch_size: int | None = None,
    longest: int | None = None,
) -> Iterator[LengthBatch]:
    """Group texts of similar length into batches, longest first.

    All batches of one width have the same number of rows, except the very last batch: it is padded
    to `multiple` times a power of two.

    Args:
      lengths: number of tokens of each text.
      multiple: the number of devices, which divides the number of rows of each batch.
      batch_tokens: approximate number of tokens of a batch, with padding.
      batch_size: a fixed number of rows, instead of `batch_tokens`.
      longest: as for `padded_width`.

    Example:
      >>> batches = length_batches(np.array([3, 20, 7, 5]), multiple=1, batch_tokens=24)
      >>> [(batch.rows.tolist(), batch.num_rows, batch.width) for batch in batches]
      [([1], 1, 20), ([2, 3, 0], 3, 8)]
    """
    order = np.argsort(-lengths, kind="stable")
    # A single query must not wait for the compilation of a program for its width.
    per_doubling = 4 if lengths.sum() > batch_tokens else 2
    first = 0
    while first < len(order):
        length = int(lengths[order[first]])
        width = padded_width(length, longest, per_doubling=per_doubling)
        most = batch_size or max(batch_tokens // width, 1)
        most += -most % multiple
        rows = order[first : first + most]
        per_device = -(-len(rows) // multiple)
        yield LengthBatch(rows, min(most, multiple << (per_device - 1).bit_length()), width)
        first += len(rows)


def embed_batches(
    batches: Iterator[LengthBatch],
    forward: Callable[[PyTree], jax.Array],
    read: Callable[[LengthBatch], PyTree],
    out: Float[np.ndarray, "n d"],
    *,
    advance: Callable[[Int[np.ndarray, " b"]], object] = lambda rows: None,
) -> None:
    """Embed all rows of the batches.

    Args:
      batches: as returned by `length_batches`.
      forward: inputs of a batch -> embeddings, such as from `jaxcl.step.embedder.make_forward`.
      read: batch -> its padded inputs.
      out: receives the embeddings, by row number.
      advance: called with the row numbers of each finished batch.
    """
    under_way: deque[tuple[LengthBatch, jax.Array]] = deque()

    def finish() -> None:
        batch, vectors = under_way.popleft()
        out[batch.rows] = fetch(vectors)[: len(batch.rows)]
        advance(batch.rows)

    for batch in batches:
        under_way.append((batch, forward(read(batch))))
        if len(under_way) > 1:  # prepare the next batch while this one is computed
            finish()
    while under_way:
        finish()
