"""One compiled search serves many numbers of rows: capacities, and recompilations."""

import contextlib

import jax
import numpy as np
import pytest

from jaxcl.assignment import PRESETS, Gcbs, assign, assign_topics
from jaxcl.assignment.bisection import Effort
from jaxcl.assignment.sizes import EXACT_ROWS, capacity_for, sizes_of

QUICK = Effort(starts=1, directions=1, walks=1, swaps=1, refinements=1)
SETTINGS = {
    "rcm_device": Gcbs(method="rcm_device", neighbours=3),
    "exact": Gcbs(neighbours=3, effort=QUICK),
    "clustered": Gcbs(graph="clustered", neighbours=3, cluster_size=64, probes=2, effort=QUICK),
}
EVERY_SETTING = [
    "rcm_device",
    pytest.param("exact", marks=pytest.mark.slow),
    pytest.param("clustered", marks=pytest.mark.slow),
]


@contextlib.contextmanager
def compilations():
    """Collects JAX's events of tracing, lowering and compiling."""
    events = []

    def note(event, seconds, **details):
        if event.startswith("/jax/core/compile"):
            events.append((event, details))

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


def sides_of(num_rows, dim=5):
    rng = np.random.default_rng(num_rows)
    return [rng.normal(size=(num_rows, dim)).astype(np.float32) for _ in range(2)]


@pytest.mark.parametrize("name", EVERY_SETTING)
def test_other_numbers_of_rows_compile_nothing(name):
    options = {"block_size": 64, "settings": SETTINGS[name]}
    with compilations() as events:
        assign(*sides_of(1_020), **options)
    assert events  # the listener receives compilations
    for num_rows in (1_021, 1_024, 961):
        with compilations() as events:
            order = assign(*sides_of(num_rows), **options)
        assert not events
        assert sorted(order.tolist()) == list(range(num_rows))


@pytest.mark.parametrize("name", EVERY_SETTING)
def test_topics_of_other_sizes_compile_nothing(name):
    options = {"num_topics": 7, "settings": SETTINGS[name], "temperature": 0.1}
    assign_topics(*sides_of(1_020), **options)
    with compilations() as events:
        topics = assign_topics(*sides_of(1_000), **options)  # blocks of 143 rows, not of 146
    assert not events
    assert np.bincount(topics).tolist() == [143] * 6 + [142]


def test_fewer_rows_than_neighbours_compile_nothing_again():
    options = {"block_size": 4, "settings": Gcbs(method="rcm_device", neighbours=24)}
    assign(*sides_of(100), **options)
    with compilations() as events:
        order = assign(*sides_of(7), **options)
    assert not events
    assert sorted(order.tolist()) == list(range(7))


@pytest.mark.parametrize("first", [1, 1_000, 4_090, 2**20 - 5, 2**31 - 20])
def test_a_capacity_holds_all_rows_and_few_more(first):
    numbers = range(first, first + 20)
    capacities = [capacity_for(num_rows) for num_rows in numbers]
    assert sorted(capacities) == capacities
    for num_rows, capacity in zip(numbers, capacities, strict=True):
        assert num_rows <= capacity <= max(1_024, num_rows * 9 / 8)
        assert capacity_for(capacity) == capacity


def test_there_are_eight_capacities_per_doubling():
    capacities = {capacity_for(num_rows) for num_rows in range(1_025, 8_193)}
    assert len(capacities) == 3 * 8


@pytest.mark.parametrize(
    ("settings", "tables"),
    [
        (SETTINGS["rcm_device"], (False, False)),
        (SETTINGS["exact"], (True, False)),
        (SETTINGS["clustered"], (True, True)),
        (SETTINGS["rcm_device"]._replace(graph="clustered"), (False, True)),
    ],
)
def test_only_tables_that_are_read_are_arguments(settings, tables):
    sizes = sizes_of(100, block_size=8, batch_size=16, settings=settings)
    assert tuple(table is not None for table in (sizes.blocks, sizes.clusters)) == tables
    assert (sizes.num_rows, sizes.batch_size) == (100, 16)


def test_the_graph_is_exact_up_to_a_number_of_rows():
    light = PRESETS["light"]
    kinds = [
        sizes_of(num_rows, block_size=8, batch_size=8, settings=light).clusters is None
        for num_rows in (EXACT_ROWS, EXACT_ROWS + 1)
    ]
    assert kinds == [True, False]
