"""Retrieval between images and captions against a plain loop, and the files of captions."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxcl.evaluation.caption_ranks import CaptionPairs, rank_captions
from jaxcl.evaluation.protocol import ComparableSet
from jaxcl.evaluation.sets import open_set
from tests.evaluation.images import model_of, write_image


def slow_ranks(images, captions, pairs):
    """The definition, one image and one caption at a time, and the hits of a best own caption."""
    scores = images.astype(np.float64) @ captions.T.astype(np.float64)
    own = {(int(i), int(c)) for i, c in zip(pairs.images, pairs.captions, strict=True)}
    known = {
        (i, c) for i in range(len(images)) for j, c in own if pairs.groups[i] == pairs.groups[j]
    }
    of_images = []
    for i in range(len(images)):
        best = max(scores[i, c] for j, c in own if j == i)
        others = [c for c in range(len(captions)) if (i, c) not in known]
        of_images.append(1 + sum(scores[i, c] >= best for c in others))
    of_pairs = []
    for i, c in zip(pairs.images, pairs.captions, strict=True):
        others = [j for j in range(len(images)) if (j, c) not in known]
        of_pairs.append(1 + sum(scores[j, c] >= scores[i, c] for j in others))
    return of_images, of_pairs


@pytest.mark.parametrize("tile", [1, 4, 11, 100])
@pytest.mark.parametrize("grouped", [False, True])
def test_ranks_are_those_of_the_definition(tile, grouped):
    rng = np.random.default_rng(0)
    images, captions = (np.float32(rng.integers(-2, 3, (size, 3))) for size in (11, 23))
    own = sorted({(int(i), c) for c, i in enumerate(rng.integers(11, size=23))})
    own = sorted({*own, *((i, (5 * i) % 23) for i in range(11))})  # some captions are shared
    groups = rng.integers(6, size=11) if grouped else np.arange(11)
    pairs = CaptionPairs(*np.array(own).T, groups)
    ranks = rank_captions(images, captions, pairs, tile=tile)
    of_images, of_pairs = slow_ranks(images, captions, pairs)
    assert ranks.of_images.tolist() == of_images
    assert ranks.of_pairs.tolist() == of_pairs
    assert max(of_images) > 3
    assert 1 in of_images


def test_without_shared_captions_the_ranks_are_those_of_the_usual_formula():
    rng = np.random.default_rng(1)
    images, captions = (np.float32(rng.normal(size=(size, 4))) for size in (8, 40))
    image_of = np.arange(40) // 5
    pairs = CaptionPairs(image_of, np.arange(40), np.arange(8))
    s = images @ captions.T
    own = image_of[None] == np.arange(8)[:, None]
    best = np.where(own, s, -np.inf).max(1, keepdims=True)
    ranks = rank_captions(images, captions, pairs)
    np.testing.assert_array_equal(ranks.of_images, 1 + ((s >= best) & ~own).sum(1))
    np.testing.assert_array_equal(ranks.of_pairs, (s >= s[image_of, np.arange(40)]).sum(0))


def test_a_collapsed_model_has_the_last_rank():
    pairs = CaptionPairs(np.arange(3), np.arange(3), np.arange(3))
    ranks = rank_captions(np.ones((3, 2)), np.ones((3, 2)), pairs)
    assert ranks.of_images.tolist() == ranks.of_pairs.tolist() == [3, 3, 3]
    with pytest.raises(ValueError, match="3 of 3 embeddings of images contain NaN"):
        rank_captions(np.full((3, 2), np.nan), np.ones((3, 2)), pairs)


VECTORS = {
    "A": (1.0, 0.0),
    "B": (0.0, 1.0),
    "a cat": (1.0, 0.1),
    "the cat": (0.4, 0.9),
    "a dog": (0.0, 1.0),
}
RECORDS = [
    {"image": "pictures/a.png", "captions": ["a cat", "the cat"]},
    {"image": "pictures/b.png", "captions": ["a dog"]},
]


@pytest.fixture
def folder(tmp_path):
    for name in "AB":
        write_image(tmp_path / "pictures" / f"{name.lower()}.png", name)
    return tmp_path


def write_records(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_both_directions_are_evaluated(folder):
    found = open_set(write_records(folder / "captions.jsonl", RECORDS))
    assert isinstance(found, ComparableSet)
    assert (found.kind, found.inputs, found.unit) == ("captions", ("image", "text"), "images")
    figures = found.evaluate(model_of(VECTORS))
    assert figures["image_to_text_recall@1"] == 2 / 2
    assert figures["text_to_image_recall@1"] == pytest.approx(2 / 3)  # "the cat" finds B first
    # The values of the two images: mean + (n / q) sum of deviations.
    values = [2 / 3 + 2 / 3 * (1 / 3 - 2 / 3), 2 / 3 + 2 / 3 * (1 / 3)]
    error = np.std(values, ddof=1) / 2**0.5
    assert figures["text_to_image_recall@1_standard_error"] == pytest.approx(error)
    assert figures["text_to_image_recall@5"] == 1
    assert [figures[name] for name in ("images", "captions", "pairs")] == [2, 3, 3]
    assert set(found.metrics) <= set(figures)
    assert found.description == "retrieval between 2 images and 3 captions, 3 pairs"


def test_two_models_are_compared(folder):
    found = open_set(write_records(folder / "captions.jsonl", RECORDS))
    one = found.measure(model_of(VECTORS))
    other = found.measure(model_of(dict.fromkeys(VECTORS, (1.0, 0.0))))
    differences = found.differences(one, other)
    assert differences["image_to_text_recall@1"].difference == 1
    assert differences["text_to_image_recall@1"].difference == pytest.approx(2 / 3)
    assert differences["text_to_image_recall@5"].difference == 0


def test_one_record_per_caption_is_the_same_set(folder):
    flat = [
        {"image": record["image"], "caption": caption}
        for record in RECORDS
        for caption in record["captions"]
    ]
    one = open_set(write_records(folder / "one.jsonl", RECORDS))
    assert one.fingerprint == open_set(write_records(folder / "flat.jsonl", flat)).fingerprint
    (folder / "flat.csv").write_text(
        "image,caption\n" + "".join(f"{row['image']},{row['caption']}\n" for row in flat)
    )
    assert one.fingerprint == open_set(folder / "flat.csv").fingerprint
    images = [{"bytes": name.encode(), "path": None} for name in "AAB"]
    table = {"image": images, "text": [row["caption"] for row in flat]}
    pq.write_table(pa.table(table), folder / "flat.parquet")
    parquet = open_set(folder / "flat.parquet")
    assert one.fingerprint == parquet.fingerprint
    assert parquet.evaluate(model_of(VECTORS)) == one.evaluate(model_of(VECTORS))


def test_images_of_a_group_share_their_captions(folder):
    twins = [
        {"image": "pictures/a.png", "caption": "a cat", "group": "twins"},
        {"image": "pictures/b.png", "caption": "a dog", "group": "twins"},
    ]
    same = model_of(dict.fromkeys(VECTORS, (1.0, 0.0)))
    grouped = open_set(write_records(folder / "grouped.jsonl", twins)).evaluate(same)
    assert grouped["image_to_text_recall@1"] == grouped["text_to_image_recall@1"] == 1
    apart = [{**record, "group": None} for record in twins]
    found = open_set(write_records(folder / "apart.jsonl", apart)).evaluate(same)
    assert found["image_to_text_recall@1"] == found["text_to_image_recall@1"] == 0


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"image": "../a.png", "caption": "x"}, r"line 2: '\.\./a\.png' is outside of"),
        ({"image": "/etc/passwd", "caption": "x"}, r"line 2: '/etc/passwd' is outside of"),
        ({"image": "absent.png", "caption": "x"}, "line 2: the image cannot be read"),
        ({"image": "pictures", "caption": "x"}, "line 2: the image cannot be read.*a folder"),
        ({"image": "", "caption": "x"}, "line 2: there is no image in the fields image, caption"),
        ({"image": "pictures/b.png", "captions": []}, "line 2: there is no caption"),
        ({"image": "pictures/b.png", "caption": 7}, "line 2: there is no caption"),
        ({"image": "pictures/b.png", "captions": ["a", " "]}, "line 2: a caption is ' '; give"),
    ],
)
def test_faulty_records_are_named(folder, record, message):
    path = write_records(folder / "captions.jsonl", [RECORDS[0], record])
    with pytest.raises(ValueError, match=message):
        open_set(path)


def test_one_image_is_not_enough(folder):
    path = write_records(folder / "captions.jsonl", RECORDS[:1])
    with pytest.raises(ValueError, match="has 1 different images; give at least two"):
        open_set(path)
