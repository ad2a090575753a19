"""Encoders of images, and of images and texts, through `jaxcl.load` and in runs."""

import io
import json
import math
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

import jaxcl
from jaxcl.export import export
from jaxcl.models.pretrained.tensor_files import map_tensors
from jaxcl.settings.read import as_dict, read_settings
from tests.models.pretrained.tiny import write_tiny_bert
from tests.models.pretrained.tiny_towers import IMAGE_SIZE, LOGITS, write_tiny_towers
from tests.saved_run import TUNED, save_tuned_run, settings_of

BOTH = {"query": "image", "key": "text"}
TEXTS = ["query 3", "file 1 : read key 7", "read"]
RUN = {"model__shared": False, "data__modality": BOTH, "evaluation__methods": ["dense"]}


def arrays(number=3, size=IMAGE_SIZE):
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, (size, size, 3), np.uint8) for _ in range(number)]


def settings(folder, **changes):
    return settings_of(TUNED, **{**RUN, "model__pretrained": str(folder), **changes})


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_tiny_towers(tmp_path_factory.mktemp("clip"), normalize=True)


@pytest.fixture(scope="module")
def model(clip):
    return jaxcl.load(clip)


def test_images_may_be_paths_bytes_pictures_or_arrays(model, tmp_path):
    given = arrays()
    wanted = model.encode(images=given)
    assert (wanted.shape, wanted.dtype) == ((3, 8), np.float32)
    np.testing.assert_allclose(np.linalg.norm(wanted, axis=1), 1, rtol=1e-5)
    pictures = [Image.fromarray(array) for array in given]
    files = []
    for number, picture in enumerate(pictures):
        files.append(tmp_path / f"{number}.png")
        picture.save(files[-1])
    buffer = io.BytesIO()
    pictures[2].save(buffer, "PNG")
    mixed = [files[0], str(files[1]), buffer.getvalue()]
    for values in (mixed, pictures, np.stack(given)):
        np.testing.assert_array_equal(model.encode(images=values), wanted)
    for one in (given[0], pictures[0], files[0]):
        np.testing.assert_allclose(model.encode(images=one), wanted[0], rtol=0, atol=1e-6)


def test_batches_do_not_change_the_embeddings_of_images(model):
    given = arrays(19)
    wanted, done = model.encode(images=given), []
    found = model.encode(images=given, batch_size=8, progress=done.append)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)
    assert sum(done) == 19
    assert model.encode(images=[]).shape == (0, 8)


def test_texts_and_images_are_embedded_in_the_same_space(model):
    images, texts = model.encode(images=arrays()), model.encode(TEXTS)
    assert model.similarity(images, texts).shape == (3, 3)
    np.testing.assert_array_equal(model.encode(TEXTS, side="key"), texts)
    assert (model.max_tokens, set(model.prompts)) == ({"key": 16}, {"key"})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, TypeError, "give either texts or images"),
        ({"texts": TEXTS, "images": []}, TypeError, "give either texts or images"),
        ({"texts": TEXTS, "side": "query"}, ValueError, "side='query' reads images; texts have"),
        ({"images": [], "side": "key"}, ValueError, "side='key' reads texts; images have"),
        ({"images": [], "side": "left"}, ValueError, "side='left' is unknown"),
        ({"images": [], "prompt": "a"}, ValueError, "prompt='a' has no effect on images"),
        ({"images": [b"no image"]}, ValueError, "the image at position 0 cannot be decoded"),
    ],
)
def test_wrong_arguments_are_refused(model, arguments, error, message):
    with pytest.raises(error, match=message):
        model.encode(**arguments)


def test_a_model_of_one_modality_says_what_it_lacks(tmp_path):
    model = jaxcl.load(write_tiny_towers(tmp_path, "vit"))
    assert model.encode(images=arrays(), side="key").shape == (3, 16)
    assert model.made_from["images"]["query"]["resize"] == "stretch"
    with pytest.raises(ValueError, match="has no encoder of texts"):
        model.encode(TEXTS)
    text = jaxcl.load(write_tiny_bert(tmp_path / "bert"))
    with pytest.raises(ValueError, match="has no encoder of images"):
        text.encode(images=arrays())


