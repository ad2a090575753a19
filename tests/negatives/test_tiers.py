"""Draws from a bank: their number and strata, equal on any mesh, and the cost of fetching."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxcl.negatives.draws import draw_slots, priorities
from jaxcl.negatives.memory_bank import MemoryBank, init_bank
from jaxcl.negatives.tiers import DrawSource, TierBudgets, draw_tiers, strata_of
from jaxcl.ops.mesh import make_mesh
from jaxcl.ops.row_tables import fetch_rows
from tests.helpers import unit_vectors

SLOTS, DIM, QUERIES = 1_024, 8, 16


def bank_of(written=600, groups=4):
    rng = np.random.default_rng(0)
    slots = jnp.arange(SLOTS)
    order = jnp.asarray(rng.permutation(SLOTS))
    return init_bank(SLOTS, DIM)._replace(
        vectors=unit_vectors(0, SLOTS, DIM, dtype=jnp.float32),
        ids=slots,
        groups=jnp.asarray(rng.integers(0, groups, SLOTS)) * 10,
        written=jnp.where(order < written, 5, -1),
    )


@functools.cache
def finder(count, devices):
    mesh = make_mesh({"data": devices}, devices=jax.devices()[:devices])
    rows, whole = PartitionSpec("data"), PartitionSpec()
    find = jax.shard_map(
        lambda *parts: draw_slots(*parts, count=count, axis_name="data")[None],
        mesh=mesh,
        in_specs=(rows, rows, whole),
        out_specs=rows,
    )
    return jax.jit(find)


def drawn(key, *, count, quotas=None, stratum=None, devices=1):
    """The slots that each device draws, one row per device."""
    stratum = jnp.where(bank_of().written >= 0, 0, 1) if stratum is None else stratum
    quotas = jnp.array([count]) if quotas is None else quotas
    return np.asarray(finder(count, devices)(priorities(key, SLOTS), stratum, quotas))


@pytest.mark.parametrize("devices", [1, 8])
def test_a_uniform_draw_takes_each_written_slot_alike_and_none_twice(devices):
    written = np.flatnonzero(bank_of().written >= 0)
    times = collections.Counter()
    for step in range(60 if devices == 1 else 3):
        found = drawn(jax.random.key(step), count=50, devices=devices)
        assert (found == found[0]).all()  # equal on all devices
        assert len(set(found[0])) == 50
        assert set(found[0]) <= set(written)
        times.update(found[0].tolist())
    if devices == 1:  # 60 · 50 draws over 600 slots: 5 each, with a deviation of 2.1
        counts = np.array([times[slot] for slot in written])
        assert counts.mean() == 5
        assert 1.9 < counts.std() < 2.4
        assert counts.max() < 18


def test_draws_differ_by_step_and_not_by_the_number_of_devices():
    first, other = (drawn(jax.random.key(step), count=50) for step in (0, 1))
    assert len(set(first[0]) & set(other[0])) < 15
    np.testing.assert_array_equal(first[0], drawn(jax.random.key(0), count=50, devices=8)[0])


@pytest.mark.parametrize("devices", [1, 8])
def test_quotas_are_met_exactly_and_missing_slots_stay_empty(devices):
    bank = bank_of()
    stratum = jnp.where(bank.written >= 0, bank.groups // 10, 4)
    stratum = stratum.at[:].set(jnp.where(stratum == 2, 4, stratum)).at[7].set(2)
    quotas = jnp.array([3, 0, 5, 9])
    found = drawn(jax.random.key(0), count=17, quotas=quotas, stratum=stratum, devices=devices)[0]
    counts = collections.Counter(np.asarray(stratum)[found[found >= 0]].tolist())
    assert counts == {0: 3, 2: 1, 3: 9}  # there is only one of the third
    assert (found < 0).sum() == 4


def test_the_lowest_slots_are_drawn_among_equal_priorities():
    rng = np.random.default_rng(0)
    priority = rng.integers(0, 3, SLOTS).astype(np.uint32) * 2**30 + 5
    stratum = rng.integers(0, 3, SLOTS)
    wanted = []
    for number, quota in enumerate((50, 0, 130)):
        members = np.flatnonzero(stratum == number)
        wanted += members[np.lexsort((members, -priority[members].astype(np.int64)))][
            :quota
        ].tolist()
    for devices in (1, 8):
        find = finder(200, devices)
        found = np.asarray(find(priority, jnp.asarray(stratum), jnp.array([50, 0, 130])))
        assert (found == found[0]).all()
        assert found[0].tolist() == sorted(wanted) + [-1] * 20


def test_a_budget_above_the_bank_draws_all_of_it():
    found = drawn(jax.random.key(0), count=SLOTS, devices=8)[0]
    assert set(found[found >= 0]) == set(np.flatnonzero(bank_of().written >= 0))


@pytest.mark.parametrize(
    ("proportions", "quotas"),
    [("rows", [6, 3, 1]), ("equal", [4, 3, 3]), ({3: 1.0, 9: 3.0}, [3, 0, 7])],
)
def test_a_budget_is_divided_over_groups(proportions, quotas):
    strata = strata_of(np.repeat([3, 5, 9], [60, 30, 10]), count=10, proportions=proportions)
    assert dict(zip(strata.groups.tolist(), strata.quotas.tolist(), strict=True)) == {
        group: quota for group, quota in zip((3, 5, 9), quotas, strict=True) if quota
    }


@pytest.mark.parametrize(
    ("proportions", "message"),
    [
        ("row", "'row' is unknown; use rows, equal"),
        ({4: 1.0}, r"name groups \[4\], which have no rows"),
        ({3: -1.0}, "must be at least 0"),
        ({3: 0.0}, "must be at least 0, and not all 0"),
        ({3: float("nan")}, "must be at least 0"),
    ],
)
def test_invalid_proportions_are_named(proportions, message):
    with pytest.raises(ValueError, match=message):
        strata_of(np.array([3, 5]), count=10, proportions=proportions)


def test_rows_are_fetched_from_whichever_device_holds_them():
    mesh = make_mesh({"replica": 2, "data": 4})
    rows = PartitionSpec(mesh.axis_names)
    table = {"vectors": unit_vectors(0, 64, 3, dtype=jnp.float32), "number": jnp.arange(64)}
    wanted = jnp.asarray(np.random.default_rng(0).integers(-1, 64, (16, 5)))
    fetch = jax.shard_map(
        functools.partial(fetch_rows, axis_name=mesh.axis_names),
        mesh=mesh,
        in_specs=(rows, rows),
        out_specs=rows,
    )
    found = jax.jit(fetch)(table, wanted)
    expected = jax.tree.map(
        lambda leaf: np.where(
            (wanted >= 0).reshape(16, 5, *[1] * (leaf.ndim - 1)), np.asarray(leaf)[wanted], 0
        ),
        table,
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    weights = jnp.arange(16.0 * 5 * 3).reshape(16, 5, 3)
    there = {"vectors": table["vectors"]}

    def weighed(fetch):
        return jax.grad(lambda tables: (fetch(tables, wanted)["vectors"] * weights).sum())(there)

    alone = functools.partial(fetch_rows, axis_name=None)
    np.testing.assert_allclose(weighed(fetch)["vectors"], weighed(alone)["vectors"], rtol=1e-6)


ALL = TierBudgets(
    uniform=20, stratified=13, nearest=5, mixed=4, mixed_with_query=3, perturbed=2, hardest=7
)


def tiers_on(devices, budgets, *, bank=True, margin=None, lower=False):
    """All tiers of 16 queries, or their compiled program."""
    mesh = make_mesh({"data": devices}, devices=jax.devices()[:devices])
    rows, whole = PartitionSpec("data"), PartitionSpec()
    slots = MemoryBank(rows, rows, rows, rows, whole, whole, None)
    sides = [unit_vectors(seed, QUERIES, DIM, dtype=jnp.float32) for seed in (1, 2)]
    numbers = jnp.arange(QUERIES)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(3), numbers)
    strata = strata_of(np.arange(4) * 10, count=budgets.stratified)
    numbers_of = [priorities(jax.random.key(seed), SLOTS) for seed in range(2)]
    source = DrawSource(bank_of(), *numbers_of, strata) if bank else None
    parts = DrawSource(slots, rows, rows, whole) if bank else None

    def local(queries, keys, ids, row_keys, source):
        return draw_tiers(
            budgets,
            queries,
            keys,
            row_keys=row_keys,
            ids=ids,
            margin=margin,
            source=source,
            axis_name="data",
        )

    draw = jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=(rows, rows, rows, rows, parts), out_specs=rows)
    )
    arguments = (*sides, numbers, keys, source)
    return draw.lower(*arguments).compile() if lower else draw(*arguments)


def test_the_tiers_are_the_same_on_any_number_of_devices():
    one, many = (tiers_on(devices, ALL) for devices in (1, 8))
    assert set(one) == {
        *("uniform", "stratified", "nearest", "mixed", "mixed_with_query", "perturbed")
    }
    for name in one:
        ours, theirs = one[name], many[name]
        np.testing.assert_array_equal(ours.valid, theirs.valid[: len(ours.valid)])
        if name in ("uniform", "stratified"):  # padded to a multiple of the devices
            assert not theirs.valid[len(ours.valid) :].any()
        np.testing.assert_allclose(
            ours.vectors, theirs.vectors[: len(ours.vectors)], rtol=1e-6, atol=1e-7
        )


def test_no_slot_is_drawn_twice_and_nearest_are_the_nearest_that_are_left():
    tiers, bank = tiers_on(8, ALL), bank_of()
    by_all = [
        np.asarray(tiers[name].ids)[np.asarray(tiers[name].valid)]
        for name in ("uniform", "stratified")
    ]
    assert [len(ids) for ids in by_all] == [20, 13]
    assert len(set(np.concatenate(by_all))) == 33
    assert collections.Counter(np.asarray(bank.groups)[by_all[1]].tolist()) == {
        0: 4, 10: 3, 20: 3, 30: 3
    }  # fmt: skip
    queries = np.asarray(unit_vectors(1, QUERIES, DIM, dtype=jnp.float32))
    free = (np.asarray(bank.written) >= 0) & ~np.isin(np.arange(SLOTS), np.concatenate(by_all))
    for row, query in enumerate(queries):
        there = np.where(free & (np.arange(SLOTS) != row), np.asarray(bank.vectors) @ query, -2)
        wanted = np.argsort(-there, kind="stable")[:5]
        np.testing.assert_array_equal(tiers["nearest"].ids[row], wanted)


def test_the_nearest_tier_skips_masked_rows():
    budgets = TierBudgets(nearest=5)
    queries, keys = (unit_vectors(seed, QUERIES, DIM, dtype=jnp.float32) for seed in (1, 2))
    ceilings = (queries * keys).sum(1) - 0.2
    found = tiers_on(8, budgets, margin=0.2)["nearest"]
    similarities = jnp.einsum("qd,qnd->qn", queries, found.vectors)
    assert bool((jnp.where(found.valid, similarities, -1) <= ceilings[:, None]).all())
    without = tiers_on(8, budgets)["nearest"]
    assert bool((jnp.einsum("qd,qnd->qn", queries, without.vectors) > ceilings[:, None]).any())


def test_without_a_bank_synthetic_negatives_are_made_of_the_batch():
    one, many = (
        tiers_on(devices, TierBudgets(mixed=3, hardest=2), bank=False) for devices in (1, 8)
    )
    np.testing.assert_allclose(one["mixed"].vectors, many["mixed"].vectors, rtol=1e-5, atol=1e-6)
    queries, keys = (unit_vectors(seed, QUERIES, DIM, dtype=jnp.float32) for seed in (1, 2))
    scores = np.where(np.eye(QUERIES), -2, np.asarray(queries @ keys.T))
    for row in range(QUERIES):
        hardest = np.asarray(keys)[np.argsort(-scores[row])[:2]]
        for vector in np.asarray(one["mixed"].vectors[row]):
            _, residual, *_ = np.linalg.lstsq(hardest.T, vector, rcond=None)
            assert residual.sum() < 1e-10


def test_synthetic_negatives_may_come_from_the_batch_in_addition_to_a_bank():
    of_batch, of_bank = (tiers_on(8, ALL._replace(of_batch=flag)) for flag in (True, False))
    without = tiers_on(8, ALL._replace(uniform=0, stratified=0, nearest=0), bank=False)
    made = {"mixed", "mixed_with_query", "perturbed"}
    assert of_batch.keys() == of_bank.keys()
    assert without.keys() == made
    for name, tier in of_batch.items():
        wanted = without if name in made else of_bank
        jax.tree.map(np.testing.assert_array_equal, tier.vectors, wanted[name].vectors)
        np.testing.assert_array_equal(tier.valid, wanted[name].valid)
    assert not np.allclose(of_batch["mixed"].vectors, of_bank["mixed"].vectors, atol=1e-2)


@pytest.mark.parametrize("gradient", [True, False])
def test_gradients_of_synthetic_negatives_reach_the_batch(gradient):
    queries, keys = (unit_vectors(seed, QUERIES, DIM, dtype=jnp.float32) for seed in (1, 2))
    budgets = TierBudgets(mixed=3, hardest=2, gradient=gradient, of_batch=True)
    numbers = jnp.arange(QUERIES)
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(3), numbers)

    def first_of_all(keys, bank):
        source = DrawSource(bank_of()) if bank else None
        tiers = draw_tiers(budgets, queries, keys, row_keys=row_keys, ids=numbers, source=source)
        return tiers["mixed"].vectors[..., 0].sum()

    with_bank, without = (jax.grad(first_of_all)(keys, bank) for bank in (True, False))
    np.testing.assert_array_equal(with_bank, without)
    assert bool((with_bank != 0).any()) == gradient


def test_a_guide_masks_the_sources_of_synthetic_negatives():
    queries, keys = (unit_vectors(seed, QUERIES, DIM, dtype=jnp.float32) for seed in (1, 2))
    guides = tuple(unit_vectors(seed, QUERIES, DIM, dtype=jnp.float32) for seed in (4, 5))
    numbers = jnp.arange(QUERIES)
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(3), numbers)
    bank = bank_of()._replace(guides=bank_of().vectors)

    def made(bank):
        found = draw_tiers(
            TierBudgets(mixed=3, hardest=2, of_batch=True),
            queries,
            keys,
            row_keys=row_keys,
            ids=numbers,
            margin=0.0,
            guides=guides,
            source=None if bank is None else DrawSource(bank),
        )
        return np.asarray(found["mixed"].vectors)

    found = made(bank)
    np.testing.assert_array_equal(found, made(None))
    judged, scores = np.asarray(guides[0] @ guides[1].T), np.asarray(queries @ keys.T)
    several = 0
    for row in range(QUERIES):
        allowed = np.flatnonzero(judged[row] < judged[row, row])
        hardest = np.asarray(keys)[allowed[np.argsort(-scores[row, allowed])[:2]]]
        several += len(hardest) == 2
        for vector in found[row] if len(hardest) == 2 else ():
            _, residual, *_ = np.linalg.lstsq(hardest.T, vector, rcond=None)
            assert residual.sum() < 1e-10
    assert several > QUERIES / 2


def test_no_device_receives_more_of_the_bank_than_it_draws():
    budgets = TierBudgets(uniform=24, nearest=5)
    program = tiers_on(8, budgets, lower=True).as_text()
    largest = max(collective_sizes(program))
    per_query = QUERIES // 8 * budgets.nearest * DIM
    whole_queries, counts_of_digits = QUERIES * DIM, 256
    assert largest <= max(per_query, whole_queries, counts_of_digits)
    assert largest < SLOTS // 8 * DIM  # a device's share of the bank; no device receives another's
    everything = TierBudgets(full_bank=True)
    assert not collective_sizes(tiers_on(8, everything, lower=True).as_text())


def collective_sizes(program):
    """The numbers in each array that a collective of the program yields."""
    found = re.findall(
        r"= \(?\w+\[([\d,]*)\][^=]*?(?:all-gather|all-reduce|all-to-all|collective-permute)"
        r"(?:-start)?\(",
        program,
    )
    return [int(np.prod([int(size) for size in shape.split(",") if size])) for shape in found]


def test_slots_without_a_stratum_are_never_drawn():
    priority = priorities(jax.random.key(0), 8)
    stratum = jnp.array([-1, -1, 0, -1, 1, -1, -1, 1])  # −1 would count as the last stratum
    found = draw_slots(priority, stratum, jnp.array([2, 3]), count=5)
    assert found[found >= 0].tolist() == [2, 4, 7]


def test_a_slot_with_nan_is_not_a_hard_negative():
    keys = unit_vectors(1, 4, DIM, dtype=jnp.float32).at[2].set(jnp.nan)
    tiers = draw_tiers(
        TierBudgets(nearest=3, mixed=2, hardest=3),
        unit_vectors(0, 4, DIM, dtype=jnp.float32),
        keys,
        row_keys=jax.random.split(jax.random.key(0), 4),
        ids=jnp.arange(4),
    )
    assert not (tiers["nearest"].ids == 2).any()
    assert np.isfinite(tiers["nearest"].vectors).all()
    assert np.isfinite(tiers["mixed"].vectors).all()


def test_strata_may_be_made_while_something_else_is_traced():
    groups = np.array([3, 3, 3, 8])
    traced = jax.eval_shape(lambda: (jnp.zeros(1), strata_of(groups, count=5)))[1]
    assert traced.quotas.shape == strata_of(groups, count=5).quotas.shape
