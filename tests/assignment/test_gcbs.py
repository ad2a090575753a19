"""From embeddings to an order of the rows: the same on any mesh, by every method."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxcl.assignment import METHODS, PRESETS, Gcbs, assign, assign_topics, make_order
from jaxcl.assignment.bisection import Effort
from jaxcl.assignment.build_graph import graph_of
from jaxcl.assignment.place import Place
from jaxcl.assignment.sizes import sizes_of
from jaxcl.ops.mesh import make_mesh, put_rows
from tests.helpers import unit_vectors

TOPICS, SIZE, DIM = 15, 8, 16
ROWS = TOPICS * SIZE - 3  # does not divide over any mesh
SIZES = {"block_size": SIZE, "batch_size": 2 * SIZE}  # the same size, which saves a compilation
QUICK = Effort(directions=4, swaps=4, refinements=2)
SETTINGS = {
    "exact": Gcbs(neighbours=9, effort=QUICK),
    "clustered": Gcbs(graph="clustered", neighbours=9, cluster_size=16, probes=4, effort=QUICK),
    "rcm_device": Gcbs(method="rcm_device", neighbours=5),
    "rcm": Gcbs(method="rcm", quantile=0.95),
}


def topical(seed=0, noise=0.45):
    """Pairs of planted topics in a random order, and the topic of each."""
    rng = np.random.default_rng(seed)
    topic = rng.permutation(np.repeat(np.arange(TOPICS), SIZE))[:ROWS]
    centres = np.asarray(unit_vectors(seed, TOPICS, DIM, dtype=jnp.float32))
    sides = [
        centres[topic] + noise * np.asarray(unit_vectors(seed + n, ROWS, DIM, dtype=jnp.float32))
        for n in (1, 2)
    ]
    return *sides, topic


@functools.cache
def compiled(name, devices):
    mesh = make_mesh({"data": devices}, devices=jax.devices()[:devices])
    return mesh, make_order(mesh, num_rows=ROWS, settings=SETTINGS[name], **SIZES)


def ordered(name, devices, *, seed=0, keep_apart=()):
    queries, keys, _ = topical()
    return compiled(name, devices)[1](queries, keys, 0.1, jax.random.key(seed), keep_apart)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("exact", marks=pytest.mark.smoke),
        pytest.param("clustered", marks=pytest.mark.slow),
        "rcm_device",
        "rcm",
    ],
)
def test_each_method_brings_topics_together_on_any_mesh(name):
    topic = topical()[2]
    one, eight = (ordered(name, devices) for devices in (1, 8))
    np.testing.assert_array_equal(one.rows, eight.rows)
    assert sorted(one.rows.tolist()) == list(range(ROWS))
    assert one.rows.dtype == np.int32
    # Neighbours in the order that share a topic: 1 in 16 of a random order.
    assert (topic[one.rows][1:] == topic[one.rows][:-1]).mean() > 0.4
    assert (one.device_bytes > 0) == (name != "rcm")


def test_the_order_depends_on_the_seed():
    assert (ordered("exact", 1).rows != ordered("exact", 1, seed=1).rows).any()


def test_a_mesh_may_hold_more_rows_than_the_data_set():
    queries, keys, _ = topical()
    mesh, order = compiled("exact", 8)
    rng = np.random.default_rng(0)
    more = [
        np.concatenate([side, rng.normal(size=(1_024 - ROWS, DIM))]) for side in (queries, keys)
    ]
    placed = [put_rows(side.astype(np.float32), mesh, num_rows=1_024) for side in more]
    found = order(*placed, 0.1, jax.random.key(0))
    assert sorted(found.rows.tolist()) == list(range(ROWS))
    # The drawn directions do not depend on the shape, so nothing else changes.
    np.testing.assert_array_equal(found.rows, ordered("exact", 8).rows)


def test_equal_labels_do_not_attract_each_other():
    topic = topical()[2].astype(np.int32)
    found, without = (ordered("exact", 8, keep_apart=labels).rows for labels in ((topic,), ()))
    together = [(topic[order][1:] == topic[order][:-1]).mean() for order in (found, without)]
    assert together[0] < together[1] - 0.1


def test_two_arrays_are_enough_to_assign_batches():
    queries, keys, topic = topical()
    options = {"block_size": SIZE, "settings": SETTINGS["exact"]}  # whole batches
    order = assign(queries, keys, **options)
    whole = order[: ROWS // SIZE * SIZE].reshape(-1, SIZE)
    most = np.mean([np.bincount(topic[block]).max() for block in whole]) / SIZE
    assert most > 0.7
    # Neither lengths nor types matter.
    other = assign(3 * queries, keys.astype(np.float16), **options)
    assert sorted(other.tolist()) == list(range(ROWS))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "kmeans"}, "method='kmeans' is unknown; use one of bisection"),
        ({"graph": "nn"}, "graph='nn' is unknown"),
        ({"neighbours": 0}, "neighbours=0; set it to at least 1"),
        ({"quantile": 1.0}, "quantile=1.0"),
        ({"quantile": float("nan")}, "quantile=nan"),
        ({"similarity_cap": float("nan")}, "similarity_cap=nan"),
        ({"similarity_cap": 1.5}, "similarity_cap=1.5; set it to at least -1, at most 1"),
        ({"effort": Effort(eagerness=float("nan"))}, "eagerness=nan"),
        ({"effort": Effort(starts=0)}, "starts=0; set it to at least 1"),
        ({"effort": Effort(swaps=-1)}, "swaps=-1; set it to at least 0"),
        ({"effort": Effort(eagerness=0.0)}, r"eagerness=0\.0; set it above 0, at most 1"),
        ({"method": "rcm", "similarity_cap": 0.9}, "similarity_cap=0.9; set them to None"),
        ({"method": "rcm", "graph": "exact"}, "ignores graph='exact' and similarity_cap=None"),
    ],
)
def test_invalid_settings_are_named(changes, message):
    queries, keys, _ = topical()
    with pytest.raises(ValueError, match=message):
        assign(queries, keys, block_size=8, settings=Gcbs(**changes))


def test_a_preset_may_be_named_and_changed():
    assert Gcbs(preset="light") == PRESETS["light"]
    assert Gcbs(preset="light", neighbours=8) == PRESETS["light"]._replace(neighbours=8)
    assert isinstance(Gcbs(preset="full"), Gcbs)
    with pytest.raises(ValueError, match="preset='fast' is unknown; use one of full, light"):
        Gcbs(preset="fast")


@pytest.mark.usefixtures("unchecked_annotations")
def test_embeddings_of_other_types_are_those_of_float32():
    queries, keys, _ = topical()
    assign_them = functools.partial(assign, block_size=SIZE, settings=SETTINGS["rcm"])
    expected = assign_them(queries, keys)
    for as_given in (np.ndarray.tolist, lambda side: side.astype(">f4"), jnp.asarray):
        np.testing.assert_array_equal(assign_them(as_given(queries), as_given(keys)), expected)
    texts = np.array([["a", "b"]] * ROWS)
    with pytest.raises(TypeError, match="queries has the type"):
        assign_them(texts, texts)
    with pytest.raises(ValueError, match="1 embeddings that are not finite in float32"):
        assign_them(np.where(np.arange(ROWS)[:, None] == 3, 1e39, queries.astype(float)), keys)
    topics = assign_topics(
        queries.tolist(), keys.tolist(), num_topics=np.int64(5), settings=SETTINGS["rcm"]
    )
    assert np.bincount(topics).max() == -(-ROWS // 5)


def test_invalid_embeddings_are_named():
    queries, keys, _ = topical()
    for other in (keys[:-1], keys[:, :-1], keys[0]):
        with pytest.raises(ValueError, match="with equally many features"):
            assign(queries, other, block_size=8)
    broken = keys.copy()
    broken[[3, 5]] = np.array([[np.nan], [np.inf]])
    with pytest.raises(ValueError, match=r"keys has 2 embeddings that are not finite.* is row 3"):
        assign(queries, broken, block_size=8)
    for batch_size in (4, 12, 0):
        with pytest.raises(ValueError, match="a batch holds whole blocks"):
            assign(queries, keys, block_size=8, batch_size=batch_size)
    assert set(METHODS) == {"bisection", "rcm_device", "rcm"}


def test_invalid_labels_and_temperatures_are_named():
    queries, keys, topic = topical()
    for labels in (topic[:-1], np.append(topic, 0)):
        with pytest.raises(ValueError, match="give one of each per row"):
            assign(queries, keys, block_size=8, keep_apart=(labels.astype(np.int32),))
    for temperature in (0.0, -1.0, np.nan):
        with pytest.raises(ValueError, match="set it above 0"):
            assign(queries, keys, block_size=8, temperature=temperature)


def test_other_types_of_the_same_shape_are_ordered_too():
    queries, keys, topic = topical()
    options = {"settings": SETTINGS["exact"], **SIZES}
    for dtype, label in ((np.float32, np.int32), (np.float16, np.int8)):
        keep_apart = (topic.astype(label),)
        found = assign(queries.astype(dtype), keys.astype(dtype), keep_apart=keep_apart, **options)
        assert sorted(found.tolist()) == list(range(ROWS))
    sides = jnp.asarray(queries), keys.tolist()
    np.testing.assert_array_equal(assign(*sides, **options), assign(queries, keys, **options))


@pytest.mark.slow
@pytest.mark.parametrize("graph", ["exact", "clustered"])
def test_more_neighbours_than_rows_and_values_of_padding_change_nothing(graph):
    queries, keys, _ = topical()
    settings = Gcbs(graph=graph, cluster_size=8, probes=2, effort=QUICK)
    found = []
    for devices, more in ((1, 0), (8, 0), (8, 1)):
        mesh = make_mesh({"data": devices}, devices=jax.devices()[:devices])
        order = make_order(mesh, num_rows=20, block_size=4, batch_size=4, settings=settings)
        sides = [side[:20] for side in (queries, keys)]
        if more:
            rows = [np.concatenate([side, 5 * side[:4]]) for side in sides]
            sides = [put_rows(side, mesh, num_rows=24) for side in rows]
        found.append(order(*sides, 0.1, jax.random.key(0)).rows)
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[1], found[2])


def test_labels_of_64_bits_stay_different():
    queries, keys, topic = topical()
    options = {"settings": SETTINGS["exact"], **SIZES}
    orders = [
        assign(queries, keys, keep_apart=(labels,), **options)
        # In 32 bits, all of these would be equal.
        for labels in (topic, topic.astype(np.int64) << 32)
    ]
    np.testing.assert_array_equal(*orders)


@pytest.mark.parametrize("graph", ["exact", "clustered"])
def test_rows_of_zeros_have_no_neighbours_and_are_none(graph):
    # As in an instance bank in which every second row has been written. If zero rows could be
    # neighbours, the first of these ties would fill all lists.
    queries, keys, _ = topical()
    met = (np.arange(ROWS) % 2 == 0)[:, None]
    settings = Gcbs(graph=graph, neighbours=9, cluster_size=16, probes=8)
    mesh = make_mesh({"data": 8})
    sides = [
        put_rows((met * side).astype(np.float32), mesh, num_rows=ROWS) for side in (queries, keys)
    ]
    found = graph_on(mesh, *sides, settings=settings)
    rows = np.asarray(found.rows)[:ROWS]
    assert (rows[~met[:, 0]] == -1).all()
    assert (rows[met[:, 0]] >= 0).all()
    assert met[rows[rows >= 0]].all()


def graph_on(mesh, queries, keys, *, settings):
    """The graph that an order is computed from."""
    rows = PartitionSpec("data")

    def of_shard(queries, keys):
        return graph_of(
            queries,
            keys,
            (),
            sizes=sizes_of(ROWS, block_size=SIZE, batch_size=SIZE, settings=settings),
            capacity=ROWS,
            temperature=jnp.float32(0.1),
            settings=settings,
            key=jax.random.key(0),
            place=Place("data", queries.shape[0]),
        )[0]

    program = jax.shard_map(of_shard, mesh=mesh, in_specs=(rows, rows), out_specs=rows)
    return jax.jit(program)(queries, keys)


def test_the_paper_s_method_takes_long_vectors_in_half_precision():
    queries, keys, _ = topical()
    halves = [(300 * side).astype(np.float16) for side in (queries, keys)]  # squares overflow
    wide = [side.astype(np.float32) for side in halves]
    settings = SETTINGS["rcm"]
    np.testing.assert_array_equal(
        assign(*halves, block_size=SIZE, settings=settings),
        assign(*wide, block_size=SIZE, settings=settings),
    )


@pytest.mark.parametrize("name", ["exact", "rcm_device", "rcm"])
def test_nonfinite_pairs_are_treated_as_never_written(name):
    queries, keys, _ = topical()
    blank, bad = ((queries.copy(), keys.copy()) for _ in range(2))
    for place in (3, 40):
        blank[0][place] = blank[1][place] = 0
    bad[0][3], bad[1][3] = np.nan, 0
    bad[0][40], bad[1][40, 2] = 0, np.inf
    order = compiled(name, 1)[1]
    found, expected = (order(*sides, 0.1, jax.random.key(0)).rows for sides in (bad, blank))
    np.testing.assert_array_equal(found, expected)


def test_assign_says_when_it_compiles_and_how_far_it_is():
    queries, keys, _ = topical()
    lines = []
    settings = SETTINGS["rcm_device"]._replace(neighbours=4)  # which no other test compiles
    options = {"block_size": 4, "settings": settings, "report": lines.append}
    first = assign(queries[:50], keys[:50], **options)
    search = "searching for the order of 50 rows on 8 devices"
    assert lines == ["compiling the search for up to 1,024 rows", search]
    np.testing.assert_array_equal(assign(queries[:50], keys[:50], **options), first)
    assert lines[2:] == [search]  # compiled already


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("exact", marks=pytest.mark.slow),
        pytest.param("clustered", marks=pytest.mark.slow),
        "rcm_device",
    ],
)
def test_padding_to_a_capacity_changes_no_order(name):
    # `assign` pads to 1,024 rows; `make_order` only as much as the devices need.
    queries, keys, topic = topical()
    options = {"temperature": 0.1, "keep_apart": (topic,), "settings": SETTINGS[name], **SIZES}
    found = assign(queries, keys, **options)
    np.testing.assert_array_equal(found, ordered(name, 8, keep_apart=(topic,)).rows)


def test_the_paper_s_method_says_how_many_rows_it_has_compared():
    queries, keys, _ = topical()
    lines = []
    assign_topics(queries, keys, num_topics=5, settings=SETTINGS["rcm"], report=lines.append)
    assert lines == [f"compared {ROWS} of {ROWS} rows with all others"]
