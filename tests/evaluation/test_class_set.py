"""Classification of labelled folders and rows by frozen embeddings."""

import math

import numpy as np
import pytest

from jaxcl.data.sources import InMemoryPairs
from jaxcl.evaluation.class_set import ClassSet, class_set_of_rows, classify
from jaxcl.evaluation.labelled import part_of, read_labelled_rows
from jaxcl.evaluation.labelled_images import read_labelled_images
from jaxcl.evaluation.protocol import ComparableSet
from jaxcl.evaluation.sets import open_set
from tests.evaluation.images import model_of, write_image

ANGLES = {"cat": 0.0, "dog": 1.5, "owl": 3.0}


def content_of(name: str, number: int) -> str:
    return f"{name} {number}"


def vector_of(name: str, number: int, spread: float = 0.2) -> tuple[float, float]:
    angle = ANGLES[name] + spread * math.sin(7 * number)
    return math.cos(angle), math.sin(angle)


@pytest.fixture
def folder(tmp_path):
    for part, count in {"train": 12, "validation": 4, "test": 5}.items():
        first = 100 * len(part)
        for name in ANGLES:
            for number in range(first, first + count):
                path = tmp_path / part / name / f"{number}.PNG"
                write_image(path, content_of(name, number))
    return tmp_path


@pytest.fixture
def good():
    return model_of(
        {content_of(name, n): vector_of(name, n) for name in ANGLES for n in range(2000)}
    )


@pytest.fixture
def bad():
    table = {content_of(name, n): (1.0, 0.0) for name in ANGLES for n in range(2000)}
    return model_of(table)


def test_separated_classes_are_classified(folder, good):
    found = open_set(folder)
    assert isinstance(found, ComparableSet)
    assert (found.kind, found.inputs) == ("classes", ("image",))
    figures = found.evaluate(good)
    assert {figures[name] for name in ("knn@20", "linear_probe")} == {1.0}
    assert figures["knn@20_standard_error"] == 0
    sizes = ("classes", "train_images", "validation_images", "test_images")
    assert [figures[name] for name in sizes] == [3, 36, 12, 15]
    assert set(found.metrics) <= set(figures)
    assert {inputs for inputs, _ in good.calls} == {"image"}
    assert found.description == (
        "classification of images in 3 classes: 36 for train, 12 for validation, 15 for test"
    )


def test_a_collapsed_model_classifies_nothing(folder, bad):
    figures = open_set(folder).evaluate(bad)
    assert figures["knn@200"] == figures["linear_probe"] == 0


def test_errors_are_over_the_test_images(folder):
    table = {content_of(name, n): vector_of(name, n) for name in ANGLES for n in range(2000)}
    table[content_of("cat", 400)] = vector_of("dog", 1)  # one of the 15 test images is wrong
    figures = open_set(folder).evaluate(model_of(table))
    assert figures["knn@20"] == pytest.approx(14 / 15)
    variance = (14 * (1 - 14 / 15) ** 2 + (14 / 15) ** 2) / 14
    assert figures["knn@20_standard_error"] == pytest.approx(math.sqrt(variance / 15))


def test_two_models_are_compared_by_image(folder, good, bad):
    found = open_set(folder)
    one, other = found.measure(good), found.measure(bad)
    differences = found.differences(one, other)
    assert differences.keys() == set(found.metrics)
    assert differences["knn@200"].difference == 1 - 0
    same = found.differences(one, one)["linear_probe"]
    assert (same.difference, same.standard_error) == (0, 0)


def test_a_folder_without_parts_is_divided_by_content(tmp_path, good):
    for name in ANGLES:
        for number in range(30):
            write_image(tmp_path / name / f"{number}.jpg", content_of(name, number))
            write_image(tmp_path / name / "copies" / f"{number}.jpg", content_of(name, number))
    parts = read_labelled_images(tmp_path)
    sizes = {part: len(labels) for part, labels in parts.labels.items()}
    assert sum(sizes.values()) == 3 * 60
    assert all(size >= 10 for size in sizes.values())
    contents = [set(parts.values[part][:]) for part in parts.values]
    assert not contents[0] & contents[1] | contents[0] & contents[2] | contents[1] & contents[2]
    assert ClassSet(parts).evaluate(good)["knn@20"] == 1
    (tmp_path / "cat" / "0.jpg").write_bytes(b"changed")
    assert read_labelled_images(tmp_path).fingerprint != parts.fingerprint


def test_a_training_folder_gives_the_validation_part(folder):
    for path in sorted((folder / "validation").rglob("*.PNG")):
        path.unlink()
    for path in sorted((folder / "validation").rglob("*"), reverse=True):
        path.rmdir()
    (folder / "validation").rmdir()
    labels = read_labelled_images(folder).labels
    assert len(labels["train"]) + len(labels["validation"]) == 3 * 12
    assert len(labels["test"]) == 3 * 5
    assert len(labels["validation"])


