"""Embed texts and mine hard negatives in blocks that are kept on disk, so that a stop loses little.

Several processes can share the work: process 0 writes the results, and the others keep them in
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
"""Number of rows per block; each finished block is on disk."""


def embed_in_blocks(
    path: Path,
    num_rows: int,
    dim: int,
    embed: Callable[[np.ndarray, Callable[[int], None]], Float[np.ndarray, "n d"]],
    *,
    title: str,
    block_rows: int | None = None,
) -> Float[np.ndarray, "n d"]:
    """Embed rows into a file, resuming unfinished work.

    Args:
      path: the file of the embeddings; its name must identify the model and the rows.
      num_rows: number of rows.
      dim: number of dimensions of the embeddings.
      embed: `(row numbers, advance) -> embeddings`.
      title: title of the progress bar.
      block_rows: number of rows per block; by default, `BLOCK_ROWS`.

    Returns:
      The embeddings; in process 0, the memory-mapped file.

    Raises:
      OSError: if the disk is full.
    """
    step = block_rows or BLOCK_ROWS
    (blocks,) = _block_files([(path, (num_rows, dim), np.float32)])
    with progress_bar(title, num_rows) as advance:
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
    """Mine negatives for all queries, resuming unfinished work.

    Args:
      mine: a function from `jaxcl.negatives.hard_negatives.make_miner`, for blocks of `BLOCK_ROWS`.
      block_of: `query numbers -> the block of these queries`.
      num_queries: number of queries.
      per_query: number of negatives per query.
      folder: folder for the results; its name must identify the model, the data and the rule.

    Raises:
      OSError: if the disk is full.
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


def _block_files(specs: list[tuple[Path, tuple[int, ...], Any]]) -> list[BlockFile]:
    """Open files by path, shape and dtype; keep the rows that all files of all processes have."""
    writes = jax.process_index() == 0
    files = first_then_others(
        lambda: [BlockFile(path, shape, dtype, writes=writes) for path, shape, dtype in specs]
    )
    # A stop may come between two files. A process that does not share a disk with process 0 has no
    # rows.
    done = min(file.done for file in files)
    if jax.process_count() > 1:
        done = int(multihost_utils.process_allgather(np.array(done)).min())
    for file in files:
        file.keep(done)
    return files
