"""Embed texts and mine hard negatives in blocks that are kept on disk, so that a stop loses little.

Several processes do the same work together: process 0 writes, and the others hold the results in
memory.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxcl.host.block_file import BlockFile
from jaxcl.host.processes import first_then_others
from jaxcl.host.progress import progress_bar
from jaxcl.negatives.hard_negatives import HardNegatives, QueryBlock
from jaxcl.typing import Float

__all__ = ["BLOCK_ROWS", "embed_in_blocks", "mine_in_blocks"]

BLOCK_ROWS = 4_096
"""Rows of a block, after which the work is on the disk."""


def embed_in_blocks(
    path: Path,
    num_rows: int,
    dim: int,
    embed: Callable[[np.ndarray, Callable[[int], None]], Float[np.ndarray, "n d"]],
    *,
    what: str,
    block_rows: int | None = None,
) -> Float[np.ndarray, "n d"]:
    """Embed rows, or map the embeddings of earlier work to memory.

    Args:
      path: the file of the embeddings; its name must identify the model and the rows.
      num_rows: the number of rows.
      dim: the width of the embeddings.
      embed: `(row numbers, advance) -> embeddings`.
      what: the work, for the progress bar.
      block_rows: the number of rows after which they are on the disk, `BLOCK_ROWS` by default.

    Raises:
      OSError: if the disk has no room.
    """
    step = block_rows or BLOCK_ROWS
    (blocks,) = _block_files([(path, (num_rows, dim), np.float32)])
    with progress_bar(what, num_rows) as advance:
        advance(blocks.done)
        while blocks.done < num_rows:
            rows = np.arange(blocks.done, min(blocks.done + step, num_rows))
            blocks.append(embed(rows, advance))
    return blocks.array


def mine_in_blocks(
    mine: Callable[[QueryBlock], HardNegatives],
    block_of: Callable[[np.ndarray], QueryBlock],
    num_queries: int,
    per_query: int,
    folder: Path,
) -> HardNegatives:
    """Mine all queries, continuing earlier work.

    Args:
      mine: of `jaxcl.negatives.hard_negatives.make_miner`, for blocks of `BLOCK_ROWS`.
      block_of: `query numbers -> their block`.
      num_queries: the number of queries.
      per_query: negatives of a query.
      folder: the folder of the results; its name must identify the model, the data and the rule.

    Raises:
      OSError: if the disk has no room.
    """
    shapes: dict[str, tuple[tuple[int, ...], type]] = {
        "rows": ((num_queries, per_query), np.int32),
        "scores": ((num_queries, per_query), np.float32),
        "ranks": ((num_queries, per_query), np.int32),
        "positive_scores": ((num_queries,), np.float32),
        "masked": ((num_queries,), np.int32),
    }
    files = _block_files(
        [(folder / f"{name}.npy", *shapes[name]) for name in HardNegatives._fields]
    )
    done = files[0].done
    with progress_bar("mining", num_queries) as advance:
        advance(done)
        while done < num_queries:
            numbers = np.arange(done, min(done + BLOCK_ROWS, num_queries))
            for file, values in zip(files, mine(block_of(numbers)), strict=True):
                file.append(values)
            done += len(numbers)
            advance(len(numbers))
    return HardNegatives(*(file.array for file in files))


def _block_files(described: list[tuple[Path, tuple[int, ...], Any]]) -> list[BlockFile]:
    """Files with as many rows done as all of them have, in all processes."""
    writes = jax.process_index() == 0
    files = first_then_others(
        lambda: [BlockFile(path, shape, dtype, writes=writes) for path, shape, dtype in described]
    )
    # A stop may come between two files. A process without the files of process 0, on a disk of its
    # own, has no row.
    done = min(file.done for file in files)
    if jax.process_count() > 1:
        done = int(multihost_utils.process_allgather(np.array(done)).min())
    for file in files:
        file.keep(done)
    return files
