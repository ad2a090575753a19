"""Image files of a folder: which are listed, and how damaged ones are named."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxcl.data.images.folder_rows import folder_rows
from jaxcl.data.images.image_files import (
    ImageFiles,
    check_images_decode,
    file_inside,
    image_files,
    naming_damaged,
)
from jaxcl.settings.file_kinds import is_image_folder


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "b" / ".hidden").mkdir(parents=True)
    for name in ("b/2.png", "a.PNG", "b/1.jpg", "b/.hidden/3.png", ".4.png"):
        with (tmp_path / name).open("wb") as file:
            Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(file, format="PNG")
    (tmp_path / "b" / "notes.txt").write_text("text")
    return tmp_path


def test_visible_image_files_are_listed_in_order(folder):
    names = [path.relative_to(folder).as_posix() for path in image_files(folder)]
    assert names == ["a.PNG", "b/1.jpg", "b/2.png"]


def test_a_folder_may_be_relative(folder, monkeypatch):
    monkeypatch.chdir(folder)
    files = image_files(Path("b"))
    assert files == [Path("b/1.jpg"), Path("b/2.png")]
    assert all(len(content) > 0 for content in ImageFiles(files))


def test_paths_outside_of_the_folder_are_errors(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    assert file_inside(folder, "b/../a.PNG") == folder / "b/../a.PNG"
    for name in ("../a.png", outside / "a.png", "b/../../a.png"):
        with pytest.raises(ValueError, match="is outside of"):
            file_inside(folder, name)
    (folder / "link").symlink_to(outside)
    with pytest.raises(ValueError, match=r"'link/a\.png' is outside of"):
        file_inside(folder, "link/a.png")


def test_contents_are_read_by_row(folder):
    content = (folder / "a.PNG").read_bytes()
    files = ImageFiles([folder / "a.PNG", b"other"])
    assert (len(files), files[0], files[1], list(files[1:])) == (2, content, b"other", [b"other"])


def test_a_damaged_file_is_named(folder):
    (folder / "b" / "1.jpg").write_bytes(b"no image")
    files = ImageFiles([*image_files(folder), b"no image"])
    with pytest.raises(ValueError, match=r"the image .*b/1\.jpg cannot be decoded"):
        files.check()
    with pytest.raises(ValueError, match="the image number 1 cannot be decoded"):
        files[3:].check()
    files[2:3].check()

    def encode():
        raise ValueError("the image at position 0 cannot be decoded")

    with pytest.raises(ValueError, match=r"b/1\.jpg cannot be decoded"), naming_damaged(files):
        encode()
    for whole in (files[2:3], ["a text"]):
        with pytest.raises(ValueError, match="at position 0"), naming_damaged(whole):
            encode()
    with pytest.raises(ValueError, match="the image second cannot be decoded"):
        check_images_decode(["first", "second"], [files[0], b"x"])


def test_a_folder_of_classes_has_the_files_that_any_folder_has(tmp_path):
    names = ("b/2.png", "b/10.pgm", "b/deep/1.JPG", "a/1.tiff", "a/._1.tiff", "a/.hidden/1.png")
    for name in (*names, "a/notes.txt", ".c/1.png", "b/3.svg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"image")
    visible = ["a/1.tiff", "b/10.pgm", "b/2.png", "b/deep/1.JPG"]
    assert [row["image"] for row in folder_rows(tmp_path)] == visible
    found = [path.relative_to(tmp_path).as_posix() for path in image_files(tmp_path)]
    assert found == visible
    assert is_image_folder(tmp_path)
    for name in visible:
        (tmp_path / name).unlink()
    assert not is_image_folder(tmp_path)  # the hidden ones are left
