"""Only TFDS's own feature classes are imported from a prepared data set."""

import itertools
import json
import shutil
import sys

import pytest
import tensorflow_datasets as tfds

from jaxcl.data.sources import open_pairs
from jaxcl.data.tfds_features import FEATURE_CLASSES
from tests.prepared_data import HOSTILE_FEATURES, Trap, make_hostile, prepare_pairs, read_by_tfds

trap_numbers = itertools.count()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare_pairs(tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def data_set(prepared, tmp_path):
    """A copy, for changes."""
    return shutil.copytree(prepared, tmp_path / "copy")


@pytest.fixture
def trap(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    return Trap(tmp_path, next(trap_numbers))


@pytest.mark.parametrize("kind", HOSTILE_FEATURES)
def test_a_class_that_is_not_of_tfds_is_not_imported(data_set, trap, kind):
    make_hostile(data_set, kind, trap.class_name)
    with pytest.raises(ValueError, match=f"names the feature class '{trap.class_name}'"):
        open_pairs(data_set, "train")
    assert not trap.sprung
    read_by_tfds(data_set)  # shows that the trap works
    assert trap.sprung


@pytest.mark.parametrize(
    "name",
    [
        "tensorflow_datasets.datasets.mnist.mnist_dataset_builder.Builder",
        "tensorflow_datasets.core.features.test_feature.CustomFeatureConnector",
        "tensorflow_datasets.core.features.text_feature.Text.mro",
        "tensorflow_datasets.core.features.text_feature.text",
        "TEXT",
        5,
        None,
    ],
)
def test_no_other_name_of_tfds_will_do(data_set, name):
    make_hostile(data_set, "first format", name)
    loaded = set(sys.modules)
    with pytest.raises(ValueError, match="which is not one of TFDS's own"):
        open_pairs(data_set, "train")
    assert not {module for module in set(sys.modules) - loaded if "tensorflow_datasets" in module}


def test_all_feature_classes_of_tfds_are_allowed():
    prefix = "tensorflow_datasets.core.features."
    registered = tfds.features.FeatureConnector._registered_features
    names = {name for name in registered if name.startswith(prefix)}
    others = {f"{prefix}top_level_feature.TopLevelFeature"}  # the abstract base class of two others
    assert names - others == FEATURE_CLASSES


def test_features_may_have_any_name(data_set):
    path = data_set / "features.json"
    content = json.loads(path.read_text())
    features = content["featuresDict"]["features"]
    words = ("type", "json", "content", "pythonClassName", "features")
    features.update(dict.fromkeys(words, features["key"]))
    path.write_text(json.dumps(content))
    assert open_pairs(data_set, "train").read([0]) == [{"query": "query 0", "key": "key 0"}]


@pytest.mark.parametrize("file", ["features.json", "dataset_info.json"])
@pytest.mark.parametrize(
    "content",
    ["", "[]", "[" * 100_000, '{"a": ' * 100_000, '{"jsonFeature": {"json": "{"}, "features": 3}'],
)
def test_damaged_files_are_named(data_set, file, content):
    (data_set / file).write_text(content)
    with pytest.raises(ValueError, match=str(data_set)):
        open_pairs(data_set, "train")
