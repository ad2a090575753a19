"""Token ids of a whole split, computed once and then read from disk by row number."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from tokenizers import Tokenizer

from jaxcl.data.row_labels import split_labels
from jaxcl.data.sources import PairSource
from jaxcl.data.tokenizer import encode_texts, tokenizer_fingerprint
from jaxcl.typing import PADDING_ID, SIDES, Int, Integer

__all__ = ["TokenTable", "build_token_table", "pad_texts", "padded", "token_spec"]

_FORMAT = 3
_CHUNK_ROWS = 4096


class TokenTable(NamedTuple):
    """The rows of a split as token ids: ragged, memory-mapped, read by row number.

    Attributes:
      tokens: side -> all rows' ids end to end.
      offsets: side -> where each row begins, and one end more than there are rows.
      group: each row's group; of concatenated data sets each has groups of its own.
      text: a number that rows of equal queries or equal keys share, and whoever shares it with
        them: none of them is a negative of another.
      max_tokens: side -> the width of its batches.
    """

    tokens: Mapping[str, Integer[np.ndarray, " _"]]
    offsets: Mapping[str, Int[np.ndarray, " _"]]
    group: Int[np.ndarray, " n"]
    text: Int[np.ndarray, " n"]
    max_tokens: Mapping[str, int]

    @property
    def num_rows(self) -> int:
        """Rows of the split."""
        return len(self.group)

    def side(self, side: str, rows: Int[np.ndarray, " b"]) -> dict[str, Int[np.ndarray, "b t"]]:
        """One side's inputs of the given rows, padded to the side's width."""
        starts = self.offsets[side][rows]
        lengths = self.offsets[side][rows + 1] - starts
        return {"tokens": padded(self.tokens[side], starts, lengths, width=self.max_tokens[side])}

    def spec(self, side: str) -> dict[str, jax.ShapeDtypeStruct]:
        """The shape and type of one row of a side."""
        return token_spec(self.max_tokens[side])

    def labels(self, rows: Int[np.ndarray, "*b"]) -> dict[str, Int[np.ndarray, "*b"]]:
        """The labels of the given rows: `"row"`, `"text"`, `"group"`."""
        return {"row": rows.astype(np.int32), "text": self.text[rows], "group": self.group[rows]}


def token_spec(width: int) -> dict[str, jax.ShapeDtypeStruct]:
    """One text as an encoder's input, without its values."""
    return {"tokens": jax.ShapeDtypeStruct((width,), np.int32)}


def padded(
    flat: Integer[np.ndarray, " _"],
    starts: Int[np.ndarray, " b"],
    lengths: Int[np.ndarray, " b"],
    *,
    width: int,
) -> Int[np.ndarray, "b t"]:
    """Cuts rows out of one long array and pads them to `width`."""
    column = np.arange(width)
    inside = column < lengths[:, None]
    position = np.where(inside, starts[:, None] + column, 0)
    return np.where(inside, flat[position], PADDING_ID).astype(np.int32)


def build_token_table(
    source: PairSource,
    tokenizer: Tokenizer,
    *,
    max_tokens: Mapping[str, int],
    add_cls: bool = False,
    distinct: bool = False,
    sides: Sequence[str] = SIDES,
    directory: Path,
    advance: Callable[[int], None] = lambda rows: None,
) -> TokenTable:
    """Reads a split's token ids, after computing them where nobody has.

    Args:
      source: the pairs.
      tokenizer: what turns text into ids.
      max_tokens: side -> longest text, in tokens; the rest is cut off.
      add_cls: begin every text with [CLS].
      distinct: keep each token of a text once.
      sides: the sides that are texts.
      directory: where tables are kept, each under the hash of all that it was made from.
      advance: called with the number of rows done since the last call.

    Returns:
      The table, memory-mapped.
    """
    made_from = {
        "format": _FORMAT,
        "source": source.fingerprint,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "max_tokens": dict(max_tokens),
        "add_cls": add_cls,
        "distinct": distinct,
    }
    if tuple(sides) != SIDES:
        made_from["sides"] = list(sides)
    name = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:12]
    path = Path(directory) / name
    if not path.exists():
        _write(source, tokenizer, made_from, path, sides, advance)
    return _read(path, max_tokens, sides)


