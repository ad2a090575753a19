"""A baseline without a model: it compares images pixel by pixel.

Images are similar if their pixels are correlated. From an image to texts, the caption of the most
similar training image is compared with all texts by BM25; from a text to images, the image of the
training row whose text is most similar by BM25 is compared with all images.

It shows how much of a result is due to nearly identical images; a useful model beats it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from jaxcl.data.images.decoding import ImageRule, image_rule
from jaxcl.data.images.image_table import decode_images
from jaxcl.data.sources import PairSource
from jaxcl.evaluation.labelled import RowValues
from jaxcl.evaluation.retrieval import BM25
from jaxcl.settings.data_sections import DataSettings
from jaxcl.typing import Float, Int

__all__ = ["PIXELS", "pixel_scorer", "pixel_vectors"]

PIXELS = "pixels"
"""The name of the method."""

_SIZE = 32
"""The largest height and width at which images are compared."""
_ROWS_AT_ONCE = 1024
_QUERIES_AT_ONCE = 64

Scorer = Callable[[slice], Float[np.ndarray, "t n"]]


def pixel_scorer(
    data: DataSettings, sources: Mapping[str, PairSource], split: str, sides: tuple[str, str]
) -> Scorer:
    """A function that scores all keys of a split for a range of its queries.

    Args:
      data: the settings of the data.
      sources: role -> rows. `"train"` is read if one of the sides holds texts.
      split: the split to rank.
      sides: the side whose rows are queries, and the side whose rows are ranked.

    Raises:
      ValueError: if neither side holds images, or there are no training rows to read.
    """
    images = [getattr(data.modality, side) == "image" for side in sides]
    if not any(images):
        raise ValueError(f"{PIXELS!r} compares images, but both sides hold texts")
    rule = image_rule(data)
    rule = rule._replace(size=min(rule.size, _SIZE))
    source, (asking, ranked) = sources[split], sides
    if all(images):
        queries, keys = (_all_pixels(source, side, rule) for side in sides)
        return lambda rows: _products(queries[rows], keys)
    if "train" not in sources:
        raise ValueError(
            f"{PIXELS!r} between images and texts reads the training rows, but there are none; "
            "add 'train' to data.splits, or leave it out of evaluation.methods"
        )
    if images[0]:
        queries = _all_pixels(source, asking, rule)
        nearest = _nearest(queries, sources["train"], asking, rule)
        texts = list(RowValues(sources["train"], ranked, nearest))
        index = BM25(_all_texts(source, ranked))
        return lambda rows: index.scores(texts[rows])
    keys = _all_pixels(source, ranked, rule)
    nearest = _nearest_texts(_all_texts(source, asking), _all_texts(sources["train"], asking))

    def scores(rows: slice) -> Float[np.ndarray, "t n"]:
        pictures = RowValues(sources["train"], ranked, nearest[rows])
        return _products(pixel_vectors(pictures, rule), keys)

    return scores


def pixel_vectors(values: Sequence[object], rule: ImageRule) -> Float[np.ndarray, "n pixels"]:
    """The pixels of images as unit vectors with mean 0, whose inner products are correlations.

    An image of one colour has the zero vector.
    """
    pixels = decode_images(values, rule)
    flat = pixels.reshape(len(pixels), -1).astype(np.float32)
    centred = flat - flat.mean(1, keepdims=True)
    norms = np.linalg.norm(centred, axis=1, keepdims=True)
    return np.where(norms > 0, centred / np.maximum(norms, 1e-6), 0)


def _nearest(
    queries: Float[np.ndarray, "q pixels"], train: PairSource, side: str, rule: ImageRule
) -> Int[np.ndarray, " q"]:
    """The training row with the most similar image; the first one in case of ties."""
    best = np.full(len(queries), -np.inf, np.float32)
    nearest = np.zeros(len(queries), np.int64)
    for rows in _chunks(len(train)):
        scores = _products(queries, pixel_vectors(RowValues(train, side, rows), rule))
        highest = scores.argmax(1)
        values = scores[np.arange(len(queries)), highest]
        better = values > best
        best[better], nearest[better] = values[better], rows[highest[better]]
    return nearest


def _nearest_texts(queries: Sequence[str], texts: Sequence[str]) -> Int[np.ndarray, " q"]:
    """The text with the highest BM25 score; the first one in case of ties."""
    index = BM25(texts)
    tiles = range(0, len(queries), _QUERIES_AT_ONCE)
    scores = (index.scores(queries[first : first + _QUERIES_AT_ONCE]) for first in tiles)
    return np.concatenate([of_tile.argmax(1) for of_tile in scores])


def _products(
    queries: Float[np.ndarray, "q pixels"], keys: Float[np.ndarray, "n pixels"]
) -> Float[np.ndarray, "q n"]:
    """Correlations, rounded so that equal images have equal correlations in any tile."""
    return (queries @ keys.T).astype(np.float64).round(5).astype(np.float32)


def _all_pixels(source: PairSource, side: str, rule: ImageRule) -> Float[np.ndarray, "n pixels"]:
    parts = [pixel_vectors(RowValues(source, side, rows), rule) for rows in _chunks(len(source))]
    return np.concatenate(parts)


def _all_texts(source: PairSource, side: str) -> list[str]:
    return list(RowValues(source, side, np.arange(len(source))))


def _chunks(num_rows: int) -> Iterator[Int[np.ndarray, " _"]]:
    for first in range(0, num_rows, _ROWS_AT_ONCE):
        yield np.arange(first, min(first + _ROWS_AT_ONCE, num_rows))
