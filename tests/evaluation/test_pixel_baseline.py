"""The baseline of pixels, in each direction, against plain loops."""

import numpy as np
import pytest

from jaxcl.data.images.decoding import ImageRule
from jaxcl.data.sources import InMemoryPairs
from jaxcl.evaluation.pixel_baseline import pixel_scorer, pixel_vectors
from jaxcl.evaluation.retrieval import BM25
from jaxcl.settings.read import read_settings

WORDS = ["latin", "greek", "small", "capital", "letter", "sign"]
RNG = np.random.default_rng(0)
TRAIN = RNG.integers(0, 256, (40, 8, 8, 3), np.uint8)
TRAIN_TEXTS = [" ".join(RNG.choice(WORDS, 3)) for _ in TRAIN]
NEAREST = RNG.permutation(40)[:9]
TEST = np.clip(TRAIN[NEAREST] * 0.7 + RNG.integers(0, 30, (9, 8, 8, 3)), 0, 255).astype(np.uint8)
TEST_TEXTS = [" ".join(RNG.choice(WORDS, 3)) for _ in TEST]


def data_with(query, key):
    images = {"size": 8}
    return read_settings(
        {
            "data": {"modality": {"query": query, "key": key}, "images": images},
            "model": {"shared": query == key},
        }
    ).data


def sources_with(query, key):
    columns = {"image": (list(TRAIN), list(TEST)), "text": (TRAIN_TEXTS, TEST_TEXTS)}
    (train_query, query), (train_key, key) = columns[query], columns[key]
    return {"train": InMemoryPairs(train_query, train_key), "test": InMemoryPairs(query, key)}


def correlations(one, other):
    flat = [images.reshape(len(images), -1).astype(np.float64) for images in (one, other)]
    return np.corrcoef(*flat)[: len(one), len(one) :]


def all_scores(query, key, sides=("query", "key")):
    scorer = pixel_scorer(data_with(query, key), sources_with(query, key), "test", sides)
    return np.concatenate([scorer(slice(first, min(first + 4, 9))) for first in (0, 4, 8)])


def test_two_images_are_correlated():
    np.testing.assert_allclose(
        all_scores("image", "image"), correlations(TEST, TEST), rtol=0, atol=2e-5
    )


def test_an_image_finds_texts_like_that_of_the_nearest_training_image():
    expected = BM25(TEST_TEXTS).scores([TRAIN_TEXTS[row] for row in NEAREST])
    np.testing.assert_array_equal(all_scores("image", "text"), expected)
    reversed_sides = all_scores("text", "image", sides=("key", "query"))
    np.testing.assert_array_equal(reversed_sides, expected)


def test_a_text_finds_images_like_that_of_the_nearest_training_text():
    nearest = BM25(TRAIN_TEXTS).scores(TEST_TEXTS).argmax(1)
    expected = correlations(TRAIN[nearest], TEST)
    np.testing.assert_allclose(all_scores("text", "image"), expected, rtol=0, atol=2e-5)


def test_brightness_and_contrast_do_not_matter_and_blank_images_are_like_none():
    image = TRAIN[:1] // 2
    rule = ImageRule(8)
    vectors = pixel_vectors([image[0], image[0] + 9, np.full((8, 8, 3), 7, np.uint8)], rule)
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-6)
    assert vectors[0] @ vectors[1] == pytest.approx(1, abs=1e-5)
    assert not vectors[2].any()


def test_large_images_are_compared_at_a_small_size():
    data = data_with("image", "image")
    data = data._replace(images=data.images._replace(size=64))
    large = list(np.random.default_rng(1).integers(0, 256, (3, 64, 64, 3), np.uint8))
    scores = pixel_scorer(data, {"test": InMemoryPairs(large, large)}, "test", ("query", "key"))
    np.testing.assert_allclose(np.diag(scores(slice(0, 3))), 1, atol=1e-5)


def test_images_and_texts_need_training_rows():
    sources = {"test": sources_with("image", "text")["test"]}
    with pytest.raises(ValueError, match="reads the training rows, but there are none"):
        pixel_scorer(data_with("image", "text"), sources, "test", ("query", "key"))
    with pytest.raises(ValueError, match="both sides hold texts"):
        pixel_scorer(read_settings({}).data, sources, "test", ("query", "key"))
