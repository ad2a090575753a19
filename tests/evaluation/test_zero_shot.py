"""Zero-shot classification by texts about each class."""

import numpy as np
import pytest

from jaxcl.evaluation.protocol import ComparableSet
from jaxcl.evaluation.sets import open_set
from jaxcl.evaluation.zero_shot import DEFAULT_TEMPLATES, ZeroShotSet, class_embeddings
from tests.evaluation.images import model_of, write_image

TEMPLATES = "a photo of a {}.\n\n  a drawing of a {}  \n"


@pytest.fixture
def folder(tmp_path):
    for name, images in {"big_cat": ["1", "2", "3"], "dog": ["4"]}.items():
        for image in images:
            write_image(tmp_path / name / f"{image}.png", image)
    (tmp_path / "templates.txt").write_text(TEMPLATES)
    return tmp_path


TEXTS = {
    "a photo of a big cat.": (2.0, 0.0),
    "a drawing of a big cat": (0.0, 1.0),
    "a photo of a dog.": (-1.0, 0.0),
    "a drawing of a dog": (-1.0, 0.0),
}
IMAGES = {"1": (0.6, 0.8), "2": (0.6, 0.8), "3": (-1.0, 0.0), "4": (-1.0, 0.0)}


def test_class_embeddings_are_means_of_unit_vectors_made_unit():
    found = class_embeddings(model_of(TEXTS), ["big cat", "dog"], TEMPLATES.strip().split("\n\n  "))
    np.testing.assert_allclose(found, [[0.5**0.5, 0.5**0.5], [-1, 0]], rtol=1e-6)


def test_images_are_compared_with_the_classes(folder):
    found = open_set(folder / "templates.txt")
    assert isinstance(found, ComparableSet)
    model = model_of(TEXTS | IMAGES)
    figures = found.evaluate(model)
    assert figures["accuracy"] == 3 / 4
    assert figures["accuracy_standard_error"] == pytest.approx(
        ((3 * (1 / 4) ** 2 + (3 / 4) ** 2) / 3 / 4) ** 0.5
    )
    assert [figures[name] for name in ("images", "classes", "templates")] == [4, 2, 2]
    assert found.metrics == ("accuracy",)  # two classes have no five highest
    assert model.calls == [("text", 4), ("image", 4)]
    assert found.description == (
        "zero-shot classification of 4 images in 2 classes, with 2 templates"
    )
    flipped = model_of(TEXTS | {name: (-x, -y) for name, (x, y) in IMAGES.items()})
    difference = found.differences(found.measure(model), found.measure(flipped))["accuracy"]
    assert difference.difference == 3 / 4 - 1 / 4


def test_equal_similarities_are_errors(folder):
    same = model_of(dict.fromkeys(TEXTS, (1.0, 0.0)) | dict.fromkeys(IMAGES, (1.0, 0.0)))
    assert open_set(folder / "templates.txt").evaluate(same)["accuracy"] == 0


def test_names_come_from_a_file_with_further_classes(folder):
    (folder / "classes.tsv").write_text("big_cat\tlion\n\ndog\tpoodle\nemu\temu\n")
    texts = {f"a photo of a {name}.": (1.0, 0.0) for name in ("lion", "emu")}
    texts |= {f"a drawing of a {name}": (1.0, 0.0) for name in ("lion", "emu")}
    texts |= {"a photo of a poodle.": (-1.0, 0.0), "a drawing of a poodle": (-1.0, 0.0)}
    figures = open_set(folder / "templates.txt").evaluate(model_of(texts | IMAGES))
    assert figures["classes"] == 3
    assert figures["accuracy"] == 1 / 4  # lion and emu are tied; only the dog is right


def test_the_folder_has_default_templates_and_a_test_part(folder):
    (folder / "templates.txt").unlink()
    by_default = open_set(folder, kind="zero_shot")
    assert f"with {len(DEFAULT_TEMPLATES)} templates" in by_default.description
    write_image(folder / "test" / "owl" / "5.png", "5")
    write_image(folder / "test" / "dog" / "6.png", "6")
    of_test = open_set(folder, kind="zero_shot")
    assert "of 2 images in 2 classes" in of_test.description
    assert of_test.fingerprint != by_default.fingerprint


def test_six_classes_have_the_five_highest():
    names = list("abcdef")
    vectors = {f"a {name}": np.eye(7)[number] for number, name in enumerate(names)}
    images = {"first": np.arange(7.0)[::-1], "last": np.arange(7.0)}
    contents = [b"first", b"last", b"last"]
    found = ZeroShotSet(contents, np.array([0, 0, 1]), names, ["a {}"])
    figures = found.evaluate(model_of(vectors | images))
    assert found.metrics == ("accuracy", "accuracy@5")
    assert figures["accuracy"] == pytest.approx(1 / 3)
    assert figures["accuracy@5"] == pytest.approx(2 / 3)  # the last image has a at rank 6


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "templates.txt",
            "a photo\n",
            r"'a photo' has 0 placeholders for the name of a class; write {}",
        ),
        ("templates.txt", "{} and {}\n", r"'{} and {}' has 2 placeholders"),
        ("templates.txt", "\n", "there are no templates; write at least one"),
        ("classes.tsv", "big_cat lion\n", r"line 1 is 'big_cat lion'; write the name of a folder"),
        ("classes.tsv", "dog\ta\ndog\tb\n", r"line 2 is 'dog\\tb'; .*each folder once"),
        ("classes.tsv", "dog\tpoodle\n", r"has no line for 1 of 2 folders, first 'big_cat'"),
        ("classes.tsv", "dog\tx\nbig_cat\tx\n", "two classes have the name 'x'"),
    ],
)
def test_faulty_names_and_templates_are_named(folder, file, content, message):
    (folder / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        open_set(folder / "templates.txt")


def test_a_folder_without_images_is_an_error(tmp_path):
    (tmp_path / "templates.txt").write_text("{}")
    with pytest.raises(ValueError, match="has no images; give a folder with a subfolder for each"):
        open_set(tmp_path / "templates.txt")
