import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxcl.models import DecoderEncoder, StaticEncoder, TransformerEncoder, make_towers
from jaxcl.models.decoder import rotated
from jaxcl.models.layers import pool, row_dropout, token_mask
from jaxcl.ops.vectors import normalise
from tests.helpers import relative_error, relative_errors

transformer = functools.partial(
    TransformerEncoder,
    20,
    dim=6,
    max_tokens=7,
    hidden_dim=8,
    num_layers=2,
    num_heads=2,
    mlp_dim=12,
)
decoder = functools.partial(
    DecoderEncoder,
    20,
    dim=6,
    max_tokens=7,
    hidden_dim=16,
    num_layers=2,
    num_heads=4,
    num_key_heads=2,
    mlp_dim=12,
    dropout=0.1,
)
ENCODERS = {
    "decoder": decoder,
    "static": functools.partial(StaticEncoder, 20, dim=6, max_tokens=7),
    "static, projected": functools.partial(StaticEncoder, 20, dim=6, max_tokens=7, hidden_dim=10),
    "static, no positions": functools.partial(
        StaticEncoder, 20, dim=6, max_tokens=7, position_weights=False
    ),
    "pre-LN, mean": transformer,
    "post-LN, cls": functools.partial(transformer, norm_position="post", pooling="cls"),
    "one loop": functools.partial(transformer, scan_layers=True),
    "bfloat16": functools.partial(transformer, compute_dtype="bfloat16"),
}
TOKENS = np.array([[1, 2, 3, 4, 0, 0, 0], [5, 6, 7, 8, 9, 1, 2], [3, 0, 0, 0, 0, 0, 0]])


@pytest.fixture(params=ENCODERS)
def towers(request):
    encoder = ENCODERS[request.param]
    return make_towers(lambda rngs: encoder(rngs=rngs), shared=True)


@pytest.mark.smoke
def test_embeddings_are_unit_vectors_in_float32(towers):
    vectors = embed(towers, TOKENS)
    assert vectors.shape == (3, 6)
    assert vectors.dtype == jnp.float32
    np.testing.assert_allclose(jnp.linalg.norm(vectors, axis=1), 1.0, rtol=1e-5)


def test_padding_changes_nothing(towers):
    vectors = embed(towers, TOKENS[2:, :1])
    assert relative_error(embed(towers, TOKENS[2:]), vectors) < 1e-2  # bfloat16 has 8 bits
    assert relative_error(embed(towers, TOKENS[:1]), vectors) > 3e-2


def test_the_token_mask_of_each_kind_of_input():
    tokens = jnp.array([[3, 0, 4, 0], [0, 5, 0, 0]])
    length = jnp.array([4, 1])
    mask = jnp.array([[True, True, False, True], [False] * 4])
    by_id = [[True, False, True, False], [False, True, False, False]]
    by_length = [[True] * 4, [True, False, False, False]]
    assert token_mask({"tokens": tokens}).tolist() == by_id
    assert token_mask({"tokens": tokens, "length": length}).tolist() == by_length
    assert token_mask({"tokens": tokens[1], "length": length[1]}).tolist() == by_length[1]
    assert (token_mask({"tokens": tokens, "length": length, "mask": mask}) == mask).all()


def test_with_lengths_tokens_and_padding_may_have_any_id(towers):
    length = np.array([4, 7, 1])
    inside = np.arange(7) < length[:, None]
    tokens = np.where((TOKENS == 2) | (TOKENS == 3), 0, TOKENS)
    variants = tokens, np.where(inside, tokens, 6), TOKENS
    vectors = embed(towers, np.concatenate(variants), length=jnp.asarray(np.tile(length, 3)))
    zeros, other_padding, other_tokens = np.split(np.asarray(vectors), 3)
    assert relative_error(other_padding, zeros) < 1e-5
    for row in range(3):
        assert relative_error(other_tokens[row], zeros[row]) > 1e-2


def test_rows_do_not_see_each_other(towers):
    together = embed(towers, TOKENS)
    for row in range(3):
        assert relative_error(together[row], embed(towers, TOKENS[row : row + 1])[0]) < 1e-2


def test_a_row_without_tokens_has_a_finite_vector_and_gradient(towers):
    params = towers.init(jax.random.key(0))
    tokens = jnp.zeros((2, 7), int)

    def total(params):
        return towers.encode(params, "query", {"tokens": tokens}).sum()

    value, gradients = jax.jit(jax.value_and_grad(total))(params)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("name", [name for name in ENCODERS if not name.startswith("static")])
