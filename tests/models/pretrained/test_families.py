import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import special

from jaxcl import models
from jaxcl.models.pretrained.activations import ACTIVATIONS
from jaxcl.models.pretrained.bert import bert_architecture
from jaxcl.models.pretrained.blocks import relative_buckets
from jaxcl.models.pretrained.description import Computation
from jaxcl.models.pretrained.families import FAMILIES
from jaxcl.models.pretrained.modernbert import modernbert_architecture
from jaxcl.models.pretrained.pooling import pool_states
from tests.helpers import relative_error, relative_errors
from tests.models.pretrained.reference import numpy_families
from tests.models.pretrained.reference_models import (
    DECODERS,
    TRANSFORMERS,
    as_parameters,
    family_of,
    hidden_states,
    read_config,
    read_parameters,
    read_tensors,
    read_values,
    without_key_biases,
)


def mask_of(values):
    return np.arange(values["tokens"].shape[1]) < values["length"][:, None]


def quick_unless(*slow):
    """All transformers, some of them for the slow tests."""
    return [
        pytest.param(name, marks=pytest.mark.slow) if name in slow else name
        for name in TRANSFORMERS
    ]


MARKS = {
    "modernbert": pytest.mark.smoke,  # whose layers have most options
    "xlm-roberta": pytest.mark.slow,  # RoBERTa's functions
}


@pytest.fixture(
    scope="module", params=[pytest.param(one, marks=MARKS.get(one, ())) for one in TRANSFORMERS]
)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def computed(name):
    """The states of a family's model, their means, and the gradient of the reference's scalar."""
    values, config = read_values(name), read_config(name)
    mask = jnp.asarray(mask_of(values))
    cotangent = np.cos(np.arange(values["mean"].size)).reshape(values["mean"].shape)

    def scalar(params):
        states = hidden_states(config, params, values["tokens"], mask)
        mean = pool_states(states, mask, modes=("mean",))
        return (mean * cotangent).sum(), (states, mean)

    differentiate = jax.jit(jax.grad(scalar, has_aux=True))
    gradients, (states, mean) = differentiate(read_parameters(name))
    return gradients, np.asarray(states), mean


def test_hidden_states_and_their_means_match_transformers(name, computed):
    values, (_, states, mean) = read_values(name), computed
    mask = mask_of(values)
    assert_equal(states[mask], values["last"][mask])
    assert_equal(mean, values["mean"])


def assert_equal(found, wanted):
    assert relative_error(found, wanted) < 1e-5
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


LLAMA_ROPE = read_config("llama")["rope_parameters"]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("bert", {"hidden_act": "gelu_new"}),
        ("bert", {"layer_norm_eps": 1e-4}),
        ("distilbert", {"activation": "gelu_new"}),
        ("modernbert", {"hidden_activation": "gelu_new"}),
        ("modernbert", {"local_attention": 6}),
        ("modernbert", {"local_attention": 10}),
        ("modernbert", {"layer_types": ["full_attention"] * 4}),
        ("modernbert", {"rope_parameters": {"full_attention": {"rope_theta": 10_000.0}}}),
        ("modernbert", {"rope_parameters": {"sliding_attention": {"rope_theta": 160_000.0}}}),
        ("modernbert", {"norm_eps": 1e-4}),
        ("mpnet", {"layer_norm_eps": 1e-4}),
        ("roberta", {"pad_token_id": 0}),
        ("mistral", {"sliding_window": 4}),
        ("mistral", {"sliding_window": 6}),
        ("mistral", {"sliding_window": None}),
        ("mistral", {"is_causal": False}),
        ("mistral", {"rope_parameters": {"rope_theta": 500.0}}),
        ("mistral", {"rms_norm_eps": 1e-4}),
        ("mistral", {"hidden_act": "gelu"}),
        ("mistral-bidirectional", {"sliding_window": 4}),
        ("mistral-bidirectional", {"sliding_window": 6}),
        ("llama", {"rope_parameters": {"rope_theta": 100.0}}),
        ("llama", {"rope_parameters": LLAMA_ROPE | {"factor": 5.0}}),
        ("llama", {"rope_parameters": LLAMA_ROPE | {"low_freq_factor": 1.2}}),
        ("llama", {"rope_parameters": LLAMA_ROPE | {"high_freq_factor": 3.0}}),
        ("llama", {"rope_parameters": LLAMA_ROPE | {"original_max_position_embeddings": 48}}),
        ("qwen2", {"layer_types": ["full_attention"] * 2}),
        ("qwen2", {"layer_types": ["sliding_attention"] * 2}),
        ("qwen2", {"sliding_window": 4}),
        ("qwen3", {"rope_parameters": {"rope_theta": 1_000.0}}),
        ("qwen3", {"rms_norm_eps": 1e-4}),
        ("gemma3", {"sliding_window": 7}),
        ("gemma3", {"sliding_window": 9}),
        ("gemma3", {"layer_types": ["full_attention"] * 3}),
        ("gemma3", {"use_bidirectional_attention": True}),
        ("gemma3", {"query_pre_attn_scalar": 6}),
        ("gemma3", {"hidden_activation": "gelu"}),
        ("gemma3", {"rope_parameters": {"full_attention": {"rope_theta": 10_000.0}}}),
        ("gemma3", {"rope_parameters": {"sliding_attention": {"rope_theta": 1_000.0}}}),
        ("gemma3-bidirectional", {"sliding_window": 7}),
        ("gemma3-bidirectional", {"sliding_window": 10}),
        ("gemma3-bidirectional", {"use_bidirectional_attention": False}),
    ],
)
def test_each_config_value_changes_the_states(name, change):
    values = read_values(name)
    mask = mask_of(values)
    config, params = read_config(name) | change, read_parameters(name)
    states = hidden_states(config, params, values["tokens"], mask)
    assert relative_error(np.asarray(states)[mask], values["last"][mask]) > 3e-5


