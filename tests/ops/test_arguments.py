"""Arguments of public functions: labels and vectors of every type, and too few of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxcl import assignment, negatives
from jaxcl.data.sources import InMemoryPairs
from jaxcl.losses import (
    LOSSES,
    ExplicitNegatives,
    Masks,
    OwnNegatives,
    SharedNegatives,
    infonce_loss,
    measure_negatives,
    supervised_infonce_loss,
)
from jaxcl.ops.arguments import as_integers, as_labels
from jaxcl.ops.mesh import make_mesh
from jaxcl.ops.nearest import IMPLEMENTATIONS, nearest
from jaxcl.ops.pairs import (
    EXCHANGES,
    PairLabels,
    pair_count,
    pair_logsumexp,
    pair_softplus,
    pair_sum,
)
from tests.every_function import OF_ROWS, loss_of
from tests.helpers import relative_error, unit_vectors

# The checks of annotations would refuse some inputs before the library sees them.
pytestmark = pytest.mark.usefixtures("unchecked_annotations")

ROWS = 4


def sides():
    return tuple(unit_vectors(seed, ROWS, 8, dtype=jnp.float32) for seed in (0, 1))


def masked(name, field):
    return lambda labels: LOSSES[name].function(*sides(), masks=Masks(**{field: labels}))


def against(kind, field):
    """Negatives from outside the batch with these labels."""

    def loss(labels):
        vectors = sides()[1] if kind is SharedNegatives else sides()[1][:, None]
        labels = labels if kind is SharedNegatives else np.asarray(labels)[:, None]
        others = {"others": kind(vectors, **{field: labels})}
        masks = Masks(**{field: jnp.arange(ROWS)})
        return infonce_loss(*sides(), masks=masks, negatives=others)

    return loss


def reduced(operation, side, **how):
    def reduce(labels):
        both = {name: PairLabels((jnp.arange(ROWS),)) for name in ("query_labels", "key_labels")}
        return operation(*sides(), **(both | {side: PairLabels((labels,))}), **how)

    return reduce


def queued(**more):
    labels = {"ids": jnp.arange(ROWS), "groups": jnp.arange(ROWS)} | more
    bank = negatives.init_bank(ROWS, 8)
    return negatives.update_queue(bank, sides()[0], **labels, num_slots=ROWS)


def kept(**more):
    labels = {"rows": jnp.arange(ROWS), "groups": jnp.arange(ROWS)} | more
    return negatives.update_instances(negatives.init_bank(ROWS, 8), sides()[0], **labels)


def drawn(**labels):
    row_keys = jax.random.split(jax.random.key(0), ROWS)
    budgets = negatives.TierBudgets(mixed=1, hardest=2)
    return negatives.draw_tiers(
        budgets, *sides(), row_keys=row_keys, **({"ids": jnp.arange(ROWS)} | labels)
    )


def mined(labels):
    row_keys = jax.random.split(jax.random.key(0), ROWS)
    return negatives.mine_negatives(
        *sides(),
        sides()[1],
        rule=negatives.MiningRule(1, (0, 2)),
        row_keys=row_keys,
        query_labels=PairLabels((labels,)),
        table_labels=PairLabels((jnp.arange(ROWS),)),
    )


def measured(labels):
    mesh = make_mesh({"data": 1}, devices=jax.devices()[:1])
    measure = assignment.make_gap_measure(mesh, num_rows=ROWS, fields=("gap",))
    batches = jnp.arange(ROWS, dtype=jnp.int32).reshape(2, 2)
    return measure(*sides(), batches, 0.1, jax.random.key(0), (labels,))


INTO_INT32 = {
    **{
        f"{name}, masks.{field}": masked(name, field)
        for name in ("decoupled", "hard", "infonce", "nt_xent", "sigmoid")
        for field in ("ids", "groups")
    },
    **{
        f"{kind.__name__}.{field}": against(kind, field)
        for kind in (ExplicitNegatives, OwnNegatives, SharedNegatives)
        for field in ("ids", "groups")
    },
    "labels": lambda labels: supervised_infonce_loss(*sides(), labels=labels),
    "key_labels": lambda labels: supervised_infonce_loss(
        *sides(), labels=jnp.arange(ROWS), key_labels=labels
    ),
    "measure_negatives": lambda labels: measure_negatives(*sides(), masks=Masks(ids=labels)),
    "pair_logsumexp": reduced(pair_logsumexp, "query_labels", temperature=0.1),
    "pair_sum": reduced(pair_sum, "key_labels", temperature=0.1),
    "pair_softplus": reduced(pair_softplus, "query_labels", scale=1.0, bias=0.0),
    "pair_count": reduced(pair_count, "key_labels"),
    "nearest, query_labels": reduced(lambda *sides, query_labels, key_labels: nearest(
        *sides, count=1, query_labels=query_labels, table_labels=key_labels
    ), "query_labels"),
    "nearest, table_labels": reduced(lambda *sides, query_labels, key_labels: nearest(
        *sides, count=1, query_labels=query_labels, table_labels=key_labels
    ), "key_labels"),
    "batch_labels": lambda labels: negatives.batch_labels(ROWS, groups=labels),
    "update_queue, ids": lambda labels: queued(ids=labels),
    "update_queue, groups": lambda labels: queued(groups=labels),
    "update_instances, rows": lambda labels: kept(rows=labels),
    "update_instances, ids": lambda labels: kept(ids=labels),
    "update_instances, groups": lambda labels: kept(groups=labels),
    "draw_tiers, ids": lambda labels: drawn(ids=labels),
    "draw_tiers, groups": lambda labels: drawn(groups=labels),
    "strata_of": lambda labels: negatives.strata_of(labels, count=2),
    "mine_negatives": mined,
    "gap measure": measured,
    "InMemoryPairs": lambda labels: [
        row["group"] for row in InMemoryPairs("abcd", "efgh", groups=labels).read(range(ROWS))
    ],
}  # fmt: skip

OF_ANY_WIDTH = {
    "assign": lambda labels: assignment.assign(*sides(), block_size=2, keep_apart=(labels,)),
    "epoch_rows": lambda labels: assignment.epoch_rows(
        np.arange(ROWS), epoch=0, batch_size=2, block_size=1, seed=0, keep_apart=(labels,)
    ),
    "epoch_batches": lambda labels: assignment.epoch_batches(
        np.arange(ROWS), epoch=0, batch_size=2, block_size=1, seed=0, keep_apart=(labels,)
    ),
    "AssignedRows": lambda labels: assignment.AssignedRows(
        assignment.Assigned(np.arange(ROWS), np.zeros(ROWS, bool), 0),
        batch_size=2, block_size=1, seed=0, keep_apart=(labels,),
    )(0),
    "count_conflicts": lambda labels: assignment.count_conflicts(
        np.arange(ROWS), labels, batch_size=2
    ),
    "SourcedRows": lambda labels: assignment.SourcedRows(labels, batch_size=2, seed=0)(0),
}  # fmt: skip

WIDE = np.array([1, 2**31 + 1, 2**32 + 1, -(2**40)])


@pytest.mark.parametrize("take", INTO_INT32.values(), ids=INTO_INT32)
@pytest.mark.parametrize("as_given", [np.asarray, np.ndarray.tolist])
def test_labels_that_int32_cannot_hold_are_refused(take, as_given):
    with pytest.raises(ValueError, match=r"does not fit in(to)? int32"):
        take(as_given(WIDE))


@pytest.mark.parametrize("take", INTO_INT32.values(), ids=INTO_INT32)
def test_labels_of_another_integer_type_that_fit_are_those_of_int32(take):
    labels = np.array([0, 1, 2, 1])
    expected = jax.tree.leaves(take(jnp.asarray(labels, jnp.int32)))
    for dtype in (np.int64, np.uint8, ">i4"):
        for one, other in zip(jax.tree.leaves(take(labels.astype(dtype))), expected, strict=True):
            np.testing.assert_array_equal(one, other)


EVERYWHERE = INTO_INT32 | OF_ANY_WIDTH


@pytest.mark.parametrize("take", EVERYWHERE.values(), ids=EVERYWHERE)
@pytest.mark.parametrize("labels", [np.array([0.2, 0.9, 1.5, 2.0]), np.array(list("abcd"))])
def test_labels_that_are_not_integers_are_refused(take, labels):
    with pytest.raises((TypeError, ValueError), match="integers"):
        take(labels)


@pytest.mark.parametrize("take", OF_ANY_WIDTH.values(), ids=OF_ANY_WIDTH)
def test_labels_on_the_host_may_have_64_bits(take):
    wide, narrow = np.uint64([2**63, 2**63 + 1, 2**63, 2**63 + 2]), np.array([0, 1, 0, 2])
    np.testing.assert_array_equal(take(wide), take(narrow))


def test_traced_labels_are_checked_by_their_type():
    with pytest.raises(TypeError, match=r"masks\.ids has the type float32"):
        jax.jit(masked("infonce", "ids"))(jnp.ones(ROWS))
    with jax.enable_x64(True):
        loss = masked("infonce", "ids")
        assert relative_error(jax.jit(loss)(jnp.arange(ROWS)), loss(jnp.arange(ROWS))) < 1e-6
        with pytest.raises(TypeError, match="traced as int64"):
            jax.jit(lambda ids: queued(ids=ids))(jnp.arange(ROWS))


def test_labels_on_devices_stay_where_they_are():
    labels = jnp.arange(3, dtype=jnp.int32)
    assert as_labels("ids", labels) is labels


of_rows = pytest.mark.parametrize("compute", OF_ROWS.values(), ids=OF_ROWS)


@of_rows
def test_vectors_that_are_not_arrays_of_floats_are_refused_by_name(compute):
    named = r"(queries|vectors) (is a list; give an array of floats|has the type int)"
    with pytest.raises(TypeError, match=named):
        compute(*(side.tolist() for side in sides()))
    with pytest.raises(TypeError, match=named):
        compute(*(np.ones((ROWS, 8), int) for _ in range(2)))
    with pytest.raises(ValueError, match=r"(queries|vectors) has the shape \(4, 0\)"):
        compute(*(np.ones((ROWS, 0), np.float32) for _ in range(2)))


@of_rows
def test_vectors_may_have_another_byte_order(compute):
    swapped = (np.asarray(side).astype(">f4") for side in sides())
    np.testing.assert_array_equal(compute(*swapped), compute(*sides()))


@of_rows
def test_no_rows_give_empty_results(compute):
    found = compute(jnp.zeros((0, 8)), jnp.zeros((0, 8)))
    assert len(found) == 0 or not found.any()


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_of_no_rows_is_empty(name):
    nobody = jnp.zeros((0, 8))
    assert jax.grad(lambda queries: loss_of(name)(queries, nobody).sum())(nobody).shape == (0, 8)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_empty_side_has_no_nearest_row(implementation):
    find = functools.partial(nearest, count=3, implementation=implementation)
    found = find(sides()[0], jnp.zeros((0, 8)))
    assert found.rows.tolist() == [[-1] * 3] * ROWS
    assert np.isneginf(found.similarities).all()
    assert find(jnp.zeros((0, 8)), sides()[0]).rows.shape == (0, 3)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_an_empty_batch_on_each_device_gives_no_losses(exchange):
    mesh = make_mesh({"data": 2}, devices=jax.devices()[:2])
    loss = functools.partial(infonce_loss, axis_name="data", exchange=exchange)
    rows = PartitionSpec("data")
    found = jax.shard_map(loss, mesh=mesh, in_specs=(rows, rows), out_specs=rows)
    assert found(jnp.zeros((0, 8)), jnp.zeros((0, 8))).shape == (0,)


def test_vectors_outside_of_the_batch_are_named():
    others = {"others": ExplicitNegatives(sides()[1][:, None].tolist())}
    with pytest.raises(TypeError, match=r"negatives\['others'\] is a list"):
        infonce_loss(*sides(), negatives=others)
    guides = Masks(guides=tuple(side.tolist() for side in sides()), margin=0.1)
    with pytest.raises(TypeError, match=r"masks\.guides is a list"):
        infonce_loss(*sides(), masks=guides)


def test_an_empty_list_has_integers():
    assert as_integers("ids", []).shape == as_labels("ids", []).shape == (0,)
