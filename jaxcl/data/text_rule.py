"""How texts become tokens, and tokens an encoder's inputs.

text = TextTokenizer(tokenizer, TextRule(max_tokens=128, special_tokens=True, prompt="query: "))
rows = text.tokenize(["what is a cat", "dogs"])  # ids of each text
text.inputs(rows)  # {"tokens": int32[2, t], "length": int32[2]}
"""

import functools
import json
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from tokenizers import Tokenizer

from jaxcl.data.tokenizer import CLS, UNKNOWN, check_texts
from jaxcl.typing import PADDING_ID, Int, Integer

__all__ = [
    "UNLIMITED",
    "TextRule",
    "TextTokenizer",
    "as_inputs",
    "input_spec",
    "special_tokens_around",
    "unknown_id",
]

UNLIMITED = 2**31 - 1
"""`TextRule.max_tokens` where texts may have any length."""


class TextRule(NamedTuple):
    """How the texts of a side become tokens.

    Attributes:
      max_tokens: the longest text, its prompt and special tokens included; the rest is cut off, but
        not the special tokens. `UNLIMITED` for any length.
      add_cls: begin with [CLS]. For `special_tokens=None` only.
      distinct: each token once, where it first stands: for encoders that neither read order nor
        should count how often a name is repeated.
      special_tokens: `None` for a tokenizer of `load_tokenizer`, whose id 0 is padding and whose
        [UNK] stands for a text without tokens. Otherwise any tokenizer, and whether texts get its
        special tokens; inputs then say each text's length.
      prompt: what is put before each text.
      exclude_prompt: inputs say how many tokens the prompt has, so that pooling leaves them out.
      skip_unknown: leave unknown tokens out, as model2vec does.
    """

    max_tokens: int
    add_cls: bool = False
    distinct: bool = False
    special_tokens: bool | None = None
    prompt: str = ""
    exclude_prompt: bool = False
    skip_unknown: bool = False

    @property
    def numbers(self) -> tuple[str, ...]:
        """The numbers that inputs have for each text, next to its tokens."""
        length = ("length",) if self.special_tokens is not None else ()
        return (*length, "prompt_length") if self.exclude_prompt and self.prompt else length