def test_gradients_match_transformers(name, computed):
    values, config, (gradients, _, _) = read_values(name), read_config(name), computed
    stored = {
        key.removeprefix("gradient "): value
        for key, value in values.items()
        if key.startswith("gradient ")
    }
    assert set(stored) == {tensor.name for tensor in family_of(name).tensors(config).values()}
    trees = gradients, as_parameters(config, stored)
    errors = relative_errors(*(trees if name in DECODERS else map(without_key_biases, trees)))
    assert max(errors.values()) < 1e-4, errors


# The slow ones differ from the others in names only.
@pytest.mark.parametrize("name", quick_unless("distilbert", "xlm-roberta"))
def test_float64_states_match_the_numpy_reference(name, x64):
    values, config = read_values(name), read_config(name)
    mask = mask_of(values)
    params = read_parameters(name, jnp.float64)

    def states(params):
        return hidden_states(config, params, values["tokens"], mask, compute_dtype="float64")

    found = np.asarray(jax.jit(states)(params))
    assert found.dtype == np.float64
    wanted = np.concatenate(
        [
            numpy_families.hidden_states(config, read_tensors(name), tokens[:length])
            for tokens, length in zip(values["tokens"], values["length"], strict=True)
        ]
    )
    assert relative_error(found[mask], wanted) < 1e-10
    assert relative_error(values["last"][mask], wanted) > 1e-9  # float32 would not do


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("bert", {"position_embedding_type": "relative_key"}, "only 'absolute' is"),
        ("bert", {"is_decoder": True}, "is_decoder=True is not supported"),
        ("bert", {"quantization_config": {"bits": 4}}, "quantization_config=.* is not supported"),
        ("bert", {"hidden_act": "gelu_11"}, "hidden_act='gelu_11' is not supported; only gelu, "),
        ("bert", {"num_attention_heads": 3}, "width of 16 does not divide over 3 heads"),
        ("bert", {"hidden_size": "16"}, "hidden_size='16'; it must be a whole number of at least"),
        ("bert", {"layer_norm_eps": float("nan")}, "layer_norm_eps=nan; it must be a number"),
        ("bert", {"hidden_act": ["gelu"]}, "hidden_act=.'gelu'. is not supported"),
        ("distilbert", {"n_layers": 0}, "n_layers=0; it must be a whole number of at least 1"),
        ("modernbert", {"norm_bias": 1}, "norm_bias=1; it must be true or false"),
        ("modernbert", {"layer_types": ["full_attention"] * 3}, "for each of 4 layers"),
        ("modernbert", {"layer_types": ["chunked_attention"] * 4}, "it must list 'full_attention'"),
        ("modernbert", {"rope_parameters": [1]}, "rope_parameters=.1.; it must map"),
        (
            "modernbert",
            {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}},
            "rope_type='yarn' is not supported; only 'default' is",
        ),
        ("modernbert", {"num_attention_heads": 16}, "over 16 heads of an even width"),
        ("mpnet", {"relative_attention_num_buckets": 16}, "only 32 is"),
        ("roberta", {"pad_token_id": -1}, "pad_token_id=-1; it must be a whole number of at least"),
    ],
)
def test_an_unsupported_config_value_is_refused_with_its_key(name, change, message):
    with pytest.raises(ValueError, match=message):
        family_of(name).make(read_config(name) | change, rngs=nnx.Rngs(0))


