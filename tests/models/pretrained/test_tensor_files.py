"""Safetensors files: views without copies, and damage that is refused by name."""

import json
import os
import random
import struct

import ml_dtypes
import numpy as np
import pytest

from jaxcl.models.pretrained.tensor_files import (
    TENSOR_TYPES,
    map_tensors,
    parse_specs,
    read_specs,
    specs_as_json,
    weight_files,
    write_tensors,
)

TENSORS = {
    "weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "half": np.array([1.5, -2.25], ml_dtypes.bfloat16),
    "scalar": np.array(7, np.int64),
    "flags": np.array([True, False, True]),
    "nothing": np.zeros((0, 4), np.float16),
}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert actual[name].shape == tensor.shape
        assert actual[name].tobytes() == tensor.tobytes()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    write_tensors(path, TENSORS)
    return path


def test_written_tensors_are_read_back(file):
    assert_same(map_tensors(file), TENSORS)
    assert read_specs(file) == {name: (t.dtype, t.shape) for name, t in TENSORS.items()}


@pytest.mark.parametrize("kind", TENSOR_TYPES)
def test_every_type_is_written_and_read(tmp_path, kind):
    tensors = {"a": np.array([0, 1, 1]).astype(TENSOR_TYPES[kind])}
    write_tensors(tmp_path / "a.safetensors", tensors)
    assert f'"{kind}"'.encode() in (tmp_path / "a.safetensors").read_bytes()
    assert_same(map_tensors(tmp_path / "a.safetensors"), tensors)


def test_the_safetensors_package_reads_the_same_tensors(file):
    from safetensors import safe_open

    with safe_open(file, framework="np") as opened:
        assert opened.metadata() == {"format": "pt"}
        assert sorted(opened.keys()) == sorted(TENSORS)
        np.testing.assert_array_equal(opened.get_tensor("weight"), TENSORS["weight"])


def test_tensors_are_read_only_views_of_one_mapping(file):
    tensors = map_tensors(file)
    bases = {id(owner(tensor)) for tensor in tensors.values()}
    assert len(bases) == 1
    assert isinstance(owner(tensors["weight"]), np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        tensors["weight"][0] = 1


def owner(array):
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def test_a_transposed_view_is_written_with_its_own_values(tmp_path):
    tensors = {"kernel": TENSORS["weight"].T}
    write_tensors(tmp_path / "a.safetensors", tensors)
    assert_same(map_tensors(tmp_path / "a.safetensors"), tensors)


def test_a_failed_write_leaves_the_old_file(file):
    before = file.read_bytes()
    with pytest.raises(ValueError, match=r"cannot hold .*complex128"):
        write_tensors(file, {"a": np.array([1j])})
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]


def test_types_and_shapes_are_written_as_json(file):
    specs = {"a/b.safetensors": read_specs(file)}
    assert parse_specs(json.loads(json.dumps(specs_as_json(specs)))) == specs


DAMAGED_LISTS = (
    *([], {"a": 1}, {"a": {"b": 1}}, {"a": {"b": ["F32"]}}, {"a": {"b": ["F99", []]}}),
    *({"a": {"b": [[], []]}}, {"a": {"b": ["F32", 5]}}, {"a": {"b": ["F32", [-1]]}}),
    *({"a": {"b": ["F32", [2.0]]}}, {"a": {"b": ["F32", ["2"]]}}),
)


@pytest.mark.parametrize("content", DAMAGED_LISTS, ids=str)
def test_a_damaged_list_of_tensors_is_refused(content):
    with pytest.raises(ValueError, match="its list of tensors is damaged"):
        parse_specs(content)


def test_unaligned_tensors_are_read(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw({"a": entry("U8", [1], 0, 1), "b": entry("F32", [1], 1, 5)}, b"\x07abcd"))
    assert map_tensors(path)["b"].tobytes() == b"abcd"


def entry(kind, shape, begin, end):
    return {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}


def raw(header, content=b""):
    text = header if isinstance(header, str) else json.dumps(header)
    return struct.pack("<Q", len(text.encode())) + text.encode() + content


