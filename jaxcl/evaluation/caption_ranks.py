"""Ranks of captions for images and of images for captions; an image may have several captions."""

from typing import NamedTuple

import numpy as np

from jaxcl.evaluation.finite import check_finite
from jaxcl.evaluation.retrieval import dense_scores
from jaxcl.typing import Bool, Float, Int

__all__ = ["CaptionPairs", "CaptionRanks", "rank_captions"]

_TILE_SCORES = 2**24
"""Scores in memory at a time, 64 MiB in float32."""


class CaptionPairs(NamedTuple):
    """Which captions belong to which images.

    Images with equal content count as one image, and equal captions as one caption. All captions of
    an image are correct answers, and so are the captions of images with the same group.

    Attributes:
      images: the image of each pair.
      captions: the caption of each pair; no pair occurs twice.
      groups: the group of each image, in [0, number of groups).
    """

    images: Int[np.ndarray, " p"]
    captions: Int[np.ndarray, " p"]
    groups: Int[np.ndarray, " n"]

    def known(
        self, images: Int[np.ndarray, " i"], captions: Int[np.ndarray, " c"], num_captions: int
    ) -> Bool[np.ndarray, "i c"]:
        """Whether each caption belongs to each image, or to another image with the same group."""
        keys = np.unique(self.groups[self.images] * num_captions + self.captions)
        asked = self.groups[images][:, None] * num_captions + captions
        return keys[np.minimum(np.searchsorted(keys, asked), len(keys) - 1)] == asked


class CaptionRanks(NamedTuple):
    """Ranks from 1, in which wrong images or captions win ties.

    Attributes:
      of_images: for each image, the rank of its best caption among all captions.
      of_pairs: for each pair, the rank of its image among all images, with its caption as query.
    """

    of_images: Int[np.ndarray, " n"]
    of_pairs: Int[np.ndarray, " p"]


def rank_captions(
    images: Float[np.ndarray, "n d"],
    captions: Float[np.ndarray, "m d"],
    pairs: CaptionPairs,
    *,
    tile: int | None = None,
) -> CaptionRanks:
    r"""Rank all captions for each image, and all images for each caption.

    $$r_i = 1 + \#\{c : s_{ic} \ge \max_{c' \in C_i} s_{ic'},\ (i, c) \text{ unknown}\}, \qquad
    r_{ic} = 1 + \#\{j : s_{jc} \ge s_{ic},\ (j, c) \text{ unknown}\}$$

    where $C_i$ are the captions of image $i$. Other correct pairs are left out. Ties count against
    the model, so a model that gives all pairs the same score finds nothing.

    Args:
      images: one vector per image.
      captions: one vector per caption.
      pairs: the captions of each image; each image and each caption is in a pair.
      tile: number of images, or of captions, to rank at a time; the result does not depend on it.

    Raises:
      ValueError: if an embedding is not finite, which would otherwise have rank 1.

    Example:
      >>> pairs = CaptionPairs(np.array([0, 0, 1]), np.array([0, 1, 2]), np.arange(2))
      >>> images, captions = np.eye(2), np.array([[0.6, 0.8], [1.0, 0.0], [0.0, 1.0]])
      >>> ranks = rank_captions(images, captions, pairs)
      >>> ranks.of_images.tolist(), ranks.of_pairs.tolist()
      ([1, 1], [2, 1, 1])
    """
    check_finite(images, "embeddings of images")
    check_finite(captions, "embeddings of captions")
    tile = tile or max(1, _TILE_SCORES // max(len(images), len(captions)))
    best = np.full(len(images), -np.inf, np.float32)
    own = np.empty(len(pairs.images), np.float32)
    for first in range(0, len(own), tile):
        part = slice(first, first + tile)
        left, right = images[pairs.images[part]], captions[pairs.captions[part]]
        own[part] = np.einsum("nd,nd->n", left, right, dtype=np.float64)
    np.maximum.at(best, pairs.images, own)
    of_images = np.empty(len(images), np.int64)
    for first in range(0, len(images), tile):
        rows = np.arange(first, min(first + tile, len(images)))
        scores = dense_scores(images[rows], captions)
        unknown = ~pairs.known(rows, np.arange(len(captions)), len(captions))
        of_images[rows] = 1 + ((scores >= best[rows, None]) & unknown).sum(1)
    of_pairs = np.empty(len(own), np.int64)
    for first in range(0, len(own), tile):
        rows = np.arange(first, min(first + tile, len(own)))
        asked = pairs.captions[rows]
        scores = dense_scores(captions[asked], images)
        unknown = ~pairs.known(np.arange(len(images)), asked, len(captions)).T
        of_pairs[rows] = 1 + ((scores >= own[rows, None]) & unknown).sum(1)
    return CaptionRanks(of_images, of_pairs)
