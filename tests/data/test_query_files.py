"""Queries with positives: common field names are found, and every bad record is named."""

import json

import pytest

from jaxcl.data.query_files import read_judged_queries, read_queries


def write(path, *records):
    lines = (one if isinstance(one, str) else json.dumps(one) for one in records)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_equal_queries_are_one_with_all_positives(tmp_path):
    path = write(
        tmp_path / "pairs.jsonl",
        {"query": "a", "pos": ["1", "2"], "neg": ["9"]},
        {"query": "b", "pos": "3"},
        {"query": "a", "pos": ["2", "4"]},
    )
    found = read_queries(path)
    assert found.queries == ["a", "b"]
    assert found.positives == [["1", "2", "4"], ["3"]]
    assert (found.records, found.by_id) == (3, False)
    assert found.where[1].endswith("line 2")
    assert found.fields == "queries from 'query', positives from 'pos', not used: neg"


@pytest.mark.parametrize(
    ("query", "positive"),
    [("anchor", "positive"), ("question", "answer"), ("query", "positives"), ("query", "key")],
)
def test_common_names_are_known(tmp_path, query, positive):
    found = read_queries(write(tmp_path / "pairs.jsonl", {query: "a", positive: "1"}))
    assert (found.queries, found.positives) == (["a"], [["1"]])


def test_ids_are_texts_or_integers(tmp_path):
    path = write(
        tmp_path / "q.jsonl",
        {"query": "a", "positive_ids": [7, "d8"]},
        {"query": "b", "positive_ids": "d9"},
    )
    found = read_queries(path)
    assert found.by_id
    assert found.positives == [["7", "d8"], ["d9"]]


def test_tables_are_read(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_bytes(b'\xef\xbb\xbfquestion,answer\r\nwhy,"because,\r\nof it"\r\nhow,so\r\n')
    found = read_queries(path)
    assert found.queries == ["why", "how"]
    assert [text.replace("\r", "") for (text,) in found.positives] == ["because,\nof it", "so"]


def test_given_fields_are_read(tmp_path):
    path = write(tmp_path / "q.jsonl", {"title": "a", "query": "no", "body": "1", "pos": "no"})
    found = read_queries(path, query_field="title", positive_field="body")
    assert (found.queries, found.positives) == (["a"], [["1"]])


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "q.jsonl has no queries"),
        ([{"a": "x", "pos": "1"}], "line 1: none of the fields a, pos is known to hold queries"),
        ([{"query": "x", "b": "1"}], "known to hold positives; name it with --positive-field"),
        (
            [{"query": "x", "pos": "1", "positive_ids": "d"}],
            "line 1 has several fields that could hold positives: pos, positive_ids",
        ),
        ([{"query": "x", "question": "y", "pos": "1"}], "several fields that could hold queries"),
        ([{"query": "x", "pos": "1"}, {"pos": "1"}], "line 2: there is no field 'query'"),
        ([{"query": "x", "pos": "1"}, {"query": "y", "pos": []}], "line 2: pos is empty"),
        ([{"query": "x", "pos": "1"}, {"query": "y"}], "line 2: pos is empty"),
        ([{"query": "x", "pos": ["1", " "]}], "line 1: pos is empty; give a text"),
        ([{"query": " ", "pos": "1"}], "line 1: query is empty; give a text"),
        ([{"query": "x", "pos": [1.5]}], "line 1: pos is 1.5, which is not a text"),
        ([{"query": "x", "pos": {"t": "1"}}], "which is not a text"),
        ([{"query": "x", "positive_ids": [True]}], "positive_ids is True, which is not a text"),
        ([{"query": 3, "pos": "1"}], "line 1: query is 3, which is not a text"),
        (["{"], "line 1 is not JSON"),
    ],
)
def test_a_bad_record_is_named(tmp_path, records, message):
    with pytest.raises(ValueError, match=message):
        read_queries(write(tmp_path / "q.jsonl", *records))


def test_a_given_field_must_exist(tmp_path):
    path = write(tmp_path / "q.jsonl", {"query": "a", "pos": "1"})
    with pytest.raises(ValueError, match="no field 'text'; it has query, pos"):
        read_queries(path, query_field="text")


def test_labelled_queries_have_the_documents_above_zero(tmp_path):
    path = write(
        tmp_path / "queries.jsonl",
        {"_id": "q1", "text": "a"},
        {"_id": "q2", "text": "b"},
        {"_id": "q3", "text": "a"},
        {"_id": "q4", "text": "not judged"},
    )
    qrels = {"q1": {"d1": 2, "d2": 0, "d3": 1}, "q2": {"d2": -1}, "q3": {"d4": 1, "d1": 1}}
    found = read_judged_queries(path, qrels)
    assert found.queries == ["a"]
    assert found.positives == [["d1", "d3", "d4"]]
    assert found.own_ids == [["q1", "q3"]]
    assert (found.by_id, found.records) == (True, 4)
    with pytest.raises(ValueError, match=r"name query 'q9', which .*queries\.jsonl lacks"):
        read_judged_queries(path, {"q9": {"d1": 1}})
    with pytest.raises(ValueError, match=r"no query .* has a document of relevance above 0"):
        read_judged_queries(path, {"q2": {"d2": 0}})