def test_a_run_reads_the_tower_of_each_side_and_the_processing_from_one_folder(tmp_path):
    folder = write_tiny_towers(tmp_path)
    read = settings(folder)
    assert {name: one.family for name, one in read.parts.pretrained.items()} == {
        "model": "clip_vision_model",
        "model.key": "clip_text_model",
    }
    assert (read.model.key.pretrained, read.model.dim) == (str(folder), 8)
    assert (read.data.images.size, read.data.images.resize) == (12, "crop")
    assert (read.data.special_tokens, read.data.vocabulary_size) == (True, 39)
    turned = settings(folder, data__modality={"query": "text", "key": "image"})
    assert turned.parts.pretrained["model"].family == "clip_text_model"
    sized = settings(folder, data__images={"size": 20}, model__options={"image_size": 16})
    assert sized.data.images.size == 20
    assert settings(folder, model__options={"image_size": 16}).data.images.size == 16


def test_the_towers_share_the_options_of_training(tmp_path):
    folder = write_tiny_towers(tmp_path)
    options = {"remat": True, "dropout": 0.1, "image_size": 16}
    read = settings(folder, model__options=options)
    assert read.model.key.options == {"remat": True, "dropout": 0.1}


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_learned_temperature_and_bias_are_the_initial_ones(tmp_path, kind):
    folder = write_tiny_towers(tmp_path, kind)
    changes = {"data__max_tokens": {"query": 16, "key": 16}}
    read = settings(folder, loss__name="sigmoid", **changes)
    scale = LOGITS[kind]["logit_scale"]
    assert read.loss.temperature.initial == pytest.approx(math.exp(-scale))
    assert read.loss.bias == LOGITS[kind].get("logit_bias")
    assert settings(folder, **changes).loss.bias is None  # InfoNCE has none
    own = {"initial": 0.2, "minimum": 0.01, "maximum": 1.0}
    kept = settings(folder, loss__temperature=own, **changes)
    assert kept.loss.temperature.initial == 0.2
    small = write_tiny_towers(tmp_path / "small", "clip")
    temperature = settings(small, **changes).loss.temperature
    assert temperature.minimum == 0.01


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__images": {"resize": "stretch"}}, "data.images.resize='stretch', but the model of"),
        ({"model__dim": 16}, "model.dim=16, but the model of model.pretrained needs 8"),
        (
            {"data__max_tokens": {"query": 16, "key": 17}},
            "data.max_tokens.key=17, but the model of",
        ),
    ],
)
def test_settings_that_contradict_the_folder_are_refused(clip, changes, message):
    with pytest.raises(ValueError, match=message):
        settings(clip, **changes)


def test_a_locked_image_tower_may_be_paired_with_a_new_text_tower(tmp_path):
    folder = write_tiny_towers(tmp_path, "vit")
    with pytest.raises(ValueError, match=r"an encoder of images \(vit\), but this side has texts"):
        settings(folder)
    key = {"name": "transformer", "options": {"max_tokens": 16, "num_layers": 1}}
    read = settings(folder, model__key=key, data__vocabulary_size=100)
    assert (read.model.dim, read.data.vocabulary_size, read.data.special_tokens) == (16, 100, None)
    assert set(read.parts.pretrained) == {"model"}
    bert = write_tiny_bert(tmp_path / "bert")
    read = settings(folder, model__key={"pretrained": str(bert)})
    assert [one.family for one in read.parts.pretrained.values()] == ["vit", "bert"]
    assert (read.model.dim, read.data.vocabulary_size, read.data.special_tokens) == (16, 39, True)
    assert read.loss.temperature.initial == 0.05
    with pytest.raises(ValueError, match=r"width 8, but model\.key\.pretrained of width 16"):
        settings(write_tiny_towers(tmp_path / "clip"), model__key={"pretrained": str(bert)})


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_recorded_settings_of_two_towers_are_read_back_unchanged(tmp_path, kind):
    folder = write_tiny_towers(tmp_path, kind)
    recorded = as_dict(settings(folder, loss__name="sigmoid", model__options={"remat": True}))
    assert as_dict(read_settings(json.loads(json.dumps(recorded)))) == recorded


