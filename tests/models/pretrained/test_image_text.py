"""CLIP, SigLIP, ViT and DINOv2 against transformers and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.models.pretrained.clip import clip_image_architecture, clip_text_architecture
from jaxcl.models.pretrained.image_tower import position_weights
from jaxcl.models.pretrained.siglip import siglip_image_architecture, siglip_text_architecture
from jaxcl.models.pretrained.vit import dinov2_architecture, vit_architecture
from tests.helpers import relative_error, relative_errors
from tests.models.pretrained.reference import numpy_towers
from tests.models.pretrained.reference_models import (
    read_config,
    read_tensors,
    read_values,
    without_key_biases,
)
from tests.models.pretrained.tower_models import (
    IMAGES,
    PAIRS,
    channels_last,
    config_of,
    embed_with,
    mask_of,
    parameters_of,
    read_tower,
)

SIDES = [(name, "image") for name in IMAGES] + [(name, "text") for name in PAIRS]


def inputs_of(name, modality, dtype=jnp.float32):
    """The names of the reference's embeddings, and the inputs that have them."""
    values = read_values(name)
    if modality == "text":
        return {"text": (jnp.asarray(values["tokens"]), mask_of(values))}
    sizes = ("", "larger ")
    return {
        f"{size}image": (channels_last(values[f"{size}pixels"]).astype(dtype),) for size in sizes
    }


@pytest.fixture(scope="module", params=SIDES, ids=lambda side: "-".join(side))
def side(request):
    return request.param


@pytest.fixture(scope="module")
def computed(side):
    """The embeddings of a tower, and the gradient of the reference's scalar."""
    config, inputs = config_of(*side), inputs_of(*side)

    def scalar(params):
        vectors = {key: embed_with(config, params, *one) for key, one in inputs.items()}
        total = sum(
            (one * jnp.cos(jnp.arange(one.size)).reshape(one.shape)).sum()
            for one in vectors.values()
        )
        return total, vectors

    return jax.jit(jax.grad(scalar, has_aux=True))(read_tower(*side))


def test_embeddings_match_transformers(side, computed):
    values, (_, vectors) = read_values(side[0]), computed
    for key, found in vectors.items():
        assert relative_error(found, values[key]) < 1e-5
        np.testing.assert_allclose(found, values[key], rtol=0, atol=1e-5 * np.abs(found).max())


def test_gradients_match_transformers(side, computed):
    config, (gradients, _) = config_of(*side), computed
    stored = {
        key.removeprefix("gradient "): value
        for key, value in read_values(side[0]).items()
        if key.startswith("gradient ")
    }
    wanted = parameters_of(config, stored)
    errors = relative_errors(without_key_biases(gradients), without_key_biases(wanted))
    assert max(errors.values()) < 1e-4, errors


def test_float64_embeddings_match_the_numpy_reference(side, x64):
    name, modality = side
    config, values = config_of(*side), read_values(name)
    params = read_tower(*side, jnp.float64)

    def embed(params, *inputs):
        return embed_with(config, params, *inputs, compute_dtype="float64")

    whole = read_config(name), read_tensors(name)
    for key, inputs in inputs_of(*side, jnp.float64).items():
        found = np.asarray(jax.jit(embed)(params, *inputs))
        assert found.dtype == np.float64
        if modality == "text":
            rows = [
                tokens[:length]
                for tokens, length in zip(values["tokens"], values["length"], strict=True)
            ]
            wanted = [numpy_towers.text_embedding(*whole, row) for row in rows]
        else:
            pixels = values[key.replace("image", "pixels")].astype(np.float64)
            wanted = [numpy_towers.image_embedding(*whole, one) for one in pixels]
        assert relative_error(found, np.stack(wanted)) < 1e-10
        assert relative_error(values[key], np.stack(wanted)) > 1e-9  # float32 would not do


@pytest.mark.parametrize(
    ("name", "modality", "change"),
    [
        ("clip", "image", {"hidden_act": "gelu"}),
        ("clip", "image", {"layer_norm_eps": 1e-3}),
        ("clip", "text", {"hidden_act": "gelu"}),
        ("clip", "text", {"eos_token_id": 7}),
        ("siglip", "image", {"hidden_act": "gelu"}),
        ("siglip", "text", {"pad_token_id": 0}),
        ("vit", "image", {"hidden_act": "gelu_new"}),
        ("vit", "image", {"layer_norm_eps": 1e-3}),
        ("dinov2", "image", {"layer_norm_eps": 1e-3}),
    ],
)
def test_each_config_value_changes_the_embeddings(name, modality, change):
    config, params = config_of(name, modality) | change, read_tower(name, modality)
    key, inputs = next(iter(inputs_of(name, modality).items()))
    assert relative_error(embed_with(config, params, *inputs), read_values(name)[key]) > 3e-5


@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_the_mean_over_the_patches_leaves_the_class_token_out(name):
    values, config = read_values(name), config_of(name, "image")
    pixels = channels_last(values["pixels"])
    found = embed_with(config, read_tower(name, "image"), pixels, own={"pooling": "mean"})
    assert relative_error(found, values["mean"]) < 1e-5
    with pytest.raises(ValueError, match="pooling='max' is unknown; use one of cls, mean"):
        embed_with(config, {}, pixels, own={"pooling": "max"})


