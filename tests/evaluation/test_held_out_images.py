"""Held-out rows with images: methods, directions, and keys that are excluded."""

import json

import numpy as np
import pytest

from jaxcl.data.prepare import RunData
from jaxcl.data.sources import InMemoryPairs
from jaxcl.evaluation.check_held_out import check_evaluation
from jaxcl.evaluation.held_out import HeldOutVectors, evaluate_splits
from jaxcl.evaluation.known_positives import read_groups
from jaxcl.settings.derived import ranking_directions, ranking_methods
from jaxcl.settings.read import read_settings

IMAGE_AND_TEXT = {"data": {"modality": {"query": "image"}}, "model": {"shared": False}}
IMAGES = {"data": {"modality": {"query": "image", "key": "image"}}}
PICTURES = list(np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8))
CAPTIONS = ["small a", "small b", "capital a", "capital b"]


def settings_of(base, **evaluation):
    config = {**base, "data": {**base.get("data", {}), "images": {"size": 8}}}
    return read_settings(config | {"evaluation": evaluation})


def vectors_of(queries, keys, source):
    vectors = {"query": np.float32(queries), "key": np.float32(keys)}

    def of_texts(split, side, texts):
        raise AssertionError("no other texts are embedded")

    return HeldOutVectors(
        lambda split, side: vectors[side], of_texts, lambda s: read_groups(source)
    )


def ranks_of(settings, queries, keys, source, *, train=None):
    sources = {"test": source} | ({} if train is None else {"train": train})
    results, failures = evaluate_splits(settings, vectors_of(queries, keys, source), sources)
    assert not failures
    return {
        (variant, method): result.ranks.tolist()
        for (_, variant), by_method in results.items()
        for method, result in by_method.items()
    }


def test_methods_and_directions_follow_the_modalities():
    for base, methods, directions in [
        ({}, ("bm25", "dense", "hybrid"), ("query_to_key",)),
        (IMAGE_AND_TEXT, ("dense",), ("query_to_key", "key_to_query")),
        (IMAGES, ("dense",), ("query_to_key",)),
    ]:
        settings = settings_of(base)
        assert (ranking_methods(settings), ranking_directions(settings)) == (methods, directions)


@pytest.mark.parametrize(
    ("base", "evaluation", "message"),
    [
        (IMAGES, {"methods": ("hybrid",)}, r"bm25 and hybrid compare texts, and data\.modality is"),
        (IMAGE_AND_TEXT, {"methods": ("bm25",)}, "use .'dense',., and 'pixels' as a baseline"),
        ({}, {"methods": ("dense", "pixels")}, "pixels compares images, and data.modality is"),
        (IMAGES, {"methods": ()}, r"evaluation\.methods=\(\); name one or more of bm25"),
        (IMAGES, {"directions": ()}, r"evaluation\.directions=\(\); name one or more of query_to"),
        (IMAGES, {"directions": ("both",)}, r"evaluation\.directions names 'both'; use some of"),
    ],
)
def test_rankings_that_have_no_meaning_are_errors(base, evaluation, message):
    with pytest.raises(ValueError, match=message):
        settings_of(base, **evaluation)


def test_images_and_captions_are_ranked_both_ways():
    queries = np.eye(4)
    keys = np.eye(4)[[0, 2, 1, 3]]  # the captions of rows 1 and 2 are mixed up
    keys[3] = [0, 0, 0.5, 1]
    source = InMemoryPairs(PICTURES, CAPTIONS)
    ranks = ranks_of(settings_of(IMAGE_AND_TEXT), queries, keys, source)
    assert ranks == {
        # Image 1 has the scores 0, 0, 1, 0 and image 2 has 0, 1, 0, 0.5: ties share a mean rank.
        ("image to text", "dense"): [1, 3, 3.5, 1],
        ("text to image", "dense"): [1, 3, 3, 1],
    }
    one_way = settings_of(IMAGE_AND_TEXT, directions=("key_to_query",))
    assert list(ranks_of(one_way, queries, keys, source)) == [("text to image", "dense")]
    both = settings_of(IMAGES, directions=("query_to_key", "key_to_query"))
    views = ranks_of(both, queries, keys, InMemoryPairs(PICTURES, PICTURES))
    assert list(views) == [("plain", "dense"), ("key to query", "dense")]


