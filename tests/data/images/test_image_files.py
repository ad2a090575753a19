"""Images in plain files: folders by class, paths or bytes in columns, and tars."""

import csv
import errno
import gzip
import io
import json
import os
import pickle
import shutil
import tarfile

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import ipc, parquet

from jaxcl.data.images.decoding import BadImage, ImageRule, decode_image
from jaxcl.data.images.file_index import digest_of_files
from jaxcl.data.images.image_references import read_inside
from jaxcl.data.prepare import open_sources, prepare_data
from jaxcl.data.sources import PairSource
from jaxcl.data.splits import open_splits
from jaxcl.settings.read import read_settings
from tests.test_readme import snippet

CLASSES = ("cat", "dog", "owl")


def picture(seed, format_="PNG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 7, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format_)
    return file.getvalue()


def settings(name, **changes):
    data = {
        "name": str(name),
        "splits": {"train": "train"},
        "modality": {"query": "image", "key": "text"},
        "images": {"size": 8, "bad": changes.pop("bad", "error")},
        "vocabulary_size": 300,
        **changes,
    }
    config = {"data": data, "evaluation": {"methods": ("dense",)}}
    config["model"] = {"shared": len(set(data["modality"].values())) == 1}
    return read_settings(config).data


def opened(name, folder, **changes):
    """The splits, without the check of all images."""
    data = settings(name, **changes)
    return open_splits(data, str(name), data_dir=folder / "shared")


def all_rows(source):
    return source.read(np.arange(len(source)))


IMAGES = {"query": "image", "key": "image"}


# Folders


@pytest.fixture
def folder(tmp_path):
    """Twelve images in three classes, one of them in a folder within its class."""
    root = tmp_path / "animals"
    for number in range(12):
        path = root / CLASSES[number % 3] / ("deep/" if number == 5 else "") / f"{number:02}.PNG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
    (root / "cat" / "notes.txt").write_text("no image")
    (root / "readme.png").write_bytes(picture(99))  # in no class
    return root


def test_a_folder_has_an_image_a_class_and_a_path_per_row(folder, tmp_path):
    fields = {"group_field": "label", "metadata_fields": ("path",)}
    train = opened(folder, tmp_path, **fields)["train"]
    assert isinstance(train, PairSource)
    rows = all_rows(train)
    assert [row["path"] for row in rows] == [
        *("cat/00.PNG", "cat/03.PNG", "cat/06.PNG", "cat/09.PNG"),
        *("dog/01.PNG", "dog/04.PNG", "dog/07.PNG", "dog/10.PNG"),
        *("owl/02.PNG", "owl/08.PNG", "owl/11.PNG", "owl/deep/05.PNG"),
    ]
    assert [row["key"] for row in rows] == [CLASSES[i // 4] for i in range(12)]
    assert [row["group"] for row in rows] == [i // 4 for i in range(12)]
    assert rows[4]["query"] == picture(1)
    assert train.read([11])[0]["query"] == picture(5)
    assert train.place("query", 4) == "dog/01.PNG"
    assert train.place("key", 4) is None
    copy = pickle.loads(pickle.dumps(train))
    assert copy.read([4]) == train.read([4])
    assert copy.fingerprint == train.fingerprint


def test_both_sides_of_a_folder_are_the_same_image(folder, tmp_path):
    rows = all_rows(opened(folder, tmp_path, modality=IMAGES)["train"])
    assert [row["query"] for row in rows] == [row["key"] for row in rows]
    assert rows[0] == {"query": picture(0), "key": picture(0)}
    named = {"query_field": "image", "key_field": "image"}
    assert all_rows(opened(folder, tmp_path, modality=IMAGES, **named)["train"]) == rows


def test_some_fields_of_a_folder_are_read_without_the_images(folder, tmp_path):
    train = opened(folder, tmp_path, group_field="label")["train"]
    train.fingerprint  # noqa: B018 - reads the images
    shutil.rmtree(folder)
    assert train.read_fields([0, 11], ("key", "group")) == [
        {"key": "cat", "group": 0},
        {"key": "owl", "group": 2},
    ]
    with pytest.raises(ValueError, match=r"cat/00\.PNG does not exist"):
        train.read([0])


def test_splits_of_a_folder_do_not_overlap_and_stay_when_images_are_added(folder, tmp_path):
    for number in range(12, 60):
        (folder / "dog" / f"{number}.png").write_bytes(picture(number))
    splits = {"train": "rest", "validation": "train[:30%]"}

    def paths():
        sources = opened(folder, tmp_path, splits=splits, metadata_fields=("path",))
        return {role: {row["path"] for row in all_rows(one)} for role, one in sources.items()}

    before = paths()
    assert not before["train"] & before["validation"]
    assert len(before["train"] | before["validation"]) == 60
    assert 8 <= len(before["validation"]) <= 28
    (folder / "dog" / "more.png").write_bytes(picture(100))
    after = paths()
    assert all(before[role] <= after[role] for role in splits)
    assert sum(map(len, after.values())) == 61


def test_a_changed_image_changes_the_fingerprint(folder, tmp_path):
    first = opened(folder, tmp_path)["train"].fingerprint
    assert opened(folder, tmp_path)["train"].fingerprint == first
    changed = folder / "dog" / "01.PNG"
    status = changed.stat()
    changed.write_bytes(picture(77))
    os.utime(changed, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))
    assert opened(folder, tmp_path)["train"].fingerprint != first
    changed.write_bytes(picture(1))
    assert opened(folder, tmp_path)["train"].fingerprint == first
    changed.rename(folder / "cat" / "01.PNG")
    assert opened(folder, tmp_path)["train"].fingerprint != first


def test_a_folder_without_classes_is_an_error(tmp_path):
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.png").write_bytes(picture(0))
    with pytest.raises(ValueError, match="holds no prepared data set"):
        opened(tmp_path / "flat", tmp_path)


def test_a_folder_has_only_one_split(folder, tmp_path):
    with pytest.raises(ValueError, match=r"no split 'val'.*A folder of images has only the split"):
        opened(folder, tmp_path, splits={"train": "val"})


def test_a_folder_of_splits_is_an_error(folder, tmp_path):
    (tmp_path / "all").mkdir()
    shutil.copytree(folder, tmp_path / "all" / "train")
    shutil.copytree(folder, tmp_path / "all" / "val")
    message = r"has a folder per split \(train, val\).*data\.name=.*train, .*validation=.*val"
    with pytest.raises(ValueError, match=message):
        opened(tmp_path / "all", tmp_path)


def test_another_folder_may_be_held_out(folder, tmp_path):
    splits = {"train": "train", "validation": str(tmp_path / "held_out")}
    shutil.copytree(folder, tmp_path / "held_out")
    with pytest.raises(ValueError, match=r"holds out rows that .* trains on"):
        opened(folder, tmp_path, splits=splits)
    (tmp_path / "held_out" / "cat" / "more.png").write_bytes(picture(100))
    assert len(opened(folder, tmp_path, splits=splits)["validation"]) == 13


# Paths and bytes in columns


def write_paths(folder, kind):
    """Write four images and a file that names them."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(4):
        (folder / "images" / f"{number}.png").write_bytes(picture(number))
        rows.append({"image": f"images/{number}.png", "caption": f"caption {number}"})
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet"])
def test_paths_are_relative_to_the_file(tmp_path, kind):
    path = write_paths(tmp_path / "rows", kind)
    train = opened(path, tmp_path)["train"]
    assert all_rows(train) == [
        {"query": picture(number), "key": f"caption {number}"} for number in range(4)
    ]
    assert train.place("query", 2) == "images/2.png"


def test_files_in_several_folders_have_their_own_images(tmp_path):
    for name, seed in (("a", 0), ("b", 10)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(picture(seed))
        row = {"image": "x.png", "caption": name}
        (tmp_path / name / "rows.jsonl").write_text(json.dumps(row) + "\n")
    rows = all_rows(opened(tmp_path / "?" / "rows.jsonl", tmp_path)["train"])
    assert rows == [{"query": picture(0), "key": "a"}, {"query": picture(10), "key": "b"}]


@pytest.mark.parametrize("struct", [False, True])
def test_parquet_holds_the_bytes_of_files(tmp_path, struct):
    values = [picture(number) for number in range(3)]
    images = [{"bytes": value, "path": "ignored.png"} for value in values] if struct else values
    table = pyarrow.table({"image": images, "text": ["a", "b", "c"], "label": [0, 1, 0]})
    parquet.write_table(table, tmp_path / "rows.parquet")
    train = opened(tmp_path / "rows.parquet", tmp_path)["train"]
    assert [row["query"] for row in all_rows(train)] == values
    assert [row["key"] for row in all_rows(train)] == ["a", "b", "c"]
    assert train.place("query", 0) is None
    both = opened(tmp_path / "rows.parquet", tmp_path, modality=IMAGES)["train"]
    assert [row["key"] for row in all_rows(both)] == values


def test_a_struct_without_bytes_has_a_path(tmp_path):
    (tmp_path / "x.png").write_bytes(picture(0))
    table = pyarrow.table({"image": [{"bytes": None, "path": "x.png"}], "text": ["a"]})
    parquet.write_table(table, tmp_path / "rows.parquet")
    assert all_rows(opened(tmp_path / "rows.parquet", tmp_path)["train"])[0]["query"] == picture(0)


def test_several_captions_are_rows_of_one_split(tmp_path):
    write_paths(tmp_path, "jsonl")
    rows = [
        {"image": f"images/{number}.png", "captions": [f"{number} {i}" for i in range(1 + number)]}
        for number in range(4)
    ]
    path = tmp_path / "captions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = opened(path, tmp_path)["train"]
    assert [row["key"] for row in all_rows(train)] == [
        text for row in rows for text in row["captions"]
    ]
    assert [row["query"] for row in all_rows(train)][-4:] == [picture(3)] * 4
    halves = opened(path, tmp_path, splits={"train": "train[:50%]", "validation": "train[50%:]"})
    images = {role: {row["query"] for row in all_rows(one)} for role, one in halves.items()}
    assert not images["train"] & images["validation"]
    run = prepared(path, tmp_path)
    text = run.tables["train"].labels(np.arange(10))["text"].tolist()
    assert text == [0, 1, 1, 2, 2, 2, 3, 3, 3, 3]  # captions of one image are no negatives


def prepared(path, folder, **changes):
    data = settings(path, **changes)
    (folder / "run").mkdir(exist_ok=True)
    return prepare_data(data, data_dir=folder / "shared", workdir=folder / "run")


def test_a_run_does_not_resume_with_changed_images(tmp_path):
    path = write_paths(tmp_path / "rows", "jsonl")
    run = prepared(path, tmp_path)
    wanted = decode_image(picture(2), ImageRule(8))
    np.testing.assert_array_equal(
        run.tables["train"].side("query", np.array([2]))["image"][0], wanted
    )
    assert prepared(path, tmp_path).remembered == run.remembered
    (tmp_path / "rows" / "images" / "2.png").write_bytes(picture(20, "BMP"))
    with pytest.raises(ValueError, match=r"other data: .* holds other rows for train"):
        prepared(path, tmp_path)


ESCAPES = {
    "../secret.png": "leads outside of",
    "images/../../secret.png": "leads outside of",
    "/etc/hostname": "leads outside of",
    "images/link.png": "is a link that leads outside of",
    "folder_link/secret.png": "is a link that leads outside of",
    "images": "is a folder",
    "images/pipe.png": "a pipe or a device",
    "images/missing.png": "does not exist in",
    "https://example.org/cat.png": "is a URL",
}


@pytest.fixture
def hostile(tmp_path):
    """A file of rows whose paths lead elsewhere."""
    folder = tmp_path / "rows"
    write_paths(folder, "jsonl")
    (tmp_path / "secret.png").write_bytes(picture(50))
    (folder / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "folder_link").symlink_to(tmp_path)
    (folder / "images" / "inside.png").symlink_to(folder / "images" / "0.png")
    os.mkfifo(folder / "images" / "pipe.png")
    rows = [{"image": name, "caption": "x"} for name in (*ESCAPES, "images/inside.png")]
    path = folder / "hostile.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ESCAPES)
def test_nothing_outside_of_the_folder_is_read(hostile, name):
    with pytest.raises(ValueError, match=ESCAPES[name]):
        read_inside(hostile.parent, name)
    assert read_inside(hostile.parent, "images/inside.png") == picture(0)


def test_paths_that_lead_outside_are_counted_and_named(hostile, tmp_path, capsys):
    message = rf"{len(ESCAPES)} of {len(ESCAPES) + 1} rows of train have images that cannot be read"
    first = r": row 0 \(\.\./secret\.png\): \.\./secret\.png leads outside"
    with pytest.raises(ValueError, match=message + first):
        prepared(hostile, tmp_path)
    run = prepared(hostile, tmp_path, bad="skip")
    assert [row["query"] for row in all_rows(run.sources["train"])] == [picture(0)]
    assert "are left out: row 0 (../secret.png)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "'image': there is no image"),
        ("", "'image': there is no image"),
        (5, "'image': 5 is neither a path nor the bytes"),
        ({"a": 1}, "is neither a path nor the bytes"),
        ("a\0b", "is not a path"),
        ("x" * 5000, "is not a path"),
    ],
)
def test_a_value_that_is_no_image_is_a_bad_row(tmp_path, value, reason):
    path = tmp_path / "rows.jsonl"
    (tmp_path / "x.png").write_bytes(picture(0))
    good = json.dumps({"image": "x.png", "caption": "good"}) + "\n"
    path.write_text(good + json.dumps({"image": value, "caption": "bad"}) + "\n")
    with pytest.raises(ValueError, match=rf"rows\.jsonl line 2: .*{reason}"):
        opened(path, tmp_path)
    kept = opened(path, tmp_path, files={"bad_rows": "skip"})["train"]
    assert [row["key"] for row in all_rows(kept)] == ["good"]


def test_columns_of_labels_and_negatives_are_not_guessed(tmp_path):
    row = {"image": "x.png", "caption": "a", "label": 3, "score": 0.5, "negative": "b"}
    (tmp_path / "x.png").write_bytes(picture(0))
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    train = opened(tmp_path / "rows.jsonl", tmp_path)["train"]
    assert all_rows(train) == [{"query": picture(0), "key": "a"}]
    with pytest.raises(ValueError, match="negatives_field='negative' names texts, but"):
        opened(tmp_path / "rows.jsonl", tmp_path, files={"negatives_field": "negative"})


def test_files_of_texts_keep_their_fingerprints(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"query": "a", "key": "b"}) + "\n")
    data = read_settings({"data": {"name": str(path), "splits": {"train": "train"}}}).data
    [source] = open_sources(data, data_dir=tmp_path).values()
    assert "images" not in source.files.made_from["columns"]


# Tars


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def samples(count=4, first=0):
    for number in range(first, first + count):
        yield f"a/{number:03}.JPG", picture(number, "JPEG")
        yield f"a/{number:03}.txt", f"caption {number}".encode()
        record = {"captions": [f"one {number}", f"two {number}"], "width": 9}
        yield f"a/{number:03}.json", json.dumps(record).encode()
        yield f"a/{number:03}.cls", str(number % 2).encode()


def test_a_tar_has_a_row_per_key(tmp_path):
    path = write_tar(tmp_path / "shard-0.tar", samples())
    fields = {"group_field": "cls", "metadata_fields": ("__key__", "json.width")}
    train = opened(path, tmp_path, **fields)["train"]
    rows = all_rows(train)
    assert [row["query"] for row in rows] == [picture(number, "JPEG") for number in range(4)]
    assert [row["key"] for row in rows] == [f"caption {number}" for number in range(4)]
    assert [row["group"] for row in rows] == [0, 1, 0, 1]
    assert [row["json.width"] for row in rows] == [9] * 4
    assert [row["__key__"] for row in rows] == [f"a/{number:03}" for number in range(4)]
    assert train.place("query", 1) == "shard-0.tar/a/001.JPG"


def test_several_tars_are_one_data_set(tmp_path):
    write_tar(tmp_path / "shard-0.tar", samples(3))
    write_tar(tmp_path / "shard-1.tar", samples(3, first=3))
    train = opened(tmp_path / "shard-*.tar", tmp_path)["train"]
    assert [row["query"] for row in all_rows(train)] == [picture(n, "JPEG") for n in range(6)]
    assert [row["query"] for row in train.read([5, 0])] == [picture(5, "JPEG"), picture(0, "JPEG")]


def test_captions_may_come_from_json(tmp_path):
    path = write_tar(tmp_path / "shard.tar", samples(2))
    train = opened(path, tmp_path, query_field="jpg", key_field="json.captions")["train"]
    assert [row["key"] for row in all_rows(train)] == ["one 0", "two 0", "one 1", "two 1"]
    assert all_rows(train)[2]["query"] == picture(1, "JPEG")


def test_a_tar_of_images_alone_has_two_equal_sides(tmp_path):
    path = write_tar(tmp_path / "s.tar", [(f"{n}.seg.png", picture(n)) for n in range(3)])
    rows = all_rows(opened(path, tmp_path, modality=IMAGES)["train"])
    assert rows == [{"query": picture(n), "key": picture(n)} for n in range(3)]


def test_a_key_is_the_path_up_to_the_first_dot(tmp_path):
    members = [("d.x/1.a.png", picture(1)), ("d.x/1.txt", b"one"), ("2.png", picture(2))]
    path = write_tar(tmp_path / "s.tar", [*members, ("2.txt", b"two")])
    rows = all_rows(opened(path, tmp_path, metadata_fields=("__key__",))["train"])
    assert [row["query"] for row in rows] == [picture(1), picture(2)]
    assert [row["__key__"] for row in rows] == ["d.x/1", "2"]


def test_a_row_without_an_image_is_a_bad_row(tmp_path):
    members = [*samples(2), ("b.txt", b"text alone"), ("c.png", picture(0))]
    path = write_tar(tmp_path / "s.tar", members)
    message = r"2 rows cannot be used: s\.tar sample 3: 'image': there is no image; s\.tar sample 4"
    with pytest.raises(ValueError, match=message):
        opened(path, tmp_path)
    assert len(opened(path, tmp_path, files={"bad_rows": "skip"})["train"]) == 2


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.png", b"1"), ("b.png", b"2"), ("a.txt", b"3")], "members of a are not adjacent"),
        ([("a.png", b"1"), ("a.png", b"2")], "two members a.png"),
    ],
)
def test_a_tar_in_another_layout_is_an_error(tmp_path, members, message):
    path = write_tar(tmp_path / "s.tar", [*samples(1), *members])
    with pytest.raises(ValueError, match=message):
        opened(path, tmp_path)


def test_a_compressed_tar_is_an_error(tmp_path):
    path = write_tar(tmp_path / "s.tar", samples())
    for name in ("s.tar.gz", "s.tgz"):
        (tmp_path / name).write_bytes(gzip.compress(path.read_bytes()))
        with pytest.raises(ValueError, match=rf"{name} is compressed, so .* decompress it"):
            opened(tmp_path / name, tmp_path)
    shutil.copy(tmp_path / "s.tgz", tmp_path / "zipped.tar")
    with pytest.raises(ValueError, match="not an uncompressed tar"):
        opened(tmp_path / "zipped.tar", tmp_path)


@pytest.mark.parametrize("kept", [0, 300, 700, 3000])
def test_a_truncated_tar_is_an_error(tmp_path, kept):
    path = write_tar(tmp_path / "s.tar", samples())
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="tar"):
        prepared(path, tmp_path)


def test_a_damaged_image_in_a_tar_is_named(tmp_path):
    members = [("a.jpg", b"no image"), ("a.txt", b"x"), *samples(2)]
    path = write_tar(tmp_path / "s.tar", members)
    message = r"1 of 3 rows of train have .*: row 0 \(s\.tar/a\.jpg\): it is not an image file"
    with pytest.raises(ValueError, match=message):
        prepared(path, tmp_path)


# A data set of the README


def test_the_builder_of_the_readme_prepares_photographs(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    for number, name in enumerate(("a cat", "a dog")):
        (tmp_path / "photos" / f"{name}.jpg").write_bytes(picture(number, "JPEG"))
    monkeypatch.chdir(tmp_path)
    exec(snippet("Use", file="jaxcl/data/images/README.md"), {"__name__": "prepare_photos"})
    fields = {"query_field": "image", "key_field": "caption"}
    directory = tmp_path / "data" / "my_photos" / "1.0.0"
    rows = all_rows(opened(directory, tmp_path, **fields)["train"])
    assert {row["key"]: row["query"] for row in rows} == {
        "a cat": picture(0, "JPEG"),
        "a dog": picture(1, "JPEG"),
    }


# Digests


def test_digests_are_computed_again_only_for_changed_files(tmp_path, monkeypatch):
    folder, directory = tmp_path / "images", tmp_path / "index"
    folder.mkdir()
    names = [f"{number}.png" for number in range(5)]
    for number, name in enumerate(names):
        (folder / name).write_bytes(picture(number))
    hashed = []
    read = read_inside

    def counted(folder, name):
        hashed.append(name)
        return read(folder, name)

    monkeypatch.setattr("jaxcl.data.images.file_index.read_inside", counted)
    first = digest_of_files(folder, names, directory=directory)
    assert sorted(hashed) == names
    assert digest_of_files(folder, names[::-1], directory=directory) == first
    assert len(hashed) == 5
    part = digest_of_files(folder, names[:2], directory=directory)
    assert part != first
    (folder / "new.png").write_bytes(picture(9))
    digest_of_files(folder, [names[0], "new.png"], directory=directory)
    assert hashed[5:] == ["new.png"]
    assert digest_of_files(folder, names, directory=directory) == first
    assert len(hashed) == 6  # the index keeps the files that other calls named
    missing = digest_of_files(folder, [*names, "missing.png"], directory=directory)
    assert missing != first
    [index] = directory.iterdir()
    (index / "digests.npy").write_bytes(b"damaged")
    assert digest_of_files(folder, names, directory=directory) == first


def test_a_folder_of_datasets_holds_images(tmp_path):
    folder = tmp_path / "saved"
    folder.mkdir()
    files = [{"bytes": picture(number), "path": None} for number in range(3)]
    table = pyarrow.table({"image": files, "text": ["a", "b", "c"], "label": [0, 1, 0]})
    with ipc.new_stream(str(folder / "data.arrow"), table.schema) as writer:
        writer.write_table(table)
    state = {"_data_files": [{"filename": "data.arrow"}]}
    (folder / "state.json").write_text(json.dumps(state))
    train = opened(folder, tmp_path, group_field="label")["train"]
    assert all_rows(train) == [
        {"query": picture(number), "key": "abc"[number], "group": number % 2} for number in range(3)
    ]


def test_a_file_that_could_not_be_read_is_read_again(tmp_path, monkeypatch):
    names = ["a.png", "b.png"]
    for seed, name in enumerate(names):
        (tmp_path / name).write_bytes(picture(seed))
    whole = digest_of_files(tmp_path, names, directory=tmp_path / "whole")
    with monkeypatch.context() as patched:

        def unreadable(folder, name):
            raise BadImage(f"{name} cannot be read")

        patched.setattr("jaxcl.data.images.file_index.read_inside", unreadable)
        assert digest_of_files(tmp_path, names, directory=tmp_path / "index") != whole
    assert digest_of_files(tmp_path, names, directory=tmp_path / "index") == whole


def test_an_error_of_the_machine_is_not_a_bad_image(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(picture(0))

    def failing(path, *, limit):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("jaxcl.data.images.image_references.read_regular", failing)
    with pytest.raises(OSError, match="Input/output error"):
        read_inside(tmp_path, "a.png")

    def forbidden(path, *, limit):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("jaxcl.data.images.image_references.read_regular", forbidden)
    with pytest.raises(BadImage, match="cannot be read"):
        read_inside(tmp_path, "a.png")
