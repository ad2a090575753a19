"""Token ids of a whole split, computed once and then read from disk by row number."""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tokenizers import Tokenizer

from jaxcl.data.checked_array import CheckedArray, DamagedArray
from jaxcl.data.column_folder import column_records, write_columns
from jaxcl.data.row_prompts import RowPrompts
from jaxcl.data.row_tokenizer import RowTokenizer
from jaxcl.data.sources import PairSource
from jaxcl.data.text_rule import TextRule, as_inputs, input_spec
from jaxcl.data.token_columns import write_token_columns
from jaxcl.data.tokenizer import tokenizer_fingerprint
from jaxcl.host.progress import say
from jaxcl.typing import SIDES, Int, Integer

__all__ = ["TokenTable", "build_token_table"]

_FORMAT = 4
_INDEX_FILE = "table.json"


class TokenTable(NamedTuple):
    """The rows of a split as token ids: ragged, memory-mapped, read by row number.

    Attributes:
      tokens: side -> the ids of all rows, concatenated.
      offsets: side -> where each row begins in `tokens`, followed by the end of the last row.
      group: each row's group; concatenated data sets share no groups.
      text: a number that rows share if they are connected by equal queries or equal keys, so that
        none is a negative of another. Differences in prompts are ignored.
      rules: side -> the rule that describes the side's inputs; `max_tokens` is the batch width.
      prompt_length: side -> the number of tokens before the first token of a text; with `prompts`,
        this number for each data set.
      prompts: the rows' prompts, if the data sets have different prompts.
    """

    tokens: Mapping[str, "Integer[np.ndarray, ' _'] | _Tokens"]
    offsets: Mapping[str, Int[np.ndarray, " _"]]
    group: Int[np.ndarray, " n"]
    text: Int[np.ndarray, " n"]
    rules: Mapping[str, TextRule]
    prompt_length: Mapping[str, int | Int[np.ndarray, " s"]] = {}
    prompts: RowPrompts | None = None

    @property
    def num_rows(self) -> int:
        """The number of rows in the split."""
        return len(self.group)

    def side(self, side: str, rows: Int[np.ndarray, " b"]) -> dict[str, Int[np.ndarray, "b ..."]]:
        """One side's inputs of the given rows, padded to the side's width."""
        starts, lengths = self.offsets[side][rows], self.lengths(side, rows)
        return as_inputs(
            self.tokens[side][_positions(starts, lengths)],
            lengths,
            self.rules[side],
            width=self.rules[side].max_tokens,
            prompt_length=self._prompt_length(side, rows),
        )

    def _prompt_length(self, side: str, rows: Int[np.ndarray, " b"]) -> int | Int[np.ndarray, " b"]:
        length = self.prompt_length.get(side, 0)
        if self.prompts is None or isinstance(length, int):
            return length
        return length[self.prompts.data_set(rows)]

    def lengths(self, side: str, rows: Int[np.ndarray, "*b"]) -> Int[np.ndarray, "*b"]:
        """The number of tokens of one side of the given rows."""
        return self.offsets[side][rows + 1] - self.offsets[side][rows]

    def spec(self, side: str) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes and types of one row of a side."""
        return input_spec(self.rules[side])

    def labels(self, rows: Int[np.ndarray, "*b"]) -> dict[str, Int[np.ndarray, "*b"]]:
        """The labels of the given rows: `"row"`, `"text"`, `"group"`."""
        return {"row": rows.astype(np.int32), "text": self.text[rows], "group": self.group[rows]}


def _described(rules: Mapping[str, TextRule]) -> dict[str, Any]:
    """Describe the rules for a table's hash.

    Rules that set only `max_tokens`, `add_cls` and `distinct` keep the hash of earlier versions, so
    that existing tables are reused.
    """
    first = next(iter(rules.values()))
    plain = TextRule(0, add_cls=first.add_cls, distinct=first.distinct)
    described = {
        "max_tokens": {side: rule.max_tokens for side, rule in rules.items()},
        "add_cls": first.add_cls,
        "distinct": first.distinct,
    }
    if any(rule._replace(max_tokens=0) != plain for rule in rules.values()):
        described["rules"] = {side: rule._asdict() for side, rule in rules.items()}
    return described


def _positions(
    starts: Int[np.ndarray, " b"], lengths: Int[np.ndarray, " b"]
) -> Int[np.ndarray, " _"]:
    """The positions of the tokens of some rows, row by row."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - ends + lengths, lengths) + np.arange(lengths.sum())


