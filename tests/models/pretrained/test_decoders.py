"""Decoders: what their config says, the tokens that attention reaches, and rotary positions."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxcl.models.pretrained.decoder_blocks import Decoder
from jaxcl.models.pretrained.decoders import (
    llama_architecture,
    mistral_architecture,
    qwen2_architecture,
    qwen3_architecture,
)
from jaxcl.models.pretrained.families import FAMILIES
from jaxcl.models.pretrained.gemma3 import gemma3_architecture
from jaxcl.models.pretrained.rotary import Rotary, frequencies
from tests.helpers import relative_error
from tests.models.pretrained.reference_models import (
    DECODERS,
    family_of,
    hidden_states,
    read_config,
    read_parameters,
    read_values,
)

SLIDING, FULL = "sliding_attention", "full_attention"


def test_missing_keys_mean_the_defaults_of_transformers():
    mistral, llama, qwen2, qwen3, gemma3 = (
        make({})
        for make in (
            *(mistral_architecture, llama_architecture, qwen2_architecture),
            *(qwen3_architecture, gemma3_architecture),
        )
    )
    #  Vocabulary, width, layers, heads, key heads, width of a head, width of the MLP.
    assert mistral[:7] == (32000, 4096, 32, 32, 8, 128, 14336)
    assert llama[:7] == (32000, 4096, 32, 32, 32, 128, 11008)
    assert qwen2[:7] == qwen3[:7] == (151936, 4096, 32, 32, 32, 128, 22016)
    assert gemma3[:7] == (262208, 2304, 26, 8, 4, 256, 9216)
    assert [one.epsilon for one in (mistral, llama, qwen2, qwen3, gemma3)] == [1e-6] * 5
    assert set(mistral.windows) == {4095}
    assert set(llama.windows) == set(qwen2.windows) == set(qwen3.windows) == {None}
    assert gemma3.windows == tuple(None if n % 6 == 5 else 4095 for n in range(26))
    assert [one.base for one in gemma3.rotary[4:6]] == [10_000.0, 1_000_000.0]
    assert set(mistral.rotary + llama.rotary + qwen3.rotary) == {Rotary(10_000.0)}
    assert gemma3.score_scale == 1 / 16
    assert llama.score_scale == pytest.approx(1 / math.sqrt(128), rel=1e-12)


def test_the_width_of_heads_of_qwen3_does_not_depend_on_the_hidden_states():
    assert qwen3_architecture({"hidden_size": 512}).head_dim == 128
    assert qwen2_architecture({"hidden_size": 512}).head_dim == 512 // 32
    assert mistral_architecture({"hidden_size": 512, "head_dim": None}).head_dim == 512 // 32
    assert llama_architecture({"num_key_value_heads": None}).num_key_heads == 32


def test_biases_follow_the_family():
    def biases(a):
        return a.projection_bias, a.output_bias, a.mlp_bias

    given = {"attention_bias": True, "mlp_bias": True}
    assert biases(mistral_architecture(given)) == (False, False, False)
    assert biases(llama_architecture(given)) == (True, True, True)
    assert biases(qwen2_architecture({})) == (True, False, False)
    assert biases(qwen3_architecture({})) == (False, False, False)
    assert biases(qwen3_architecture(given)) == (True, True, False)
    assert biases(gemma3_architecture(given)) == (True, True, False)


WINDOWS = {
    "mistral": (mistral_architecture, {"sliding_window": 5}, (4, 4)),
    "mistral without one": (mistral_architecture, {"sliding_window": None}, (None, None)),
    "mistral, bidirectional": (
        mistral_architecture,
        {"sliding_window": 5, "is_causal": False},
        (5, 5),
    ),
    "qwen2 without use_sliding_window": (
        qwen2_architecture,
        {"sliding_window": 5, "max_window_layers": 0},
        (None, None),
    ),
    "qwen2 from the second layer on": (
        qwen2_architecture,
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
        (None, 4),
    ),
    "qwen2 by a list": (
        qwen2_architecture,
        {"use_sliding_window": True, "sliding_window": 5, "layer_types": [SLIDING, FULL]},
        (4, None),
    ),
    "qwen3": (
        qwen3_architecture,
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
        (None, 4),
    ),
    "gemma3 by its pattern": (
        gemma3_architecture,
        {"sliding_window": 8, "sliding_window_pattern": 2},
        (7, None),
    ),
    "gemma3, bidirectional": (
        gemma3_architecture,
        {"sliding_window": 8, "use_bidirectional_attention": True, "layer_types": [FULL, SLIDING]},
        (None, 4),
    ),
    "gemma3, causal by null": (
        gemma3_architecture,
        {"sliding_window": 8, "use_bidirectional_attention": None, "layer_types": [SLIDING, FULL]},
        (7, None),
    ),
}


@pytest.mark.parametrize("case", WINDOWS)
def test_windows_follow_the_family(case):
    architecture, config, windows = WINDOWS[case]
    assert architecture({"num_hidden_layers": 2} | config).windows == windows


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
ROTARY = {
    "older base": (llama_architecture, {"rope_theta": 500.0}, Rotary(500.0)),
    "newer base": (llama_architecture, {"rope_parameters": {"rope_theta": 500}}, Rotary(500.0)),
    "older type": (
        qwen2_architecture,
        {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2}},
        Rotary(1e6, 2.0),
    ),
    "newer type": (
        mistral_architecture,
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}},
        Rotary(1e6, 2.0),
    ),
    "null": (qwen3_architecture, {"rope_scaling": None, "rope_theta": 1e6}, Rotary(1e6)),
    "llama3": (
        llama_architecture,
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        Rotary(5e5, 8.0, (1.0, 4.0), 8192),
    ),
}


@pytest.mark.parametrize("case", ROTARY)
def test_older_and_newer_spellings_of_rotary_positions_are_read(case):
    architecture, config, rotary = ROTARY[case]
    assert set(architecture(config).rotary) == {rotary}


def test_gemma3_has_rotary_positions_for_each_kind_of_layer():
    older = {"rope_theta": 2e6, "rope_local_base_freq": 3e4}
    scaled = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    newer = {
        FULL: {"rope_type": "linear", "rope_theta": 2e6, "factor": 8.0},
        SLIDING: {"rope_type": "default", "rope_theta": 3e4},
    }
    layers = {"num_hidden_layers": 2, "layer_types": [SLIDING, FULL]}
    expected = Rotary(3e4), Rotary(2e6, 8.0)
    assert gemma3_architecture(layers | older | scaled).rotary == expected
    assert gemma3_architecture(layers | {"rope_parameters": newer}).rotary == expected
    assert gemma3_architecture(layers | {"rope_parameters": {FULL: None}}).rotary == (
        Rotary(10_000.0),
        Rotary(1_000_000.0),
    )


def test_llama3_keeps_fast_pairs_and_slows_the_others():
    rotary = Rotary(1e4, factor=8.0, turns=(1.0, 4.0), tokens=100.0)
    plain, scaled = frequencies(Rotary(1e4), 8), frequencies(rotary, 8)
    np.testing.assert_allclose(plain, [1, 0.1, 0.01, 0.001])
    # 100 tokens are 100 / 2π = 15.9 turns of the first pair, and 1.59, 0.159, 0.0159 of the rest.
    share = (100 * 0.1 / (2 * math.pi) - 1) / (4 - 1)
    blended = (1 - share) * 0.1 / 8 + share * 0.1
    np.testing.assert_allclose(scaled, [1, blended, 0.01 / 8, 0.001 / 8])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mistral", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type='yarn' is not"),
        ("mistral", {"layer_types": [FULL] * 2}, "layer_types=.* is not supported"),
        ("mistral", {"sliding_window": 0}, "sliding_window=0; it must be a whole number"),
        ("mistral", {"num_key_value_heads": 3}, "4 heads do not divide over 3 key heads"),
        ("mistral", {"head_dim": 5}, "heads have the odd width 5"),
        (
            "mistral",
            {"quantization_config": {"bits": 4}},
            "quantization_config=.* is not",
        ),
        ("mistral", {"is_causal": None}, "is_causal=None; it must be true or false"),
        ("mistral", {"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5'; it must be a number"),
        ("mistral", {"hidden_act": "swiglu"}, "hidden_act='swiglu' is not supported; only gelu, "),
        ("llama", {"rope_scaling": {"rope_type": "dynamic"}}, "'dynamic' is not supported; only "),
        ("llama", {"rope_scaling": {"rope_type": "longrope"}}, "'longrope' is not supported"),
        ("llama", {"rope_scaling": [1]}, r"rope_parameters=\[1\]; it must map names to values"),
        (
            "llama",
            {"rope_parameters": {"rope_theta": 0}},
            "rope_theta=0; it must be a number",
        ),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ("llama", {"original_max_position_embeddings": 8}, "original_max_position_embeddings=8 is"),
        (
            "llama",
            {"rope_parameters": {k: LLAMA3[k] for k in LLAMA3 if k != "low_freq_factor"}},
            "low_freq_factor=None; it must be a number above 0",
        ),
        (
            "llama",
            {"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0}},
            "low_freq_factor=4.0 must be less than high_freq_factor=4.0",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear"}},
            "factor=None; it must be a number above 0",
        ),
        ("qwen2", {"use_sliding_window": 1}, "use_sliding_window=1; it must be true or false"),
        ("qwen2", {"use_sliding_window": False}, "layer_types lists 'sliding_attention', but"),
        ("qwen2", {"layer_types": [FULL]}, "for each of 2 layers"),
        ("qwen2", {"layer_types": ["linear_attention"] * 2}, "must list 'full_attention' or"),
        ("gemma3", {"layer_types": [["sliding"]] * 3}, "must list 'full_attention' or"),
        (
            "gemma3",
            {"attn_logit_softcapping": 50.0},
            "attn_logit_softcapping=50.0 is not",
        ),
        ("gemma3", {"is_causal": False}, "is_causal=False is not supported; only True is"),
        ("gemma3", {"use_bidirectional_attention": "all"}, "it must be true or false"),
        ("gemma3", {"sliding_window": None}, "sliding_window=None; it must be a whole number"),
        ("gemma3", {"rope_parameters": {"rope_theta": 1e4}}, "it must map 'full_attention' and"),
        ("gemma3", {"rope_scaling": 8.0}, "rope_scaling=8.0; give an object"),
        (
            "gemma3",
            {"rope_parameters": {FULL: {"rope_type": "yarn"}}},
            "rope_type='yarn' is not supported; only 'default', 'linear', 'llama3' are",
        ),
    ],
)
def test_an_unsupported_config_value_is_refused_with_its_key(name, change, message):
    with pytest.raises(ValueError, match=message):
        family_of(name).make(read_config(name) | change, rngs=nnx.Rngs(0))


def test_a_texts_tokens_beyond_the_window_change_nothing():
    config = read_config("mistral") | {"num_hidden_layers": 1}
    params = read_parameters("mistral")
    params = params | {"blocks": {0: params["blocks"][0]}}
    tokens = read_values("mistral")["tokens"][:1]
    mask = np.ones_like(tokens, bool)

    def reached(config):
        """The places whose states depend on the tenth token."""
        states = [
            np.asarray(hidden_states(config, params, one, mask))
            for one in (tokens, np.where(np.arange(20) == 10, 59, tokens))
        ]
        return np.flatnonzero(np.abs(states[0] - states[1]).max(axis=(0, 2))).tolist()

    assert reached(config) == [10, 11, 12, 13, 14]
    assert reached(config | {"sliding_window": None}) == list(range(10, 20))
    assert reached(config | {"is_causal": False, "sliding_window": 2}) == [8, 9, 10, 11, 12]


@pytest.mark.parametrize(
    ("architecture", "name", "change"),
    [
        (gemma3_architecture, "gemma3", {"norm_offset": 0.0}),
        (gemma3_architecture, "gemma3", {"embedding_scale": 1.0}),
        (gemma3_architecture, "gemma3", {"score_scale": 6**-0.5}),
        (mistral_architecture, "mistral", {"num_key_heads": 4}),
    ],
    ids=["norms without 1", "unscaled embeddings", "scores by the width", "other groups"],
)
def test_each_variant_changes_the_states(architecture, name, change):
    values, params = read_values(name), read_parameters(name)
    mask = np.arange(values["tokens"].shape[1]) < values["length"][:, None]
    a = architecture(read_config(name))

    def states(a):
        decoder = nnx.eval_shape(lambda: Decoder(a, rngs=nnx.Rngs(0)))
        graph, _ = nnx.split(decoder, nnx.Param)
        found = nnx.merge(graph, params)(jnp.asarray(values["tokens"]), jnp.asarray(mask))
        return np.asarray(found)[mask]

    # Without the change they are right, so the variant and nothing else makes the difference.
    assert relative_error(states(a), values["last"][mask]) < 1e-5
    if "num_key_heads" in change:  # query head i reads key head i % 2 instead of i // 2
        for block in params["blocks"].values():
            for part in ("key", "value"):
                kernel = block["attention"][part]["kernel"]
                block["attention"][part] = {"kernel": jnp.tile(kernel, (1, 2))}
    assert relative_error(states(a._replace(**change)), values["last"][mask]) > 0.01


@pytest.mark.parametrize("name", [pytest.param(one, marks=pytest.mark.slow) for one in DECODERS])
def test_activations_are_bfloat16_on_request(name):
    values, config = read_values(name), read_config(name)
    mask = np.arange(values["tokens"].shape[1]) < values["length"][:, None]
    params = read_parameters(name)
    found = hidden_states(config, params, values["tokens"], mask, compute_dtype="bfloat16")
    assert found.dtype == "bfloat16"
    assert 1e-4 < relative_error(np.asarray(found, np.float32)[mask], values["last"][mask]) < 0.05


def test_texts_longer_than_the_positions_are_refused():
    config, params = read_config("mistral"), read_parameters("mistral")
    assert FAMILIES["mistral"].max_tokens(config) == 32
    tokens = np.ones((1, 33), np.int32)
    with pytest.raises(ValueError, match="texts of 33 tokens; this encoder reads 32"):
        hidden_states(config, params, tokens, tokens == 1)
