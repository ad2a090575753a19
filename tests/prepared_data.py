"""Small data sets that TFDS prepares, and hostile versions of them."""

import contextlib
import json
from pathlib import Path

import tensorflow_datasets as tfds

NUM_TRAIN, NUM_DEV = 20, 6
DICT = "tensorflow_datasets.core.features.features_dict.FeaturesDict"
SEQUENCE = "tensorflow_datasets.core.features.sequence_feature.Sequence"


class TinyPairs(tfds.core.GeneratorBasedBuilder):
    """Rows `query 0`, `key 0` and so on: 20 training rows, then 6 more."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        text = tfds.features.Text()
        features = tfds.features.FeaturesDict({"query": text, "key": text})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples(0, NUM_TRAIN),
            "dev": self._generate_examples(NUM_TRAIN, NUM_TRAIN + NUM_DEV),
        }

    def _generate_examples(self, start, stop):
        for i in range(start, stop):
            yield i, {"query": f"query {i}", "key": f"key {i}"}


def prepare_pairs(data_dir: Path, file_format: str = "array_record", num_shards: int = 1) -> Path:
    """Prepare `tiny_pairs`, and return its directory."""
    builder = TinyPairs(data_dir=data_dir, file_format=file_format)
    config = tfds.download.DownloadConfig(num_shards=num_shards)
    builder.download_and_prepare(download_config=config)
    return Path(builder.data_dir)


def change_info(directory: Path, change) -> None:
    """Change `dataset_info.json` by `change(content)`."""
    path = directory / "dataset_info.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def as_proto(name: str) -> dict:
    return {"pythonClassName": name, "text": {}}


def in_dict(feature: dict) -> dict:
    return {"pythonClassName": DICT, "featuresDict": {"features": {"a": feature}}}


def in_json(content: dict) -> dict:
    return {"pythonClassName": DICT, "jsonFeature": {"json": json.dumps(content)}}


# Ways to give TFDS the class of a feature: in `features.json`, unless the name says otherwise.
HOSTILE_FEATURES = {
    "alone": as_proto,
    "other spelling": lambda name: {"python_class_name": name, "text": {}},
    "first format": lambda name: {"type": name, "content": {}},
    "in a dict": lambda name: in_dict(as_proto(name)),
    "in a sequence": lambda name: {
        "pythonClassName": SEQUENCE,
        "sequence": {"feature": as_proto(name), "length": "-1"},
    },
    "in a dict of the first format": lambda name: {
        "type": DICT,
        "content": {"a": {"type": name, "content": {}}},
    },
    "in a sequence of the first format": lambda name: {
        "type": SEQUENCE,
        "content": {"feature": {"type": name, "content": {}}, "length": None},
    },
    "as text": lambda name: in_json({"a": {"type": name, "content": {}}}),
    "as text in text": lambda name: in_json({"a": in_json({"b": as_proto(name)})}),
    "as text of a proto": lambda name: {
        "type": DICT,
        "proto_cls": "tensorflow_datasets.FeaturesDict",
        "content": json.dumps({"features": {"a": as_proto(name)}}),
    },
    "in dataset_info.json": as_proto,
    "in a dict in dataset_info.json": lambda name: in_dict(as_proto(name)),
}


def make_hostile(directory: Path, kind: str, class_name: str) -> None:
    """Make a prepared data set name a class for one of its features."""
    features = HOSTILE_FEATURES[kind](class_name)
    if "dataset_info" in kind:
        change_info(directory, lambda content: content.update(features=features))
    else:
        (directory / "features.json").write_text(json.dumps(features))


def read_by_tfds(directory: Path) -> None:
    """Open a data set with TFDS alone, and ignore errors."""
    with contextlib.suppress(Exception):
        tfds.builder_from_directory(directory)


class Trap:
    """A module that leaves a file when it is imported."""

    def __init__(self, folder: Path, number: int) -> None:
        self.module = f"jaxcl_trap_{number}"
        self.marker = folder / "sprung"
        code = f"import pathlib\npathlib.Path({str(self.marker)!r}).touch()\n"
        (folder / f"{self.module}.py").write_text(code)

    @property
    def class_name(self) -> str:
        return f"{self.module}.Feature"

    @property
    def sprung(self) -> bool:
        return self.marker.exists()
