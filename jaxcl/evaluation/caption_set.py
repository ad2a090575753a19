"""Retrieval between images and their captions, in both directions.

When not to trust it: a caption may fit many images, but only the labelled pairs count. Recall
depends on the number of candidates, so only sets of equal size can be compared. With five captions
per image, chance is k/n in both directions for n images: a query has five times the candidates, and
five times the hits. COCO and Flickr30k are usually evaluated with the first five captions of each
image.
"""

import contextlib
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxcl.data.images.decoding import MAX_IMAGE_BYTES
from jaxcl.data.images.image_files import ImageFiles, file_inside
from jaxcl.data.text_files import is_text_file, read_records
from jaxcl.evaluation.caption_ranks import CaptionPairs, rank_captions
from jaxcl.evaluation.per_item import mean_differences, mean_figures, values_of_items
from jaxcl.evaluation.protocol import Encode
from jaxcl.host.files import read_regular
from jaxcl.host.paths import AnyPath, local_path
from jaxcl.host.processes import together
from jaxcl.metrics import recall_at_k_metric
from jaxcl.typing import Float

__all__ = ["CaptionSet", "CaptionedImages", "has_captions", "open_caption_set"]

IMAGE_FIELDS = ("image", "image_path", "file_name", "filename", "filepath", "path")
CAPTION_FIELDS = ("captions", "caption", "sentences", "texts", "text")
"""The recognised fields of an image and its captions, in order of preference."""
_GROUP_FIELD = "group"
_CUTOFFS = (1, 5, 10)
_TO_TEXT, _TO_IMAGE = "image_to_text", "text_to_image"


class CaptionedImages(NamedTuple):
    """Distinct images with their captions.

    Attributes:
      images: the image files.
      captions: the distinct captions.
      pairs: the captions of each image.
      fingerprint: a digest of the contents and the pairs.
    """

    images: ImageFiles
    captions: Sequence[str]
    pairs: CaptionPairs
    fingerprint: str


class CaptionSet:
    """Images with captions, an `EvaluationSet`.

    Attributes:
      kind: `"captions"`.
      unit: `"images"`, over which standard errors are computed in both directions.
      metrics: `"image_to_text_recall@1"` and so on, at the cutoffs 1, 5 and 10.
      fingerprint: a digest of the images and captions.
      inputs: `("image", "text")`.
    """

    kind = "captions"
    unit = "images"
    inputs: tuple[str, ...] = ("image", "text")
    metrics: tuple[str, ...] = tuple(
        f"{direction}_recall@{k}" for direction in (_TO_TEXT, _TO_IMAGE) for k in _CUTOFFS
    )

    def __init__(self, data: CaptionedImages) -> None:
        self._data = data
        self.fingerprint = data.fingerprint

    @property
    def description(self) -> str:
        """The numbers of images and captions."""
        data = self._data
        return (
            f"retrieval between {len(data.images):,} images and {len(data.captions):,} captions, "
            f"{len(data.pairs.images):,} pairs"
        )

    def evaluate(self, encode: Encode) -> dict[str, float]:
        """Rank the captions of each image, and the images of each caption.

        An image has the rank of its best caption. Every caption is a query for its image.
        Ties count against the model. Captions of other images with the same group are correct too,
        and are left out of the ranking.

        Returns:
          The recall of each direction and cutoff, with its standard error over images, and the
          numbers of images and captions.

        Raises:
          ValueError: if an embedding is not finite.
        """
        return self.figures(self.measure(encode))

    def measure(self, encode: Encode) -> dict[str, Float[np.ndarray, " n"]]:
        """One value per image for each metric."""
        data = self._data
        images, captions = encode("image", data.images), encode("text", data.captions)
        ranks = together(lambda: rank_captions(images, captions, data.pairs))
        measured = {}
        for cutoff in _CUTOFFS:
            recall = recall_at_k_metric(ranks.of_images.astype(np.float64), cutoff=cutoff)
            measured[f"{_TO_TEXT}_recall@{cutoff}"] = recall
        for cutoff in _CUTOFFS:
            recall = recall_at_k_metric(ranks.of_pairs.astype(np.float64), cutoff=cutoff)
            measured[f"{_TO_IMAGE}_recall@{cutoff}"] = values_of_items(
                recall, data.pairs.images, num_items=len(data.images)
            )
        return measured

    def figures(self, measured: Mapping[str, Float[np.ndarray, " n"]]) -> dict[str, float]:
        """Compute the result of `evaluate`."""
        data = self._data
        sizes = {"images": len(data.images), "captions": len(data.captions)}
        return {**mean_figures(measured), **sizes, "pairs": len(data.pairs.images)}

    differences = staticmethod(mean_differences)


