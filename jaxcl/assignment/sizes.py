"""The sizes of a search: the capacity of its compiled program, and its actual number of rows.

Everything that depends on the exact number of rows is an argument of the program. One program
therefore orders any number of rows up to its capacity, and the order does not depend on the
capacity.
"""

from typing import NamedTuple

import numpy as np

from jaxcl.assignment.gcbs_settings import Gcbs
from jaxcl.typing import Array, Int

__all__ = ["EXACT_ROWS", "Sizes", "capacity_for", "segment_starts", "sizes_of"]

EXACT_ROWS = 10_000
"""The most rows for which `graph=None` is exact, since probes would search most clusters anyway."""

_LEAST_CAPACITY = 1_024  # padding to it costs hundredths of a second; compiling costs far more


class Sizes(NamedTuple):
    """The arguments of a compiled search that depend on the number of rows.

    Attributes:
      num_rows: rows on all devices; later rows are padding.
      batch_size: rows of a global batch.
      blocks: the segments of a bisection into blocks, from `segment_starts`; `None` for a method
        without blocks.
      clusters: the segments of a bisection into clusters; `None` for an exact graph.
    """

    num_rows: Int[Array | np.ndarray, ""]
    batch_size: Int[Array | np.ndarray, ""]
    blocks: Int[Array | np.ndarray, "l s"] | None
    clusters: Int[Array | np.ndarray, "l s"] | None


def sizes_of(num_rows: int, *, block_size: int, batch_size: int, settings: Gcbs) -> Sizes:
    """The sizes of a search for blocks of `num_rows` rows.

    Only a different shape of a table, which depends on its number of levels, or a missing table
    needs another program.
    """
    kind = settings.graph or ("exact" if num_rows <= EXACT_ROWS else "clustered")
    return Sizes(
        np.asarray(num_rows, np.int32),
        np.asarray(batch_size, np.int32),
        segment_starts(num_rows, block_size) if settings.method == "bisection" else None,
        segment_starts(num_rows, settings.cluster_size) if kind == "clustered" else None,
    )


def capacity_for(num_rows: int) -> int:
    """Round a number of rows up to one of eight capacities per doubling, at least 1,024.

    A search then has 4% more rows on average and 12% at most, and the exact graph 9% and 27%
    more work. Four capacities per doubling would double this overhead; sixteen would compile twice
    as often.

    Example:
      >>> [capacity_for(num_rows) for num_rows in (1, 1_024, 1_025, 3_000, 3_001, 1_000_000)]
      [1024, 1024, 1152, 3072, 3072, 1048576]
    """
    num_rows = max(num_rows, _LEAST_CAPACITY)
    step = (1 << (num_rows - 1).bit_length()) // 16
    return -(-num_rows // step) * step


def segment_starts(num_rows: int, block_size: int) -> Int[np.ndarray, "l s"]:
    """The first position of each segment, `[levels + 1, segments + 1]`.

    Segment `s` of one level becomes `2 s` and `2 s + 1` of the next. All segments except the last
    hold whole blocks; the second half of a single block is empty.
    """
    blocks = np.array([-(-num_rows // block_size)])
    levels = [blocks]
    while blocks.max() > 1:
        blocks = np.stack([blocks - blocks // 2, blocks // 2], axis=1).ravel()
        levels.append(blocks)
    # All levels are padded with empty segments to the width of the last, so that one loop body
    # handles them all.
    table = np.full((len(levels), len(blocks) + 1), num_rows, np.int32)
    for row, blocks in zip(table, levels, strict=True):
        row[0] = 0
        row[1 : len(blocks) + 1] = np.minimum(np.cumsum(blocks) * block_size, num_rows)
    return table
