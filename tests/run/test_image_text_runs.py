"""Runs that fine-tune the two towers of a CLIP, or lock one of them."""

import io
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

import jaxcl
from jaxcl.data.modalities import modality_of
from jaxcl.export import export
from jaxcl.models.trainable import parameter_paths
from jaxcl.ops.mesh import put_batch
from jaxcl.run.training import build_training
from jaxcl.train import main
from jaxcl.typing import SIDES
from tests.helpers import bits, relative_errors, some_slow
from tests.models.pretrained.reference_models import without_key_biases
from tests.models.pretrained.tiny_towers import write_tiny_towers
from tests.saved_run import TUNED, settings_of

CONFIG = Path(__file__).parents[2] / "configs" / "large_encoders.py"
SGD = {"name": "sgd", "learning_rate": 0.1, "schedule": "constant", "clip_norm": 0.0}


@pytest.fixture(scope="module", params=some_slow(["clip", "siglip"], ("clip",)))
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    return write_tiny_towers(tmp_path_factory.mktemp(kind), kind)


def settings(folder, **changes):
    given = {
        "model__pretrained": str(folder),
        "model__shared": False,
        "data__modality": {"query": "image", "key": "text"},
        "evaluation__methods": ["dense"],
        "optimizer": SGD,
    }
    return settings_of(TUNED, **given | changes)


def one_step(settings, devices=None):
    """The parameters before and after one step on random rows."""
    training = build_training(settings, devices=devices)
    rng = np.random.default_rng(0)
    size = settings.global_batch_size
    batch = {
        side: modality_of(settings.data, side).random_inputs(settings.data, side, rng, size)
        for side in SIDES
    }
    batch |= dict.fromkeys(("row", "text", "group"), np.arange(size, dtype=np.int32))
    state = training.init(size)
    before = jax.tree.map(np.asarray, state.params)
    state, metrics = training.train_step(state, put_batch(batch, training.mesh))
    assert np.isfinite(metrics.loss)
    return before, jax.tree.map(np.asarray, state.params)


@pytest.fixture(scope="module")
def stepped(folder):
    return one_step(settings(folder))


def changes_of(before, after):
    return without_key_biases(jax.tree.map(lambda a, b: a - b, after, before)["towers"])


def test_a_step_trains_both_towers_and_is_equal_on_one_device(folder, stepped):
    before, after = stepped
    changes = changes_of(before, after)
    alone = changes_of(*one_step(settings(folder), jax.devices()[:1]))
    errors = relative_errors(changes, alone)
    assert max(errors.values()) < 1e-3, errors
    assert {name.split("/")[0] for name in parameter_paths(changes)} == set(SIDES)


def test_a_step_with_gradient_caching_is_the_same(folder, stepped):
    cached = settings(folder, grad_cache={"chunk_size": 1}, global_batch_size=16)
    whole = settings(folder, global_batch_size=16)
    errors = relative_errors(changes_of(*one_step(cached)), changes_of(*one_step(whole)))
    assert max(errors.values()) < 1e-3, errors


def test_a_locked_tower_keeps_its_bits(folder, stepped):
    before, after = one_step(settings(folder, optimizer=SGD | {"freeze": ["towers/query/*"]}))
    for side, changed in (("query", False), ("key", True)):
        pairs = zip(
            jax.tree.leaves(before["towers"][side]),
            jax.tree.leaves(after["towers"][side]),
            strict=True,
        )
        assert any(bits(old) != bits(new) for old, new in pairs) == changed


def test_adapters_are_added_to_the_blocks_of_both_towers(folder):
    training = build_training(settings(folder, model__lora={"rank": 2}))
    params = training.abstract_state(8).params
    trained = [path for path in parameter_paths(params) if path not in training.frozen]
    adapters = [path for path in trained if path != "log_temperature"]
    assert len(adapters) == 2 * 2 * 6  # A and B of six layers in one block of two towers
    assert all(path.endswith(("lora_a", "lora_b")) for path in adapters)


class TinyPictures(tfds.core.GeneratorBasedBuilder):
    """Pictures of one colour, and the number of the colour."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        image = tfds.features.Image(shape=(None, None, 3), encoding_format="png")
        features = {"image": image, "caption": tfds.features.Text()}
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(0, 24), "dev": self._generate_examples(24, 30)}

    def _generate_examples(self, start, stop):
        for number in range(start, stop):
            yield number, {"image": picture(number), "caption": f"file {number}"}


def picture(number):
    colour = ((8 * number) % 256, (40 * number) % 256, (90 * number) % 256)
    buffer = io.BytesIO()
    Image.new("RGB", (16, 20), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.slow
def test_a_run_fine_tunes_a_clip_on_images_and_captions(tmp_path):
    folder = write_tiny_towers(tmp_path / "clip")
    builder = TinyPictures(data_dir=tmp_path / "data", file_format="array_record")
    builder.download_and_prepare()
    workdir = tmp_path / "run"
    values = {
        "model.pretrained": folder,
        "data.name": builder.data_dir,
        "data.splits.train": "train",
        "data.splits.validation": "dev",
        "data.max_tokens.key": 12,
        "global_batch_size": 8,
        "steps": 6,
        "evaluation.batch_size": 8,
        "run.data_dir": tmp_path / "shared",
        "optimizer.learning_rate": 1e-3,
        "optimizer.warmup_steps": 1,
    }
    flags = [f"--config.{name}={value}" for name, value in values.items()]
    main([f"--config={CONFIG}:clip", f"--workdir={workdir}", *flags])
    before, after = jaxcl.load(folder), jaxcl.load(workdir)
    images = [picture(number) for number in range(24, 30)]
    moved = np.abs(after.encode(images=images) - before.encode(images=images)).max()
    assert moved > 1e-3
    assert after.encode(["file 3"]).shape == (1, 8)
    again = jaxcl.load(export(workdir, tmp_path / "exported"))
    np.testing.assert_allclose(again.encode(images=images), after.encode(images=images), atol=1e-5)
