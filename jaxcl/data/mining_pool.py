"""The keys for hard-negative mining: distinct documents and the queries' positives."""

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxcl.data.documents import Documents
from jaxcl.data.query_files import QueryFile
from jaxcl.host.files import digest_of
from jaxcl.typing import Bool, Int, Integer

__all__ = ["MiningPool", "mining_pool", "positives_as_documents"]

_BLOCK = 10_000
_TAIL_WORDS = 8
"""The minimum length of a positive, in words, to exclude documents that end with it."""


class MiningPool(NamedTuple):
    """Keys with their texts, and the positives and excluded keys of each query.

    Texts that differ only in white space count as equal. Only the first of several equal documents
    is a key, so that no query has the same negative twice. Positives that are not in the corpus
    follow the documents.

    Attributes:
      documents: the corpus.
      rows: for each key from the corpus, its row in `documents`; the keys in `outside` follow.
      outside: the texts of positives that are not in the corpus.
      digests: a hash of each key's text.
      candidates: the keys that may be negatives: all documents with a text.
      positives: for each query, the keys that are its positives, by number.
      positive_texts: for each query, the texts of its positives as written in the file of queries;
        `None` if the file gives ids.
      excluded: for each query, further keys that must not be its negatives, by number: documents
        with the query's text or id, and documents that end with one of its positives (of at least
        8 words), as in a corpus where the title precedes the text.
    """

    documents: Documents
    rows: Int[np.ndarray, " _"]
    outside: Sequence[str]
    digests: Integer[np.ndarray, " k"]
    candidates: Bool[np.ndarray, " k"]
    positives: Sequence[Sequence[int]]
    positive_texts: Sequence[Sequence[str]] | None
    excluded: Sequence[Sequence[int]]

    @property
    def num_keys(self) -> int:
        """The number of keys."""
        return len(self.rows) + len(self.outside)

    def read(self, rows: Sequence[int] | Integer[np.ndarray, " n"]) -> list[str]:
        """The texts of these keys, in the order given."""
        numbers = np.asarray(rows, np.int64)
        inside = numbers < len(self.rows)
        texts = iter(self.documents.read(self.rows[numbers[inside]]))
        return [
            next(texts) if is_inside else self.outside[number - len(self.rows)]
            for number, is_inside in zip(numbers.tolist(), inside, strict=True)
        ]

    def find(self, texts: Sequence[str]) -> Int[np.ndarray, " n"]:
        """The number of the key with each text; −1 where there is none."""
        order = np.argsort(self.digests)
        digests = np.array(_digests(texts), np.uint64)
        positions = np.searchsorted(self.digests, digests, sorter=order)
        rows = order[np.minimum(positions, self.num_keys - 1)]
        return np.where(self.digests[rows] == digests, rows, -1)

    def counts(self) -> dict[str, int]:
        """Count the documents, copies, empty documents, and positives outside of the corpus."""
        return {
            "documents": len(self.documents),
            "copies of documents": len(self.documents) - len(self.rows),
            "documents without text": int((~self.candidates[: len(self.rows)]).sum()),
            "positives outside of the corpus": len(self.outside),
        }


def mining_pool(documents: Documents, queries: QueryFile) -> MiningPool:
    """Build the pool of keys from a corpus and from queries with their positives.

    Raises:
      ValueError: if no document has the id of a positive, or that document has no text; the message
        names the line.
    """
    digests = _digests_of(documents)
    values, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    by_document = np.argsort(np.argsort(first))  # distinct digest -> key, in the order of documents
    key_of_value = dict(zip(values.tolist(), by_document.tolist(), strict=True))
    rows = np.sort(first)
    have_text = digests[rows] != _digests([""])[0]
    outside: dict[int, str] = {}
    if queries.by_id:
        positives, excluded = _by_id(documents, queries, by_document[inverse], have_text)
        texts = None
    else:
        positives, texts = _by_text(queries, key_of_value, outside)
        excluded = [[] for _ in queries.queries]
    for digest, keys in zip(_digests(queries.queries), excluded, strict=True):
        if digest in key_of_value:
            keys.append(key_of_value[digest])
    titled = _ending_with(list(outside.values()), documents, rows)
    for keys, positive_keys in zip(excluded, positives, strict=True):
        keys += [row for key in positive_keys for row in titled.get(key - len(rows), ())]
    outside_digests = np.array(list(outside), np.uint64)
    return MiningPool(
        documents,
        rows,
        list(outside.values()),
        np.append(digests[rows], outside_digests),
        np.append(have_text, np.zeros(len(outside), bool)),
        positives,
        texts,
        excluded,
    )


