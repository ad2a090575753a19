"""Rows of files are matched with the rows of a split by id."""

import numpy as np
import pytest

from jaxcl.data.row_guides import read_guides
from jaxcl.data.row_ids import match_rows
from jaxcl.data.row_negatives import read_negatives
from jaxcl.data.row_topics import read_topics
from jaxcl.data.sources import InMemoryPairs

IDS = ["d", "b", "a"]
"""The ids of the split's rows."""
FILE_IDS = ["a", "b", "c", "d"]


def split(ids=IDS):
    return InMemoryPairs(["q"] * len(ids), ["k"] * len(ids), metadata={"id": ids})


def read(function, path, *, ids=FILE_IDS, field="id", pairs=None, **arrays):
    pairs = pairs or split()
    np.savez(path / "file.npz", ids=ids, id_field=np.array(field), **arrays)
    options = {"scored": "teacher_scores" in arrays} if function is read_negatives else {}
    return function(path / "file.npz", num_rows=len(pairs), pairs=pairs, **options)


def test_topics_go_to_the_rows_of_their_ids(tmp_path):
    assert read(read_topics, tmp_path, topic=[10, 11, 12, 13]).topic.tolist() == [13, 11, 10]


def test_guides_go_to_the_rows_of_their_ids(tmp_path):
    vectors = np.array([[1.0], [2], [3], [4]])
    guides = read(read_guides, tmp_path, query=vectors, key=-vectors)
    assert guides.query.tolist() == [[4], [2], [1]]
    assert guides.key.tolist() == [[-4], [-2], [-1]]


def test_negatives_go_to_the_rows_of_their_ids_and_are_renumbered(tmp_path, capsys):
    rows = np.array([[1, 3], [-1, 0], [0, 1], [1, 2]])  # b d, - a, a b, b c
    scores = np.arange(12.0).reshape(4, 3)
    negatives = read(read_negatives, tmp_path, rows=rows, teacher_scores=scores)
    assert negatives.rows.tolist() == [[1, -1], [-1, 2], [1, 0]]  # d: b -, b: - a, a: b d
    assert negatives.teacher_scores.tolist() == scores[[3, 1, 0]].tolist()
    assert "1 negatives are not in the training split" in capsys.readouterr().err


def test_ids_may_be_integers(tmp_path):
    pairs = split([np.int32(7), np.int32(3)])
    topics = read(read_topics, tmp_path, ids=np.array([3, 7]), topic=[0, 1], pairs=pairs)
    assert topics.topic.tolist() == [1, 0]


def test_more_rows_than_are_read_at_once_are_matched(monkeypatch):
    monkeypatch.setattr("jaxcl.data.row_ids._ROWS_AT_ONCE", 2)
    assert match_rows(np.array(FILE_IDS), split(), field="id").tolist() == [3, 1, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": ["a", "b", "c", "e"]}, "ids lacks 'd', the id of row 0; add it"),
        ({"ids": [1, 2, 3, 4]}, "ids lacks 'd'"),
        ({"ids": ["a", "b", "b", "d"]}, "ids contains 'b' twice"),
        ({"field": "name"}, r"id_field='name' is not read; add it to data\.metadata_fields"),
        ({"pairs": split(["d", "b", "d"])}, "rows 0 and 2 have the same id 'd'"),
        ({"pairs": split([["d"], ["b"]])}, r"ids lacks \['d'\]"),
        ({"ids": [FILE_IDS]}, r"use texts or integers, one per row"),
        ({"ids": np.ones(4)}, "ids is float64"),
        ({"field": 3}, r"id_field is int64\[\]; use a text"),
        ({"topic": [0, 1, 2]}, r"use integers of shape \[4\]"),
    ],
)
def test_ids_that_do_not_match_are_an_error_that_names_the_file(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        read(read_topics, tmp_path, **{"topic": [0, 1, 2, 3]} | changes)
    assert str(caught.value).startswith(f"data.topics={tmp_path / 'file.npz'}")


@pytest.mark.parametrize("lacking", ["ids", "id_field"])
def test_ids_and_their_field_go_together(tmp_path, lacking):
    arrays = {"ids": np.array(FILE_IDS), "id_field": np.array("id"), "topic": np.arange(4)}
    del arrays[lacking]
    np.savez(tmp_path / "file.npz", **arrays)
    with pytest.raises(ValueError, match="id_field"):
        read_topics(tmp_path / "file.npz", num_rows=3, pairs=split())


def test_negatives_beyond_the_file_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"rows has \[4\] in row 2; use rows from 0 to 3"):
        read(read_negatives, tmp_path, rows=np.array([[4], [0], [1], [2]]))
