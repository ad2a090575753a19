"""Token dropout and span masking: their rates, their spans, and their random keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.models import StaticEncoder, TransformerEncoder, make_towers
from jaxcl.models.augmentations import KEEP_SPECIAL_TOKENS, span_masking, token_dropout
from jaxcl.models.layers import row_dropout
from jaxcl.ops.mesh import make_mesh
from jaxcl.step import encode_rows
from jaxcl.step.encode_rows import keys_of_side, make_encode_rows
from jaxcl.typing import SIDES

WIDTH, ROWS = 24, 4_000
TOKENS = jnp.where(jnp.arange(WIDTH) < 20, 100 + jnp.arange(WIDTH), 0)  # four are padding


def augmented(augment, seed=0, rows=ROWS):
    """The tokens of one text, augmented with many keys."""
    keys = jax.random.split(jax.random.key(seed), rows)
    inputs = {"tokens": jnp.broadcast_to(TOKENS, (rows, WIDTH))}
    return np.asarray(jax.vmap(augment)(inputs, keys)["tokens"])


@pytest.mark.parametrize("span_length", [1, 3, 30])
@pytest.mark.parametrize("rate", [0.0, 0.15, 0.6])
def test_each_token_is_masked_with_the_same_probability(rate, span_length):
    tokens = augmented(span_masking(rate=rate, span_length=span_length, mask_id=7))
    masked = tokens == 7
    # Four standard errors; tokens of one text are correlated, tokens of different texts are not.
    error = 4 * np.sqrt(rate * (1 - rate) / ROWS)
    np.testing.assert_allclose(masked[:, :20].mean(0), rate, atol=error + 1e-12)
    assert not masked[:, 20:].any()  # padding stays padding
    np.testing.assert_array_equal(
        np.where(masked, TOKENS, tokens), np.broadcast_to(TOKENS, tokens.shape)
    )


def test_spans_are_runs_of_at_least_their_length():
    masked = augmented(span_masking(rate=0.1, span_length=4, mask_id=7))[:, :20] == 7
    starts = masked[:, 4:-4] & ~masked[:, 3:-5]  # the start of a run, away from the ends
    for ahead in range(4):
        followed = masked[:, 4 + ahead : masked.shape[1] - 4 + ahead]
        assert followed[starts].all()
    alone = augmented(span_masking(rate=0.1, span_length=1, mask_id=7))[:, :20] == 7
    assert not (alone[:, 1:] == alone[:, :-1])[alone[:, :-1]].all()


def test_dropped_tokens_are_padding_and_the_first_may_be_kept():
    tokens = augmented(token_dropout(rate=0.5, keep_first=2))
    assert (tokens[:, :2] == TOKENS[:2]).all()
    dropped = tokens[:, 2:20] == 0
    assert 0.4 < dropped.mean() < 0.6


@pytest.mark.parametrize("span_length", [1, 3])
def test_special_tokens_at_both_ends_may_be_kept(span_length):
    lengths = np.array([0, 1, 2, 3, 20, WIDTH])
    inputs = {"tokens": jnp.where(jnp.arange(WIDTH) < lengths[:, None], 100, 0)}
    augment = span_masking(rate=0.6, span_length=span_length, mask_id=7, **KEEP_SPECIAL_TOKENS)
    keys = jax.random.split(jax.random.key(0), 200)
    tokens = jax.vmap(jax.vmap(augment, (None, 0)), (0, None))(inputs, keys)["tokens"]
    for length, masked in zip(lengths, np.asarray(tokens) == 7, strict=True):
        inner = masked[:, 1 : max(length - 1, 1)]
        assert inner.any(0).all()  # each in some draw
        assert masked.sum() == inner.sum()


@pytest.mark.parametrize(
    "augment", [token_dropout(rate=0.5, keep_first=1), span_masking(rate=0.5, keep_first=1)]
)
def test_with_lengths_a_mask_leaves_the_tokens_out(augment):
    """A mask drops the same tokens as the padding id would, so that any id may be a token."""
    key = jax.random.key(0)
    by_id = augment({"tokens": TOKENS}, key)["tokens"]
    inputs = {"tokens": TOKENS.at[5].set(0), "length": jnp.int32(20)}
    found = augment(inputs, key)
    np.testing.assert_array_equal(found["tokens"], inputs["tokens"])
    np.testing.assert_array_equal(found["mask"], by_id != 0)
    assert 3 < found["mask"].sum() < 17
    assert found["length"] == 20


def test_spans_are_replaced_by_the_mask_token_with_lengths_too():
    augment, key = span_masking(rate=0.5, mask_id=0), jax.random.key(0)
    tokens = jnp.arange(100, 100 + WIDTH)
    found = augment({"tokens": tokens, "length": jnp.int32(20)}, key)
    assert found.keys() == {"tokens", "length"}
    assert 3 < (found["tokens"][:20] == 0).sum() < 17
    np.testing.assert_array_equal(found["tokens"][20:], tokens[20:])


def test_other_inputs_of_a_row_are_left_alone():
    inputs = {"tokens": TOKENS, "language": jnp.int32(3)}
    assert token_dropout(rate=0.5)(inputs, jax.random.key(0))["language"] == 3


@functools.cache
def towers():
    return make_towers(
        lambda rngs: StaticEncoder(200, dim=8, max_tokens=WIDTH, rngs=rngs),
        augment={"query": token_dropout(rate=0.5), "key": span_masking(rate=0.5)},
    )


each_arrangement = pytest.mark.parametrize(
    ("devices", "chunk_sizes"),
    [
        (1, None),
        (8, {"query": 1, "key": 3}),
        pytest.param(1, {"query": 1, "key": 3}, marks=pytest.mark.slow),
        pytest.param(8, None, marks=pytest.mark.slow),
    ],
    ids=str,
)


@each_arrangement
def test_a_row_s_view_depends_on_its_number_alone(devices, chunk_sizes):
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(1, 200, (16, WIDTH)))
    row, order = jnp.arange(16) * 3, jnp.asarray(rng.permutation(16))
    params = towers().init(jax.random.key(1))

    def embedded(devices, chunk_sizes, order):
        mesh = make_mesh({"data": devices}, devices=jax.devices()[:devices])
        encode = make_encode_rows(towers(), mesh, chunk_sizes)
        return {
            side: encode(
                params,
                side,
                {"tokens": tokens[order]},
                keys_of_side(jax.random.key(2), number, row[order]),
            )
            for number, side in enumerate(SIDES)
        }

    wanted = embedded(1, None, jnp.arange(16))
    found = embedded(devices, chunk_sizes, order)
    for side in SIDES:
        np.testing.assert_allclose(found[side], wanted[side][order], atol=1e-6)
    assert np.abs(wanted["query"] - wanted["key"]).max() > 0.1  # the sides have different views


def test_a_momentum_encoder_sees_the_view_and_evaluation_sees_the_text():
    mesh, params = (
        make_mesh({"data": 1}, devices=jax.devices()[:1]),
        towers().init(jax.random.key(1)),
    )
    encode = make_encode_rows(towers(), mesh, None)
    inputs = {"tokens": jnp.broadcast_to(TOKENS, (4, WIDTH))}
    keys = keys_of_side(jax.random.key(2), 0, jnp.arange(4))
    view = encode(params, "query", inputs, keys)
    # The static encoder has no dropout, so without the augmentation only the view is left.
    np.testing.assert_array_equal(encode(params, "query", inputs, keys, dropout=False), view)
    plain = towers().encode(params, "query", inputs)
    np.testing.assert_array_equal(encode(params, "query", inputs), plain)
    assert np.abs(np.asarray(view - plain)).max() > 0.05


def test_augmentation_and_dropout_draw_different_numbers():
    keys = keys_of_side(jax.random.key(2), 0, jnp.arange(64))
    views = encode_rows.keys_of_view(keys)
    tokens = {"tokens": jnp.ones((64, 32), int)}
    kept = jax.vmap(token_dropout(rate=0.3))(tokens, views)["tokens"] == 1
    for layer in range(100):
        units = row_dropout(jnp.ones((64, 32)), keys, rate=0.3, layer=layer) > 0
        assert abs(np.mean(kept == units) - (0.7**2 + 0.3**2)) < 0.06  # as independent draws do


def test_a_transformer_s_dropout_does_not_change_its_view():
    def towers_with(dropout):
        return make_towers(
            lambda rngs: TransformerEncoder(
                200,
                dim=8,
                hidden_dim=8,
                num_layers=1,
                num_heads=2,
                mlp_dim=8,
                dropout=dropout,
                rngs=rngs,
            ),
            augment={"query": token_dropout(rate=0.5)},
        )

    mesh = make_mesh({"data": 1}, devices=jax.devices()[:1])
    inputs = {"tokens": jnp.broadcast_to(TOKENS, (4, WIDTH))}
    keys = keys_of_side(jax.random.key(2), 0, jnp.arange(4))
    params = towers_with(0.0).init(jax.random.key(1))
    plain = make_encode_rows(towers_with(0.0), mesh, None)(params, "query", inputs, keys)
    encode = make_encode_rows(towers_with(0.3), mesh, None)
    np.testing.assert_allclose(
        encode(params, "query", inputs, keys, dropout=False), plain, atol=1e-6
    )
    assert np.abs(np.asarray(encode(params, "query", inputs, keys) - plain)).max() > 0.05