def test_older_config_keys_of_modernbert_give_the_same_architecture():
    config = read_config("modernbert")
    rope = config["rope_parameters"]
    new = modernbert_architecture(config)
    older = {
        key: value for key, value in config.items() if key not in ("layer_types", "rope_parameters")
    } | {
        "global_attn_every_n_layers": 3,
        "global_rope_theta": rope["full_attention"]["rope_theta"],
        "local_rope_theta": rope["sliding_attention"]["rope_theta"],
    }
    assert modernbert_architecture(older) == new
    assert new.windows == (None, 4, 4, None)
    assert new.rotary_bases == (160_000.0, 10_000.0, 10_000.0, 160_000.0)
    assert modernbert_architecture(older | {"global_rope_theta": 1.0}) != new


def test_the_readme_lists_every_family():
    readme = (Path(models.__file__).parent / "README.md").read_text()
    assert not [
        name for name in FAMILIES if name != "static_embedding" and f"`{name}`" not in readme
    ]


def test_a_missing_key_means_the_published_base_model():
    assert bert_architecture({})[:9] == (30522, 768, 12, 12, 3072, "gelu", 1e-12, 0.1, 512)


@pytest.mark.parametrize(
    ("name", "longest"), [("bert", 24), ("roberta", 22), ("mpnet", 150), ("modernbert", 32)]
)
def test_texts_longer_than_the_positions_are_refused(name, longest):
    config, params = read_config(name), read_parameters(name)
    assert family_of(name).max_tokens(config) == longest
    tokens = np.ones((1, longest + 1), np.int32)
    with pytest.raises(ValueError, match=f"texts of {longest + 1} tokens; this encoder reads"):
        hidden_states(config, params, tokens, tokens == 1)


def test_buckets_of_relative_positions_match_the_numpy_reference():
    buckets = relative_buckets(300)
    wanted = [[numpy_families.bucket(k - q) for k in range(300)] for q in range(300)]
    assert (buckets == np.array(wanted)).all()
    assert buckets[0, 1] == 17  # a key after its query
    assert buckets[1, 0] == 1
    assert buckets[0, 128] == buckets[0, 299] == 31


@pytest.mark.parametrize("name", ["gelu", "gelu_new", "quick_gelu", "silu", "mish"])
def test_activations_match_their_formulas(name):
    x = np.linspace(-6, 6, 101)
    cubic = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    wanted = {
        "gelu": x * special.ndtr(x),
        "gelu_new": x * (1 + np.tanh(cubic)) / 2,
        "quick_gelu": x / (1 + np.exp(-1.702 * x)),
        "silu": x / (1 + np.exp(-x)),
        "mish": x * np.tanh(np.log1p(np.exp(x))),
    }[name]
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.array(x, jnp.float32)), wanted, atol=2e-6)


def test_activations_are_bfloat16_on_request_and_parameters_float32():
    values, config = read_values("bert"), read_config("bert")
    mask = mask_of(values)
    params = read_parameters("bert")
    found = hidden_states(config, params, values["tokens"], mask, compute_dtype="bfloat16")
    assert found.dtype == jnp.bfloat16
    assert 1e-4 < relative_error(found[mask], values["last"][mask]) < 3e-2
    narrow = Computation(compute_dtype="bfloat16")
    made = nnx.eval_shape(lambda: FAMILIES["bert"].make(config, narrow, rngs=nnx.Rngs(0)))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(made))} == {jnp.dtype("float32")}


def test_dropout_has_the_rate_of_pretraining_and_depends_on_the_row_only():
    values, config, params = read_values("bert"), read_config("bert"), read_parameters("bert")
    tokens, mask = values["tokens"], mask_of(values)
    keys = jax.random.split(jax.random.key(0), len(tokens))

    def states(rows, **options):
        return hidden_states(config, params, tokens[rows], mask[rows], keys[rows], **options)

    rows, order = np.arange(3), np.array([2, 0, 1])
    dropped = states(rows)
    np.testing.assert_array_equal(dropped, states(rows, dropout=config["hidden_dropout_prob"]))
    assert relative_error(states(order), dropped[order]) < 1e-6
    assert relative_error(dropped[mask], values["last"][mask]) > 1e-2
    assert relative_error(states(rows, dropout=0.0)[mask], values["last"][mask]) < 1e-5
