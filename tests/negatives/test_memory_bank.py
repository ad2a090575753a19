import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.negatives.memory_bank import (
    init_bank,
    mean_age,
    read_bank,
    update_instances,
    update_queue,
)
from jaxcl.ops.mesh import batch_sharding, make_mesh, replicated_sharding, table_sharding
from jaxcl.ops.row_tables import write_rows
from tests.helpers import unit_vectors

DIM = 4


def batches(sizes, seed=0):
    rng = np.random.default_rng(seed)
    for step, size in enumerate(sizes):
        vectors = np.asarray(unit_vectors(step, size, DIM, dtype=jnp.float32))
        yield step, vectors, rng.integers(0, 50, size), rng.integers(0, 9, size)


@pytest.mark.parametrize("num_slots", [1, 7, 12, 1_030])
def test_a_queue_holds_the_last_keys_whatever_divides(num_slots):
    bank = init_bank(num_slots, DIM)
    history = []
    for step, vectors, rows, groups in batches([5, 3, 12, 5]):
        bank = update_queue(bank, *map(jnp.asarray, (vectors, rows, groups)), num_slots=num_slots)
        history += [
            (*vector, row, group, step)
            for vector, row, group in zip(
                vectors.tolist(), rows.tolist(), groups.tolist(), strict=True
            )
        ]
        found = {
            (*vector, row, group, written)
            for vector, row, group, written in zip(
                *(np.asarray(leaf).tolist() for leaf in bank[:4]), strict=True
            )
            if written >= 0
        }
        assert found == set(history[-num_slots:])
        assert int(read_bank(bank).valid.sum()) == min(num_slots, len(history))


def test_first_in_is_first_out():
    bank = init_bank(3, DIM)
    for step in range(5):
        bank = update_queue(
            bank,
            jnp.full((1, DIM), float(step)),
            jnp.array([step]),
            jnp.array([0]),
            num_slots=3,
        )
    assert bank.ids[:3].tolist() == [3, 4, 2]
    assert int(bank.head) == 2


def test_padding_is_not_written_to_a_bank():
    rows = jnp.arange(6)
    arguments = (jnp.ones((6, DIM)), rows, rows)
    valid = jnp.array([True, False, True, True, False, True])
    bank = update_queue(init_bank(3, DIM), *arguments, num_slots=3, valid=valid)
    assert sorted(bank.ids[:3].tolist()) == [2, 3, 5]
    bank = update_instances(init_bank(6, DIM), *arguments, valid=valid)
    assert bank.ids[:6].tolist() == [0, -1, 2, 3, -1, 5]


def test_an_instance_moves_towards_its_embedding_and_stays_of_unit_norm():
    first, second = unit_vectors(0, 2, DIM, dtype=jnp.float32)
    bank = init_bank(5, DIM)
    one = (jnp.array([3]), jnp.array([8]))
    bank = update_instances(bank, first[None], *one, momentum=0.9)
    np.testing.assert_array_equal(bank.vectors[3], first)
    bank = update_instances(bank, second[None], *one, momentum=0.9)
    wanted = 0.9 * first + 0.1 * second
    np.testing.assert_allclose(bank.vectors[3], wanted / jnp.linalg.norm(wanted), rtol=1e-6)
    assert (int(bank.ids[3]), int(bank.groups[3]), int(bank.written[3])) == (3, 8, 1)
    assert read_bank(bank).valid.tolist()[:5] == [False, False, False, True, False]


def test_the_first_of_repeated_rows_is_kept():
    vectors = unit_vectors(0, 3, DIM, dtype=jnp.float32)
    rows = jnp.array([2, 1, 2])
    bank = update_instances(init_bank(4, DIM), vectors, rows, rows)
    np.testing.assert_array_equal(bank.vectors[2], vectors[0])
    valid = jnp.array([False, True, True])
    bank = update_instances(init_bank(4, DIM), vectors, rows, rows, valid=valid)
    np.testing.assert_array_equal(bank.vectors[2], vectors[2])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("update", ["queue", "instances"])
def test_any_number_of_devices_holds_the_same_slots(update, dtype):
    def run(size):
        mesh = make_mesh({"data": size}, devices=jax.devices()[:size])
        tables, whole = table_sharding(mesh), replicated_sharding(mesh)
        bank = init_bank(50, DIM, dtype=jnp.dtype(dtype))
        places = type(bank)(tables, tables, tables, tables, whole, whole, None)

        def step_fn(bank, vectors, rows, groups):
            how = {"num_slots": 50} if update == "queue" else {"momentum": 0.5}
            function = update_queue if update == "queue" else update_instances
            return function(bank, vectors, rows, groups, **how)

        rows = batch_sharding(mesh)
        compiled = jax.jit(
            step_fn,
            in_shardings=(places, rows, rows, rows),
            out_shardings=places,
            donate_argnums=0,
        )
        bank = jax.device_put(bank, places)
        for _, *batch in batches([16, 8, 16, 24]):
            bank = compiled(bank, *(jax.device_put(leaf, rows) for leaf in batch))
        assert bank.vectors.sharding == tables
        return jax.device_get(bank)

    one, many = run(1), run(8)
    for ours, theirs in zip(one[:-1], many[:-1], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert one.vectors.dtype == dtype


@pytest.mark.parametrize(
    ("num_slots", "dim", "message"),
    [
        (2_000, DIM, "num_slots=2000, but the bank has 1024"),
        (5, DIM + 1, f"vectors have {DIM + 1} features, but the bank's have {DIM}"),
    ],
)
def test_a_batch_for_another_bank_is_named(num_slots, dim, message):
    labels = jnp.arange(3)
    with pytest.raises(ValueError, match=message):
        update_queue(init_bank(5, DIM), jnp.ones((3, dim)), labels, labels, num_slots=num_slots)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="num_slots=0 must be at least 1"):
        init_bank(0, DIM)
    with pytest.raises(ValueError, match="dtype=int8 is not a float; use float32"):
        init_bank(1, DIM, dtype="int8")
    with pytest.raises(ValueError, match=r"momentum=1\.0; set it to at least 0 and below 1"):
        update_instances(
            init_bank(1, DIM),
            jnp.ones((1, DIM)),
            jnp.zeros(1, int),
            jnp.zeros(1, int),
            momentum=1.0,
        )


def test_the_age_of_many_old_slots_does_not_overflow():
    bank = init_bank(2**20, 1)._replace(
        written=jnp.zeros(2**20, jnp.int32).at[: 2**19].set(-1), updates=jnp.int32(6_001)
    )
    assert float(mean_age(bank)) == pytest.approx(6_000, rel=1e-5)
    assert float(mean_age(init_bank(4, 1))) == 0


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_a_negative_row_is_written_nowhere(momentum):
    rows, groups = jnp.array([-1, 0, -3]), jnp.zeros(3, int)
    vectors = unit_vectors(0, 3, DIM, dtype=jnp.float32)
    bank = update_instances(init_bank(4, DIM), vectors, rows, groups, momentum=momentum)
    assert np.flatnonzero(bank.written >= 0).tolist() == [0]
    valid = jnp.array([True, False, True])
    bank = update_instances(init_bank(4, DIM), vectors, rows, groups, valid=valid)
    assert not (bank.written >= 0).any()


def test_a_table_has_no_entry_of_a_negative_row():
    table = jnp.zeros((4, 1))
    rows, entries = jnp.array([-1, 2, 2]), jnp.array([[5.0], [6.0], [7.0]])
    assert write_rows(table, rows, entries).tolist() == [[0], [0], [6], [0]]
