"""The columns of a prepared TFDS data set, decoded without TensorFlow."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

__all__ = [
    "check_image",
    "check_text",
    "field_decoder",
    "field_value",
    "image_fields",
    "selected_features",
    "text_groups",
]

_READ_AT_ONCE = 8192


def selected_features(builder: Any, fields: Iterable[str]) -> Any:
    """The TFDS features of the given fields, as a `FeaturesDict`.

    Raises:
      ValueError: if the data set lacks one of the fields.
    """
    known = dict(_leaves(builder.info.features))
    for field in fields:
        if field not in known:
            raise ValueError(f"{builder.name} has no field {field!r}; it has {sorted(known)}")
    return _nested({field: known[field] for field in fields})


def field_decoder(features: Any, fields: Iterable[str]) -> Callable[[Any], Any]:
    """Make a function that decodes only `fields` of a record.

    Decoding the other fields as well would take twice as long. (TFDS's PartialDecoding does not
    work without TensorFlow.) Images are returned as the bytes of their files, because TFDS would
    return a palette's indices as colours.

    Args:
      features: TFDS features that include these fields.
      fields: the names of the fields; `"a/b"` names field b in a.
    """
    import tensorflow_datasets as tfds

    known = dict(_leaves(features))
    wanted = {field: known[field] for field in fields}
    decode = _nested(wanted).deserialize_example_np
    skip = {field: tfds.decode.SkipDecoding() for field in image_fields(_nested(wanted))}
    return functools.partial(decode, decoders=_nested_dict(skip)) if skip else decode


def image_fields(features: Any) -> list[str]:
    """The fields whose features are images."""
    import tensorflow_datasets as tfds

    return [name for name, leaf in _leaves(features) if isinstance(leaf, tfds.features.Image)]


def _nested(leaves: Mapping[str, Any]) -> Any:
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict(_nested_dict(leaves))


def _nested_dict(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Build a tree of dicts from path -> leaf."""
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        *parents, leaf = path.split("/")
        inner = functools.reduce(lambda node, parent: node.setdefault(parent, {}), parents, tree)
        inner[leaf] = value
    return tree


def check_text(builder: Any, records: Any, field: str, *, side: str) -> None:
    """Raise a `ValueError` unless the first value of a field is a text."""
    first = _first_value(builder, records, field)
    if not isinstance(first, str):
        raise ValueError(
            f"the field {field!r} of {builder.name} holds {type(first).__name__}; give a field of "
            f"texts as {side}_field: it has {sorted(dict(_leaves(builder.info.features)))}"
        )


def check_image(builder: Any, records: Any, field: str, *, side: str) -> None:
    """Raise a `ValueError` unless the first value of a field can be an image."""
    decode = field_decoder(builder.info.features, [field])
    first = field_value(decode(records.read([0])[0]), field, 0, is_image=True)
    if isinstance(first, bytes) or (isinstance(first, np.ndarray) and first.dtype == np.uint8):
        return
    raise ValueError(
        f"the field {field!r} of {builder.name} holds {type(first).__name__}; give a field of "
        f"images as {side}_field: it has {sorted(dict(_leaves(builder.info.features)))}"
    )


def text_groups(builder: Any, records: Any, field: str) -> list[str] | None:
    """The distinct texts of `field`, sorted, or None if the field holds integers."""
    first = _first_value(builder, records, field)
    if isinstance(first, int):  # or a bool
        return None
    if not isinstance(first, str):
        raise ValueError(
            f"the group field {field!r} holds {type(first).__name__}; give one that holds an "
            "integer, a label, a boolean or a text in each row"
        )
    distinct: set[str] = set()
    for start in range(0, len(records), _READ_AT_ONCE):
        rows = list(range(start, min(start + _READ_AT_ONCE, len(records))))
        distinct.update(_read_column(builder, records, field, rows))
    return sorted(distinct)


def _first_value(builder: Any, records: Any, field: str) -> Any:
    """A field's value in the first row; for an array, such as an image, the feature instead."""
    feature = dict(_leaves(builder.info.features))[field]
    if feature.shape != ():
        return feature
    return _read_column(builder, records, field, [0])[0]


def _read_column(builder: Any, records: Any, field: str, rows: list[int]) -> list[Any]:
    decode = field_decoder(builder.info.features, [field])
    pairs = zip(rows, records.read(rows), strict=True)
    return [field_value(decode(record), field, row) for row, record in pairs]


def _leaves(features: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    import tensorflow_datasets as tfds

    for name, feature in features.items():
        if isinstance(feature, tfds.features.FeaturesDict):
            yield from _leaves(feature, f"{prefix}{name}/")
        else:
            yield prefix + name, feature


def field_value(example: Any, field: str, row: int, *, is_image: bool = False) -> Any:
    """A field of an example; bytes are decoded as text, unless they are an image.

    Raises:
      ValueError: if a text is not UTF-8; the message names the row.
    """
    value = functools.reduce(lambda node, part: node[part], field.split("/"), example)
    if isinstance(value, bytes) and not is_image:
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"row {row} of the field {field!r} is not UTF-8 ({error}); prepare the data set "
                "with texts in that encoding"
            ) from error
    return value.item() if isinstance(value, np.generic) else value
