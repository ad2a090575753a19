"""A guide model's embeddings by row number: batches, and errors for wrong files."""

import numpy as np
import pytest

from jaxcl.data.row_guides import guide_dim, read_guides

QUERY, KEY = np.arange(6.0).reshape(3, 2), np.arange(6.0, 12).reshape(3, 2)


def spoilt(value):
    """Embeddings with this value in row 1."""
    vectors = np.ones((3, 2))
    vectors[1, 1] = value
    return vectors


def written(path, **arrays):
    np.savez(path / "guides.npz", **arrays)
    return path / "guides.npz"


def test_a_batch_holds_the_embeddings_of_its_rows(tmp_path):
    path = written(tmp_path, query=QUERY, key=KEY)
    guides = read_guides(path, num_rows=3)
    found = guides.columns(np.array([2, 0]))
    assert found["query"].tolist() == [[4, 5], [0, 1]]
    assert found["key"].tolist() == [[10, 11], [6, 7]]
    assert found["key"].dtype == np.float32
    assert guide_dim(path) == 2
    other = read_guides(written(tmp_path, query=QUERY, key=QUERY), num_rows=3)
    assert other.fingerprint != guides.fingerprint


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"query": QUERY}, "cannot be read: it has no key"),
        ({"query": QUERY[:2], "key": KEY[:2]}, r"use floats of shape \[3, 2\]"),
        ({"query": QUERY[:, :1], "key": KEY}, r"query is float64\[3, 1\]"),
        ({"query": QUERY.astype(int), "key": KEY}, "query is int64"),
        ({"query": spoilt(np.nan), "key": KEY}, "query has .* in row 1; use finite"),
        ({"query": QUERY, "key": spoilt(-np.inf)}, "key has .* in row 1; use finite"),
        ({"query": QUERY, "key": spoilt(1e39)}, "key has .* in row 1; use finite"),
        ({"query": QUERY, "key": spoilt(1e20)}, "key has .* in row 1; use embeddings of norm 1"),
        ({"query": QUERY * 1e-8, "key": KEY}, "query has .* in row 0; use embeddings of norm 1"),
        ({"query": QUERY[:, :0], "key": KEY[:, :0]}, r"use \[rows, width\]"),
        ({"query": QUERY, "key": KEY[0]}, r"use \[rows, width\]"),
    ],
)
def test_a_wrong_file_is_an_error_that_names_the_problem(tmp_path, arrays, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_guides(written(tmp_path, **arrays), num_rows=3)
    assert str(caught.value).startswith(f"data.guides={tmp_path / 'guides.npz'}")


def test_an_embedding_of_zeros_is_similar_to_none_and_allowed(tmp_path):
    path = written(tmp_path, query=np.zeros((3, 2)), key=KEY.astype(np.float16))
    found = read_guides(path, num_rows=3).columns(np.array([0]))
    assert found["query"].tolist() == [[0, 0]]
    assert found["key"].tolist() == [[6, 7]]


@pytest.mark.parametrize("content", [None, b"", b"no archive"])
def test_a_missing_or_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "guides.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"data\.guides=.*guides\.npz cannot be read"):
        read_guides(path, num_rows=3)
