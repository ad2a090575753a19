"""Scores of pairs from a file: found by text, and every bad record is named."""

import json

import numpy as np
import pytest

from jaxcl.data.documents import read_documents
from jaxcl.data.mining_pool import mining_pool
from jaxcl.data.query_files import read_queries
from jaxcl.data.score_files import read_pair_scores


def write(path, *records):
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


@pytest.fixture
def scored(tmp_path):
    """Reads scores for two queries and three documents; the second query's positive is outside."""
    documents = read_documents(write(tmp_path / "c.jsonl", *({"text": one} for one in "xyz")))
    records = {"query": "a", "pos": "x"}, {"query": "b", "pos": "w"}
    queries = read_queries(write(tmp_path / "q.jsonl", *records))
    pool = mining_pool(documents, queries)

    def read(*records):
        return read_pair_scores(write(tmp_path / "s.jsonl", *records), queries.queries, pool)

    return read


def triple(query, document, score):
    return {"query": query, "document": document, "score": score}


def test_scores_are_found_by_text(scored):
    found = scored(
        triple("b", " y\n", 0.5),
        triple("b", "w", 2),
        triple("absent", "x", 1.0),
        triple("a", "absent", 1.0),
        triple("a", "z", -1.5),
        triple("b", "y", 0.5),  # again
    )
    assert (len(found.scores), found.unknown) == (3, 2)
    scores = found.of(np.array([1, 0]), np.array([[1, 3, 0, -1], [2, 1, -1, 3]]))
    np.testing.assert_array_equal(
        scores, [[0.5, 2.0, np.nan, np.nan], [-1.5, np.nan, np.nan, np.nan]]
    )
    other = scored(triple("b", "y", 0.5), triple("b", "w", 2), triple("a", "z", -1.25))
    assert other.fingerprint != found.fingerprint


def test_mined_lines_hold_scores_of_positives_and_negatives(scored):
    line = {"query": "a", "positives": ["x"], "negatives": ["z", "y"]}
    line["teacher_scores"] = {"positives": [3], "negatives": [1, 2]}
    found = scored(line)
    assert found.of(np.array([0]), np.array([[0, 1, 2]])).tolist() == [[3.0, 2.0, 1.0]]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (triple("a", "x", float("nan")), "line 2: score is nan; give a finite number"),
        (triple("a", "x", float("inf")), "score is inf"),
        (triple("a", "x", 1e300), "score is 1e[+]300"),
        (triple("a", "x", True), "score is True"),
        (triple("a", "x", "high"), "score is 'high'"),
        ({"query": "a", "document": "x"}, "score is None"),
        ({"query": "a", "score": 1}, "there is no field 'document'"),
        ({"document": "x", "score": 1}, "there is no field 'query'"),
        (triple("b", "y", 0.25), "line 2 gives a second score for 'b' and 'y'"),
        (
            {"query": "a", "positives": ["x"], "negatives": [], "teacher_scores": [1]},
            "teacher_scores.positives are not lists",
        ),
        (
            {
                "query": "a",
                "positives": ["x"],
                "negatives": ["y"],
                "teacher_scores": {"positives": [1], "negatives": []},
            },
            "line 2 has 1 negatives, but 0 scores for them",
        ),
    ],
)
def test_a_bad_record_is_named(scored, record, message):
    with pytest.raises(ValueError, match=message):
        scored(triple("b", "y", 0.5), record)


def test_a_file_without_a_known_pair_is_named(scored):
    with pytest.raises(ValueError, match=r"s\.jsonl scores no pair of these queries"):
        scored(triple("absent", "x", 1))
