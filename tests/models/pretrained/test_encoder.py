import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxcl.grad_cache import chunked
from jaxcl.models.pretrained.description import Dense, Pooling
from jaxcl.models.pretrained.encoder import PretrainedEncoder
from jaxcl.models.pretrained.pooling import pool_states
from jaxcl.models.towers import make_towers
from tests.helpers import relative_error, relative_errors
from tests.models.pretrained.reference_models import (
    REFERENCE,
    TRANSFORMERS,
    describe,
    embed,
    read_config,
    read_parameters,
    read_values,
    without_key_biases,
)

STATIC = {"model_type": "static_embedding", "tensors": {"embedding.weight": [6, 2]}}
MODEL2VEC = {"model_type": "model2vec", "tensors": {"embeddings": [6, 2], "weights": [6]}}
TABLE = jnp.array([[9.0, 9.0], [1.0, 2.0], [3.0, 4.0], [5.0, -6.0], [7.0, 8.0], [9.0, 9.0]])


def inputs_of(values):
    return {"tokens": values["tokens"], "length": values["length"]}


@pytest.mark.parametrize(
    "name",
    [
        *("modernbert", "gemma3-bidirectional", "qwen2"),
        *(pytest.param(one, marks=pytest.mark.slow) for one in ("mpnet", "mistral-bidirectional")),
    ],
)
def test_padding_and_other_rows_do_not_change_an_embedding(name):
    values, model = read_values(name), describe(read_config(name))
    params = {"encoder": read_parameters(name)}
    together = embed(model, params, inputs_of(values))
    assert relative_error(together, values["mean"]) < 1e-5
    tokens, length = values["tokens"][2:], values["length"][2:]
    # Padding may have any id.
    for width, padding in ((length[0], 0), (length[0] + 4, 7)):
        filled = np.full((1, width), padding)
        filled[:, : length[0]] = tokens[:, : length[0]]
        alone = embed(model, params, {"tokens": filled, "length": length})
        assert relative_error(alone[0], together[2]) < 1e-6
    shorter = embed(model, params, {"tokens": tokens, "length": length - 1})
    assert relative_error(shorter[0], together[2]) > 1e-2


def test_pooling_dense_layers_and_unit_vectors_match_sentence_transformers():
    values = read_values("bert")
    model = describe(
        read_config("bert"),
        pooling=Pooling(("weightedmean", "max")),
        dense=(
            Dense("2_Dense", 32, 12),
            Dense("3_Dense", 12, 12, activation="gelu", residual=True),
        ),
        normalize=True,
    )
    with np.load(REFERENCE / "pooling.npz") as stored:
        wanted = stored["dense"]
        dense = {
            layer: {part: jnp.array(stored[f"dense {layer} {part}"]) for part in ("kernel", "bias")}
            for layer in range(2)
        }
    params = {"encoder": read_parameters("bert"), "dense": dense}
    found = embed(model, params, inputs_of(values))
    assert relative_error(found, wanted) < 1e-5
    np.testing.assert_allclose(jnp.linalg.norm(found, axis=1), 1.0, rtol=1e-5)
    raw = embed(model, params, inputs_of(values), normalize=False)
    assert relative_error(raw, wanted) > 0.1
    tanh = model._replace(dense=(model.dense[0], model.dense[1]._replace(activation="tanh")))
    assert relative_error(embed(tanh, params, inputs_of(values)), wanted) > 1e-3


def test_the_last_token_is_found_by_the_length_and_not_by_its_id():
    values, config = read_values("mistral"), read_config("mistral")
    model = describe(config, pooling=Pooling(("lasttoken",)))
    params = {"encoder": read_parameters("mistral")}
    ends = values["length"] - 1
    tokens = values["tokens"].copy()
    wanted = values["last"][range(3), ends]
    assert relative_error(embed(model, params, inputs_of(values)), wanted) < 1e-5
    # Texts may end with the very token that pads them.
    for filler in (0, 7, int(tokens[1, ends[1]])):
        beyond = np.arange(tokens.shape[1]) > ends[:, None]
        inputs = {"tokens": np.where(beyond, filler, tokens), "length": values["length"]}
        assert relative_error(embed(model, params, inputs), wanted) < 1e-5
    early = {"tokens": tokens, "length": values["length"] - 1}
    assert relative_error(embed(model, params, early), wanted) > 1e-2


def test_an_excluded_prompt_is_encoded_but_not_pooled():
    values, model = read_values("bert"), describe(read_config("bert"))
    params = {"encoder": read_parameters("bert")}
    inputs = inputs_of(values) | {"prompt_length": np.full(3, 3)}
    with np.load(REFERENCE / "pooling.npz") as stored:
        assert relative_error(embed(model, params, inputs), stored["mean without prompt"]) < 1e-5


