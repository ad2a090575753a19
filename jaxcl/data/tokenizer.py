"""A byte-pair tokenizer for code and prose, trained on the training rows and kept in one file.

The tokenizers of pretrained encoders use the same file format.
"""

import functools
import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from jaxcl.host.files import read_text
from jaxcl.host.paths import AnyPath
from jaxcl.typing import PADDING_ID

__all__ = [
    "CLS",
    "UNKNOWN",
    "check_texts",
    "load_pretrained_tokenizer",
    "load_tokenizer",
    "tokenizer_fingerprint",
    "train_tokenizer",
]

_MAX_WORD = 256
"""The longest word, in letters; longer words are split, since training time is quadratic in it."""
_MAX_BYTES = 256 * 2**20
"""The maximum size of a `tokenizer.json`; the largest in practice have 40 MB."""
PADDING, UNKNOWN, CLS = _SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]")
"""The tokens with the ids 0, 1 and 2."""


def train_tokenizer(texts: Iterable[str], *, vocabulary_size: int) -> Tokenizer:
    """Learn byte-pair merges inside the words of identifiers and prose.

    Identifiers are split at underscores, at digits and between `camel` and `Case` before case
    folding, so that `parseISODate`, `parse_iso_date` and "parse ISO date" have the same words. Each
    punctuation mark is a word.

    Args:
      texts: the queries and keys of the training rows, without any held-out rows.
      vocabulary_size: the number of ids, including the special ids: 0 padding, 1 unknown, 2 [CLS].

    Returns:
      The tokenizer; `tokenizer.save(path)` writes all of it to one file.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Replace(Regex(r"(?<=[a-z0-9])(?=[A-Z])"), " "),
            normalizers.Replace(Regex(r"(?<=[A-Z])(?=[A-Z][a-z])"), " "),
            normalizers.Lowercase(),
        ]
    )
    words = Regex(rf"[^\W\d_]{{1,{_MAX_WORD}}}|\d|[^\w\s]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(words, "removed", invert=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=list(_SPECIAL_TOKENS),
        limit_alphabet=512,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _reading_specials_as_text(tokenizer)


def load_tokenizer(path: AnyPath) -> Tokenizer:
    """Read a `tokenizer.json` with the special ids of `train_tokenizer`.

    Memory is bounded by the size of the file, but time is not: the patterns of a file from someone
    else may take very long to match a text.

    Raises:
      ValueError: if the file cannot be read as a tokenizer, its id 0 is not padding, or it
        has no unknown token; the message begins with the file's name.
    """
    return _parsed(_read(path), path, pretrained=False)


def load_pretrained_tokenizer(path: AnyPath) -> Tokenizer:
    """Read any `tokenizer.json`, such as one from a pretrained encoder.

    A special token that a text spells out, such as "</s>", is read as the special token, as in
    sentence-transformers.

    Raises:
      ValueError: if the file is not a readable tokenizer; the message begins with the file's name.
    """
    return _parsed(_read(path), path, pretrained=True)


def _read(path: AnyPath) -> str:
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the tokenizer.json in it")
    try:
        return read_text(path, limit=_MAX_BYTES)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a readable tokenizer.json: {error}") from error


@functools.lru_cache(maxsize=2)  # a starting run loads its tokenizer several times
def _parsed(content: str, path: AnyPath, *, pretrained: bool) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(content)
    except Exception as error:  # the library raises the bare class
        raise ValueError(f"{path} is not a readable tokenizer.json: {error}") from error
    # A file may contain settings for padding and truncation.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if pretrained:
        return tokenizer
    if tokenizer.id_to_token(PADDING_ID) != PADDING:
        raise ValueError(
            f"{path}: token {PADDING_ID} is {tokenizer.id_to_token(PADDING_ID)!r}; "
            f"it must be {PADDING!r}, since encoders read id {PADDING_ID} as padding"
        )
    if tokenizer.token_to_id(UNKNOWN) is None:
        raise ValueError(
            f"{path} has no token {UNKNOWN!r}, which replaces texts without tokens; "
            "add it to the vocabulary"
        )
    return _reading_specials_as_text(tokenizer)


def _reading_specials_as_text(tokenizer: Tokenizer) -> Tokenizer:
    # Code about tokenizers spells out "[PAD]", which must not become padding. Files do not store
    # this setting.
    tokenizer.encode_special_tokens = True
    return tokenizer


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """The sha256 of a tokenizer's whole definition, in hex."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def check_texts(texts: Sequence[Any], *, what: str, first: int = 0) -> None:
    """Check that values are texts.

    Args:
      texts: the values.
      what, first: a name for the values and the number of the first value, for messages.

    Raises:
      ValueError: if a value is not a `str`, or not Unicode.
    """
    for number, text in enumerate(texts, start=first):
        if not isinstance(text, str):
            raise ValueError(f"{what} {number} is {type(text).__name__}, {text!r}; give a text")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{what} {number} is not Unicode ({error})") from error
