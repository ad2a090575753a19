"""Images in prepared TFDS data sets: files come back as they were written, without TensorFlow."""

import io
import pickle
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from jaxcl.data.images.decoding import ImageRule, decode_image
from jaxcl.data.modalities import open_tables
from jaxcl.data.prepare import open_sources
from jaxcl.data.sources import open_pairs
from jaxcl.settings.read import read_settings


def encoded(image, format_):
    file = io.BytesIO()
    image.save(file, format_)
    return file.getvalue()


def palette_png(row):
    """A PNG whose palette TFDS's own decoder would lose."""
    image = Image.new("P", (6, 5), row % 2)
    image.putpalette([250, 10 * row, 0, 0, 10 * row, 250])
    return encoded(image, "PNG")


def picture(row):
    pixels = np.random.default_rng(row).integers(0, 256, (6, 5, 3), np.uint8)
    return [palette_png(row), encoded(Image.fromarray(pixels), "JPEG")][row % 2]


def array(row):
    return np.random.default_rng(row).integers(0, 256, (4, 3, 3), np.uint8)


class TinyImages(tfds.core.GeneratorBasedBuilder):
    """Images as files, as fixed arrays and as bytes in a text, with captions."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "nested": {"view": tfds.features.Image(shape=(None, None, 3))},
            "array": tfds.features.Tensor(shape=(4, 3, 3), dtype=np.uint8, encoding="zlib"),
            "bytes": tfds.features.Text(),
            "caption": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=["cat", "dog"]),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for row in range(6):
            yield (
                row,
                {
                    "image": picture(row),
                    "nested": {"view": picture(row + 10)},
                    "array": array(row),
                    "bytes": picture(row + 20),
                    "caption": f"caption {row}",
                    "label": row % 2,
                },
            )


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    builder = TinyImages(
        data_dir=tmp_path_factory.mktemp("tiny_images"), file_format="array_record"
    )
    builder.download_and_prepare()
    return builder.data_dir


def opened(directory, query, key="caption", **options):
    sides = ("query",) if key == "caption" else ("query", "key")
    return open_pairs(
        directory, "train", query_field=query, key_field=key, image_sides=sides, **options
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image", picture),
        ("nested/view", lambda row: picture(row + 10)),
        ("bytes", lambda row: picture(row + 20)),
    ],
)
def test_files_come_back_as_they_were_written(directory, field, value):
    pairs = opened(directory, field)
    assert [record["query"] for record in pairs.read([4, 1])] == [value(4), value(1)]
    assert pairs.read([1])[0]["key"] == "caption 1"
    assert "tensorflow" not in sys.modules


def test_arrays_are_images(directory):
    for row, record in enumerate(opened(directory, "array").read(range(6))):
        np.testing.assert_array_equal(record["query"], array(row))


def test_both_sides_may_be_images(directory):
    record = opened(directory, "image", "nested/view").read([3])[0]
    assert record == {"query": picture(3), "key": picture(13)}
    record = opened(directory, "image", "image").read([3])[0]
    assert record == {"query": picture(3), "key": picture(3)}


def test_some_fields_are_read_alone(directory):
    pairs = opened(directory, "image", group_field="label", metadata_fields=("nested/view",))
    for copy in (pairs, pickle.loads(pickle.dumps(pairs))):
        assert copy.read_fields([5], ("key", "group")) == [{"key": "caption 5", "group": 1}]
        assert copy.read_fields([5], ("nested/view",)) == [{"nested/view": picture(15)}]
        assert copy.read_fields([5, 4], ("negatives",)) == [{}, {}]
        assert set(copy.read([0])[0]) == {"query", "key", "group", "nested/view"}


def test_a_field_of_numbers_is_no_image(directory):
    message = "the field 'label' of tiny_images holds int; give a field of images as query_field"
    with pytest.raises(ValueError, match=message):
        opened(directory, "label")


def test_a_run_reads_images_and_captions(directory, tmp_path):
    config = {
        "data": {
            "name": str(directory),
            "splits": {"train": "train[:4]", "validation": "train[4:]"},
            "query_field": "image",
            "key_field": "caption",
            "group_field": "label",
            "modality": {"query": "image", "key": "text"},
            "images": {"size": 4},
            "vocabulary_size": 300,
        },
        "model": {"shared": False},
        "evaluation": {"methods": ("dense",)},
    }
    data = read_settings(config).data
    sources = open_sources(data, data_dir=tmp_path)
    tables = open_tables(data, sources, data_dir=tmp_path, workdir=tmp_path)
    images = tables["validation"].side("query", np.arange(2))["image"]
    wanted = [decode_image(picture(row), ImageRule(4)) for row in (4, 5)]
    np.testing.assert_array_equal(images, wanted)
    assert (wanted[0] == [250, 40, 0]).all()  # the colour of the palette
    assert tables["train"].labels(np.arange(4))["group"].tolist() == [0, 1, 0, 1]
    captions = data._replace(query_field="caption")
    with pytest.raises(ValueError, match="4 of 4 rows of train have images that cannot be read"):
        open_sources(captions, data_dir=tmp_path)