def test_dropout_needs_keys_and_follows_them(name):
    towers = make_towers(lambda rngs: ENCODERS[name](rngs=rngs), shared=True)
    params = towers.init(jax.random.key(0))
    inputs = {"tokens": jnp.asarray(TOKENS)}
    keys = jax.random.split(jax.random.key(1), 3)
    encode = jax.jit(towers.encode, static_argnums=1)
    dropped = encode(params, "query", inputs, keys)
    order = np.array([2, 0, 1])
    reordered = encode(params, "query", {"tokens": inputs["tokens"][order]}, keys[order])
    assert relative_error(reordered, dropped[order]) < 1e-2
    assert relative_error(dropped, encode(params, "query", inputs)) > 1e-2


def test_shared_towers_are_one_and_separate_ones_two():
    encoder = ENCODERS["static"]
    inputs = {"tokens": jnp.asarray(TOKENS)}
    for shared in (True, False):
        towers = make_towers(lambda rngs: encoder(rngs=rngs), shared=shared)
        params = towers.init(jax.random.key(0))
        assert set(params) == ({"both"} if shared else {"query", "key"})
        sides = [towers.encode(params, side, inputs) for side in ("query", "key")]
        assert bool((sides[0] == sides[1]).all()) == shared


def test_word_order_matters_to_a_transformer_and_not_yet_to_a_new_static_encoder():
    reverse = TOKENS[1:2, ::-1]
    for name, matters in {"static": False, "pre-LN, mean": True}.items():
        towers = make_towers(lambda rngs, name=name: ENCODERS[name](rngs=rngs), shared=True)
        difference = relative_error(embed(towers, reverse), embed(towers, TOKENS[1:2]))
        assert (difference > 1e-4) == matters, name


def test_attention_sees_no_padding_token():
    towers = make_towers(lambda rngs: ENCODERS["pre-LN, mean"](rngs=rngs), shared=True)
    wide = np.pad(TOKENS[:, :4], ((0, 0), (0, 3)))
    assert relative_error(embed(towers, wide)[0], embed(towers, TOKENS[:, :4])[0]) < 1e-5


def test_cudnn_s_attention_gets_lengths_that_give_the_mask_s_embeddings(monkeypatch):
    asked = []

    def on_a_cpu(queries, keys, values, *, implementation, **options):
        asked.append((implementation, *options))
        return dot_product_attention(queries, keys, values, **options)

    dot_product_attention = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", on_a_cpu)
    by_mask, by_lengths = (
        make_towers(
            lambda rngs, attention=attention: transformer(
                attention=attention, compute_dtype="bfloat16", rngs=rngs
            ),
            shared=True,
        )
        for attention in ("xla", "cudnn")
    )
    tokens = np.pad(TOKENS, ((0, 1), (0, 0)))  # the last row has no token
    assert relative_error(embed(by_lengths, tokens), embed(by_mask, tokens)) < 1e-2
    masked = ("xla", "bias", "mask", "scale")
    assert asked == [("cudnn", "key_value_seq_lengths")] * 2 + [masked] * 2
    length = jnp.array([4, 7, 1, 0])
    with_zeros = np.where(tokens == 3, 0, tokens)
    mask, lengths = (embed(one, with_zeros, length=length) for one in (by_mask, by_lengths))
    assert relative_error(lengths, mask) < 1e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "flash"}, "attention='flash' is unknown; use one of xla, cudnn"),
        (
            {"attention": "cudnn", "compute_dtype": "float32"},
            "attention='cudnn' with activations of float32; set compute_dtype to 'bfloat16'",
        ),
        ({"norm_position": "both"}, "norm_position='both' is unknown; use one of pre, post"),
        ({"pooling": "max"}, "pooling='max' is unknown; use one of mean, cls"),
        ({"num_heads": 3}, "hidden_dim=8 does not divide over 3 heads"),
    ],
)
def test_a_wrong_option_is_an_error_that_lists_the_known_ones(options, message):
    with pytest.raises(ValueError, match=message):
        make_towers(lambda rngs: transformer(rngs=rngs, **options), shared=True)


