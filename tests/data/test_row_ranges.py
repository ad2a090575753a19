"""Held-out rows are never training rows, however they are named."""

import os
import shutil

import pytest
from jaxcl.configs.tfds_pairs import get_config

from jaxcl.data.row_ranges import RowRange, check_held_out, shared_rows
from jaxcl.data.sources import DESCRIPTION_FILE
from jaxcl.data.splits import open_splits
from jaxcl.settings.read import read_settings
from tests.prepared_data import NUM_TRAIN, prepare_pairs


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("data")
    prepare_pairs(data_dir, num_shards=3)
    return data_dir


@pytest.fixture
def opened(data_dir):
    """Open splits of a data set, with others concatenated."""

    def open_with(splits, *others, name="tiny_pairs:1.0.0"):
        config = get_config("smoke").data
        config.splits = type(config)(splits)
        with config.unlocked():
            config.concatenated = type(config)(
                {
                    f"other{i}": {"name": str(other), "splits": their_splits}
                    for i, (other, their_splits) in enumerate(others)
                }
            )
        data = read_settings({"data": config.to_dict()}).data
        return open_splits(data, str(name), data_dir=data_dir)

    return open_with


def numbers(pairs):
    return [int(row["query"].split()[1]) for row in pairs.read(range(len(pairs)))]


@pytest.mark.parametrize(
    ("train", "held_out"),
    [
        ("train[:95%]", "train[95%:]"),
        ("train[:33%]", "train[33%:]"),
        ("train[:7]", "train[7:]"),
        ("train[:-1]", "train[-1:]"),
        ("train[:1shard]", "train[1shard:]"),
        ("train[:2]+train[4:]", "train[2:4]"),
        ("train[50%:]+dev", "train[:50%]"),
        ("train", "dev"),
        ("train", "dev+dev"),
        ("train+train", "dev"),
    ],
)
def test_splits_without_a_common_row_are_opened(opened, train, held_out):
    sources = opened({"train": train, "validation": held_out})
    assert not set(numbers(sources["train"])) & set(numbers(sources["validation"]))


@pytest.mark.parametrize(
    ("train", "held_out"),
    [
        ("train", "train"),
        ("train", "train[95%:]"),
        ("train[:95%]", "train[90%:]"),
        ("train[:95%]", "train"),
        ("train[:8]", "train[7:]"),
        ("train[5:6]", "train[:19]"),
        ("train[:1shard]", "train[6:]"),
        ("train[:2]+train[4:]", "train[2:5]"),
        ("train[:50%]+dev", "dev"),
        ("train", "train[-1:]+dev"),
    ],
)
def test_splits_with_a_common_row_are_refused(opened, data_dir, train, held_out):
    # Each can be opened alone, and they have a row in common.
    alone = [opened({"train": split})["train"] for split in (train, held_out)]
    assert set(numbers(alone[0])) & set(numbers(alone[1]))
    with pytest.raises(ValueError, match=r"holds out rows that .* trains on") as error:
        opened({"train": train, "validation": held_out})
    assert f"data.splits.validation={held_out!r}" in str(error.value)
    assert f"data.splits.train={train!r}" in str(error.value)


def test_held_out_roles_may_share_rows(opened):
    sources = opened({"train": "train[:10]", "validation": "train[10:]", "test": "train[15:]+dev"})
    assert len(sources["test"]) == 11


def test_the_shared_rows_are_named(opened):
    with pytest.raises(ValueError, match=r"rows 2 to 5 of tiny_pairs-train\.array_record-00001-of"):
        opened({"train": "train[:13]", "validation": "train[9:]"})  # 7 + 6 + 7


def test_concatenated_data_sets_are_compared_too(opened):
    data_set = "tiny_pairs:1.0.0"
    splits = {"train": "train[:15]", "validation": "train[15:]"}
    assert len(opened(splits, (data_set, {"train": "train[5:10]"}))["train"]) == NUM_TRAIN
    assert len(opened(splits, (data_set, {"validation": "dev"}))["validation"]) == 5 + 6
    for role, split in {"train": "train[14:16]", "validation": "train[14:16]"}.items():
        with pytest.raises(ValueError, match=rf"data\.concatenated\.other0\.splits\.{role}="):
            opened(splits, (data_set, {role: split}))
    with pytest.raises(ValueError, match=r"other1\.splits\.validation=.*other0\.splits\.train="):
        opened(splits, (data_set, {"train": "dev"}), (data_set, {"validation": "dev[:1]"}))


def same_folder(folder, other):
    return folder


def version_left_out(folder, other):
    return "tiny_pairs"


def roundabout(folder, other):
    return folder / ".." / folder.name


def symbolic_link(folder, other):
    other.symlink_to(folder)
    return other


def hard_links(folder, other):
    return shutil.copytree(folder, other, copy_function=os.link)


def copied(folder, other):
    return shutil.copytree(folder, other)


SPELLINGS = [same_folder, version_left_out, roundabout, symbolic_link, hard_links, copied]


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda function: function.__name__)
@pytest.mark.parametrize("described", [False, True])
def test_another_spelling_is_the_same_data_set(opened, data_dir, tmp_path, spelling, described):
    folder = shutil.copytree(data_dir / "tiny_pairs" / "1.0.0", tmp_path / "first")
    if described:
        (folder / DESCRIPTION_FILE).write_text('{"fingerprint": "abc"}')
    name = data_dir / "tiny_pairs" / "1.0.0" if spelling is version_left_out else folder
    other = spelling(folder, tmp_path / "other")
    opened({"train": "train"}, (other, {"train": "dev"}), name=name)
    with pytest.raises(ValueError, match="holds out rows"):
        opened(
            {"train": "train", "validation": "dev"},
            (other, {"validation": "train[:1]"}),
            name=name,
        )


def test_ranges_of_different_files_share_nothing():
    first = RowRange("a", frozenset({"content 1", "inode 1"}), 0, 10)
    assert list(shared_rows([first], [first._replace(identities=frozenset({"content 2"}))])) == []
    assert list(shared_rows([first], [first._replace(start=10, stop=12)])) == []
    assert list(shared_rows([first], [])) == []
    [shared] = shared_rows([first], [RowRange("b", frozenset({"inode 1"}), 9, 12)])
    assert (shared.file, shared.start, shared.stop) == ("a", 9, 10)


def test_roles_without_training_rows_are_not_compared():
    rows = [RowRange("a", frozenset({"a"}), 0, 1)]
    check_held_out({"validation": [("one", rows)], "test": [("two", rows)]})