def test_equal_contents_are_in_one_part():
    shares = [part_of(np.random.default_rng(n).bytes(16)) for n in range(1000)]
    assert 150 < shares.count("test") < 250
    assert 150 < shares.count("validation") < 250
    with_test = [part_of(np.random.default_rng(n).bytes(16), test_share=0.0) for n in range(1000)]
    assert "test" not in with_test
    both = zip(shares, with_test, strict=True)
    assert all(one in ("test", other) for one, other in both)


def test_hidden_and_other_files_are_ignored(folder):
    before = read_labelled_images(folder).fingerprint
    write_image(folder / "train" / "cat" / "notes.txt", "text")
    write_image(folder / "train" / "cat" / ".hidden.png", "hidden")
    write_image(folder / ".cache" / "x.png", "hidden")
    assert read_labelled_images(folder).fingerprint == before


def test_faulty_folders_are_named(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "a.png"
    outside.touch()
    link = folder / "test" / "cat" / "link.png"
    link.symlink_to(outside)
    with pytest.raises(ValueError, match=r"link\.png' is outside of"):
        open_set(folder)
    link.unlink()
    write_image(folder / "test" / "eel" / "1.png", "eel")
    with pytest.raises(
        ValueError, match=r"1 of 4 classes in .* have no training image, first 'eel'"
    ):
        open_set(folder)
    one_class = tmp_path_factory.mktemp("one")
    write_image(one_class / "cat" / "1.png", "cat")
    with pytest.raises(ValueError, match="has images of 1 classes; give a folder with a subfolder"):
        open_set(one_class)
    (one_class / "train").mkdir()
    with pytest.raises(ValueError, match="has a folder 'train', but no 'test'; add it, or put"):
        open_set(one_class)


def rows_of(first: int, count: int, names=tuple(ANGLES)) -> InMemoryPairs:
    rows = [(name, number) for name in names for number in range(first, first + count)]
    images = [content_of(*row).encode() for row in rows]
    groups = [10 * names.index(name) for name, _ in rows]
    return InMemoryPairs(images, [name for name, _ in rows], groups=groups)


IMAGES = {"query": "image", "key": "text"}


def test_rows_are_classified_by_their_groups(good):
    found = class_set_of_rows(rows_of(0, 20), rows_of(100, 10), modality=IMAGES)
    figures = found.evaluate(good)
    assert (figures["classes"], figures["test_images"], figures["knn@20"]) == (3, 30, 1)
    assert figures["train_images"] + figures["validation_images"] == 60
    within = class_set_of_rows(rows_of(0, 40), None, modality=IMAGES)
    assert within.evaluate(good)["knn@20"] == 1
    assert within.fingerprint != found.fingerprint


def test_the_side_with_images_is_classified_or_else_the_queries():
    texts = dict.fromkeys(("query", "key"), "text")
    swapped = InMemoryPairs(["a"] * 9 + ["b"] * 9, [b"x"] * 18, groups=[0] * 9 + [1] * 9)
    with pytest.raises(ValueError, match="have no rows of these classes; use a split"):
        class_set_of_rows(swapped, None, modality={"query": "text", "key": "image"})
    assert class_set_of_rows(rows_of(0, 40), None, modality=texts).inputs == ("query",)
    assert class_set_of_rows(rows_of(0, 40), None, modality=IMAGES).inputs == ("image",)


def test_rows_of_unknown_classes_are_left_out():
    test = InMemoryPairs([b"1", b"2"], ["", ""], groups=[0, 7])
    parts = read_labelled_rows(rows_of(0, 20), test, side="query")
    assert (parts.left_out, parts.labels["test"].tolist()) == (1, [0])
    assert parts.classes == ("0", "10", "20")
    assert "1 left out, without images of their class to train on" in ClassSet(parts).description


def test_rows_without_groups_are_an_error():
    with pytest.raises(ValueError, match=r"the rows have no group.*set data\.group_field"):
        read_labelled_rows(InMemoryPairs(["a"], ["b"]), None, side="query")


def test_embeddings_that_are_not_finite_are_an_error(folder):
    table = {content_of(name, n): (np.nan, 0.0) for name in ANGLES for n in range(2000)}
    with pytest.raises(ValueError, match=r"embeddings contain NaN or infinity; the first is row 0"):
        open_set(folder).evaluate(model_of(table))


def test_the_final_probe_reads_the_validation_part_too():
    """Only the validation part has class 1 at the place of the test value."""
    vectors = {
        "train": np.float32([[1, 0], [1, 0], [0, 1]]),
        "validation": np.float32([[-1, 0]] * 4),
        "test": np.float32([[-1, 0]]),
    }
    labels = {"train": np.array([0, 0, 1]), "validation": np.ones(4, int), "test": np.array([1])}
    found = classify(vectors, labels, 2)
    assert {name: values.tolist() for name, values in found.correct.items()} == {
        "linear_probe": [1.0],
        "knn@20": [1.0],
        "knn@200": [1.0],
    }
