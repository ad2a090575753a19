"""Pictures of an assignment: the values of cells, and the file format."""

import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.ops.mesh import batch_sharding, make_mesh
from jaxcl.run import picture
from jaxcl.run.picture import coarse_similarity, similarity_picture
from tests.helpers import relative_error, unit_vectors

CLUSTERS, MEMBERS, DIM = 6, 8, 16
ROWS = CLUSTERS * MEMBERS


def clustered(dtype=jnp.float32):
    """Rows around six centres in turn, so that consecutive rows are dissimilar."""
    centres = unit_vectors(0, CLUSTERS, DIM, dtype=dtype)[np.arange(ROWS) % CLUSTERS]
    return [centres + 0.3 * unit_vectors(seed, ROWS, DIM, dtype=dtype) for seed in (1, 2)]


BEFORE = np.arange(ROWS)
AFTER = BEFORE.reshape(MEMBERS, CLUSTERS).T.ravel()


def by_all_pairs(queries, keys, order, cells):
    """Block means of the whole matrix without its diagonal."""
    matrix = np.asarray(queries) @ np.asarray(keys).T
    np.fill_diagonal(matrix, np.nan)
    runs = [[] for _ in range(cells)]
    for place, row in enumerate(order):
        runs[place * cells // len(order)].append(row)
    return np.array([[np.nanmean(matrix[np.ix_(a, b)]) for b in runs] for a in runs])


@pytest.mark.parametrize("cells", [1, 5, 6, 24])
@pytest.mark.parametrize("num_rows", [ROWS, 31])
def test_a_cell_is_the_mean_of_its_pairs(num_rows, cells, x64):
    sides = clustered(jnp.float64)
    order = np.random.default_rng(0).permutation(ROWS)[:num_rows]
    cells = min(cells, num_rows // 2)
    found = coarse_similarity(*sides, order, cells=cells)
    assert relative_error(found, by_all_pairs(*sides, order, cells)) < 1e-12


def test_a_cell_of_one_row_has_no_negative():
    found = coarse_similarity(*clustered(), AFTER, cells=ROWS)
    np.testing.assert_array_equal(np.isnan(found), np.eye(ROWS, dtype=bool))


def test_own_keys_do_not_brighten_the_diagonal():
    sides = [jnp.eye(8)] * 2
    assert (coarse_similarity(*sides, np.arange(8), cells=4) == 0).all()


def test_sharded_rows_give_the_same_and_stay_where_they_are(x64):
    sides = clustered(jnp.float64)
    sharded = jax.device_put(sides, batch_sharding(make_mesh({"data": 8})))
    one, many = (coarse_similarity(*some, AFTER, cells=12) for some in (sides, sharded))
    np.testing.assert_allclose(many, one, rtol=1e-12)
    program = picture._sums.lower(*sharded, np.zeros(ROWS, np.int32), 12).compile()
    assert "all-reduce" in program.as_text()
    assert "all-gather" not in program.as_text()


def test_batches_of_one_cluster_are_brighter_than_their_surroundings():
    own = np.eye(CLUSTERS, dtype=bool)
    before, after = (
        coarse_similarity(*clustered(), order, cells=CLUSTERS) for order in (BEFORE, AFTER)
    )
    assert after[own].min() > after[~own].max() + 0.2
    assert before[own].max() < after[own].min() - 0.2
    everywhere = [
        matrix.sum() * MEMBERS**2 - matrix[own].sum() * MEMBERS for matrix in (before, after)
    ]
    assert everywhere[0] == pytest.approx(everywhere[1], rel=1e-5)  # only the order changed


@pytest.mark.parametrize(
    ("num_batches", "batch_size", "cells"),
    [(4, 64, 256), (16, 8, 64), (100, 7, 200), (300, 64, 256)],
)
def test_cells_hold_a_pair_and_do_not_cross_batches_where_there_are_enough(
    num_batches, batch_size, cells
):
    found = picture._cells(num_batches, batch_size, most=cells)
    assert found <= cells
    assert num_batches * batch_size >= 2 * found
    assert (found % num_batches == 0) == (num_batches <= cells)


def drawn(monkeypatch, tmp_path, *, batch_size, order=AFTER):
    """The drawn values, and the file."""
    seen = []
    draw = picture._draw
    monkeypatch.setattr(picture, "_draw", lambda *parts: seen.append(parts) or draw(*parts))
    path = tmp_path / "similarity.png"
    similarity_picture(*clustered(), BEFORE, order, batch_size=batch_size, path=path, cells=32)
    assert [file.name for file in tmp_path.iterdir()] == ["similarity.png"]
    return *seen[0], path.read_bytes()


def size_of(png):
    """Width and height, from the first chunk of the file."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert png[12:16] == b"IHDR"
    assert png[-8:-4] == b"IEND"
    return struct.unpack(">II", png[16:24])


def test_few_batches_are_one_pair_of_pictures(monkeypatch, tmp_path):
    panels, title, png = drawn(monkeypatch, tmp_path, batch_size=MEMBERS)
    assert [panel.title for panel in panels] == ["before, all 6 batches", "after, all 6 batches"]
    assert [panel.similarities.shape for panel in panels] == [(24, 24)] * 2
    assert "48 rows in batches of 8" in title
    width, height = size_of(png)
    assert 1_000 < width < 2_000
    assert 500 < height < 1_000
    assert len(png) < 2**20


def test_many_batches_are_shown_closely_and_as_a_whole(monkeypatch, tmp_path):
    panels, _, png = drawn(monkeypatch, tmp_path, batch_size=2)
    assert [panel.batches for panel in panels] == [16, 16, 24, 24]
    assert panels[0].title == "before, first 16 batches"
    assert panels[3].title == "after, all 24 batches"
    width, height = size_of(png)
    assert 1_000 < width < 2_000
    assert 1_000 < height < 2_000


def test_the_title_says_how_similar_the_rows_of_a_batch_are(monkeypatch, tmp_path):
    _, title, _ = drawn(monkeypatch, tmp_path, batch_size=MEMBERS)
    queries, keys = map(np.asarray, clustered())
    matrix = queries @ keys.T
    np.fill_diagonal(matrix, np.nan)
    means = [
        np.nanmean([matrix[np.ix_(batch, batch)] for batch in order.reshape(CLUSTERS, MEMBERS)])
        for order in (BEFORE, AFTER)
    ]
    assert means[1] > means[0] + 0.2
    wanted = f"{means[0]:.3f} before, {means[1]:.3f} after; over all rows {np.nanmean(matrix):.3f}"
    assert title.endswith(wanted)


@pytest.mark.parametrize(
    "change",
    [{"batch_size": 49}, {"batch_size": 1}, {"cells": 0}, {"after": AFTER[1:]}],
    ids=lambda change: next(iter(change)),
)
def test_mistakes_are_named(tmp_path, change):
    given = {"before": BEFORE, "after": AFTER, "batch_size": 8, "path": tmp_path / "a.png"}
    with pytest.raises(ValueError, match="give two orders of the same length"):
        similarity_picture(*clustered(), **given | change)
    assert not list(tmp_path.iterdir())