def build_token_table(
    source: PairSource,
    tokenizer: Tokenizer,
    *,
    rules: Mapping[str, TextRule],
    sides: Sequence[str] = SIDES,
    prompts: RowPrompts | None = None,
    directory: Path,
    advance: Callable[[int], None] = lambda rows: None,
) -> TokenTable:
    """Read a split's token ids, and compute them first if necessary.

    Args:
      source: the pairs.
      tokenizer: the tokenizer of all texts.
      rules: side -> the rule by which the side's texts become tokens.
      sides: the sides that are texts.
      prompts: the rows' prompts, which replace the rules' prompts; with `None`, all rows have the
        rules' prompts.
      directory: the folder of all tables; a table is named after a hash of everything that it was
        made from.
      advance: called with the number of rows done since the last call.

    Returns:
      The table, memory-mapped. A damaged table is built again, even if the damage only shows when
      a batch reads its part of the table.

    Raises:
      ValueError: if a value is not a text, or the tokenizer does not fit a rule.
      OSError: if the table cannot be written, or is damaged right after it was written.
    """
    made_from = {
        "format": _FORMAT,
        "source": source.fingerprint,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        **_described(rules),
    }
    if tuple(sides) != SIDES:
        made_from["sides"] = list(sides)
    if prompts is not None:
        made_from["prompts"] = prompts.described(tuple(sides))
    texts = {side: RowTokenizer(tokenizer, rules[side], prompts, side) for side in sides}
    name = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:12]
    path = Path(directory) / name

    def write(advance: Callable[[int], None]) -> None:
        def columns(folder: Path) -> None:
            write_token_columns(source, texts, folder, advance)

        write_columns(path, _INDEX_FILE, made_from, columns, what="the token table")

    num_ids = max(text.num_ids for text in texts.values())

    def read() -> TokenTable:
        arrays = _open_arrays(path, made_from, num_ids=num_ids)
        table = _as_table(arrays, path, texts, num_rows=len(source), rebuild=rebuild)
        return table._replace(prompts=prompts)

    def rebuild(
        damage: DamagedArray, advance: Callable[[int], None] = lambda rows: None
    ) -> TokenTable:
        say(f"rebuilding the token table: {damage}")
        write(advance)
        try:
            table = read()
            for tokens in table.tokens.values():
                np.asarray(tokens)  # verifies all tokens
        except DamagedArray as error:
            raise OSError(
                f"{error}, right after it was written; set run.data_dir to a folder on another disk"
            ) from error
        return table

    if not os.path.lexists(path):
        write(advance)
    try:
        return read()
    except DamagedArray as damage:
        return rebuild(damage, advance)


class _Tokens:
    """A side's ids on disk. If they are damaged, the table is built again.

    Args:
      array: the ids.
      rebuild: builds the table again, and returns the new ids.
    """

    def __init__(
        self, array: CheckedArray, rebuild: Callable[[DamagedArray], CheckedArray]
    ) -> None:
        self.array, self._rebuild = array, rebuild

    def __getitem__(self, positions: Int[np.ndarray, "*n"]) -> Integer[np.ndarray, "*n"]:
        try:
            return self.array[positions]
        except DamagedArray as damage:
            self.array = self._rebuild(damage)
            return self.array[positions]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.array.whole(), dtype, copy=copy)


def _open_arrays(path: Path, made_from: Mapping, *, num_ids: int) -> dict[str, CheckedArray]:
    """The columns of a table, by name.

    Raises:
      DamagedArray: if the index or a file has changed since it was written.
    """
    return {
        name: CheckedArray(
            path / f"{name}.npy", record, below=num_ids if name.endswith("_tokens") else None
        )
        for name, record in column_records(path / _INDEX_FILE, made_from).items()
    }


def _as_table(
    arrays: Mapping[str, CheckedArray],
    path: Path,
    texts: Mapping[str, RowTokenizer],
    *,
    num_rows: int,
    rebuild: Callable[[DamagedArray], TokenTable],
) -> TokenTable:
    """Build the table from its columns.

    Raises:
      DamagedArray: if a column that is read whole has changed since it was written, or the
        columns do not fit together.
    """

    def rebuild_side(side: str, damage: DamagedArray) -> CheckedArray:
        tokens = rebuild(damage).tokens[side]
        assert isinstance(tokens, _Tokens)
        return tokens.array

    table = TokenTable(  # small columns are copied, so that later damage does not affect them
        tokens={
            side: _Tokens(arrays[f"{side}_tokens"], functools.partial(rebuild_side, side))
            for side in texts
        },
        offsets={side: arrays[f"{side}_offsets"].copy() for side in texts},
        group=arrays["group"].copy(),
        text=arrays["text"].copy(),
        rules={side: text.rule for side, text in texts.items()},
        prompt_length={side: text.prompt_length for side, text in texts.items()},
    )
    for side, offsets in table.offsets.items():
        ends = len(offsets) == num_rows + 1 and (offsets[0], offsets[-1])
        if ends != (0, len(arrays[f"{side}_tokens"])) or np.diff(offsets).min() < 0:
            raise DamagedArray(f"{path} has offsets of each {side} that do not fit its tokens")
    if not len(table.group) == len(table.text) == num_rows:
        raise DamagedArray(f"{path} has labels for another number of rows than {num_rows:,}")
    return table
