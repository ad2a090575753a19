"""Turn texts into tokens, and tokens into the inputs of an encoder.

text = TextTokenizer(tokenizer, TextRule(max_tokens=128, special_tokens=True, prompt="query: "))
rows = text.tokenize(["what is a cat", "dogs"])  # the ids of each text
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
"""The value of `TextRule.max_tokens` that means no limit."""


class TextRule(NamedTuple):
    """The rule by which the texts of a side become tokens.

    Attributes:
      max_tokens: the maximum length of a text in tokens, including its prompt and special tokens;
        `UNLIMITED` for any length. Longer texts are truncated, but keep their special tokens.
      add_cls: begin each text with [CLS]; only for `special_tokens=None`.
      distinct: keep only the first occurrence of each token, for encoders that ignore the order of
        tokens and should not count repeated names.
      special_tokens: `None` for a tokenizer from `load_tokenizer`: id 0 is padding, and texts
        without tokens become [UNK]. For any other tokenizer, whether to add its special tokens to
        each text; the inputs then include each text's length.
      prompt: the prompt that precedes each text.
      exclude_prompt: include the prompt's length in the inputs, so that pooling leaves it out.
      skip_unknown: leave out unknown tokens, as model2vec does.
    """

    max_tokens: int
    add_cls: bool = False
    distinct: bool = False
    special_tokens: bool | None = None
    prompt: str = ""
    exclude_prompt: bool = False
    skip_unknown: bool = False

    @property
    def excludes_prompt(self) -> bool:
        """Whether there is a prompt, and pooling leaves it out."""
        return self.exclude_prompt and bool(self.prompt)

    @property
    def numbers(self) -> tuple[str, ...]:
        """The names of the numbers that accompany the tokens of each text in the inputs."""
        length = ("length",) if self.special_tokens is not None else ()
        return (*length, "prompt_length") if self.excludes_prompt else length


class TextTokenizer:
    """Tokenizes the texts of a side by the side's rule.

    Args:
      tokenizer: from `load_tokenizer` if `rule.special_tokens` is `None`, otherwise from
        `load_pretrained_tokenizer`.
      rule: the side's rule.

    Attributes:
      rule: the side's rule.
      prefix: the ids before the first token of a text: special tokens and the prompt's tokens. The
        last ids differ if the tokenizer merges the end of the prompt with the text.

    Raises:
      ValueError: if the tokenizer lacks a token that the rule needs or does more than add special
        tokens around a text, or if `max_tokens` leaves no room for text.
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
        self.prefix = (*self._before, *prompt)
        self._room = rule.max_tokens - len(self._before) - len(self._after)
        needed = self.prompt_length + len(self._after) + 1
        if rule.max_tokens < needed:
            raise ValueError(
                f"max_tokens={rule.max_tokens} leaves no room for text: special tokens and the "
                f"prompt {rule.prompt!r} take {needed - 1}; use at least {needed}"
            )

    @property
    def prompt_length(self) -> int:
        """The number of tokens before the first token of a text."""
        return len(self.prefix)

    @functools.cached_property
    def num_ids(self) -> int:
        """One more than the tokenizer's largest id."""
        return max(self._tokenizer.get_vocab().values()) + 1

    def tokenize(
        self, texts: Sequence[str], *, what: str = "text", first: int = 0
    ) -> list[Int[np.ndarray, " _"]]:
        """Compute the token ids of each text.

        Args:
          texts: the texts, without the prompt.
          what, first: a name for the texts and the number of the first text, for messages.

        Returns:
          One int32 array per text. A text without tokens gives only special tokens, if any.

        Raises:
          ValueError: if a text is not a `str` or not Unicode, or the tokenizer fails.
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
        """Build the inputs of tokenized texts, padded to `width` or to the longest text."""
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
    prompt_length: int | Int[np.ndarray, " n"] = 0,
) -> dict[str, Int[np.ndarray, "n ..."]]:
    """Build the inputs of an encoder.

    Args:
      ids: the tokens of all texts, concatenated.
      lengths: number of tokens of each text, at most `width`.
      rule: the rule that the tokens follow.
      width: number of tokens of a row, with padding after the text.
      prompt_length: as in `TextTokenizer`; one number for all texts, or one per text.

    Returns:
      `{"tokens": int32[n, width]}`, and an int32 per row for each of `rule.numbers`.
    """
    tokens = np.full((len(lengths), width), PADDING_ID, np.int32)
    tokens[np.arange(width) < lengths[:, None]] = ids
    numbers = {"length": lengths, "prompt_length": np.full_like(lengths, prompt_length)}
    return {"tokens": tokens} | {name: numbers[name].astype(np.int32) for name in rule.numbers}


def input_spec(rule: TextRule) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and types of an encoder's input for one text, padded to `max_tokens`."""
    number = jax.ShapeDtypeStruct((), np.int32)
    tokens = jax.ShapeDtypeStruct((rule.max_tokens,), np.int32)
    return {"tokens": tokens} | dict.fromkeys(rule.numbers, number)


def special_tokens_around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Find the ids that a tokenizer's post-processor adds before and after a text.

    Raises:
      ValueError: if the post-processor does anything else, or a sample text has no tokens.
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
            "the tokenizer has no tokens for 'x x', so its special tokens before a text cannot be "
            "distinguished from those after it; set special_tokens=False"
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
            "add_cls=True needs a tokenizer that jaxcl trained; set add_cls=False, and set "
            "special_tokens=True to add the special tokens of any other tokenizer"
        )
    cls = tokenizer.token_to_id(CLS)
    if cls is None:
        raise ValueError(
            f"the tokenizer has no token {CLS!r} to begin texts with; add it to the vocabulary, or "
            "set add_cls=False"
        )
    return [cls], []


def unknown_id(tokenizer: Tokenizer) -> int | None:
    """The id of a tokenizer's unknown token; `None` if it has none."""
    token = getattr(tokenizer.model, "unk_token", None)
    if token is not None:
        return tokenizer.token_to_id(token)
    # A Unigram model has the id only in its serialised form.
    return json.loads(tokenizer.to_str())["model"].get("unk_id")