@pytest.fixture(scope="module")
def saved(tmp_path_factory, clip):
    return save_tuned_run(tmp_path_factory.mktemp("runs") / "clip", clip, **RUN)


def test_the_model_of_a_run_embeds_images_and_texts_as_its_folder(saved, model):
    trained = jaxcl.load(saved)
    for given in ({"images": arrays()}, {"texts": TEXTS}):
        np.testing.assert_allclose(trained.encode(**given), model.encode(**given), atol=1e-6)
    assert trained.max_tokens == {"key": 12}


def test_an_untrained_clip_is_exported_with_the_same_bytes(saved, clip, model, tmp_path):
    folder = export(saved, tmp_path / "exported")
    stored, exported = (map_tensors(one / "model.safetensors") for one in (clip, folder))
    assert stored.keys() == exported.keys()
    assert all(exported[name].tobytes() == tensor.tobytes() for name, tensor in stored.items())
    modules = json.loads((folder / "modules.json").read_text())
    assert [one["type"].rpartition(".")[2] for one in modules] == ["CLIPModel", "Normalize"]
    card = (folder / "README.md").read_text()
    assert "Encoder of query images" in card
    assert "Longest query" not in card
    again = jaxcl.load(folder)
    np.testing.assert_allclose(again.encode(images=arrays()), model.encode(images=arrays()))
    assert again.max_tokens == {"key": 12}


def test_a_folder_without_processing_gets_a_description_of_it(tmp_path):
    folder = write_tiny_towers(tmp_path / "model", processing={}, seed=3)
    run = save_tuned_run(tmp_path / "run", folder, **RUN)
    exported = export(run, tmp_path / "exported")
    processing = json.loads((exported / "preprocessor_config.json").read_text())
    assert processing["size"] == {"shortest_edge": 12}
    assert processing["image_mean"] == [0.48145466, 0.4578275, 0.40821073]


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("siglip", {}, "no module for the towers siglip_text_model and siglip_vision_model"),
        ("clip", {"data__images": {"size": 20}}, "data.images.size=20 differs from its folder"),
        (
            "clip",
            {"model__options": {"image_size": 16}},
            "its images have 16 pixels, but its folder",
        ),
    ],
)
def test_models_without_a_folder_of_sentence_transformers_say_why(tmp_path, kind, changes, message):
    folder = write_tiny_towers(tmp_path / "model", kind)
    run = save_tuned_run(tmp_path / "run", folder, **RUN, **changes)
    with pytest.raises(
        ValueError, match=f"has no equivalent in sentence-transformers: .*{message}"
    ):
        export(run, tmp_path / "exported")


class Unread(Sequence):
    """Images that note how many were read."""

    def __init__(self, images):
        self._images = images
        self.read = 0

    def __len__(self):
        return len(self._images)

    def __getitem__(self, row):
        self.read += 1
        return self._images[row]


def test_images_are_read_batch_by_batch(model):
    given = Unread(arrays(40))
    read = []
    found = model.encode(images=given, batch_size=8, progress=lambda _: read.append(given.read))
    assert read[0] <= 16
    assert read[-1] == 40
    np.testing.assert_array_equal(found, model.encode(images=arrays(40), batch_size=8))


def test_a_tokenizer_without_the_end_token_is_an_error(clip, tmp_path):
    """Each text would be pooled at its first token, which is the same for all texts."""
    folder = write_tiny_towers(tmp_path / "clip", normalize=True)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=r"tokenizer\.json does not end a text with token 3"):
        jaxcl.load(folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 2  # an old file: the largest id
    (folder / "config.json").write_text(json.dumps(config))
    assert jaxcl.load(folder).encode(["read"]).shape == (1, 8)


def test_texts_of_a_run_keep_the_end_token(clip):
    with pytest.raises(ValueError, match=r"data\.special_tokens=False, but the model of model"):
        settings(clip, data__special_tokens=False)
    assert settings(clip).data.special_tokens is True