def test_activations_that_are_computed_again_change_nothing_and_are_not_kept():
    params = make_towers(lambda rngs: transformer(rngs=rngs), shared=True).init(jax.random.key(0))
    tokens = jnp.tile(jnp.asarray(TOKENS), (8, 1))
    keys = jax.random.split(jax.random.key(1), tokens.shape[0])

    def total(params, remat):
        make = functools.partial(transformer, dropout=0.2, remat=remat)
        towers = make_towers(lambda rngs: make(rngs=rngs), shared=True)
        return jnp.sin(7 * towers.encode(params, "query", {"tokens": tokens}, keys)).sum()

    again, kept = (
        jax.jit(jax.value_and_grad(total), static_argnums=1)(params, remat)
        for remat in (True, False)
    )
    assert max(relative_errors(again, kept).values()) < 1e-5
    # The residuals of the backward pass. XLA undoes this on CPUs, but not on accelerators.
    sizes = [
        sum(
            leaf.size
            for leaf in jax.tree.leaves(
                jax.eval_shape(lambda p, r=remat: jax.vjp(lambda p: total(p, r), p)[1], params)
            )
        )
        for remat in (True, False)
    ]
    assert sizes[0] < 0.4 * sizes[1], sizes


def test_a_text_longer_than_the_positions_is_an_error():
    towers = make_towers(lambda rngs: ENCODERS["pre-LN, mean"](rngs=rngs), shared=True)
    with pytest.raises(ValueError, match="texts of 8 tokens; this encoder reads 7"):
        embed(towers, np.ones((1, 8), int))


def test_a_mean_in_half_precision_is_summed_in_float32():
    hidden = jnp.full((1, 3_000, 2), 100.0, jnp.float16)  # the sum and the count overflow float16
    mean = pool(hidden, jnp.ones((1, 3_000), bool), pooling="mean")
    assert mean.dtype == jnp.float16
    assert mean.tolist() == [[100.0, 100.0]]


def test_pooling_by_hand():
    hidden = jnp.array([[[1.0, 2.0], [3.0, 4.0], [100.0, 100.0]]])
    mask = jnp.array([[True, True, False]])
    assert pool(hidden, mask, pooling="mean").tolist() == [[(1 + 3) / 2, (2 + 4) / 2]]
    assert pool(hidden, mask, pooling="cls").tolist() == [[1.0, 2.0]]


def test_the_zero_vector_stays_zero_with_a_finite_gradient():
    zero = jnp.zeros((1, 3))
    assert normalise(zero).tolist() == [[0.0, 0.0, 0.0]]
    assert np.isfinite(jax.grad(lambda v: normalise(v).sum())(zero)).all()
    naive = jax.grad(lambda v: (v / jnp.linalg.norm(v)).sum())(zero)
    assert np.isnan(naive).all()  # which the epsilon prevents


def test_row_dropout_keeps_the_mean_and_the_share():
    keys = jax.random.split(jax.random.key(0), 4)
    dropped = row_dropout(jnp.ones((4, 10_000)), keys, rate=0.3, layer=0)
    zeros = float((dropped == 0).mean())
    # The standard error of a share of .3 over 40,000 draws is .0023.
    assert abs(zeros - 0.3) < 5 * 0.0023
    # Decisions have 16 bits, so the rate is a multiple of 2⁻¹⁶, and the kept values match it.
    kept = 1 - round(0.3 * 2**16) / 2**16
    np.testing.assert_allclose(dropped.max(), 1 / kept, rtol=1e-6)
    other = row_dropout(jnp.ones((4, 10_000)), keys, rate=0.3, layer=1)
    assert (dropped != other).any()


def embed(towers, tokens, **others):
    params = towers.init(jax.random.key(0))
    encode = jax.jit(towers.encode, static_argnums=1)
    return encode(params, "query", {"tokens": jnp.asarray(tokens), **others})


def test_a_static_embedding_by_hand():
    towers = make_towers(lambda rngs: StaticEncoder(4, dim=2, max_tokens=3, rngs=rngs), shared=True)
    params = towers.init(jax.random.key(0))
    params["both"] = {
        "table": jnp.array([[9.0, 9.0], [1.0, 0.0], [0.0, 1.0], [9.0, 9.0]]),
        "token_weight": jnp.log(jnp.array([1.0, 3.0, 1.0, 1.0])),
        "position_weight": jnp.log(jnp.array([1.0, 4.0, 1.0])),
    }
    vectors = towers.encode(params, "query", {"tokens": jnp.array([[1, 2, 0], [2, 1, 0]])})
    # 3·1·(1, 0) + 1·4·(0, 1), and 1·1·(0, 1) + 3·4·(1, 0): norms 5 and √145.
    wanted = [[3 / 5, 4 / 5], [12 / 145**0.5, 1 / 145**0.5]]
    np.testing.assert_allclose(vectors, wanted, rtol=1e-6)


