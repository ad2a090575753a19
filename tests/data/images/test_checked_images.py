"""The check of all images: its cache, the sides that it names, and the files in memory."""

import io

import numpy as np
import pytest
from PIL import Image, features

from jaxcl.data.images import checked_images
from jaxcl.data.images.checked_images import check_images
from jaxcl.data.images.decoding import BadImage, ImageRule
from jaxcl.data.sources import InMemoryPairs
from tests.data.fields_only import FieldsOnly

RULE = ImageRule(4)


def picture(number: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (9, 7, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def checked(source, tmp_path, sides=("query",)):
    return check_images(source, sides, RULE, role="train", directory=tmp_path)


def test_other_limits_of_the_decoder_check_the_images_again(tmp_path, monkeypatch):
    source = InMemoryPairs([picture(0), picture(1)], ["a", "b"])
    assert checked(source, tmp_path).bad.tolist() == []
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    assert checked(source, tmp_path).bad.tolist() == [0, 1]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert checked(source, tmp_path).bad.tolist() == []
    folders = set(tmp_path.iterdir())
    checked(source, tmp_path)
    assert set(tmp_path.iterdir()) == folders
    avif = features.check("avif")
    check = features.check
    monkeypatch.setattr(features, "check", lambda name: not avif if name == "avif" else check(name))
    checked(source, tmp_path)
    assert len(set(tmp_path.iterdir()) - folders) == 1


class OneSideUnread(FieldsOnly):
    """A source whose keys of some rows cannot be read."""

    def read_fields(self, rows, names):
        records = super().read_fields(rows, names)
        if "key" in names and {1, 3} & set(rows):
            raise BadImage("the file does not exist")
        return records


def test_an_image_that_cannot_be_read_is_that_of_its_side(tmp_path, monkeypatch):
    images = [picture(number) for number in range(4)]
    source = OneSideUnread(InMemoryPairs(images, images))
    source.place = lambda side, row: f"{side}/{row}.png"
    found = checked(source, tmp_path, ("query", "key"))
    assert found.bad.tolist() == [1, 3]
    assert found.reasons == (
        "row 1 (key/1.png): the file does not exist",
        "row 3 (key/3.png): the file does not exist",
    )


@pytest.mark.parametrize("threads", [1, 32])
def test_few_bytes_of_files_are_waiting_for_threads(tmp_path, monkeypatch, threads):
    """The files that were read but not yet decoded."""
    monkeypatch.setattr(checked_images, "_BYTES_AT_ONCE", 10_000)
    files = [bytes(1_000) + number.to_bytes(2) for number in range(3_000)]
    source = FieldsOnly(InMemoryPairs(files, ["text"] * len(files)))
    waiting = []

    def in_order(function, values):
        for value in values:
            waiting.append(value)
            if len(waiting) > 2 * threads:
                yield function(waiting.pop(0))
        while waiting:
            yield function(waiting.pop(0))

    monkeypatch.setattr(checked_images, "in_threads", in_order)
    assert len(checked(source, tmp_path).bad) == 3_000
    sizes = [len(rows) for rows, names in source.reads if "query" in names]
    assert sizes[:2] == [8, 9]
    assert max(sizes) <= 10
    assert sum(sizes) == 3_000