def test_a_static_embedding_is_the_mean_over_its_tokens():
    inputs = {"tokens": [[1, 2, 3, 5], [0, 4, 0, 0], [5, 5, 5, 5]], "length": [3, 2, 0]}
    vectors = embed(describe(STATIC), {"encoder": {"token_table": TABLE}}, inputs)
    wanted = [[(1 + 3 + 5) / 3, (2 + 4 - 6) / 3], [(9 + 7) / 2, (9 + 8) / 2], [0, 0]]
    np.testing.assert_allclose(vectors, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("option", [{"dropout": 0.1}, {"remat": True}])
def test_an_option_without_effect_on_static_embeddings_is_an_error(option):
    with pytest.raises(ValueError, match="has no effect on static embeddings"):
        PretrainedEncoder(describe(STATIC), rngs=nnx.Rngs(0), **option)


@pytest.mark.parametrize("dtype", ["int32", "half a float"])
@pytest.mark.parametrize("config", [STATIC, read_config("bert")])
def test_an_unknown_type_of_activations_is_an_error(config, dtype):
    with pytest.raises(ValueError, match=f"compute_dtype='{dtype}' is not a floating-point type"):
        PretrainedEncoder(describe(config), compute_dtype=dtype, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("config", [STATIC, MODEL2VEC])
def test_the_direct_mean_of_static_embeddings_equals_the_mean_of_their_states(config):
    encoder = PretrainedEncoder(describe(config), rngs=nnx.Rngs(0)).encoder
    tokens, mask = jnp.array([[1, 2, 3], [4, 5, 0]]), jnp.array([[1, 0, 1], [0, 0, 0]], bool)
    states = encoder(tokens, mask)
    np.testing.assert_allclose(
        encoder.mean(tokens, mask), pool_states(states, mask, modes=("mean",)), rtol=1e-6
    )


def test_a_model2vec_weights_its_tokens_and_normalises_if_its_config_says_so():
    weights = jnp.array([1.0, 0.5, 2.0, 1.0, 1.0, 1.0])
    params = {"encoder": {"token_table": TABLE, "token_weight": weights}}
    inputs = {"tokens": [[1, 2]], "length": [2]}
    mean = np.array([(0.5 * 1 + 2 * 3) / 2, (0.5 * 2 + 2 * 4) / 2])
    np.testing.assert_allclose(embed(describe(MODEL2VEC), params, inputs), [mean], rtol=1e-6)
    unit = embed(describe(MODEL2VEC, normalize=True), params, inputs)
    np.testing.assert_allclose(unit, [mean / np.linalg.norm(mean)], rtol=1e-6)


def test_tokens_that_share_rows_are_refused():
    config = MODEL2VEC | {"tensors": {"embeddings": [3, 2], "mapping": [6]}}
    with pytest.raises(ValueError, match=r"share rows .the tensor 'mapping'., which is not"):
        PretrainedEncoder(describe(config), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_parameter_paths_are_those_that_the_family_declares(name):
    config = read_config(name)
    dense = (Dense("2_Dense", 16, 4, bias=False),)
    make = functools.partial(PretrainedEncoder, describe(config, dense=dense))
    towers = make_towers(lambda rngs: make(rngs=rngs))
    params = jax.eval_shape(towers.init, jax.random.key(0))["both"]
    assert jax.tree.structure(params) == jax.tree.structure(
        {"encoder": read_parameters(name), "dense": {0: {"kernel": 0}}}
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "qwen2", "gemma3"])
def test_gradient_caching_gives_the_gradients_of_the_whole_batch(name):
    values, model = read_values(name), describe(read_config(name))
    params = {"encoder": read_parameters(name)}
    inputs = jax.tree.map(jnp.asarray, inputs_of(values))
    keys = jax.random.split(jax.random.key(0), 3)

    def encode(params, inputs, keys):
        return embed(model, params, inputs, keys, normalize=True, dropout=0.2)

    def gradients(encode):
        def total(params):
            return jnp.sin(7 * encode(params, inputs, keys)).sum()

        return without_key_biases(jax.jit(jax.grad(total))(params))

    whole = gradients(encode)
    cached = gradients(chunked(encode, chunk_size=2))
    assert max(relative_errors(cached, whole).values()) < 1e-5
    rematerialised = gradients(
        lambda *rows: embed(model, *rows, normalize=True, dropout=0.2, remat=True)
    )
    assert max(relative_errors(rematerialised, whole).values()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mpnet", "modernbert", "qwen3", "gemma3-bidirectional"])
def test_sharded_parameters_give_the_same_gradients(name):
    values, model = read_values(name), describe(read_config(name))
    params = {"encoder": read_parameters(name)}
    inputs = {
        key: jnp.tile(value, (8, 1)[: value.ndim]) for key, value in inputs_of(values).items()
    }
    keys = jax.random.split(jax.random.key(0), len(inputs["length"]))

    @jax.jit
    def differentiate(params, inputs, keys):
        def total(params):
            vectors = embed(model, params, inputs, keys, normalize=True, dropout=0.2)
            return jnp.sin(7 * vectors).sum()

        return without_key_biases(jax.grad(total)(params))

    alone = differentiate(params, inputs, keys)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def spread(leaf):
        spec = PartitionSpec("data") if leaf.shape[0] % 8 == 0 else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    together = differentiate(*jax.tree.map(spread, (params, inputs, keys)))
    assert max(relative_errors(together, alone).values()) < 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "t5"}, "family='t5' is unknown; use one of bert, clip_text_model"),
        ({"dense": (Dense("2_Dense", 8, 4),)}, "2_Dense reads 8 features, but gets 16"),
        (
            {"dense": (Dense("2_Dense", 16, 4, residual=True),)},
            "2_Dense adds 16 features to 4; a residual between different widths",
        ),
        (
            {"dense": (Dense("2_Dense", 16, 4, activation="hardtanh"),)},
            "2_Dense: the activation 'hardtanh' is not supported; only gelu, ",
        ),
    ],
)
def test_an_unsupported_model_is_refused_with_the_reason(changes, message):
    with pytest.raises(ValueError, match=message):
        PretrainedEncoder(describe(STATIC_16)._replace(**changes), rngs=nnx.Rngs(0))


STATIC_16 = STATIC | {"tensors": {"embedding.weight": [6, 16]}}


def test_an_option_out_of_range_is_an_error():
    with pytest.raises(ValueError, match=r"dropout=1\.5"):
        PretrainedEncoder(describe(STATIC), dropout=1.5, rngs=nnx.Rngs(0))


def test_inputs_without_tokens_name_the_encoder():
    encoder = PretrainedEncoder(describe(STATIC), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="PretrainedEncoder reads texts, but this side has image"):
        encoder({"image": jnp.zeros((1, 2))})