F32 = entry("F32", [2], 0, 8)
DAMAGED = {
    "a header longer than the file": (struct.pack("<Q", 2**63) + b"{}", "claims 9,223"),
    "no header": (b"\x01", "claims 1 bytes, but the file has 1"),
    "a header of another encoding": (struct.pack("<Q", 2) + b"\xff\xff", "utf-8"),
    "a header that is not JSON": (raw("{"), "Expecting"),
    "a list for a header": (raw("[]"), "not a JSON object"),
    "deep nesting": (raw('{"a":' + "[" * 100_000 + "]" * 100_000 + "}"), "recursion"),
    "a name twice": (raw('{"a": 1, "a": 2}'), "'a' twice"),
    "a key twice": (
        raw('{"a": {"dtype": "U8", "dtype": "U8", "shape": [], "data_offsets": [0, 1]}}', b"a"),
        "'dtype' twice",
    ),
    "a number for an entry": (raw({"a": 1}), "must have a type"),
    "an unknown key": (raw({"a": F32 | {"more": 1}}, bytes(8)), "and nothing else"),
    "an unknown type": (raw({"a": entry("F8_E4M3", [8], 0, 8)}, bytes(8)), "supported are F64"),
    "a list for a type": (raw({"a": entry([], [8], 0, 8)}, bytes(8)), r"type \[\]"),
    "a negative size": (raw({"a": entry("F32", [-2, -1], 0, 8)}, bytes(8)), r"shape \[-2, -1\]"),
    "a boolean size": (raw({"a": entry("F32", [True, 2], 0, 8)}, bytes(8)), "shape"),
    "a fraction of a size": (raw({"a": entry("F32", [2.0], 0, 8)}, bytes(8)), "shape"),
    "a size for a shape": (raw({"a": entry("F32", 2, 0, 8)}, bytes(8)), "shape 2"),
    "too many dimensions": (raw({"a": entry("F32", [1] * 65, 0, 4)}, bytes(4)), "shape"),
    "an overflow": (raw({"a": entry("F32", [2**33, 2**31, 2], 0, 0)}), "shape"),
    "an overflow with a zero": (raw({"a": entry("F32", [2**40, 2**40, 0], 0, 0)}), "shape"),
    "another number of bytes": (raw({"a": entry("F32", [3], 0, 8)}, bytes(8)), "has 8 bytes"),
    "reversed offsets": (raw({"a": entry("F32", [2], 8, 0)}, bytes(8)), "has -8 bytes"),
    "a negative offset": (raw({"a": entry("F32", [2], -8, 0)}, bytes(8)), "offsets"),
    "one offset": (raw({"a": F32 | {"data_offsets": [8]}}, bytes(8)), "offsets"),
    "offsets past the end": (raw({"a": entry("F32", [2], 0, 8)}, bytes(4)), "the file has 4"),
    "an overlap": (raw({"a": F32, "b": entry("F32", [2], 4, 12)}, bytes(12)), "begins at 4"),
    "a gap": (raw({"a": F32, "b": entry("F32", [1], 12, 16)}, bytes(16)), "begins at 12"),
    "bytes of no tensor": (raw({"a": F32}, bytes(12)), "the file has 12"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_header_is_refused_by_name(tmp_path, damage):
    content, message = DAMAGED[damage]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    for read in (read_specs, map_tensors):
        with pytest.raises(ValueError, match=f"{path} is not a valid safetensors file.*{message}"):
            read(path)


def test_a_huge_header_is_not_read(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 10**9))
    os.truncate(path, 2 * 10**9)  # takes no space on the disk
    with pytest.raises(ValueError, match="header has 1,000,000,000 bytes, more than"):
        read_specs(path)


@pytest.mark.parametrize("rounds", [200, pytest.param(3000, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("unchecked_annotations")
def test_random_damage_is_refused_by_name_or_harmless(file, rounds):
    content = file.read_bytes()
    rng = random.Random(rounds)
    refused = 0
    for _ in range(rounds):
        damaged = bytearray(content)
        for _ in range(rng.choice([1, 1, 3])):
            damaged[rng.randrange(len(content) - 40)] = rng.randrange(256)
        file.write_bytes(damaged[: rng.choice([len(content)] * 3 + [rng.randrange(len(content))])])
        try:
            map_tensors(file)
        except ValueError as error:
            refused += str(error).startswith(f"{file} is not a valid safetensors file")
    assert refused > rounds / 2


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="pipe or a device"):
        weight_files(tmp_path, "")


def shards(folder, weight_map, **files):
    for name, tensors in files.items():
        write_tensors(folder / f"{name}.safetensors", tensors)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


A, B = {"a": np.zeros(2, np.float32)}, {"b": np.ones(3, np.float32)}
SPECS = {name: {name: (np.dtype("f4"), (size,))} for name, size in [("a", 2), ("b", 3)]}


def test_a_single_file_or_all_shards_are_listed(tmp_path):
    shards(tmp_path, {"a": "x.safetensors", "b": "y.safetensors"}, x=A, y=B)
    assert weight_files(tmp_path, "") == {"x.safetensors": SPECS["a"], "y.safetensors": SPECS["b"]}
    write_tensors(tmp_path / "model.safetensors", A)
    assert weight_files(tmp_path, "") == {"model.safetensors": SPECS["a"]}
    assert weight_files(tmp_path.parent, tmp_path.name) == {
        f"{tmp_path.name}/model.safetensors": SPECS["a"]
    }


MAP = {"a": "x.safetensors", "b": "y.safetensors"}
WRONG_INDEXES = {
    "a missing shard": (MAP, {"x": A}, "y.safetensors is missing"),
    "a missing tensor": (MAP | {"c": "x.safetensors"}, {"x": A, "y": B}, "lacks .*c in x"),
    "another shard": ({"a": "y.safetensors", "b": "x.safetensors"}, {"x": A, "y": B}, "lacks"),
    "an unlisted tensor": ({"a": "x.safetensors"}, {"x": A | B}, "not list: b in x"),
    "a tensor in two shards": (MAP, {"x": A | B, "y": B}, "not list: b in x"),
    "a shard above the folder": (
        {"a": "../x.safetensors"},
        {},
        "not the name of a file in the same folder",
    ),
    "an absolute shard": ({"a": "/etc/passwd"}, {}, "not the name of a file in the same folder"),
    "a shard on a drive": ({"a": "C:\\x.safetensors"}, {}, "lie outside"),
    "a number for a shard": ({"a": 5}, {}, "not map tensors to files"),
    "a list for the map": (["a"], {}, "not map tensors to files"),
}


@pytest.mark.parametrize("wrong", WRONG_INDEXES)
def test_a_wrong_index_is_refused(tmp_path, wrong):
    weight_map, files, message = WRONG_INDEXES[wrong]
    shards(tmp_path, weight_map, **files)
    with pytest.raises(ValueError, match=message):
        weight_files(tmp_path, "")


@pytest.mark.parametrize("content", ["[]", "{", "{}", "[" * 100_000])
def test_a_damaged_index_is_refused_by_name(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"index\.json does not map tensors to files"):
        weight_files(tmp_path, "")


def test_pickled_weights_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor"):
        weight_files(tmp_path, "")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"pytorch_model\.bin only; a pickle can run code.*as safetensors"
    ):
        weight_files(tmp_path, "")


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    (tmp_path / "model").mkdir()
    write_tensors(tmp_path / "a.safetensors", A)
    (tmp_path / "model" / "model.safetensors").symlink_to("../a.safetensors")
    with pytest.raises(ValueError, match="outside of the folder; copy the file"):
        weight_files(tmp_path / "model", "")


def test_a_linked_folder_is_refused(tmp_path):
    for folder in ("model", "other"):
        (tmp_path / folder).mkdir()
    write_tensors(tmp_path / "other" / "model.safetensors", A)
    (tmp_path / "model" / "dense").symlink_to("../other")
    with pytest.raises(ValueError, match="outside of the folder; copy the file"):
        weight_files(tmp_path / "model", "dense")


def test_links_of_a_hub_cache_are_followed(tmp_path):
    repository = tmp_path / "models--org--name"
    blobs, revision = repository / "blobs", repository / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    revision.mkdir(parents=True)
    write_tensors(blobs / "abcd", A)
    (revision / "model.safetensors").symlink_to("../../blobs/abcd")
    assert weight_files(revision, "") == {"model.safetensors": SPECS["a"]}
    (revision / "model.safetensors").unlink()
    (revision / "model.safetensors").symlink_to("../../../outside")
    with pytest.raises(ValueError, match="outside of the folder"):
        weight_files(revision, "")


def test_the_model_folder_may_be_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    write_tensors(tmp_path / "real" / "model.safetensors", A)
    (tmp_path / "link").symlink_to("real")
    assert weight_files(tmp_path / "link", "") == {"model.safetensors": SPECS["a"]}
