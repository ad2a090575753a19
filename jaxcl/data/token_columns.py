"""The columns of a token table, written to disk chunk by chunk."""

import contextlib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxcl.data.array_writer import ArrayWriter
from jaxcl.data.row_checks import checked_int32
from jaxcl.data.row_labels import equal_rows, split_labels
from jaxcl.data.row_tokenizer import RowTokenizer
from jaxcl.data.source_fields import read_fields
from jaxcl.data.sources import PairSource
from jaxcl.host.progress import say
from jaxcl.typing import Int, Integer

__all__ = ["write_token_columns"]

_CHUNK_ROWS = 4096
_MANY_ROWS = 1_000_000
"""The number of rows above which comparing their texts takes seconds."""


def write_token_columns(
    source: PairSource,
    texts: Mapping[str, RowTokenizer],
    folder: Path,
    advance: Callable[[int], None],
) -> None:
    """Write the columns of a table into a folder.

    Takes about 80 bytes of memory per row, whatever the length of the texts.

    Args:
      source: the pairs.
      texts: side -> the tokenizer of the side's texts.
      folder: an empty folder. Each column becomes a `.npy` file: for each side, the concatenated
        ids of all rows (`query_tokens`) and where each row begins (`query_offsets`); and the labels
        from `split_labels`.
      advance: called with the number of rows done since the last call.

    Raises:
      ValueError: if a value is not a text, or a group not an integer.
      OSError: if a file cannot be written.
    """
    group, lengths, digests = _encode(source, texts, folder, advance)
    for side in texts:
        offsets = np.zeros(len(source) + 1, np.int64)
        np.cumsum(lengths.pop(side), out=offsets[1:])
        np.save(folder / f"{side}_offsets.npy", offsets)
    del offsets  # frees the memory
    if len(source) >= _MANY_ROWS:
        say(f"comparing the texts of {len(source):,} rows")
    numbers = [equal_rows(digests.pop(side)) for side in texts]
    for name, column in split_labels(source, group, numbers).items():
        np.save(folder / f"{name}.npy", column)


def _encode(
    source: PairSource,
    texts: Mapping[str, RowTokenizer],
    folder: Path,
    advance: Callable[[int], None],
) -> tuple[Int[np.ndarray, " n"], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Write the ids of all rows.

    Returns:
      Each row's group; side -> the number of ids of each row; side -> the digest of each row's
      text.
    """
    num_ids = max(text.num_ids for text in texts.values())
    dtype = np.uint16 if num_ids <= 1 << 16 else np.uint32
    group = np.zeros(len(source), np.int32)
    lengths = {side: np.zeros(len(source), np.int32) for side in texts}
    digests = {side: np.zeros((len(source), 2), np.uint64) for side in texts}
    paths = {side: folder / f"{side}_tokens.npy" for side in texts}
    with contextlib.ExitStack() as open_files:
        files = {
            side: open_files.enter_context(ArrayWriter(path, dtype)) for side, path in paths.items()
        }
        for first in range(0, len(source), _CHUNK_ROWS):
            rows = slice(first, min(first + _CHUNK_ROWS, len(source)))
            numbers = np.arange(rows.start, rows.stop)
            records = read_fields(source, numbers, (*texts, "group"))
            groups = [record.get("group", 0) for record in records]
            group[rows] = checked_int32(groups, what="group", first_row=first)
            for side, file in files.items():
                values = [record[side] for record in records]
                ids = texts[side].tokenize(values, what=f"{side} of row", first=first)
                lengths[side][rows] = [len(row) for row in ids]
                digests[side][rows] = _digests(texts[side].without_prompts(ids, first=first))
                file.append(np.concatenate(ids))
            advance(len(records))
    for path in paths.values():
        if not path.exists():  # no text of this side has a token
            np.save(path, np.zeros(0, dtype))
    return group, lengths, digests


def _digests(rows: Sequence[Integer[np.ndarray, " _"]]) -> Integer[np.ndarray, "n 2"]:
    """A 128-bit digest of each row's ids, which take four bytes each."""
    digests = b"".join(hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows)
    return np.frombuffer(digests, np.uint64).reshape(-1, 2)
