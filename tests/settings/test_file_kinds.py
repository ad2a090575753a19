"""Names of files are distinguished from TFDS names, and splits from paths."""

from pathlib import Path

import pytest

from jaxcl.settings.file_kinds import (
    REST,
    Share,
    file_kind,
    names_files,
    names_other_files,
    relocated_splits,
    share_of_split,
)


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("pairs.jsonl", True),
        ("/data/Pairs.JSONL.gz", True),
        ("part-*.parquet", True),
        ("part-0[0-3].txt", True),
        ("a.b.csv.xz", True),
        ("snli:1.1.0", False),
        ("json", False),
        ("my_package.csv:open_split", False),
        ("gs://bucket/folder", False),
        ("code_pairs", False),
        (None, False),
    ],
)
def test_files_are_known_by_their_names(name, files):
    assert names_files(name) == files


def test_existing_files_and_folders_of_datasets_are_known_by_their_content(tmp_path):
    text = tmp_path / "pairs.txt"
    assert not names_files(str(text))
    assert not names_files(str(tmp_path))
    text.touch()
    (tmp_path / "prepared[1].csv").mkdir()
    assert not names_files(str(tmp_path / "prepared[1].csv"))
    (tmp_path / "state.json").touch()
    assert names_files(str(text))
    assert names_files(str(tmp_path))


@pytest.mark.parametrize("name", ["pairs.txt", "pairs", "pairs.zip", "pairs.parquet.gz", "gz"])
def test_an_unknown_suffix_is_refused(name):
    with pytest.raises(ValueError, match=rf"{name} has an unknown suffix; .* \.jsonl, \.csv"):
        file_kind(Path(name))


@pytest.mark.parametrize(
    ("split", "share"),
    [
        ("train", Share("train", 0, 1_000_000)),
        ("train[:95%]", Share("train", 0, 950_000)),
        ("dev[0.0001%:12.5%]", Share("dev", 1, 125_000)),
        ("train[:1000]", None),
        ("dev.jsonl", None),
        ("data/dev", None),
    ],
)
def test_shares_are_exact_millionths(split, share):
    assert share_of_split(split) == share


@pytest.mark.parametrize("split", ["train[50%:50%]", "train[60%:40%]", "train[:101%]"])
def test_an_empty_share_is_refused(split):
    with pytest.raises(ValueError, match=r"is empty; give a share such as train\[:95%\]"):
        share_of_split(split)


def test_relative_paths_of_splits_belong_to_the_folder_of_the_name():
    splits = {"train": "train[:9%]", "validation": "sub/dev.csv", "test": "/else/test.csv"}
    moved = splits | {"validation": "/data/sub/dev.csv"}

    def relocated(name, absolute_name):
        return relocated_splits(splits, name=name, absolute_name=absolute_name)

    assert relocated("a.csv", "/data/a.csv") == moved
    assert relocated("b/a-*.csv", "/data/b/a-*.csv") == moved
    assert relocated("/data/a.csv", "/data/a.csv") == splits
    assert relocated("a.csv", "/elsewhere/of-other-name.csv") == splits
    assert relocated(None, "rows") == splits


def test_a_split_may_be_another_file():
    for split in ("dev.jsonl", "part-*.csv", "parts/dev[0-3].csv"):
        assert names_other_files(split), split
    for split in (REST, "train", "train[:5%]", "train[:100]", "train[50%:]+dev", "a+b[1:]"):
        assert not names_other_files(split), split
