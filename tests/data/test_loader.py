"""The loader: the same batches from any step, over any number of hosts, on any mesh."""

import jax
import numpy as np
import pytest

from jaxcl.assignment import uniform_rows
from jaxcl.data.loader import _LocalBatches, training_batches
from jaxcl.data.sources import InMemoryPairs
from jaxcl.data.table import table_batch
from jaxcl.data.text_rule import TextRule
from jaxcl.data.token_table import build_token_table
from jaxcl.data.tokenizer import train_tokenizer
from jaxcl.ops.mesh import batch_sharding, make_mesh

NUM_ROWS, BATCH_SIZE, STEPS = 37, 16, 7  # over three epochs, with batches across their ends


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    queries = [f"number {i}" for i in range(NUM_ROWS)]
    keys = [f"return {i} + {i // 10}" for i in range(NUM_ROWS)]
    return build_token_table(
        InMemoryPairs(queries, keys, groups=range(NUM_ROWS)),
        train_tokenizer([*queries, *keys], vocabulary_size=40),
        rules={"query": TextRule(3), "key": TextRule(5)},
        directory=tmp_path_factory.mktemp("tokens"),
    )


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({"data": -1})


def rows_of(step: int) -> np.ndarray:
    return uniform_rows(step, num_rows=NUM_ROWS, batch_size=BATCH_SIZE, seed=3)


def read(table, mesh, *, first_step=0, last_step=STEPS, rows_fn=rows_of):
    batches = training_batches(table, rows_fn, mesh, first_step=first_step, last_step=last_step)
    return list(batches)


def assert_equal(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_each_batch_holds_the_rows_of_its_step(table, mesh):
    batches = read(table, mesh)
    assert len(batches) == STEPS
    for step, batch in enumerate(batches):
        assert_equal(jax.device_get(batch), table_batch(table, rows_of(step)))
    assert len({tuple(batch["row"].tolist()) for batch in batches}) == STEPS


def test_a_run_resumed_at_any_step_reads_the_same_batches(table, mesh):
    whole = read(table, mesh)
    for first_step in range(STEPS + 1):
        resumed = read(table, mesh, first_step=first_step)
        assert len(resumed) == STEPS - first_step
        for found, wanted in zip(resumed, whole[first_step:], strict=True):
            assert_equal(found, wanted)


def test_the_last_step_ends_the_run_and_changes_no_batch(table, mesh):
    whole = read(table, mesh)
    shorter = read(table, mesh, first_step=2, last_step=5)
    assert len(shorter) == 5 - 2
    for found, wanted in zip(shorter, whole[2:5], strict=True):
        assert_equal(found, wanted)


@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 2, "model": 4}])
def test_rows_are_spread_over_all_axes_of_the_mesh(table, axes):
    mesh = make_mesh(axes)
    batch = read(table, mesh, last_step=1)[0]
    wanted = table_batch(table, rows_of(0))
    assert_equal(jax.device_get(batch), wanted)
    for array in jax.tree.leaves(batch):
        assert array.sharding == batch_sharding(mesh)
        assert len(array.sharding.device_set) == 8
    shards = sorted(batch["row"].addressable_shards, key=lambda shard: shard.index[0].start)
    per_device = BATCH_SIZE // 8
    for i, shard in enumerate(shards):
        rows = wanted["row"][i * per_device : (i + 1) * per_device]
        np.testing.assert_array_equal(shard.data, rows)


def test_the_mesh_does_not_change_the_batches(table):
    row, grid = (read(table, make_mesh(axes)) for axes in ({"a": 8}, {"a": 4, "b": 2}))
    for ours, theirs in zip(row, grid, strict=True):
        assert_equal(jax.device_get(ours), jax.device_get(theirs))


@pytest.mark.parametrize("num_processes", [1, 2, 4, 16])
def test_the_parts_of_all_processes_make_up_the_batch(table, monkeypatch, num_processes):
    source = _LocalBatches(table, rows_of, STEPS)
    for step in (0, 2, STEPS - 1):
        parts = []
        for process in range(num_processes):
            with monkeypatch.context() as simulated:
                simulated.setattr(jax, "process_count", lambda: num_processes)
                simulated.setattr(jax, "process_index", lambda process=process: process)
                parts.append(source[step])
        assert [len(part["row"]) for part in parts] == [BATCH_SIZE // num_processes] * num_processes
        whole = jax.tree.map(lambda *rows: np.concatenate(rows), *parts)
        assert_equal(whole, table_batch(table, rows_of(step)))


def test_a_batch_that_the_processes_cannot_share_is_an_error(table, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    with pytest.raises(ValueError, match="equal division"):
        _LocalBatches(table, rows_of, STEPS)[0]


def test_an_error_in_the_rows_reaches_the_reader(table, mesh):
    def rows_fn(step):
        if step == 2:
            raise LookupError("no rows for step 2")
        return rows_of(step)

    with pytest.raises(LookupError, match="no rows for step 2"):
        read(table, mesh, rows_fn=rows_fn)


def test_a_reader_that_stops_early_can_be_followed_by_another(table, mesh):
    for _ in range(3):
        batches = training_batches(table, rows_of, mesh, first_step=0, last_step=10**6)
        next(batches)
        batches.close()
    assert len(read(table, mesh)) == STEPS