def test_in_old_configs_the_largest_id_ends_a_text():
    values, params = read_values("clip"), read_tower("clip", "text")
    config = config_of("clip", "text") | {"eos_token_id": 2}
    (inputs,) = inputs_of("clip", "text").values()
    found = embed_with(config, params, *inputs)
    assert relative_error(found, values["text by largest id"]) < 1e-5
    assert relative_error(found, values["text"]) > 1e-2


@pytest.mark.parametrize("name", PAIRS)
def test_the_padding_of_a_text_does_not_change_its_embedding(name):
    config, params, values = config_of(name, "text"), read_tower(name, "text"), read_values(name)
    length = int(values["length"][2])
    for width, padding in ((length, 0), (length + 3, 55)):
        tokens = np.full((1, width), padding)
        tokens[:, :length] = values["tokens"][2:, :length]
        mask = jnp.arange(width)[None] < length
        found = embed_with(config, params, jnp.asarray(tokens), mask)
        assert relative_error(found, values["text"][2:]) < 1e-5
    with pytest.raises(ValueError, match="texts of 13 tokens; this encoder reads 12"):
        embed_with(config, params, jnp.ones((1, 13), int), jnp.ones((1, 13), bool))


def test_a_masked_token_is_not_attended_to():
    config, params = config_of("clip", "text"), read_tower("clip", "text")
    ((tokens, mask),) = inputs_of("clip", "text").values()
    other = tokens.at[:, 2].set(9)
    hidden = mask.at[:, 2].set(False)
    same = embed_with(config, params, tokens, hidden), embed_with(config, params, other, hidden)
    assert relative_error(*same) < 1e-6
    assert relative_error(embed_with(config, params, other, mask), same[0]) > 1e-2


def test_positions_of_the_same_grid_stay_and_weights_sum_to_one():
    np.testing.assert_allclose(position_weights(5, 5), np.eye(5), atol=1e-12)
    for after in (1, 3, 8, 13):
        np.testing.assert_allclose(position_weights(5, after).sum(1), 1, rtol=1e-12)
    # Halfway between two rows: -0.75 · (1.5³ - 5 · 1.5² + 8 · 1.5 - 4) of the outer ones.
    outer = -0.75 * (1.5**3 - 5 * 1.5**2 + 8 * 1.5 - 4)
    np.testing.assert_allclose(
        position_weights(8, 4)[1], [0, outer, 0.5 - outer, 0.5 - outer, outer, 0, 0, 0]
    )


def test_dropout_depends_on_the_row_only_and_recomputing_changes_nothing():
    config, params = config_of("clip", "image"), read_tower("clip", "image")
    pixels = channels_last(read_values("clip")["pixels"])
    keys = jax.random.split(jax.random.key(0), len(pixels))
    order = np.array([2, 0, 1])
    dropped = embed_with(config, params, pixels, keys, dropout=0.3)
    again = embed_with(config, params, pixels[order], keys[order], dropout=0.3, remat=True)
    assert relative_error(again, dropped[order]) < 1e-6
    assert relative_error(embed_with(config, params, pixels, keys), dropped) > 1e-2


def test_a_missing_key_means_the_published_base_model():
    clip = clip_image_architecture({}), clip_text_architecture({})
    assert [a.sizes[:4] for a in clip] == [(768, 12, 12, 3072), (512, 12, 8, 2048)]
    assert (clip[0].grid, clip[0].dim) == (7, 512)
    assert (clip[1].vocabulary_size, clip[1].max_tokens, clip[1].end_token) == (49408, 77, 49407)
    siglip = siglip_image_architecture({}), siglip_text_architecture({})
    assert (siglip[0].grid, siglip[0].dim, siglip[1].max_tokens) == (14, 768, 64)
    assert vit_architecture({}).sizes.epsilon == 1e-12
    assert dinov2_architecture({}).sizes[:4] == (768, 12, 12, 3072)


@pytest.mark.parametrize(
    ("architecture", "config", "message"),
    [
        (clip_image_architecture, {"num_channels": 1}, "num_channels=1 is not supported; only 3"),
        (
            clip_text_architecture,
            {"hidden_act": "gelu_11"},
            "hidden_act='gelu_11' is not supported",
        ),
        (siglip_image_architecture, {"vision_use_head": False}, "vision_use_head=False is not"),
        (dinov2_architecture, {"use_swiglu_ffn": True}, "use_swiglu_ffn=True is not supported"),
        (vit_architecture, {"image_size": [224, 224]}, r"image_size=\[224, 224\]; it must be a"),
    ],
)
def test_an_unsupported_config_names_its_key(architecture, config, message):
    with pytest.raises(ValueError, match=message):
        architecture(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 3}, "a width of 20 does not divide over 3 heads"),
        ({"patch_size": 13}, "patches of 13 pixels do not fit in images of 12"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        embed_with(config_of("clip", "image") | change, {}, jnp.zeros((1, 12, 12, 3)))