def test_without_position_weights_a_static_encoder_starts_with_the_same_embeddings():
    encoder = functools.partial(StaticEncoder, 4, dim=2, max_tokens=3)
    towers, without = (
        make_towers(lambda rngs, kind=kind: kind(rngs=rngs))
        for kind in (encoder, functools.partial(encoder, position_weights=False))
    )
    params = without.init(jax.random.key(0))["both"]
    assert set(params) == {"table", "token_weight"}
    assert params["table"].tobytes() == towers.init(jax.random.key(0))["both"]["table"].tobytes()
    np.testing.assert_array_equal(
        embed(without, TOKENS[:, :3] % 4), embed(towers, TOKENS[:, :3] % 4)
    )
    with pytest.raises(ValueError, match="texts of 4 tokens; this encoder reads 3"):
        embed(without, TOKENS[:, :4] % 4)


@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, True])
def test_one_loop_over_the_layers_is_the_layers_one_after_the_other(x64, remat):
    encoder = functools.partial(transformer, remat=remat, dropout=0.3)
    towers = make_towers(lambda rngs: encoder(rngs=rngs), shared=True)
    looped = make_towers(lambda rngs: encoder(scan_layers=True, rngs=rngs), shared=True)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), towers.init(jax.random.key(0)))
    blocks = params["both"]["blocks"]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(blocks[n] for n in sorted(blocks)))
    keys = jax.random.split(jax.random.key(1), len(TOKENS))

    def total(params, towers):
        vectors = towers.encode(params, "query", {"tokens": jnp.array(TOKENS)}, keys)
        return (vectors**3).sum()

    def differentiate(params, towers):
        return jax.jit(jax.value_and_grad(lambda params: total(params, towers)))(params)

    value, gradients = differentiate(params, towers)
    together = {"both": params["both"] | {"blocks": stacked}}
    found, found_gradients = differentiate(together, looped)
    # The attention's softmax is rounded to float32.
    assert relative_error(found, value) < 1e-6
    wanted = gradients["both"]["blocks"]
    wanted = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(wanted[n] for n in sorted(wanted)))
    errors = relative_errors(found_gradients["both"]["blocks"], wanted)
    assert max(errors.values()) < 1e-5


def decoder_state(tokens, **options):
    towers = make_towers(lambda rngs: decoder(rngs=rngs, **options), shared=True)
    return embed(towers, np.array(tokens)[None])[0]


def test_a_decoder_reads_the_order_of_its_tokens_and_ends_at_the_last():
    assert relative_error(decoder_state([1, 2, 3]), decoder_state([2, 1, 3])) > 1e-3
    assert relative_error(decoder_state([1, 2, 3]), decoder_state([1, 2, 3, 0, 0])) < 1e-5
    assert relative_error(decoder_state([1, 2, 3]), decoder_state([1, 2, 3, 4])) > 1e-2


def test_a_decoder_s_state_does_not_depend_on_later_tokens():
    model = decoder(rngs=nnx.Rngs(0))
    graph, params = nnx.split(model.blocks)
    block = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[0], params))
    hidden = jax.random.normal(jax.random.key(0), (1, 5, 16))
    mask = jnp.ones((1, 5), bool)
    whole = block(hidden, mask, None, 0)
    np.testing.assert_allclose(block(hidden[:, :3], mask[:, :3], None, 0), whole[:, :3], atol=1e-5)
    assert relative_error(block(hidden[:, ::-1], mask, None, 0)[:, ::-1], whole) > 1e-2


def test_rotary_positions_are_relative(x64):
    query, key = np.random.default_rng(0).normal(size=(2, 8))
    turned = [
        rotated(jnp.tile(vector, (1, 9, 1, 1)), base=100.0)[0, :, 0] for vector in (query, key)
    ]
    scores = turned[0] @ turned[1].T
    np.testing.assert_allclose(scores[1:, 1:], scores[:-1, :-1], atol=1e-12)
    assert abs(scores[0, 0] - scores[0, 1]) > 1e-3
    np.testing.assert_allclose(jnp.linalg.norm(turned[0], axis=1), np.linalg.norm(query))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_heads": 16}, "heads of an even width"), ({"num_key_heads": 3}, "num_key_heads=3")],
)
def test_heads_that_do_not_divide_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        decoder(rngs=nnx.Rngs(0), **options)
