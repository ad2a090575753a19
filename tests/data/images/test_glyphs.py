"""The glyphs: which pictures there are, which belong together, and how they are split."""

import collections
import io
import string

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from jaxcl.data.images import demo_sets, glyphs
from jaxcl.data.images.glyphs import FACES, Glyph, draw_glyphs, group_characters, prepare_glyphs
from jaxcl.data.sources import open_pairs

FIELDS = {"query_field": "image", "key_field": "caption", "group_field": "group"}
METADATA = ("character", "face", "other", "other_face")


def test_the_twelve_faces_have_the_known_pictures():
    pictures = draw_glyphs(glyphs._font_files())
    characters = collections.Counter(glyph.character for glyph in pictures)
    characters_of = collections.defaultdict(set)
    for glyph in pictures:
        characters_of[glyph.pixels.tobytes()].add(glyph.character)
    shared = [alike for alike in characters_of.values() if len(alike) > 1]
    assert len(FACES) == 12
    assert len(pictures) == 45_627
    assert len(characters) == 6_492
    assert len(characters_of) == 32_891
    assert sum(map(len, characters_of.values())) == 36_101
    assert (len(shared), len(set().union(*shared))) == (2_137, 1_495)
    groups = collections.Counter(group_characters(pictures).values())
    assert sorted(groups) == list(range(5_321))
    assert (sum(size == 1 for size in groups.values()), max(groups.values())) == (4_997, 19)
    assert min(glyph.pixels.max() for glyph in pictures) > 0


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """The Latin and Greek letters, a third of them held out."""
    folder = tmp_path_factory.mktemp("glyphs")
    greek = [chr(code) for code in range(0x391, 0x3CA) if code != 0x3A2]
    options = {"characters": {*string.ascii_letters, *greek}, "test_fraction": 0.3}
    return prepare_glyphs(folder, validation_fraction=0.1, **options), options, folder


def rows_of(info, split):
    pairs = open_pairs(
        info.directory, split, metadata_fields=METADATA, image_sides=("query",), **FIELDS
    )
    return pairs.read(range(len(pairs)))


def pixels_of(file):
    return np.asarray(Image.open(io.BytesIO(file)))


def test_a_row_has_a_picture_its_name_and_another_face(letters):
    rows = rows_of(letters[0], "train")
    pictures = {glyph[:2]: glyph.pixels for glyph in draw_glyphs(glyphs._font_files())}
    for row in rows[::50]:
        np.testing.assert_array_equal(
            pixels_of(row["query"]), pictures[row["character"], row["face"]]
        )
        np.testing.assert_array_equal(
            pixels_of(row["other"]), pictures[row["character"], row["other_face"]]
        )
        assert row["face"] != row["other_face"]
    captions = {row["character"]: row["key"] for row in rows}
    names = {
        "B": "latin capital letter b",
        "z": "latin small letter z",
        "λ": "greek small letter lamda",
    }
    assert any(captions.get(character) == name for character, name in names.items())
    assert len({row["other_face"] for row in rows}) == 12


def test_groups_are_held_out_whole(letters):
    info, _, _ = letters
    rows = {split: rows_of(info, split) for split in ("train", "validation", "test")}
    groups = {split: {row["group"] for row in rows[split]} for split in rows}
    characters = {split: {row["character"] for row in rows[split]} for split in rows}
    assert not groups["train"] & groups["test"]
    assert not groups["train"] & groups["validation"]
    assert not groups["test"] & groups["validation"]
    assert {split: len(rows[split]) for split in rows}.items() <= info.split_sizes.items()
    by_character = {row["character"]: row["group"] for split in rows for row in rows[split]}
    assert by_character["A"] == by_character["Α"]  # the Greek one
    assert by_character["A"] != by_character["B"]
    share = len(groups["test"]) / len(set().union(*groups.values()))
    assert 0.15 < share < 0.45
    assert min(map(len, characters.values())) > 1


def test_further_splits_have_one_picture_of_each_unseen_character(letters):
    info, _, _ = letters
    test, sans, faces = (rows_of(info, split) for split in ("test", "test_sans", "test_faces"))
    assert {row["face"] for row in sans} == {row["face"] for row in faces} == {"DejaVuSans"}
    assert {row["other_face"] for row in faces} == {"DejaVuSansMono-BoldOblique"}
    characters = [row["character"] for row in sans]
    assert sorted(characters) == sorted(set(characters)) == sorted({r["character"] for r in test})
    assert {row["character"] for row in faces} <= set(characters)
    assert faces


def test_the_rows_depend_on_the_options_alone(letters, tmp_path, monkeypatch):
    info, options, folder = letters
    again = prepare_glyphs(tmp_path, validation_fraction=0.1, **options)
    assert again.directory.name == info.directory.name
    for split in info.split_sizes:
        assert rows_of(again, split) == rows_of(info, split)
    other = prepare_glyphs(folder, validation_fraction=0.1, split_seed=1, **options)
    assert other.directory != info.directory
    assert {row["character"] for row in rows_of(other, "test")} != {
        row["character"] for row in rows_of(info, "test")
    }
    monkeypatch.setattr(glyphs, "draw_glyphs", None)  # calling it would raise
    assert prepare_glyphs(folder, validation_fraction=0.1, **options) == info


def test_tfds_knows_the_data_set_without_jaxcl(letters):
    builder = tfds.builder_from_directory(letters[0].directory)
    assert builder.name == "glyphs"
    assert set(builder.info.splits) == set(letters[0].split_sizes)


def test_characters_are_joined_through_others():
    def glyph(character, ink, face="Sans"):
        return Glyph(character, face, np.full((2, 2), ink, np.uint8))

    groups = group_characters(
        [
            *(glyph("d", 1), glyph("c", 2), glyph("d", 2, "Serif"), glyph("c", 3, "Serif")),
            *(glyph("a", 3), glyph("b", 4), glyph("z", 5), glyph("b", 5, "Serif")),
        ]
    )
    assert groups == {"a": 0, "c": 0, "d": 0, "b": 1, "z": 1}


def test_wrong_shares_are_errors(tmp_path):
    with pytest.raises(ValueError, match=r"test_fraction=1\.5 must be from 0 to 1"):
        prepare_glyphs(tmp_path, test_fraction=1.5)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(demo_sets.importlib.util, "find_spec", lambda name: None)
    message = r"data\.name='glyphs' needs the package matplotlib.*pip install \"jaxcl\[images\]\""
    with pytest.raises(ValueError, match=message):
        glyphs._font_files()
