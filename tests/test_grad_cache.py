"""Chunks give the gradient of the whole batch, with dropout, in the memory of one chunk."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxcl.grad_cache import chunked, rows_per_chunk
from jaxcl.losses import infonce_loss, sigmoid_pair_loss
from jaxcl.models.layers import row_dropout
from jaxcl.ops.mesh import make_mesh
from jaxcl.ops.vectors import normalise
from tests.helpers import relative_errors, unit_vectors

pytestmark = pytest.mark.usefixtures("x64")

ROWS, FEATURES, HIDDEN = 16, 6, 12


def encode(params, inputs, keys=None):
    """Three layers with dropout by row; the leaves of the inputs are a tree."""
    hidden = inputs["features"]
    for layer, weights in enumerate(params["layers"]):
        hidden = jnp.tanh(hidden @ weights)
        hidden = row_dropout(hidden, keys, rate=0.3, layer=layer)
    return normalise(hidden + inputs["offset"][:, None])


def params_of(seed):
    widths = (FEATURES, HIDDEN, HIDDEN, FEATURES)
    rng = np.random.default_rng(seed)
    pairs = itertools.pairwise(widths)
    return {"layers": [jnp.asarray(rng.normal(size=pair) / 3) for pair in pairs]}


def inputs_of(seed, rows=ROWS):
    offset = jnp.linspace(-0.1, 0.1, rows)
    return {"features": unit_vectors(seed, rows, FEATURES), "offset": offset}


def row_keys(seed, rows=ROWS):
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(rows))


def total(encode_fn, loss_fn=infonce_loss, **options):
    """The mean loss of two towers, as a function of all learned parameters."""

    def loss(params):
        queries = encode_fn(params["query"], inputs_of(0), row_keys(0))
        keys = encode_fn(params["key"], inputs_of(1), row_keys(1))
        temperature = jnp.exp(params["log_temperature"])
        return loss_fn(queries, keys, temperature=temperature, **options).mean()

    return loss


PARAMS = {"query": 2, "key": 3}


def all_params():
    return {side: params_of(seed) for side, seed in PARAMS.items()} | {
        "log_temperature": jnp.log(0.1)
    }


@pytest.mark.parametrize(
    ("chunk_size", "loss_fn"),
    [(1, infonce_loss), (3, infonce_loss), (100, infonce_loss), (4, sigmoid_pair_loss)],
)
def test_chunks_give_the_gradient_of_the_whole_batch(loss_fn, chunk_size):
    found, wanted = (
        jax.jit(jax.value_and_grad(total(fn, loss_fn)))(all_params())
        for fn in (chunked(encode, chunk_size=chunk_size), encode)
    )
    assert max(relative_errors(found, wanted).values()) < 1e-12


def test_other_dropout_in_the_second_pass_would_be_seen():
    def forgetful(params, inputs, keys):
        # A key per position in the chunk, as in a layer with its own random keys.
        return encode(params, inputs, row_keys(0, inputs["offset"].shape[0]))

    found, wanted = (
        jax.jit(jax.grad(total(fn)))(all_params())
        for fn in (chunked(forgetful, chunk_size=4), encode)
    )
    assert min(relative_errors(found, wanted).values()) > 1e-3


@pytest.mark.slow
def test_auxiliary_losses_and_counters_of_the_chunks_are_stacked():
    def with_aux(params, inputs, keys):
        embeddings = encode(params, inputs, keys)
        return embeddings, {"penalty": (embeddings**4).sum(), "rows": inputs["offset"].size}

    def loss(encode_fn):
        def penalised(params):
            embeddings, aux = encode_fn(params, inputs_of(0), row_keys(0))
            return embeddings[:, 0].sum() + aux["penalty"].sum(), aux["rows"]

        return jax.value_and_grad(penalised, has_aux=True)(params_of(2))

    (value, rows), gradient = loss(chunked(with_aux, chunk_size=4, has_aux=True))
    (wanted, _), wanted_gradient = loss(with_aux)
    assert rows.tolist() == [4, 4, 4, 4]
    errors = relative_errors((value, gradient), (wanted, wanted_gradient))
    assert max(errors.values()) < 1e-12


def over_mesh(shape, exchange, chunk_size):
    """The same loss inside a shard_map, with rows sharded over all axes of the mesh."""
    mesh = make_mesh(shape)
    rows, whole = PartitionSpec(mesh.axis_names), PartitionSpec()
    encode_fn = chunked(encode, chunk_size=chunk_size) if chunk_size else encode

    def local(params, queries, keys, query_keys, key_keys):
        return infonce_loss(
            encode_fn(params["query"], queries, query_keys),
            encode_fn(params["key"], keys, key_keys),
            temperature=jnp.exp(params["log_temperature"]),
            axis_name=mesh.axis_names,
            exchange=exchange,
            implementation="tiled",
        )

    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(whole, rows, rows, rows, rows), out_specs=rows
    )
    batch = inputs_of(0), inputs_of(1), row_keys(0), row_keys(1)
    return lambda params: sharded(params, *batch).mean()


@pytest.mark.parametrize(
    ("shape", "exchange"), [({"data": 8}, "gather"), ({"replica": 2, "data": 4}, "ring")], ids=str
)
def test_chunks_of_each_device_give_the_gradient_of_one_device(shape, exchange):
    found = jax.jit(jax.value_and_grad(over_mesh(shape, exchange, 1)))(all_params())
    wanted = jax.jit(jax.value_and_grad(total(encode)))(all_params())
    assert max(relative_errors(found, wanted).values()) < 1e-10


def test_no_turn_of_the_loop_waits_for_other_devices():
    step = jax.jit(jax.grad(over_mesh({"data": 8}, "gather", 1)))
    text = step.lower(all_params()).compile().as_text()
    computations = dict(re.findall(r"^%?([\w.\-]+) [^\n]*\{\n(.*?)^\}", text, re.M | re.S))
    bodies = re.findall(r"body=%?([\w.\-]+)", text)
    assert bodies
    assert "all-reduce" in text
    assert not any("all-reduce" in computations[body] for body in bodies)


def test_a_chunk_needs_a_chunks_memory():
    rows = 4_096
    params = jax.eval_shape(lambda: params_of(0))
    inputs = jax.eval_shape(lambda: inputs_of(0, rows))

    def temporary_bytes(encode_fn):
        def loss(params, inputs):
            embeddings = encode_fn(params, inputs)
            return infonce_loss(embeddings, embeddings, implementation="tiled").mean()

        compiled = jax.jit(jax.grad(loss)).lower(params, inputs).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # Both have the tiles of the loss; the rest are activations.
    tiles = temporary_bytes(lambda params, inputs: inputs["features"] + params["layers"][0].sum())
    whole, chunk = (
        temporary_bytes(encode_fn) - tiles for encode_fn in (encode, chunked(encode, chunk_size=64))
    )
    assert whole > 3 * rows * HIDDEN * 8
    assert chunk < whole / 2


def test_a_token_budget_gives_a_number_of_rows():
    assert [rows_per_chunk(width, max_tokens=1_000) for width in (1, 10, 300, 2_000)] == [
        1_000,
        100,
        3,
        1,
    ]


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="chunk_size=0 must be at least 1"):
        chunked(encode, chunk_size=0)
    uneven = inputs_of(0) | {"offset": jnp.zeros(3)}
    with pytest.raises(ValueError, match=r"differ in length, \[3, 16\]"):
        chunked(encode, chunk_size=4)(params_of(0), uneven)


@pytest.mark.parametrize("shards", [1, 2])
def test_no_rows_make_no_chunk(shards):
    encode = chunked(
        lambda params, rows: (params * rows, rows.sum()), chunk_size=2, shards=shards, has_aux=True
    )
    embeddings, aux = encode(jnp.ones(()), jnp.zeros((0, 8)))
    assert embeddings.shape == (0, 8)
    assert aux.shape == (0,)
