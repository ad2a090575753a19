"""The public functions of the library, each as a function of queries and keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxcl import assignment, negatives
from jaxcl.grad_cache import chunked
from jaxcl.losses import (
    LOSSES,
    ExplicitNegatives,
    Masks,
    OwnNegatives,
    SharedNegatives,
    infonce_loss,
    matryoshka,
    measure_negatives,
)
from jaxcl.losses.comparison import DIRECTIONS
from jaxcl.losses.running_estimate import remembered_estimate_loss
from jaxcl.negatives.memory_bank import mean_age
from jaxcl.ops.mesh import make_mesh
from jaxcl.ops.nearest import nearest
from jaxcl.ops.pairs import PairLabels, pair_count, pair_logsumexp, pair_softplus, pair_sum
from jaxcl.typing import SIDES


def loss_of(name):
    """A loss with the columns that it needs, for any number of rows."""

    def compute(queries, keys):
        rows, loss = np.shape(queries)[0], LOSSES[name]
        columns = {"labels": jnp.arange(rows), "teacher_scores": jnp.zeros((rows, 1))}
        columns["scores"] = jnp.arange(rows, dtype=jnp.float32)
        columns["teacher_vectors"] = dict.fromkeys(SIDES, jnp.ones(np.shape(queries)))
        given = {argument: columns[argument] for argument in loss.columns}
        if loss.has_temperature:
            given["temperature"] = 0.1
        if loss.init_memory is not None:
            tables = loss.init_memory(rows, temperature=0.1)
            given["memory"] = jax.tree.map(lambda table: table[:rows], tables)
        found = loss.function(queries, keys, **given)
        return found if loss.init_memory is None else found[0]

    return compute


def of_tiers(queries, keys):
    rows = np.shape(queries)[0]
    return negatives.draw_tiers(
        negatives.TierBudgets(nearest=2),
        queries,
        keys,
        row_keys=jax.random.split(jax.random.key(0), rows),
        ids=jnp.arange(rows),
    )["nearest"].vectors


def of_mining(queries, keys):
    rows = np.shape(queries)[0]
    labels = PairLabels((jnp.arange(rows),))
    return negatives.mine_negatives(
        queries,
        keys,
        keys,
        rule=negatives.MiningRule(1, (0, 2)),
        row_keys=jax.random.split(jax.random.key(0), rows),
        query_labels=labels,
        table_labels=labels,
    ).rows


def of_hard_negatives(queries, keys):
    rule = negatives.MiningRule(2, (0, 3), relative_margin=-1.0)
    rows = range(np.shape(queries)[0])
    return tuple(negatives.mine_hard_negatives(queries, keys, positives=rows, rule=rule))


def of_queue(vectors, _):
    labels = jnp.arange(np.shape(vectors)[0])
    return negatives.update_queue(
        negatives.init_bank(9, 8), vectors, labels, labels, num_slots=9
    ).vectors


def of_instances(vectors, _):
    labels = jnp.arange(np.shape(vectors)[0])
    return negatives.update_instances(negatives.init_bank(9, 8), vectors, labels, labels).vectors


OF_ROWS = {
    **{name: loss_of(name) for name in LOSSES},
    "matryoshka": matryoshka(infonce_loss, dims=(4, 8)),
    "measure_negatives": lambda *sides: measure_negatives(*sides)["batch"].share,
    "pair_logsumexp": lambda *sides: pair_logsumexp(*sides, temperature=0.1)[0],
    "tiled": lambda *sides: pair_logsumexp(*sides, temperature=0.1, implementation="tiled")[0],
    "pair_sum": lambda *sides: pair_sum(*sides, temperature=0.1)[0],
    "pair_softplus": lambda *sides: pair_softplus(*sides, scale=1.0, bias=0.0)[0],
    "pair_count": lambda *sides: pair_count(*sides)[0],
    "nearest": lambda *sides: nearest(*sides, count=2).rows,
    "mine_negatives": of_mining,
    "draw_tiers": of_tiers,
    "update_queue": of_queue,
    "update_instances": of_instances,
}


def gradient_of(loss):
    """The gradient of a loss with respect to both sides, through `chunked`."""
    encode = chunked(lambda scale, rows: scale * rows, chunk_size=2)

    def mean(queries, keys):
        return loss(encode(jnp.float32(1), queries), encode(jnp.float32(1), keys)).mean()

    return jax.grad(mean, argnums=(0, 1))


def with_labels(name, implementation=None):
    """A loss with ids, groups, padding, a margin, and negatives of each kind."""

    def compute(queries, keys):
        rows, loss = len(queries), LOSSES[name]
        numbers = jnp.arange(rows)
        masks = Masks(numbers, numbers // 2, numbers < rows - 1, margin=0.05)
        masks = Masks(**{field: getattr(masks, field) for field in loss.masks})
        own = jnp.stack([keys[::-1], keys], 1)
        kinds = {
            ExplicitNegatives: ExplicitNegatives(own, valid=jnp.ones((rows, 2), bool)),
            OwnNegatives: OwnNegatives(own),
            SharedNegatives: SharedNegatives(jnp.concatenate([keys, keys])),
        }
        columns = {"labels": numbers // 2, "teacher_scores": jnp.ones((rows, 3))}
        columns["scores"] = (numbers // 2).astype(jnp.float32)
        columns["teacher_vectors"] = dict.fromkeys(SIDES, keys[::-1])
        given = {argument: columns[argument] for argument in loss.columns}
        if loss.has_temperature:
            given["temperature"] = 0.1
        if loss.exchanges and loss.multiplies:
            given["implementation"] = implementation
        if loss.init_memory is not None:
            tables = loss.init_memory(rows, temperature=0.1)
            given["memory"] = jax.tree.map(lambda table: table[:rows], tables)
        names = {ExplicitNegatives: "explicit", OwnNegatives: "own", SharedNegatives: "shared"}
        if loss.negatives:
            given["negatives"] = {names[kind]: kinds[kind] for kind in loss.negatives}
        found = loss.function(queries, keys, masks=masks, **given)
        return found if loss.init_memory is None else found[0]

    return compute


def row_temperatures(queries, keys):
    """A loss that learns a temperature for each row and direction."""
    shape = (len(queries), 4)
    memory = {
        "estimates": jnp.full(shape, -jnp.inf),
        "log_temperatures": jnp.full(shape, jnp.log(0.1)),
    }
    options = {"directions": DIRECTIONS, "temperature_rate": 0.1}
    return remembered_estimate_loss(queries, keys, memory=memory, **options)[0]


def all_tiers(queries, keys):
    """Draws of every tier from a queue that is half full."""
    rows = len(queries)
    numbers = jnp.arange(rows)
    bank = negatives.init_bank(2 * rows, keys.shape[1])
    bank = negatives.update_queue(bank, keys, numbers, numbers // 2, num_slots=2 * rows)
    key, slots = jax.random.key(0), bank.ids.shape[0]
    source = negatives.DrawSource(
        bank,
        *(negatives.priorities(jax.random.fold_in(key, number), slots) for number in range(2)),
        negatives.strata_of(np.arange(rows) // 2, count=3),
    )
    budgets = negatives.TierBudgets(
        full_bank=True, uniform=2, stratified=2, nearest=2, mixed=2, mixed_with_query=2, perturbed=2
    )
    return mean_age(bank), negatives.draw_tiers(
        budgets,
        queries,
        keys,
        row_keys=jax.random.split(key, rows),
        ids=numbers,
        groups=numbers // 2,
        relative_margin=0.05,
        source=source,
    )


def moved(queries, keys):
    """An instance bank that has been updated twice."""
    rows = jnp.arange(len(queries))
    bank = negatives.init_bank(len(queries), keys.shape[1], dtype=jnp.bfloat16)
    for vectors in (queries, keys):
        bank = negatives.update_instances(bank, vectors, rows, rows, momentum=0.5)
    return negatives.read_bank(bank).vectors


def sharded(exchange):
    """A loss over two devices."""
    mesh = make_mesh({"data": 2}, devices=jax.devices()[:2])
    rows = PartitionSpec("data")
    loss = functools.partial(infonce_loss, axis_name="data", exchange=exchange)
    compute = jax.shard_map(loss, mesh=mesh, in_specs=(rows, rows), out_specs=rows)

    def within(queries, keys):
        with jax.set_mesh(mesh):  # as JAX requires inside another mesh
            return compute(queries, keys)

    return within


def assigned(queries, keys, **settings):
    sides = np.asarray(queries), np.asarray(keys)
    labels = np.arange(len(queries)) // 2
    effort = assignment.PRESETS["light"].effort
    chosen = assignment.Gcbs(effort=effort, **({"neighbours": 4} | settings))
    return assignment.assign(
        *sides, block_size=2, batch_size=4, keep_apart=(labels,), settings=chosen
    )


def topics(queries, keys):
    sides = np.asarray(queries), np.asarray(keys)
    return assignment.assign_topics(*sides, num_topics=3, settings=assignment.PRESETS["light"])


def gap(queries, keys):
    rows = len(queries)
    batches = jnp.arange(rows, dtype=jnp.int32).reshape(2, -1)
    return assignment.measure_gap(
        queries, keys, batches, temperature=0.1, key=jax.random.key(0), num_rows=rows
    )


def gap_on_mesh(queries, keys):
    measure = assignment.make_gap_measure(
        make_mesh({"data": 2}, devices=jax.devices()[:2]), num_rows=len(queries)
    )
    batches = jnp.arange(len(queries), dtype=jnp.int32).reshape(2, -1)
    return measure(queries, keys, batches, 0.1, jax.random.key(0))


EVERY = {
    **OF_ROWS,
    **{f"{name} with labels": with_labels(name) for name in LOSSES},
    **{
        f"{name} in tiles": with_labels(name, "tiled")
        for name, loss in LOSSES.items()
        if loss.exchanges and loss.multiplies
    },
    **{f"gradient of {name}": gradient_of(with_labels(name)) for name in LOSSES},
    "gradient in tiles": gradient_of(with_labels("infonce", "tiled")),
    "gradient of matryoshka": gradient_of(matryoshka(infonce_loss, dims=(4, 8))),
    "row temperatures": row_temperatures,
    "gather": sharded("gather"),
    "ring": sharded("ring"),
    "tiers": all_tiers,
    "instances": moved,
    "assign": assigned,
    "assign in clusters": functools.partial(assigned, graph="clustered", cluster_size=4, probes=2),
    "assign by levels": functools.partial(assigned, method="rcm_device"),
    "assign as the paper": functools.partial(assigned, method="rcm"),
    "topics": topics,
    "gap": gap,
    "gap on a mesh": gap_on_mesh,
    "mine_hard_negatives": of_hard_negatives,
}
"""Each maps queries and keys to a tree of arrays."""