def _read(path: Path, max_tokens: Mapping[str, int], sides: Sequence[str]) -> TokenTable:
    def column(name: str) -> np.ndarray:
        return np.load(path / f"{name}.npy", mmap_mode="r")

    return TokenTable(
        tokens={side: column(f"{side}_tokens") for side in sides},
        offsets={side: np.asarray(column(f"{side}_offsets")) for side in sides},
        group=np.asarray(column("group")),
        text=np.asarray(column("text")),
        max_tokens=dict(max_tokens),
    )


def _write(
    source: PairSource,
    tokenizer: Tokenizer,
    made_from: dict,
    path: Path,
    sides: Sequence[str],
    advance: Callable[[int], None],
) -> None:
    """Writes beside the final place and renames, so that a table is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{path.name}.unfinished-"))
    dtype = np.uint16 if max(tokenizer.get_vocab().values()) < 1 << 16 else np.uint32
    group = np.zeros(len(source), np.int32)
    lengths = {side: np.zeros(len(source), np.int64) for side in sides}
    numbers: dict[str, dict[bytes, int]] = {side: {} for side in sides}
    same = {side: np.zeros(len(source), np.int64) for side in sides}
    try:
        with contextlib.ExitStack() as open_files:
            files = {
                side: open_files.enter_context(open(unfinished / f"{side}.raw", "wb"))
                for side in sides
            }
            for first in range(0, len(source), _CHUNK_ROWS):
                rows = np.arange(first, min(first + _CHUNK_ROWS, len(source)))
                records = source.read(rows)
                group[rows] = [record.get("group", 0) for record in records]
                for side, file in files.items():
                    texts = [record[side] for record in records]
                    ids = list(
                        encode_texts(
                            tokenizer,
                            texts,
                            max_tokens=made_from["max_tokens"][side],
                            add_cls=made_from["add_cls"],
                            distinct=made_from["distinct"],
                        )
                    )
                    lengths[side][rows] = [len(row) for row in ids]
                    same[side][rows] = [
                        numbers[side].setdefault(_digest(row), len(numbers[side])) for row in ids
                    ]
                    file.write(np.concatenate(ids).astype(dtype).tobytes())
                advance(len(rows))
        for side in sides:
            raw = unfinished / f"{side}.raw"
            np.save(unfinished / f"{side}_tokens.npy", np.fromfile(raw, dtype))
            np.save(unfinished / f"{side}_offsets.npy", np.append(0, np.cumsum(lengths[side])))
            raw.unlink()
        for name, labels in split_labels(source, group, [same[side] for side in sides]).items():
            np.save(unfinished / f"{name}.npy", labels)
        (unfinished / "made_from.json").write_text(json.dumps(made_from, indent=2))
        try:
            os.rename(unfinished, path)
        except OSError:
            if not path.exists():  # another process was first
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _digest(tokens: Integer[np.ndarray, " t"]) -> bytes:
    return hashlib.blake2b(np.asarray(tokens, np.uint32).tobytes(), digest_size=16).digest()


def pad_texts(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    max_tokens: int,
    add_cls: bool = False,
    distinct: bool = False,
) -> Int[np.ndarray, "n t"]:
    """Token ids of texts, padded to `max_tokens`."""
    if not texts:
        return np.zeros((0, max_tokens), np.int32)
    rows = list(
        encode_texts(tokenizer, texts, max_tokens=max_tokens, add_cls=add_cls, distinct=distinct)
    )
    lengths = np.array([len(row) for row in rows])
    return padded(np.concatenate(rows), np.cumsum(lengths) - lengths, lengths, width=max_tokens)
