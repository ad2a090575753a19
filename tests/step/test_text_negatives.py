"""Ragged text negatives and several positives per query, against a dense computation."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.assignment import Assigned, AssignedRows
from jaxcl.data.prepare import prepare_data
from jaxcl.data.sources import InMemoryPairs
from jaxcl.data.table import table_batch
from jaxcl.losses import LOSSES, measure_negatives
from jaxcl.ops.mesh import make_mesh, put_batch, replicated_sharding
from jaxcl.settings.read import read_settings
from jaxcl.step.batch_loss import BeyondBatch, make_loss, make_measure
from tests.helpers import relative_error, relative_errors, towers_of
from tests.small_models import DIM, VOCABULARY, encode

pytestmark = pytest.mark.usefixtures("x64")

# Query 0 has positives in rows 0 to 2, query 4 in rows 4 and 5; rows 3 and 6 share a key.
QUERIES = ["q0", "q0", "q0", "q3", "q4", "q4", *(f"q{row}" for row in range(6, 20))]
KEYS = [f"k{row}" for row in range(20)]
KEYS[6] = KEYS[3]
GROUPS = [0, 0, 0, 3, 4, 4, *range(6, 20)]
NEGATIVES = [
    ["n0", "k1"],  # the second is a positive of this query
    [],
    ["n1", "n0", "k5"],  # a positive of another query in the batch
    ["k9", "q0"],  # a query of the batch
    ["k6 and more"],
    ["n2", "k4", "n2"],  # the same text twice; another positive of this query
    ["k3"],  # its own positive
    [],
    ["k19", "n0"],  # a key outside the batch
    *([f"own {row}"] * (row % 4) for row in range(9, 20)),
]
BATCH = np.arange(16)
SCORES = [
    [round(np.cos(3 * row + place), 6) for place in range(1 + len(texts))]
    for row, texts in enumerate(NEGATIVES)
]
TEMPERATURE, MARGIN = 0.3, -0.2
HOW = {
    "one device": ({"data": 1}, {}, None),
    "eight": ({"data": 8}, {}, None),
    "ring": ({"data": 8}, {"exchange": "ring", "implementation": "tiled"}, None),
    "chunks": ({"data": 1}, {}, {"query": 3, "key": 5}),
    "chunks in a ring": (
        {"replica": 2, "data": 4},
        {"exchange": "ring", "implementation": "tiled"},
        {"query": 1, "key": 4},
    ),
    "sharded parameters": ({"data": 2, "fsdp": 2}, {}, {"query": 2, "key": 3}),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The data of a run on these rows, and a batch of them."""
    folder = tmp_path_factory.mktemp("run")
    metadata = {"negatives": NEGATIVES, "teacher_scores": SCORES}
    settings = {
        "name": "none",
        "vocabulary_size": VOCABULARY,
        "max_tokens": {"query": 4, "key": 6},
        "splits": {"train": "train"},
        "group_field": "group",
    }
    return prepare_data(
        read_settings({"data": settings}).data,
        data_dir=folder,
        workdir=folder,
        scored=True,
        open_source=lambda role: InMemoryPairs(QUERIES, KEYS, groups=GROUPS, metadata=metadata),
    )


def batch_of(data, rows):
    table = data.tables["train"]
    return table_batch(table, rows) | data.negatives.columns(table, rows)


def params_of(seed=1):
    rng = np.random.default_rng(seed)
    tables = {side: jnp.asarray(rng.normal(size=(VOCABULARY, DIM))) for side in ("query", "key")}
    return {"towers": tables, "log_temperature": jnp.log(jnp.float64(TEMPERATURE))}


class Dense(NamedTuple):
    """Embeddings of the batch's texts, and the row of each concatenated negative."""

    queries: jax.Array
    keys: jax.Array
    negatives: jax.Array
    texts: list[str]
    owners: np.ndarray


def dense(params, data, rows):
    texts = [text for row in rows for text in NEGATIVES[row]]
    owners = np.repeat(np.arange(len(rows)), [len(NEGATIVES[row]) for row in rows])

    def embedded(side, texts):
        return encode(params["towers"], side, data.readers[side](texts))

    return Dense(
        embedded("query", [QUERIES[row] for row in rows]),
        embedded("key", [KEYS[row] for row in rows]),
        embedded("key", texts) if texts else jnp.zeros((0, DIM)),
        texts,
        owners,
    )


def alike(row):
    """The rows connected with a row by equal queries or equal keys."""
    rows = {row}
    while True:
        queries, keys = {QUERIES[one] for one in rows}, {KEYS[one] for one in rows}
        more = {one for one in range(20) if QUERIES[one] in queries or KEYS[one] in keys}
        if more == rows:
            return rows
        rows = more


def allowed(rows, texts, masks):
    """The keys, and the text negatives, that are negatives of each query."""
    keys = np.ones((len(rows), len(rows)), bool)
    others = np.ones((len(rows), len(texts)), bool)
    for i, row in enumerate(rows):
        same = alike(row) if "text" in masks else {row}
        keys[i] = [other not in same for other in rows]
        if "text" in masks:
            positives, queries = {KEYS[one] for one in same}, {QUERIES[one] for one in same}
            others[i] = [
                text not in positives and (text in KEYS or text not in queries) for text in texts
            ]
    return keys, others


