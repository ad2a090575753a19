"""Labels of rows: equal for connected rows, in the order of first rows, in linear memory."""

import tracemalloc

import numpy as np
import pytest
import scipy.sparse

from jaxcl.data.row_labels import equal_rows, joined_numbers

SIZES = [1, 2, 3, 17, 200]


def by_first_appearance(values):
    numbers = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values.tolist()])


def components(queries, keys):
    """SciPy's components, in the order of their first rows."""
    size = int(queries.max()) + 1
    edges = scipy.sparse.coo_array((np.ones(len(queries)), (queries, size + keys)))
    size = max(edges.shape)
    edges.resize(size, size)
    part = scipy.sparse.csgraph.connected_components(edges, directed=False)[1]
    return by_first_appearance(part[queries])


@pytest.mark.parametrize("num_rows", SIZES)
def test_rows_share_a_number_if_equal_sides_connect_them(num_rows):
    rng = np.random.default_rng(num_rows)
    for distinct in (1, num_rows // 2 + 1, num_rows, 3 * num_rows):
        for _ in range(20):
            queries, keys = (rng.integers(0, distinct, num_rows) for _ in range(2))
            found = joined_numbers(queries, keys)
            np.testing.assert_array_equal(found, components(queries, keys))
            assert found.dtype == np.int32


@pytest.mark.parametrize("in_order", [True, False])
def test_a_chain_of_any_length_and_order_is_one_component(in_order):
    num_rows = 5_000
    place = np.arange(num_rows)
    if not in_order:
        place = np.random.default_rng(0).permutation(num_rows)
    connected = joined_numbers(place // 2, (place + 1) // 2)
    assert not connected.any()
    cut = joined_numbers(place // 2, (place + 1) // 2 + (place >= 2_500) * num_rows)
    assert sorted(np.bincount(cut)) == [2_500, num_rows - 2_500]


def test_an_equal_query_is_not_an_equal_key():
    assert joined_numbers(np.array([0, 1]), np.array([1, 0])).tolist() == [0, 1]


@pytest.mark.parametrize("num_rows", SIZES)
def test_the_first_row_with_an_equal_digest_is_found(num_rows):
    rng = np.random.default_rng(num_rows)
    digests = rng.integers(0, 3, (num_rows, 2)).astype(np.uint64) << np.uint64(62)
    rows = digests.tolist()
    wanted = [rows.index(row) for row in rows]
    found = equal_rows(digests)
    assert found.tolist() == wanted
    assert found.dtype == np.int32


def test_both_halves_of_a_digest_matter():
    digests = np.array([[1, 2], [1, 3], [4, 2], [1, 2]], np.uint64)
    assert equal_rows(digests).tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize(
    ("distinct", "bytes_per_row"), [(50_000, 64), (10, 64)], ids=["all distinct", "few distinct"]
)
def test_labels_take_a_few_bytes_a_row(distinct, bytes_per_row):
    num_rows = 50_000
    digests = np.random.default_rng(0).integers(0, distinct, (num_rows, 2)).astype(np.uint64)
    tracemalloc.start()
    try:
        first = equal_rows(digests)
        joined_numbers(first, first[::-1])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < bytes_per_row * num_rows