def test_rows_of_a_group_are_excluded_only_if_asked():
    queries, keys = np.eye(4), np.eye(4)[[1, 0, 3, 2]]
    source = InMemoryPairs(PICTURES, CAPTIONS, groups=[7, 7, 3, 5])
    plain = ranks_of(settings_of(IMAGES), queries, keys, source)
    assert plain["plain", "dense"] == [3, 3, 3, 3]
    grouped = ranks_of(settings_of(IMAGES, exclude_groups=True), queries, keys, source)
    # Rows 0 and 1 lose the key before them; each is then tied with the other two.
    assert grouped["plain", "dense"] == [2, 2, 3, 3]


def test_equal_images_and_captions_are_excluded_in_both_directions():
    """Rows 0 and 1 show the same picture; rows 2 and 3 have the same caption."""
    pictures = [b"one", b"one", b"two", b"three"]
    captions = ["a", "b", "c", "c"]
    source = InMemoryPairs(pictures, captions)
    queries, keys = np.eye(4), np.eye(4)[[1, 0, 3, 2]]
    ranks = ranks_of(settings_of(IMAGE_AND_TEXT), queries, keys, source)
    for direction in ("image to text", "text to image"):
        assert ranks[direction, "dense"] == [2, 2, 2, 2]  # only ties with the other pair are left


def test_pixels_are_ranked_next_to_the_embeddings():
    train = InMemoryPairs(PICTURES, CAPTIONS)
    order = [2, 0, 3, 1]
    source = InMemoryPairs(
        [PICTURES[row] // 2 + 60 for row in order], [CAPTIONS[row] for row in order]
    )
    settings = settings_of(IMAGE_AND_TEXT, methods=("dense", "pixels"))
    ranks = ranks_of(settings, -np.eye(4), np.eye(4), source, train=train)
    assert ranks["image to text", "pixels"] == ranks["text to image", "pixels"] == [1, 1, 1, 1]
    assert ranks["image to text", "dense"] == [4, 4, 4, 4]


def test_rows_without_groups_are_an_error():
    data = RunData({"test": InMemoryPairs(PICTURES, CAPTIONS)}, {}, {})
    check_evaluation(settings_of(IMAGES), data)
    with pytest.raises(ValueError, match=r"exclude_groups=True, but the rows of the test split ha"):
        check_evaluation(settings_of(IMAGES, exclude_groups=True), data)


def test_the_settings_are_saved_and_read_back():
    from jaxcl.configs import base

    config = base.get_config()
    settings = read_settings(config)
    assert (settings.evaluation.methods, settings.evaluation.directions) == (None, None)
    config.evaluation.methods = ("dense",)
    assert read_settings(json.loads(config.to_json())).evaluation.methods == ("dense",)


def test_pixels_do_not_rank_texts_with_masked_names():
    """They would read the texts as they are, with the names."""
    names = [f"name_{row}" for row in range(4)]
    source = InMemoryPairs(PICTURES, CAPTIONS, metadata={"name": names})
    base = {**IMAGE_AND_TEXT, "data": {**IMAGE_AND_TEXT["data"], "metadata_fields": ("name",)}}
    eye = np.eye(4, dtype=np.float32)
    vectors = HeldOutVectors(lambda *_: eye, lambda *_: eye, read_groups)
    sources = {"test": source, "train": InMemoryPairs(PICTURES, CAPTIONS)}

    def methods_of(*methods):
        settings = settings_of(base, methods=methods, directions=("query_to_key",))
        results, failures = evaluate_splits(settings, vectors, sources)
        assert not failures
        return {variant: list(by_method) for (_, variant), by_method in results.items()}

    both = {"image to text": ["dense", "pixels"], "name masked": ["dense"]}
    assert methods_of("dense", "pixels") == both
    assert methods_of("pixels") == {"image to text": ["pixels"]}