def dense_infonce(params, data, rows, masks=("row", "text"), guide=None):
    found = dense(params, data, rows)
    tau = jnp.exp(params["log_temperature"])
    keys, others = allowed(rows, found.texts, masks)
    if guide is not None:  # either row's margin decides on a pair of the batch
        seen = dense(params_of(guide), data, rows)
        ceilings = (seen.queries * seen.keys).sum(1, keepdims=True) - MARGIN
        keys &= seen.queries @ seen.keys.T <= jnp.minimum(ceilings, ceilings.T)
        others &= seen.queries @ seen.negatives.T <= ceilings
    scores = found.queries @ found.keys.T / tau
    positives = jnp.diag(scores)
    apart = jnp.where(keys, scores, -jnp.inf)
    outside = jnp.where(others, found.queries @ found.negatives.T / tau, -jnp.inf)
    own = positives[:, None]
    to_key = jax.nn.logsumexp(jnp.concatenate([own, apart, outside], 1), axis=1) - positives
    to_query = jax.nn.logsumexp(jnp.concatenate([own, apart.T], 1), axis=1) - positives
    return (to_key + to_query).mean() / 2


def dense_supervised(params, data, rows, masks=()):
    found = dense(params, data, rows)
    tau = jnp.exp(params["log_temperature"])
    groups = np.array(GROUPS)[rows]
    scores = found.queries @ found.keys.T / tau
    of_class = groups[:, None] == groups
    group_of = {KEYS[row]: GROUPS[row] for row in reversed(range(20))}
    group_of = {QUERIES[row]: GROUPS[row] for row in range(20)} | group_of
    others = np.array([group_of.get(text, -1) for text in found.texts]) != groups[:, None]
    outside = jnp.where(others, found.queries @ found.negatives.T / tau, -jnp.inf)
    both = [jnp.concatenate([scores, outside], 1), scores.T]
    losses = [
        jax.nn.logsumexp(candidates, axis=1)
        - (candidates[:, : len(rows)] * of_class).sum(1) / of_class.sum(1)
        for candidates in both
    ]
    return jnp.stack(losses).mean()


def dense_distillation(params, data, rows, masks=()):
    found = dense(params, data, rows)
    own = np.insert(found.owners == np.arange(len(rows))[:, None], 0, True, axis=1)
    teacher = np.zeros(own.shape, np.float32)
    for i, row in enumerate(rows):
        teacher[i, own[i]] = SCORES[row]
    positives = (found.queries * found.keys).sum(1, keepdims=True)
    scores = jnp.concatenate([positives, found.queries @ found.negatives.T], 1)
    log_wanted, log_found = (
        jax.nn.log_softmax(jnp.where(own, one, -jnp.inf), axis=1)
        for one in (teacher.astype(np.float64), scores / jnp.exp(params["log_temperature"]))
    )
    terms = jnp.exp(log_wanted) * (jnp.where(own, log_wanted, 0) - jnp.where(own, log_found, 0))
    return terms.sum(1).mean()


DENSE = {
    "infonce": dense_infonce,
    "supervised": dense_supervised,
    "distillation": dense_distillation,
}
MASKS = {"infonce": {"ids": "text"}, "supervised": {"ids": "row"}, "distillation": {}}


def found_with(how, data, name, *, rows=BATCH, masks=None, batch=None, guide=None):
    """The value and the gradients of a loss, computed as `HOW` says."""
    shape, options, chunk_sizes = HOW[how] if isinstance(how, str) else how
    size = int(np.prod(list(shape.values())))
    mesh = make_mesh(shape, devices=jax.devices()[:size])
    loss = LOSSES[name]
    if loss.exchanges:
        loss = loss._replace(function=functools.partial(loss.function, **options))
    of_batch = make_loss(
        towers_of(encode),
        loss,
        mesh,
        masks=MASKS[name] if masks is None else masks,
        chunk_sizes=chunk_sizes,
        beyond=None if guide is None else BeyondBatch(guide="momentum", margins={"margin": MARGIN}),
    )
    memory = {} if guide is None else {"momentum": params_of(guide)["towers"]}
    params = jax.device_put(params_of(), replicated_sharding(mesh))
    batch = put_batch(batch_of(data, rows) if batch is None else batch, mesh)
    step = jax.jit(jax.value_and_grad(of_batch, has_aux=True))
    (value, _), gradient = step(params, memory, batch, None)
    return value, gradient


@pytest.fixture(scope="module")
def wanted_of(data):
    """The value and the gradients of the dense restatement, by name and masks; kept."""

    @functools.cache
    def wanted(name, **options):
        value = functools.partial(DENSE[name], data=data, rows=BATCH, **options)
        with jax.enable_x64(True):
            return jax.jit(jax.value_and_grad(value))(params_of())

    return wanted


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(how, marks=pytest.mark.slow) if how in ("ring", "chunks") else how
        for how in HOW
    ],
)
def test_infonce_with_ragged_negatives_is_the_dense_one(data, wanted_of, how):
    errors = relative_errors(found_with(how, data, "infonce"), wanted_of("infonce"))
    assert max(errors.values()) < 1e-10, errors


