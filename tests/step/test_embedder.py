"""Embeddings of many rows equal the encoder's, for any number of rows and devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.models import StaticEncoder, make_towers
from jaxcl.ops.mesh import make_mesh
from jaxcl.step.embedder import make_embedder
from tests.helpers import relative_error

BATCH_SIZE, WIDTH, DIM, VOCABULARY = 16, 5, 12, 50
TOLERANCE = 3e-7  # float32: sums of batches of other shapes may have another order


@pytest.fixture(scope="module")
def towers():
    return make_towers(
        lambda rngs: StaticEncoder(VOCABULARY, dim=DIM, max_tokens=64, rngs=rngs), shared=False
    )


@pytest.fixture(scope="module")
def params(towers):
    return towers.init(jax.random.key(0))


@pytest.fixture(scope="module")
def embed(towers):
    return embedder(towers.encode)


def embedder(encode, mesh=None, *, batch_size=BATCH_SIZE):
    """Embed tokens in memory."""
    mesh = make_mesh({"data": -1}) if mesh is None else mesh
    embed_rows = make_embedder(encode, mesh, batch_size=batch_size)

    def embed(params, side, tokens, **options):
        return embed_rows(
            params, side, lambda rows: {"tokens": tokens[rows]}, len(tokens), **options
        )

    return embed


def some_tokens(num_rows: int) -> np.ndarray:
    """Texts of 1 to WIDTH tokens, followed by padding."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(1, VOCABULARY, (num_rows, WIDTH), dtype=np.int32)
    lengths = generator.integers(1, WIDTH + 1, (num_rows, 1))
    return np.where(np.arange(WIDTH) < lengths, tokens, 0).astype(np.int32)


ROWS = [1, 7, BATCH_SIZE - 1, BATCH_SIZE, BATCH_SIZE + 1, 3 * BATCH_SIZE - 5]


@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("side", ["query", "key"])
def test_any_number_of_rows_is_embedded_as_the_encoder_does(towers, params, embed, side, num_rows):
    tokens = some_tokens(num_rows)
    found = embed(params, side, tokens)
    wanted = towers.encode(params, side, {"tokens": jnp.asarray(tokens)})
    assert found.shape == (num_rows, DIM)
    assert found.dtype == np.float32
    assert relative_error(found, wanted) < TOLERANCE


def test_each_side_has_its_own_tower(params, embed):
    tokens = some_tokens(9)
    assert relative_error(embed(params, "query", tokens), embed(params, "key", tokens)) > 0.5


@pytest.mark.parametrize("axes", [{"data": 2, "model": 4}, {"data": 1}])
def test_the_mesh_does_not_change_embeddings(towers, params, embed, axes):
    tokens = some_tokens(BATCH_SIZE + 3)
    mesh = make_mesh(axes, devices=jax.devices()[: 8 if "model" in axes else 1])
    other = embedder(towers.encode, mesh)
    assert relative_error(other(params, "key", tokens), embed(params, "key", tokens)) < TOLERANCE


@pytest.mark.parametrize("batch_size", [1, 7, 9])
def test_a_batch_that_does_not_divide_over_the_devices_is_rounded_up(
    towers, params, embed, batch_size
):
    tokens = some_tokens(21)
    uneven = embedder(towers.encode, batch_size=batch_size)
    done = []
    found = uneven(params, "key", tokens, advance=done.append)
    rounded = -(-batch_size // 8) * 8
    assert done == [rounded] * (21 // rounded) + [21 % rounded]
    assert relative_error(found, embed(params, "key", tokens)) < TOLERANCE


def test_every_number_of_rows_runs_the_same_program(towers, params):
    traced = []

    def encode(params, side, inputs, rngs=None):
        traced.append((side, inputs["tokens"].shape))
        return towers.encode(params, side, inputs, rngs)

    embed = embedder(encode)
    for num_rows in ROWS:
        embed(params, "key", some_tokens(num_rows))
    assert traced == [("key", (BATCH_SIZE, WIDTH))]


def test_embeddings_in_low_precision_come_back_as_float32(towers, params):
    def encode(params, side, inputs, rngs=None):
        return towers.encode(params, side, inputs, rngs).astype(jnp.bfloat16)

    embed = embedder(encode)
    assert embed(params, "key", some_tokens(3)).dtype == np.float32


def test_no_rows_have_no_embeddings(params, embed):
    assert embed(params, "key", some_tokens(0)).shape == (0, DIM)


def test_only_one_batch_of_rows_is_read_at_a_time(params, embed, towers):
    tokens, read = some_tokens(3 * BATCH_SIZE - 5), []

    def read_rows(rows):
        read.append(rows)
        return {"tokens": tokens[rows]}

    embed_rows = make_embedder(towers.encode, make_mesh({"data": -1}), batch_size=BATCH_SIZE)
    found = embed_rows(params, "key", read_rows, len(tokens))
    assert relative_error(found, embed(params, "key", tokens)) < TOLERANCE
    assert np.concatenate(read).tolist() == list(range(len(tokens)))
    assert max(map(len, read)) == BATCH_SIZE


@pytest.mark.parametrize("with_lengths", [True, False])
def test_batches_of_similar_texts_are_cut_to_few_widths(with_lengths):
    """Each embedding is the width of its batch."""

    def encode(params, side, inputs, rngs=None):
        rows, width = inputs["tokens"].shape
        return jnp.full((rows, 1), width, jnp.float32)

    lengths = np.array([3, 60, 9, 30, 1, 17, 64, 12])
    tokens = np.where(np.arange(64) < lengths[:, None], 7, 0).astype(np.int32)
    mesh = make_mesh({"data": 1}, devices=jax.devices()[:1])
    embed = make_embedder(encode, mesh, batch_size=2, cut_sides=("key",))
    for inputs in ({"tokens": tokens}, {"tokens": tokens, "length": lengths.astype(np.int32)}):

        def read(rows, inputs=inputs):
            return {name: column[rows] for name, column in inputs.items()}

        given = lengths if with_lengths else None
        found = embed({}, "key", read, 8, lengths=given)[:, 0].tolist()
        # The batches are rows 6 and 1, 3 and 5, 7 and 2, 0 and 4; or pairs of neighbours.
        in_order = [64, 64, 32, 32, 24, 24, 64, 64]
        assert found == ([8, 64, 12, 32, 8, 32, 64, 12] if with_lengths else in_order)
        assert embed({}, "query", read, 8, lengths=given)[:, 0].tolist() == [64] * 8
