"""Check the feature classes that a prepared data set names, before TFDS imports them.

TFDS rebuilds a data set's features from `features.json`, or from the `features` entry of
`dataset_info.json`. Both name a Python class for each feature, and TFDS imports the module of a
class that it does not know. An import runs code, so a folder from someone else could run any code.
`check_features` therefore reads both files first and accepts only TFDS's own classes.
"""

import json
from collections.abc import Iterator
from typing import Any

from jaxcl.host.files import read_json_object

__all__ = ["DATASET_INFO_FILE", "FEATURE_CLASSES", "check_features"]

DATASET_INFO_FILE = "dataset_info.json"
FEATURES_FILE = "features.json"

_TFDS_FEATURES = "tensorflow_datasets.core.features"
FEATURE_CLASSES = frozenset(
    f"{_TFDS_FEATURES}.{name}"
    for name in (
        "audio_feature.Audio",
        "bounding_boxes.BBoxFeature",
        "class_label_feature.ClassLabel",
        "dataset_feature.Dataset",
        "feature.Tensor",  # TFDS's alias of tensor_feature.Tensor
        "features_dict.FeaturesDict",
        "image_feature.Image",
        "labeled_image.LabeledImage",
        "scalar.Scalar",
        "sequence_feature.Sequence",
        "tensor_feature.Tensor",
        "text_feature.Text",
        "translation_feature.Translation",
        "translation_feature.TranslationVariableLanguages",
        "video_feature.Video",
    )
)
"""Full names of the accepted classes. TFDS registers them itself, so it imports nothing for them.

A prefix is not enough: it would also admit TFDS's scripts and its several hundred data set modules,
whose code runs on import.
"""

# The keys of a feature's class: in TFDS's first format, and in the current format in both spellings
# that protobuf reads.
_CLASS_KEYS = ("type", "pythonClassName", "python_class_name")
# The keys of strings that hold JSON: in `jsonFeature`, and in a feature of the first format.
_NESTED_JSON_KEYS = ("json", "content")


def check_features(directory: Any) -> None:
    """Reject a prepared data set that names a class other than TFDS's own.

    Args:
      directory: the directory of one version, an `etils.epath.Path`.

    Raises:
      ValueError: if a feature, at any depth, has another class, or a file is damaged.
    """
    features_path, info_path = directory / FEATURES_FILE, directory / DATASET_INFO_FILE
    if features_path.exists():
        _check(read_json_object(features_path), features_path)
    _check(read_json_object(info_path).get("features"), info_path)


def _check(features: Any, path: Any) -> None:
    try:
        classes = list(_class_names(features))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    for name in classes:
        if name not in FEATURE_CLASSES:
            raise ValueError(
                f"{path} names the feature class {name!r}, which is not one of TFDS's own and is "
                "not imported, because an import runs code; prepare the data set with classes of "
                "tfds.features only"
            )


def _class_names(features: Any) -> Iterator[Any]:
    """Yield all class names in a tree of features, including features encoded as text."""
    pending = [features]
    while pending:
        node = pending.pop()
        if isinstance(node, list):
            pending.extend(node)
        elif isinstance(node, dict):
            for key, value in node.items():
                if isinstance(value, dict | list):  # also a feature that is named "type" or "json"
                    pending.append(value)
                elif key in _CLASS_KEYS:
                    yield value
                elif key in _NESTED_JSON_KEYS and isinstance(value, str):
                    pending.append(json.loads(value))
