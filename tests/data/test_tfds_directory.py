"""Prepared data sets are found, and have as many rows as they say."""

import json
import shutil

import pytest
from array_record.python.array_record_module import ArrayRecordReader
from jaxcl.configs.tfds_pairs import get_config
from tensorflow_datasets.core.utils import file_utils

from jaxcl.data.sources import open_pairs
from jaxcl.data.splits import open_splits
from jaxcl.data.tfds_directory import find_directory
from jaxcl.settings.read import read_settings
from tests.prepared_data import NUM_DEV, NUM_TRAIN, Trap, change_info, prepare_pairs


@pytest.fixture(scope="module")
def array_record(tmp_path_factory):
    return prepare_pairs(tmp_path_factory.mktemp("array_record"), num_shards=3)


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    return prepare_pairs(tmp_path_factory.mktemp("parquet"), "parquet", num_shards=3)


@pytest.fixture(params=["array_record", "parquet"])
def copy(request, array_record, parquet, tmp_path):
    """A copy in either format, for changes."""
    source = {"array_record": array_record, "parquet": parquet}[request.param]
    return shutil.copytree(source, tmp_path / "copy")


def numbers(pairs):
    return [int(row["query"].split()[1]) for row in pairs.read(range(len(pairs)))]


@pytest.mark.parametrize(
    ("split", "wanted"),
    [
        ("train", range(NUM_TRAIN)),
        ("dev", range(NUM_TRAIN, NUM_TRAIN + NUM_DEV)),
        ("train+dev", range(NUM_TRAIN + NUM_DEV)),
        ("train[:2shard]", range(13)),  # 7 + 6 of 7 + 6 + 7
    ],
)
def test_whole_files_are_read_of_either_format(copy, split, wanted):
    pairs = open_pairs(copy, split)
    assert numbers(pairs) == list(wanted)
    last = len(pairs) - 1
    assert pairs.read([last]) == [{"query": f"query {wanted[-1]}", "key": f"key {wanted[-1]}"}]
    with pytest.raises(IndexError):
        pairs.read([last + 1])


@pytest.mark.parametrize(
    "split",
    ["train[:95%]", "train[95%:]", "train[3:9]", "train[-1:]", "dev+train[:5]", "train+train"],
)
def test_parts_of_parquet_files_are_refused(array_record, parquet, split):
    pairs = open_pairs(array_record, split)  # the same split has as many rows as it says
    assert len(numbers(pairs)) == sum(part.stop - part.start for part in pairs.row_ranges)
    with pytest.raises(ValueError, match=r"parquet, .* whole\. Name a whole split, .* or prepare"):
        open_pairs(parquet, split)


def test_the_default_splits_of_tfds_pairs_hold_out_no_training_row(array_record, parquet, tmp_path):
    config = get_config("smoke").data
    sources = open_splits(
        read_settings({"data": config.to_dict()}).data, str(array_record), data_dir=tmp_path
    )
    assert sorted([*numbers(sources["train"]), *numbers(sources["validation"])]) == list(
        range(NUM_TRAIN)
    )
    with pytest.raises(ValueError, match="prepared as parquet"):
        open_splits(read_settings({"data": config.to_dict()}).data, str(parquet), data_dir=tmp_path)
    config.splits = type(config)({"train": "train", "validation": "dev"})
    sources = open_splits(
        read_settings({"data": config.to_dict()}).data, str(parquet), data_dir=tmp_path
    )
    assert numbers(sources["validation"]) == list(range(NUM_TRAIN, NUM_TRAIN + NUM_DEV))


@pytest.mark.parametrize("change", [-2, 2])
def test_another_number_of_rows_than_stated_is_an_error(copy, change):
    def with_change(content):
        [train] = [split for split in content["splits"] if split["name"] == "train"]
        train["shardLengths"][1] = str(int(train["shardLengths"][1]) + change)

    change_info(copy, with_change)
    with pytest.raises(ValueError, match=r"prepare (it|the data set) again"):
        open_pairs(copy, "train")