def has_captions(path: AnyPath) -> bool:
    """Whether a path is a file of records whose first record has an image and captions."""
    if not is_text_file(path):
        return False
    with contextlib.closing(read_records(path)) as records, contextlib.suppress(ValueError):
        _, record = next(records, ("", {}))
        return _field(record, IMAGE_FIELDS) is not None and (
            _field(record, CAPTION_FIELDS) is not None
        )
    return False


def open_caption_set(path: AnyPath) -> CaptionSet:
    """Read a file of images with captions.

    Each record has an image, as a path relative to the folder of the file or, in Parquet, as bytes,
    and a caption or a list of captions. An optional `group` is shared by images that show the same
    thing. Records with equal images become one image.

    Raises:
      ValueError: for a record without an image or caption, or an image outside of the folder; the
        message names the line.
      OSError: if the file or an image cannot be read.
    """
    file = local_path(path)
    with contextlib.closing(read_records(file)) as records:
        return CaptionSet(_captioned(records, file))


def _captioned(records: Iterable[tuple[str, Mapping[str, Any]]], file: Path) -> CaptionedImages:
    numbers: dict[bytes, int] = {}
    captions: dict[str, int] = {}
    groups: dict[Any, int] = {}
    images: list[bytes | Path] = []
    group_of: list[int] = []
    pairs: dict[tuple[int, int], None] = {}
    for where, record in records:
        image, texts = _image_of(record, file.parent, where), _captions_of(record, where)
        content = image if isinstance(image, bytes) else _read(image, where)
        number = numbers.setdefault(hashlib.sha256(content).digest(), len(numbers))
        group = record.get(_GROUP_FIELD)
        if number == len(images):
            images.append(image)
            label = ("image", number) if group is None else ("group", str(group))
            group_of.append(groups.setdefault(label, len(groups)))
        for text in texts:
            pairs[number, captions.setdefault(text, len(captions))] = None
    if len(images) < 2:
        raise ValueError(f"{file} has {len(images)} different images; give at least two")
    columns = np.array(list(pairs), np.int64)
    digest = hashlib.sha256(b"".join(numbers) + "\0".join(captions).encode())
    digest.update(np.concatenate([columns.ravel(), group_of]).astype(np.int64).tobytes())
    of_pairs = CaptionPairs(columns[:, 0], columns[:, 1], np.array(group_of, np.int64))
    return CaptionedImages(ImageFiles(images), list(captions), of_pairs, digest.hexdigest())


def _image_of(record: Mapping[str, Any], folder: Path, where: str) -> bytes | Path:
    field = _field(record, IMAGE_FIELDS)
    value = None if field is None else record[field]
    if isinstance(value, Mapping):  # as Hugging Face datasets write images to Parquet
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return value
    if not isinstance(value, str) or not value:
        raise ValueError(
            f"{where}: there is no image in the fields {', '.join(map(str, record))}; name it "
            "'image', with a path relative to the folder of the file, or bytes"
        )
    try:
        return file_inside(folder, value)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _read(path: Path, where: str) -> bytes:
    try:
        return read_regular(path, limit=MAX_IMAGE_BYTES)
    except (OSError, ValueError) as error:
        raise ValueError(f"{where}: the image cannot be read: {error}") from error


def _captions_of(record: Mapping[str, Any], where: str) -> list[str]:
    field = _field(record, CAPTION_FIELDS)
    value = None if field is None else record[field]
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not texts:
        raise ValueError(f"{where}: there is no caption; name it 'caption', or a list 'captions'")
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{where}: a caption is {text!r:.80}; give a text")
    return list(texts)


def _field(record: Mapping[str, Any], names: Sequence[str]) -> str | None:
    return next((name for name in names if name in record), None)
