"""The pool of a corpus: copies count once, and positives are found by text or id."""

import json

import pytest

from jaxcl.data.documents import read_documents
from jaxcl.data.mining_pool import mining_pool, positives_as_documents
from jaxcl.data.query_files import read_judged_queries, read_queries

CORPUS = (
    {"_id": "d0", "text": "a cat"},
    {"_id": "d1", "text": "a dog"},
    {"_id": "d2", "text": " a  cat\n"},
    {"_id": "d3", "text": ""},
    {"_id": "d4", "title": "A", "text": "bird"},
    {"_id": "d5", "text": "which pet?"},
    {"_id": "d6", "text": "a dog"},
)


def write(path, records):
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


@pytest.fixture
def documents(tmp_path):
    return read_documents(write(tmp_path / "corpus.jsonl", CORPUS))


def queries_of(tmp_path, *records):
    return read_queries(write(tmp_path / "queries.jsonl", records))


def test_the_first_of_equal_documents_is_the_key(documents, tmp_path):
    pool = mining_pool(documents, queries_of(tmp_path, {"query": "which pet?", "pos": "a dog"}))
    assert pool.rows.tolist() == [0, 1, 3, 4, 5]
    assert pool.candidates.tolist() == [True, True, False, True, True]  # d3 has no text
    assert pool.read([3, 0, 1]) == ["A bird", "a cat", "a dog"]
    assert pool.counts() == {
        "documents": 7,
        "copies of documents": 2,
        "documents without text": 1,
        "positives outside of the corpus": 0,
    }


def test_positives_are_found_by_text(documents, tmp_path):
    queries = queries_of(
        tmp_path,
        {"query": "which pet?", "pos": ["a\tcat", "a fish", "a cat", "A bird"]},
        {"query": "other", "pos": ["a  fish ", "a frog"]},
    )
    pool = mining_pool(documents, queries)
    assert pool.positives == [[0, 5, 3], [5, 6]]
    assert pool.positive_texts == [["a\tcat", "a fish", "A bird"], ["a  fish ", "a frog"]]
    assert pool.outside == ["a fish", "a frog"]
    assert pool.candidates.tolist() == [True, True, False, True, True, False, False]
    assert pool.excluded == [[4], []]  # the query is document d5
    assert pool.read([6, 1, 5]) == ["a frog", "a dog", "a fish"]
    assert pool.num_keys == 7
    assert pool.find(["a frog", "", "A  bird", "absent", "a cat"]).tolist() == [6, 2, 3, -1, 0]


def test_positives_are_found_by_id(documents, tmp_path):
    queries = queries_of(tmp_path, {"query": "pet", "positive_ids": ["d6", "d2", "d1"]})
    pool = mining_pool(documents, queries)
    assert pool.positives == [[1, 0]]  # d6 and d1 have the same text
    assert pool.positive_texts is None
    unknown = queries_of(tmp_path, {"query": "pet", "positive_ids": ["d1", "d9"]})
    empty = queries_of(tmp_path, {"query": "pet", "positive_ids": ["d1", "d3"]})
    with pytest.raises(ValueError, match="line 1: the positive 'd3' has no text"):
        mining_pool(documents, empty)  # training would reject the line
    with pytest.raises(ValueError, match="line 1: no document of the corpus has the id 'd9'"):
        mining_pool(documents, unknown)


def test_a_document_with_the_id_of_a_query_is_excluded(documents, tmp_path):
    path = write(
        tmp_path / "queries.jsonl", [{"_id": "d4", "text": "x"}, {"_id": "q", "text": "y"}]
    )
    pool = mining_pool(documents, read_judged_queries(path, {"d4": {"d0": 1}, "q": {"d1": 1}}))
    assert pool.positives == [[0], [1]]
    assert pool.excluded == [[3], []]


def test_a_positive_excludes_the_document_that_has_it_after_a_title(tmp_path):
    long = "a bird that flies at night and eats mice"  # nine words
    documents = read_documents(
        write(
            tmp_path / "corpus.jsonl",
            [
                {"title": "Owls", "text": long},
                {"title": "Owls", "text": "a bird"},
                {"text": f"{long} too"},
                {"text": f"the{long}"},
            ],
        )
    )
    queries = queries_of(
        tmp_path,
        {"query": "hunts in the dark", "pos": f" {long}\n"},
        {"query": "flies", "pos": "a bird"},  # many documents may end with a short text
        {"query": "both", "pos": ["a bird", long]},
    )
    pool = mining_pool(documents, queries)
    assert pool.positives == [[4], [5], [5, 4]]
    assert pool.excluded == [[0], [], [0]]


def test_without_a_corpus_the_positives_are_the_documents(tmp_path):
    queries = queries_of(
        tmp_path, {"query": "a", "pos": ["1", "2"]}, {"query": "b", "pos": ["2", "3"]}
    )
    documents = positives_as_documents(queries)
    assert documents.read(range(3)) == ["1", "2", "3"]
    other = positives_as_documents(queries_of(tmp_path, {"query": "a", "pos": ["1", "2", "4"]}))
    assert documents.fingerprint != other.fingerprint
    pool = mining_pool(documents, queries)
    assert pool.positives == [[0, 1], [1, 2]]
    with pytest.raises(ValueError, match="ids of documents; give the documents with --corpus"):
        positives_as_documents(queries_of(tmp_path, {"query": "a", "positive_ids": "d1"}))