def test_a_damaged_record_file_is_named(array_record, tmp_path):
    copy = shutil.copytree(array_record, tmp_path / "copy")
    shard = min(copy.glob("*-train.array_record*"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{shard.name} (is damaged|has 0 rows)"):
        open_pairs(copy, "train")


def test_a_format_with_random_access_is_preferred(array_record, tmp_path):
    copy = shutil.copytree(array_record, tmp_path / "copy")
    change_info(
        copy,
        lambda content: content.update(
            fileFormat="tfrecord", alternativeFileFormats=["array_record"]
        ),
    )
    pairs = open_pairs(copy, "train[5:15]")
    assert numbers(pairs) == list(range(5, 15))
    assert {part.file.split(".")[1].split("-")[0] for part in pairs.row_ranges} == {"array_record"}


def test_records_of_the_file_are_counted(array_record):
    shards = sorted(array_record.glob("*-train.array_record*"))
    counts = []
    for shard in shards:
        reader = ArrayRecordReader(str(shard))
        counts.append(reader.num_records())
        reader.close()
    assert counts == [7, 6, 7]


@pytest.fixture
def data_dir(tmp_path):
    """Folders of data sets with empty descriptions."""
    for directory in (
        *("plain/1.0.0", "plain/1.10.0", "plain/1.9.0", "plain/2.0.0/unfinished"),
        *("configured/a/1.0.0", "configured/b/1.0.0", "configured/b/2.0.0"),
    ):
        (tmp_path / directory).mkdir(parents=True)
        if "unfinished" not in directory:
            (tmp_path / directory / "dataset_info.json").write_text("{}")
    (tmp_path / "configured" / ".config").mkdir()
    (tmp_path / "configured" / ".config" / "metadata.json").write_text(
        '{"default_config_name": "a"}'
    )
    return tmp_path


@pytest.mark.parametrize(
    ("name", "directory"),
    [
        ("plain", "plain/1.10.0"),
        ("Plain", "plain/1.10.0"),
        ("plain:1.9.0", "plain/1.9.0"),
        ("plain:1.9.*", "plain/1.9.0"),
        ("plain:*.*.*", "plain/1.10.0"),
        ("configured", "configured/a/1.0.0"),
        ("configured/b", "configured/b/2.0.0"),
        ("configured/b:1.0.0", "configured/b/1.0.0"),
    ],
)
def test_names_find_the_newest_version_that_matches(data_dir, name, directory):
    assert str(find_directory(name, data_dir)) == str(data_dir / directory)


def test_a_data_set_in_two_places_is_ambiguous(data_dir, tmp_path_factory, monkeypatch):
    other = tmp_path_factory.mktemp("other")
    monkeypatch.setattr(file_utils, "list_data_dirs", lambda _: [data_dir, other])
    assert str(find_directory("plain", None)) == str(data_dir / "plain/1.10.0")
    shutil.copytree(data_dir / "plain", other / "plain")
    with pytest.raises(ValueError, match=r"is prepared in .* and in .*; set data_dir"):
        find_directory("plain", None)


@pytest.mark.parametrize("name", ["other", "plain:2.0.0", "plain:3.*.*", "configured/c", "plain/b"])
def test_prepared_data_sets_are_listed(data_dir, name):
    with pytest.raises(ValueError, match=r"is not prepared; .*configured/a:1\.0\.0, .*plain:1\.9"):
        find_directory(name, data_dir)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "huggingface:trap",
            "kaggle:trap/config:1.0.0",
            "plain:1.0.0/module=trap",
            "plain/..:1.0.0",
        ),
        *("trap/trap/trap.py", "trap/.", "../plain", "./trap", "", "plain:latest"),
    ],
)
def test_no_name_imports_anything(data_dir, monkeypatch, name):
    trap = Trap(data_dir, number=10_000)
    (data_dir / "trap").mkdir()
    for file in ("trap/trap.py", "trap/__init__.py", "trap/trap_dataset_builder.py", "trap.py"):
        shutil.copy(data_dir / f"{trap.module}.py", data_dir / file)
    monkeypatch.syspath_prepend(data_dir)
    monkeypatch.chdir(data_dir)
    with pytest.raises(ValueError, match=r"neither a directory nor|holds no prepared"):
        open_pairs(name, "train", data_dir=data_dir)
    assert not trap.sprung


def test_a_command_to_copy_holds_no_name_of_others(array_record, tmp_path):
    copy = shutil.copytree(array_record, tmp_path / "copy")
    change_info(copy, lambda content: content.update(fileFormat="tfrecord", name="x$(touch y)"))
    for file in copy.glob("*.array_record*"):
        file.rename(copy / file.name.replace("tiny_pairs", "x$(touch y)").replace("array_", "tf"))
    with pytest.raises(ValueError, match=r"tfds\.builder\('NAME:VERSION'"):
        open_pairs(copy, "train")
    with pytest.raises(ValueError, match=r"data_dir='DIRECTORY'"):
        find_directory("plain", tmp_path / "$(touch y)")


@pytest.mark.parametrize("default", ['["a"]', '"../plain"', '".."', '""', "3"])
def test_a_default_configuration_is_a_plain_name(data_dir, default):
    metadata = data_dir / "configured" / ".config" / "metadata.json"
    metadata.write_text(f'{{"default_config_name": {default}}}')
    with pytest.raises(ValueError, match="is not prepared"):
        find_directory("configured", data_dir)


def test_a_folder_without_a_data_set_is_named_as_such(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, message in {
        "folder.csv": r"folder\.csv holds no prepared data set .*or a file of pairs",
        "folder": r"'folder' is not prepared; .*\(the folder folder holds none\)",
    }.items():
        with pytest.raises(ValueError, match=r"is not prepared|is neither a directory") as absent:
            find_directory(name, tmp_path)
        (tmp_path / name).mkdir()
        with pytest.raises(ValueError, match=message):
            find_directory(name, tmp_path)
        assert "holds no" not in str(absent.value)


@pytest.mark.parametrize("name", ["whole", "by_split"])
def test_a_folder_of_hugging_face_is_named_as_such(tmp_path, monkeypatch, name):
    """Files as `save_to_disk` writes them, for a data set and for several splits."""
    one_split = tmp_path / "whole"
    one_split.mkdir()
    info = {"builder_name": "json", "features": {"text": {"dtype": "string", "_type": "Value"}}}
    (one_split / "dataset_info.json").write_text(json.dumps(info))
    (one_split / "state.json").write_text(json.dumps({"_fingerprint": "a"}))
    shutil.copytree(one_split, tmp_path / "by_split" / "train")
    (tmp_path / "by_split" / "dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))
    monkeypatch.chdir(tmp_path)
    for given in (name, tmp_path / name):
        with pytest.raises(ValueError, match=f"{name} holds a data set of Hugging Face's datasets"):
            open_pairs(given, "train")
