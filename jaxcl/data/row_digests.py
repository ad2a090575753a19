"""Digests of rows' contents, and numbers for distinct digests, without a Python object per row."""

import hashlib
from collections.abc import Callable

import jax
import numpy as np

from jaxcl.data.row_labels import equal_rows
from jaxcl.data.table import Table
from jaxcl.typing import Int, Integer

__all__ = ["NO_DIGEST", "as_digests", "input_digests", "number_digests", "text_digest"]

NO_DIGEST = bytes(16)
"""The placeholder for content without a digest; no real digest is equal to it."""

_CHUNK_ROWS = 4096
_COMPARED_AT_ONCE = 1_000_000


def text_digest(text: str) -> bytes:
    """The 16-byte digest of a text."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def as_digests(joined: bytes | bytearray) -> Integer[np.ndarray, "n 2"]:
    """View concatenated digests as an array, with two uint64 per digest."""
    return np.frombuffer(joined, np.uint64).reshape(-1, 2)


def input_digests(
    table: Table, side: str, *, advance: Callable[[int], None] = lambda rows: None
) -> Integer[np.ndarray, "n 2"]:
    """The digest of each row's input on a side; inputs with the same arrays have equal digests.

    Args:
      table: the rows.
      side: the side of the inputs.
      advance: called with the number of rows done since the last call.
    """
    joined = bytearray()
    for first in range(0, table.num_rows, _CHUNK_ROWS):
        rows = np.arange(first, min(first + _CHUNK_ROWS, table.num_rows))
        leaves = [
            np.ascontiguousarray(leaf).reshape(len(rows), -1).view(np.uint8)
            for leaf in jax.tree.leaves(table.side(side, rows))
        ]
        for row in np.concatenate(leaves, axis=1):
            joined += hashlib.blake2b(row.data, digest_size=16).digest()
        advance(len(rows))
    return as_digests(joined)


def number_digests(
    digests: Integer[np.ndarray, "n 2"],
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " _"]]:
    """Number the distinct digests in the order in which they first appear.

    Args:
      digests: digests as `as_digests` returns them.

    Returns:
      The number of each digest, int32, and for each number the position of its first digest.

    Example:
      >>> numbers, firsts = number_digests(np.array([[7, 1], [5, 1], [7, 1], [5, 2]], np.uint64))
      >>> numbers.tolist(), firsts.tolist()
      ([0, 1, 0, 2], [0, 1, 3])
    """
    first = np.empty(len(digests), np.int32)
    # Equal digests fall into the same part. Comparing part by part limits memory use.
    num_parts = max(len(digests) // _COMPARED_AT_ONCE, 1)
    for part in range(num_parts):
        positions = np.flatnonzero(digests[:, 0] % num_parts == part).astype(np.int32)
        first[positions] = positions[equal_rows(digests[positions])]
    firsts = np.flatnonzero(first == np.arange(len(first), dtype=np.int32))
    renumbered = np.empty(len(first), np.int32)
    renumbered[firsts] = np.arange(len(firsts), dtype=np.int32)
    return renumbered[first], firsts