def test_a_momentum_encoder_masks_ragged_negatives(data, wanted_of):
    found = found_with("chunks in a ring", data, "infonce", guide=9)
    errors = relative_errors(found, wanted_of("infonce", guide=9))
    assert max(errors.values()) < 1e-10, errors
    for other in (wanted_of("infonce"), wanted_of("infonce", guide=1)):  # no guide, the model
        assert relative_error(other[0], found[0]) > 1e-2


@pytest.mark.parametrize("how", ["one device", "chunks in a ring"])
def test_rows_of_one_group_are_positives_and_their_texts_no_negatives(data, wanted_of, how):
    errors = relative_errors(found_with(how, data, "supervised"), wanted_of("supervised"))
    assert max(errors.values()) < 1e-10, errors


@pytest.mark.parametrize("how", ["one device", "chunks in a ring"])
def test_a_teachers_scores_go_with_ragged_negatives(data, wanted_of, how):
    found, wanted = found_with(how, data, "distillation"), wanted_of("distillation")
    errors = relative_errors(found, wanted)
    assert max(errors.values()) < 1e-10, errors


def test_the_comparison_sees_a_mask_or_a_negative_that_is_missing(data, wanted_of):
    wanted, _ = wanted_of("infonce")
    unmasked, _ = wanted_of("infonce", masks=("row",))
    assert relative_error(unmasked, wanted) > 1e-2
    by_row = found_with("eight", data, "infonce", masks={"ids": "row"})
    errors = relative_errors(by_row, wanted_of("infonce", masks=("row",)))
    assert max(errors.values()) < 1e-10, errors
    batch = batch_of(data, BATCH)
    del batch["negatives"]
    without, _ = found_with("one device", data, "infonce", batch=batch)
    assert relative_error(without, wanted) > 1e-2
    batch = batch_of(data, BATCH)
    batch["negatives"]["valid"][:] = True  # as if padding were negatives
    filled, _ = found_with("one device", data, "infonce", batch=batch)
    assert relative_error(filled, wanted) > 1e-3


def test_distillation_and_groups_notice_what_is_missing(data, wanted_of):
    for name, column in (("supervised", "group"), ("distillation", "valid")):
        wanted, _ = wanted_of(name)
        batch = batch_of(data, BATCH)
        labels = batch["negatives"][column]
        batch["negatives"][column] = np.full_like(labels, 0 if column == "group" else True)
        changed, _ = found_with("one device", data, name, batch=batch)
        assert relative_error(changed, wanted) > 1e-3, name


@pytest.mark.parametrize("options", [{}, {"exchange": "ring", "implementation": "tiled"}])
@pytest.mark.parametrize("size", [1, 2])
def test_the_positives_of_a_query_are_not_its_negatives(data, size, options):
    rows = np.array([4, 5])  # two positives of one query
    batch = batch_of(data, rows)
    del batch["negatives"]
    how = ({"data": size}, options, None)
    value, gradient = found_with(how, data, "infonce", batch=batch)
    assert value == 0
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(gradient))
    value, _ = found_with(how, data, "infonce", batch=batch, masks={"ids": "row"})
    assert value > 0.1


def test_the_positives_of_a_query_are_kept_out_of_each_others_batch(data):
    text = data.tables["train"].text
    assert text[0] == text[1] == text[2]
    order = Assigned(np.arange(20, dtype=np.int32), np.zeros(20, bool), 0)
    sizes = {"batch_size": 4, "block_size": 4, "seed": 0}

    def conflicts(**options):
        rows_of = AssignedRows(order, **sizes, **options)
        return sum(4 - len(set(text[rows_of(step)])) for step in range(5))

    assert conflicts(keep_apart=(text,)) == 0
    assert conflicts() > 0


def test_the_metrics_count_allowed_and_masked_negatives(data):
    mesh = make_mesh({"data": 8})
    measure = make_measure(
        towers_of(encode),
        LOSSES["infonce"],
        mesh,
        measure_fn=measure_negatives,
        masks={"ids": "text"},
    )
    batch = put_batch(batch_of(data, BATCH), mesh)
    metrics = jax.jit(measure)(params_of(), {}, batch, None)
    texts = [text for row in BATCH for text in NEGATIVES[row]]
    keys, others = allowed(BATCH, texts, ("row", "text"))
    assert float(metrics["negatives/explicit/counted"]) == others.sum() / 16
    assert float(metrics["negatives/explicit/masked"]) == (~others).sum() / 16
    assert float(metrics["negatives/batch/counted"]) == keys.sum() / 16
    # k1 and q0 for the three rows of q0, k4 and k5 for both of q4, k3 for two, k9 for its own.
    assert (~others).sum() == 3 + 3 + 2 + 2 + 2 + 1
