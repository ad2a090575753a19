"""Tokenize the texts of one side of a split, each with the prompt of its data set."""

from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

from jaxcl.data.row_prompts import RowPrompts
from jaxcl.data.text_rule import TextRule, TextTokenizer
from jaxcl.typing import Int, Integer

__all__ = ["RowTokenizer"]

_OTHER_PREFIX = 2**32 - 1
"""An id that no token has."""


class RowTokenizer:
    """Tokenize the texts of consecutive rows.

    Args:
      tokenizer: as for `TextTokenizer`.
      rule: the side's rule.
      prompts: the rows' prompts, which replace the rule's prompt; with `None`, all rows have the
        rule's prompt.
      side: the side.

    Attributes:
      rule: the rule that describes the inputs of all rows. It has a prompt if any row has one.
      prompt_length: for each data set, the number of tokens that pooling leaves out if the rule
        excludes prompts; a single number without `prompts`.
      num_ids: one more than the tokenizer's largest id.

    Raises:
      ValueError: as in `TextTokenizer`; the message names the setting of the prompt.
    """

    def __init__(
        self, tokenizer: Tokenizer, rule: TextRule, prompts: RowPrompts | None, side: str
    ) -> None:
        self.rule, self._prompts = rule, prompts
        self.prompt_length: int | Int[np.ndarray, " s"]
        if prompts is None:
            self._texts = [TextTokenizer(tokenizer, rule)]
            self.prompt_length = self._texts[0].prompt_length
        else:
            self._texts = [
                _text(tokenizer, rule._replace(prompt=prompt), f"{setting}.{side}")
                for setting, prompt in zip(prompts.settings, prompts.prompts[side], strict=True)
            ]
            self.rule = max((text.rule for text in self._texts), key=lambda rule: bool(rule.prompt))
            # Without a prompt, pooling includes special tokens.
            lengths = [text.prompt_length if text.rule.prompt else 0 for text in self._texts]
            self.prompt_length = np.array(lengths)
        self.num_ids = self._texts[0].num_ids

    def tokenize(
        self, texts: Sequence[str], *, what: str, first: int
    ) -> list[Int[np.ndarray, " _"]]:
        """The token ids of each text, as in `TextTokenizer.tokenize`.

        Args:
          texts: the texts of consecutive rows.
          what: a name for the texts, for messages.
          first: the number of the first row.
        """
        if self._prompts is None:
            return self._texts[0].tokenize(texts, what=what, first=first)
        return [
            ids
            for number, part in self._prompts.parts(first, first + len(texts))
            for ids in self._texts[number].tokenize(
                texts[part], what=what, first=first + part.start
            )
        ]

    def without_prompts(
        self, rows: Sequence[Integer[np.ndarray, " _"]], *, first: int
    ) -> Sequence[Integer[np.ndarray, " _"]]:
        """The ids for comparing texts, without the prompts if rows have different prompts.

        If all rows have the same prompt, these are the unchanged ids. If a prompt and a text run
        together into one token, the text is compared including its prompt.

        Args:
          rows: the ids of consecutive rows.
          first: the number of the first row.
        """
        if self._prompts is None:
            return rows
        return [
            _after(ids, self._texts[number].prefix)
            for number, part in self._prompts.parts(first, first + len(rows))
            for ids in rows[part]
        ]


def _text(tokenizer: Tokenizer, rule: TextRule, setting: str) -> TextTokenizer:
    try:
        return TextTokenizer(tokenizer, rule)
    except ValueError as error:
        raise ValueError(f"{setting}: {error}") from error


def _after(ids: Integer[np.ndarray, " _"], prefix: tuple[int, ...]) -> Integer[np.ndarray, " _"]:
    if np.array_equal(ids[: len(prefix)], prefix):
        return ids[len(prefix) :]
    return np.array([_OTHER_PREFIX, *prefix, _OTHER_PREFIX, *ids], np.uint32)