class TextTokenizer:
    """A tokenizer and the rule of a side.

    Args:
      tokenizer: of `load_tokenizer`, or of `load_pretrained_tokenizer` where the rule has
        `special_tokens` of `True` or `False`.
      rule: of the side.

    Attributes:
      rule: as given.
      prompt_length: how many tokens stand before the first one of a text: the prompt's, and special
        ones.

    Raises:
      ValueError: if the tokenizer lacks a token that the rule needs or does more than put special
        tokens around a text, or if `max_tokens` leaves no room for a token of a text.
    """

    def __init__(self, tokenizer: Tokenizer, rule: TextRule) -> None:
        self.rule = rule
        self._tokenizer = tokenizer
        self._before, self._after = _added_tokens(tokenizer, rule)
        self._skipped = unknown_id(tokenizer) if rule.skip_unknown else None
        self._without_tokens = []
        if rule.special_tokens is None:
            self._without_tokens = [tokenizer.token_to_id(UNKNOWN)]
        check_texts([rule.prompt], what="prompt")
        (prompt,) = self._ids([rule.prompt])
        self.prompt_length = len(self._before) + len(prompt)
        self._room = rule.max_tokens - len(self._before) - len(self._after)
        needed = self.prompt_length + len(self._after) + 1
        if rule.max_tokens < needed:
            raise ValueError(
                f"max_tokens={rule.max_tokens} leaves no room for text: special tokens and the "
                f"prompt {rule.prompt!r} take {needed - 1}; use at least {needed}"
            )

    @functools.cached_property
    def num_ids(self) -> int:
        """One more than the tokenizer's largest id."""
        return max(self._tokenizer.get_vocab().values()) + 1

    def tokenize(
        self, texts: Sequence[str], *, what: str = "text", first: int = 0
    ) -> list[Int[np.ndarray, " _"]]:
        """Token ids of each text.

        Args:
          texts: what to encode, without the prompt.
          what, first: a name for the texts and the number of the first, for messages.

        Returns:
          One int32 array per text. A text without tokens has the special tokens, or none.

        Raises:
          ValueError: if a text is not a `str` of Unicode, or the tokenizer fails.
        """
        try:
            rows = self._ids([self.rule.prompt + text for text in texts])
        except Exception as error:  # the library raises the bare class
            check_texts(texts, what=what, first=first)
            raise ValueError(f"the tokenizer cannot encode the texts: {error}") from error
        return [
            np.asarray(
                [*self._before, *(ids or self._without_tokens)[: self._room], *self._after],
                np.int32,
            )
            for ids in rows
        ]

    def inputs(
        self, rows: Sequence[Int[np.ndarray, " _"]], width: int | None = None
    ) -> dict[str, Int[np.ndarray, "n ..."]]:
        """The inputs of tokenised texts, padded to `width` or to the longest of them."""
        return as_inputs(
            np.concatenate([np.zeros(0, np.int32), *rows]),
            np.array([len(row) for row in rows], np.int64),
            self.rule,
            width=max(map(len, rows), default=0) if width is None else width,
            prompt_length=self.prompt_length,
        )

    def _ids(self, texts: list[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        rows = [encoding.ids for encoding in encodings]
        if self._skipped is not None:
            rows = [[i for i in ids if i != self._skipped] for ids in rows]
        return [list(dict.fromkeys(ids)) for ids in rows] if self.rule.distinct else rows


def as_inputs(
    ids: Integer[np.ndarray, " _"],
    lengths: Int[np.ndarray, " n"],
    rule: TextRule,
    *,
    width: int,
    prompt_length: int = 0,
) -> dict[str, Int[np.ndarray, "n ..."]]:
    """An encoder's inputs.

    Args:
      ids: the tokens of all texts, end to end.
      lengths: of each text, in tokens; none is longer than `width`.
      rule: from which the tokens were made.
      width: tokens of a row; padding follows a text.
      prompt_length: of `TextTokenizer`.

    Returns:
      `{"tokens": int32[n, width]}`, and an int32 per row for each of `rule.numbers`.
    """
    tokens = np.full((len(lengths), width), PADDING_ID, np.int32)
    tokens[np.arange(width) < lengths[:, None]] = ids
    numbers = {"length": lengths, "prompt_length": np.full_like(lengths, prompt_length)}
    return {"tokens": tokens} | {name: numbers[name].astype(np.int32) for name in rule.numbers}


def input_spec(rule: TextRule) -> dict[str, jax.ShapeDtypeStruct]:
    """One text as an encoder's input, padded to the longest, without its values."""
    number = jax.ShapeDtypeStruct((), np.int32)
    tokens = jax.ShapeDtypeStruct((rule.max_tokens,), np.int32)
    return {"tokens": tokens} | dict.fromkeys(rule.numbers, number)


def special_tokens_around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer puts before and after one text, whatever its post-processor.

    Raises:
      ValueError: if it does something else as well, or has no tokens for an example of a text.
    """
    try:
        full = tokenizer.encode("x x")
        bare = tokenizer.encode("x x", add_special_tokens=False).ids
    except Exception as error:  # the library raises the bare class
        raise ValueError(f"the tokenizer cannot encode 'x x': {error}") from error
    added = full.special_tokens_mask
    start = [*added, 0].index(0)
    before, after = full.ids[:start], full.ids[start + len(bare) :]
    if full.ids and not bare:
        raise ValueError(
            "the tokenizer has no tokens for 'x x', so that it cannot be told which of its special "
            "tokens begin a text; set special_tokens=False"
        )
    if added != [1] * len(before) + [0] * len(bare) + [1] * len(after):
        raise ValueError(
            "the tokenizer's post-processor does more than put special tokens around a text; use "
            "one that does not, or set special_tokens=False"
        )
    return before, after


def _added_tokens(tokenizer: Tokenizer, rule: TextRule) -> tuple[list[int], list[int]]:
    if not rule.add_cls:
        return special_tokens_around(tokenizer) if rule.special_tokens else ([], [])
    if rule.special_tokens is not None:
        raise ValueError(
            "add_cls=True is for a tokenizer that was trained here; set special_tokens=True for "
            "the special tokens of any other, and add_cls=False"
        )
    cls = tokenizer.token_to_id(CLS)
    if cls is None:
        raise ValueError(
            f"the tokenizer has no token {CLS!r} to begin texts with; add it to the vocabulary, or "
            "set add_cls=False"
        )
    return [cls], []


def unknown_id(tokenizer: Tokenizer) -> int | None:
    """The id that stands for whatever a tokenizer does not know; `None` if it has none."""
    token = getattr(tokenizer.model, "unk_token", None)
    if token is not None:
        return tokenizer.token_to_id(token)
    # A Unigram model tells the number in its file alone.
    return json.loads(tokenizer.to_str())["model"].get("unk_id")