def positives_as_documents(queries: QueryFile) -> Documents:
    """The distinct positives of all queries as a corpus.

    Raises:
      ValueError: if the positives are ids of documents.
    """
    import pyarrow  # not at the top, because the import is slow

    if queries.by_id:
        raise ValueError("the positives are ids of documents; give the documents with --corpus")
    texts = list(dict.fromkeys(text for positives in queries.positives for text in positives))
    fingerprint = digest_of("\n".join(f"{len(text)} {text}" for text in texts).encode())
    column = pyarrow.chunked_array([pyarrow.array(texts, pyarrow.large_string())])
    return Documents([str(row) for row in range(len(texts))], column, fingerprint=fingerprint)


def _by_id(
    documents: Documents,
    queries: QueryFile,
    key_of_document: Int[np.ndarray, " n"],
    have_text: Bool[np.ndarray, " k"],
) -> tuple[list[list[int]], list[list[int]]]:
    """The keys that are each query's positives, and the keys with the query's id, by number."""
    keys = dict(zip(documents.ids, key_of_document.tolist(), strict=True))
    positives = []
    for where, names in zip(queries.where, queries.positives, strict=True):
        if unknown := next((name for name in names if name not in keys), None):
            raise ValueError(f"{where}: no document of the corpus has the id {unknown!r}")
        if empty := next((name for name in names if not have_text[keys[name]]), None):
            raise ValueError(
                f"{where}: the positive {empty!r} has no text; remove it from the line"
            )
        positives.append(list(dict.fromkeys(keys[name] for name in names)))
    own_keys = [[keys[name] for name in names if name in keys] for names in queries.own_ids]
    return positives, own_keys


def _by_text(
    queries: QueryFile, key_of_value: dict[int, int], outside: dict[int, str]
) -> tuple[list[list[int]], list[list[str]]]:
    """The keys and texts of each query's positives; adds new texts to `outside`."""
    positives, texts = [], []
    numbers: dict[int, int] = {}
    for query_positives in queries.positives:
        distinct: dict[int, str] = {}
        for digest, text in zip(_digests(query_positives), query_positives, strict=True):
            row = key_of_value.get(digest)
            if row is None:
                outside.setdefault(digest, text)
                row = len(key_of_value) + numbers.setdefault(digest, len(numbers))
            distinct.setdefault(row, text)
        positives.append(list(distinct))
        texts.append(list(distinct.values()))
    return positives, texts


def _ending_with(
    texts: Sequence[str], documents: Documents, rows: Int[np.ndarray, " _"]
) -> Mapping[int, list[int]]:
    """Index of a text -> the keys of longer documents that end with it."""
    tails = collections.defaultdict(list)
    for number, text in enumerate(texts):
        words = text.split()
        if len(words) >= _TAIL_WORDS:
            tails[tuple(words[-_TAIL_WORDS:])].append((number, " ".join(words)))
    keys = collections.defaultdict(list)
    for first in range(0, len(rows) if tails else 0, _BLOCK):
        for key, text in enumerate(documents.read(rows[first : first + _BLOCK]), first):
            words = text.split()
            for number, tail in tails.get(tuple(words[-_TAIL_WORDS:]), ()):
                if " ".join(words).endswith(f" {tail}"):
                    keys[number].append(key)
    return keys


def _digests_of(documents: Documents) -> Integer[np.ndarray, " n"]:
    blocks = [
        _digests(documents.read(range(first, min(first + _BLOCK, len(documents)))))
        for first in range(0, len(documents), _BLOCK)
    ]
    return np.array([digest for block in blocks for digest in block], np.uint64)


def _digests(texts: Iterable[str]) -> list[int]:
    """A 64-bit hash of each text that ignores differences in white space."""
    return [int(digest_of(" ".join(text.split()).encode())[:16], 16) for text in texts]
