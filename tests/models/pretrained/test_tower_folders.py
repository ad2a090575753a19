"""Folders of CLIP, SigLIP, ViT and DINOv2: the towers, their files and their images."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxcl.grad_cache import chunked
from jaxcl.models.lora import Lora, add_adapters
from jaxcl.models.pretrained.encoder import PretrainedEncoder
from jaxcl.models.pretrained.folder import read_pretrained, read_towers
from jaxcl.models.pretrained.weights import export_tensors, keep_copy, load_parameters
from jaxcl.models.trainable import parameter_paths
from jaxcl.models.vision.entry import IMAGENET_MEAN, PixelRule
from jaxcl.run.optimizer import layer_factors
from tests.helpers import relative_error, relative_errors
from tests.models.pretrained.reference_models import embed, without_key_biases
from tests.models.pretrained.tiny_towers import (
    IMAGE_SIZE,
    PROCESSING,
    write_tiny_towers,
)

PAIRS, ALONE = ("clip", "siglip"), ("vit", "dinov2")


def parameters_of(model):
    encoder = nnx.eval_shape(lambda: PretrainedEncoder(model, rngs=nnx.Rngs(0)))
    abstract = nnx.to_pure_dict(nnx.state(encoder, nnx.Param))
    return jax.tree.map(lambda leaf: jnp.array(leaf), load_parameters(model, abstract))


def images(size, rows=2, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (rows, size, size, 3), np.uint8)


@pytest.mark.parametrize("kind", PAIRS)
def test_a_folder_with_two_towers_has_an_encoder_for_each_modality(tmp_path, kind):
    towers = read_towers(write_tiny_towers(tmp_path, kind))
    assert {one: model.modality for one, model in towers.items()} == {
        "text": "text",
        "image": "image",
    }
    assert towers["text"].dim == towers["image"].dim == (8 if kind == "clip" else 16)
    assert (towers["text"].max_tokens, towers["image"].max_tokens) == (16, None)
    assert towers["text"].logits == towers["image"].logits
    stored = load_file(tmp_path / "model.safetensors")
    exported = {}
    for model in towers.values():
        (file,) = export_tensors(model, parameters_of(model)).values()
        exported |= file
    assert exported.keys() == stored.keys()
    assert all(exported[name].tobytes() == tensor.tobytes() for name, tensor in stored.items())


def test_old_folders_have_further_configs_and_stored_positions(tmp_path):
    write_tiny_towers(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    shrunk = {**config["text_config"], "num_hidden_layers": 7}
    config |= {"text_config": shrunk, "text_config_dict": {"num_hidden_layers": 1}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model.safetensors")
    positions = {"text_model.embeddings.position_ids": np.arange(16)[None]}
    save_file(tensors | positions, tmp_path / "model.safetensors")
    model = read_pretrained(tmp_path)
    assert model.config["num_hidden_layers"] == 1
    (exported,) = export_tensors(model, parameters_of(model)).values()
    assert positions.keys() < exported.keys()


@pytest.mark.parametrize("kind", ALONE)
def test_a_folder_of_images_has_no_encoder_of_texts(tmp_path, kind):
    assert list(read_towers(write_tiny_towers(tmp_path, kind))) == ["image"]
    message = rf"has an encoder of images \({kind}\), but this side has texts; see data.modality"
    with pytest.raises(ValueError, match=message):
        read_pretrained(tmp_path)


@pytest.mark.parametrize("kind", [*PAIRS, *ALONE])
def test_a_copy_of_a_folder_has_the_same_description(tmp_path, kind):
    for modality, model in read_towers(write_tiny_towers(tmp_path / "model", kind)).items():
        keep_copy(model, tmp_path / modality)
        copy = read_pretrained(tmp_path / modality, modality=modality)
        assert copy._replace(path=model.path) == model
        assert not list((tmp_path / modality).glob("*.safetensors"))


def test_the_class_token_without_projection_is_read_from_a_vision_folder(tmp_path):
    write_tiny_towers(tmp_path, "clip")
    config = json.loads((tmp_path / "config.json").read_text())["vision_config"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "clip_vision_model"}))
    tensors = load_file(tmp_path / "model.safetensors")
    own = {name: one for name, one in tensors.items() if name.startswith("vision_model.")}
    save_file(own, tmp_path / "model.safetensors")
    assert read_pretrained(tmp_path, modality="image").dim == 16
    save_file(
        own | {"visual_projection.weight": tensors["visual_projection.weight"]},
        tmp_path / "model.safetensors",
    )
    assert read_pretrained(tmp_path, modality="image").dim == 8


def test_images_are_processed_as_the_folder_says(tmp_path):
    rule = read_pretrained(write_tiny_towers(tmp_path), modality="image").images
    assert (rule.size, rule.resize) == (12, "crop")
    assert rule.pixels == PixelRule(12, (0.5, 0.4, 0.3), (0.3, 0.25, 0.2), 1.0, True)
    other = {"size": {"height": 16, "width": 16}, "crop_size": 12, "do_center_crop": True}
    write_tiny_towers(tmp_path, processing=other)
    rule = read_pretrained(tmp_path, modality="image").images
    assert (rule.size, rule.resize, rule.pixels.kept) == (16, "stretch", 0.75)
    # transformers 5 writes another file.
    (tmp_path / "preprocessor_config.json").unlink()
    content = {
        "image_processor": {
            "size": {"shortest_edge": 24},
            "crop_size": {"height": 12, "width": 12},
            "resample": 2,
        }
    }
    (tmp_path / "processor_config.json").write_text(json.dumps(content))
    rule = read_pretrained(tmp_path, modality="image").images
    assert (rule.size, rule.pixels.kept, rule.pixels.cubic) == (24, 0.5, False)


@pytest.mark.parametrize(
    ("kind", "size", "resize", "kept", "mean", "cubic"),
    [
        ("clip", 12, "crop", 1.0, 0.48145466, True),
        ("siglip", 12, "stretch", 1.0, 0.5, True),
        ("vit", 12, "stretch", 1.0, 0.5, False),
        ("dinov2", 14, "crop", 12 / 14, IMAGENET_MEAN[0], True),
    ],
)
def test_a_folder_without_processing_has_that_of_its_family(
    tmp_path, kind, size, resize, kept, mean, cubic
):
    write_tiny_towers(tmp_path, kind, processing={})
    rule = read_pretrained(tmp_path, modality="image").images
    assert (rule.size, rule.resize, rule.pixels.size) == (size, resize, 12)
    assert (rule.pixels.kept, rule.pixels.mean[0], rule.pixels.cubic) == (
        pytest.approx(kept),
        mean,
        cubic,
    )


UNSUPPORTED = {
    "do_resize=False is not supported": {"do_resize": False},
    "rescale_factor=1.0 is not supported; only 1 / 255": {"rescale_factor": 1.0},
    "resample=1 is not supported; only 2": {"resample": 1},
    "do_center_crop=False leaves images of any shape": {"do_center_crop": False},
    "crop_size=20 is larger than size=12": {"crop_size": 20},
    "size={'height': 12, 'width': 14}; only equal": {"size": {"height": 12, "width": 14}},
    "size=0; it must be a number of pixels up to 8192": {"size": 0},
    "image_std=[0.3, 0.2, 0.0]; it must be three numbers": {"image_std": [0.3, 0.2, 0.0]},
}


@pytest.mark.parametrize("message", UNSUPPORTED)
def test_unsupported_processing_names_its_file(tmp_path, message):
    processing = PROCESSING["clip"] | UNSUPPORTED[message]
    write_tiny_towers(tmp_path, processing=processing)
    with pytest.raises(ValueError, match="preprocessor_config.json: " + re.escape(message)):
        read_pretrained(tmp_path, modality="image")


def test_modules_of_another_kind_of_model_are_refused(tmp_path):
    write_tiny_towers(tmp_path, normalize=True)
    assert read_pretrained(tmp_path).normalize
    modules = [
        {"type": f"sentence_transformers.models.{name}", "path": path}
        for name, path in (("Transformer", ""), ("Pooling", "1_Pooling"))
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="lists modules with Pooling for a clip_text_model model"):
        read_pretrained(tmp_path)


def test_integer_images_are_normalised_and_cut_to_the_size_of_the_encoder(tmp_path):
    model = read_pretrained(write_tiny_towers(tmp_path), modality="image")
    params, pixels = parameters_of(model), images(IMAGE_SIZE)
    found = embed(model, params, {"image": pixels})
    floats = embed(model, params, {"image": (pixels / 255).astype(np.float32)})
    assert relative_error(found, floats) < 1e-6
    doubled = embed(model, params, {"image": np.repeat(np.repeat(pixels, 2, 1), 2, 2)})
    assert 1e-3 < relative_error(doubled, found) < 0.5
    with pytest.raises(
        ValueError, match="PretrainedEncoder reads images, but this side has tokens"
    ):
        embed(model, params, {"tokens": np.ones((1, 4), np.int32)})


def test_another_image_size_has_interpolated_positions(tmp_path):
    model = read_pretrained(write_tiny_towers(tmp_path, "vit"), modality="image")
    params = parameters_of(model)
    found = embed(model, params, {"image": images(20)}, image_size=20)
    assert relative_error(embed(model, params, {"image": images(20)}), found) > 1e-2
    mean = embed(model, params, {"image": images(20)}, image_size=20, pooling="mean")
    assert relative_error(mean, found) > 1e-2


@pytest.mark.parametrize("option", ["pooling='mean'", "image_size=20"])
def test_options_of_image_encoders_are_refused_for_texts(tmp_path, option):
    model = read_pretrained(write_tiny_towers(tmp_path))
    name, value = option.split("=")
    message = f"{option} has no effect on clip_text_model models; leave it out"
    with pytest.raises(ValueError, match=message):
        PretrainedEncoder(model, rngs=nnx.Rngs(0), **{name: eval(value)})


@pytest.mark.parametrize("modality", ["text", "image"])
def test_adapters_and_layer_decay_find_the_blocks_of_both_towers(tmp_path, modality):
    model = read_pretrained(write_tiny_towers(tmp_path), modality=modality)

    def adapted(rngs):
        return add_adapters(PretrainedEncoder(model, rngs=rngs), Lora(rank=2), rngs=rngs)

    params = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: adapted(nnx.Rngs(0))), nnx.Param))
    adapters = [path for path in parameter_paths(params) if path.endswith("lora_a")]
    assert adapters == [
        f"encoder/blocks/0/{layer}/lora_a"
        for layer in (
            *("attention/key", "attention/output", "attention/query", "attention/value"),
            *("mlp/narrow", "mlp/widen"),
        )
    ]
    below = ("towers/query/encoder/norm", "towers/query/encoder/embeddings")
    factors = layer_factors({"towers": {"query": params}}, 0.5, embedding_norms=below)
    lowest = {
        path.removeprefix("towers/query/encoder/") for path, one in factors.items() if one == 0.5
    }
    assert (
        lowest
        == {
            "text": {"token_table", "position_table"},
            "image": {
                *("embeddings/kernel", "embeddings/position_table", "embeddings/class_token"),
                *("norm/scale", "norm/bias"),
            },
        }[modality]
    )
    assert factors["towers/query/encoder/blocks/0/mlp/widen/kernel"] == 1.0
    assert "towers/query/encoder/projection/kernel" not in factors


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*PAIRS, *ALONE])
def test_gradient_caching_gives_the_gradients_of_the_whole_batch(tmp_path, kind):
    model = read_pretrained(write_tiny_towers(tmp_path, kind), modality="image")
    params, inputs = parameters_of(model), {"image": jnp.asarray(images(IMAGE_SIZE, rows=5))}
    keys = jax.random.split(jax.random.key(0), 5)

    def encode(params, inputs, keys):
        return embed(model, params, inputs, keys, normalize=True, dropout=0.2)

    def gradients(encode):
        def total(params):
            return jnp.sin(7 * encode(params, inputs, keys)).sum()

        return without_key_biases(jax.jit(jax.grad(total))(params))

    whole, cached = gradients(encode), gradients(chunked(encode, chunk_size=2))
    # The projection of keys shifts all scores of the pooling's query alike, too.
    errors = relative_errors(cached, whole)
    assert max(errors.values()) < 1e-5, errors
