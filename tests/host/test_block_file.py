"""Arrays that are filled block by block: sound blocks are kept, damaged ones recomputed."""

import errno
import os

import numpy as np
import pytest

from jaxcl.host.block_file import BlockFile, complete_array

SHAPE = (5, 2)
BLOCKS = [np.full((2, 2), 1, np.int32), np.full((2, 2), 2, np.int32), np.full((1, 2), 3, np.int32)]


@pytest.fixture
def path(tmp_path):
    """The path of a complete file with three blocks."""
    blocks = BlockFile(tmp_path / "rows.npy", SHAPE, np.int32)
    for block in BLOCKS:
        blocks.append(block)
    return tmp_path / "rows.npy"


def test_a_block_file_keeps_exactly_the_finished_blocks(tmp_path):
    path = tmp_path / "rows.npy"
    blocks = BlockFile(path, SHAPE, np.int32)
    blocks.append(np.ones((3, 2), np.int32))
    blocks.array[3] = 7  # not counted
    again = BlockFile(path, SHAPE, np.int32)
    assert again.done == 3
    assert again.array[:3].tolist() == [[1, 1]] * 3
    again.append(np.full((2, 2), 4, np.int32))
    assert BlockFile(path, SHAPE, np.int32).done == 5


@pytest.mark.parametrize(("shape", "dtype"), [((6, 2), np.int32), (SHAPE, np.float32)])
def test_a_file_of_another_shape_or_type_is_started_over(path, shape, dtype):
    assert BlockFile(path, shape, dtype).done == 0
    assert BlockFile(path, shape, dtype).array.shape == shape


def test_other_processes_have_the_same_rows_in_memory(path):
    BlockFile(path, SHAPE, np.int32).keep(2)
    other = BlockFile(path, SHAPE, np.int32, writes=False)
    other.append(BLOCKS[1])
    assert other.done == 4
    assert other.array[:4].tolist() == np.concatenate(BLOCKS[:2]).tolist()
    assert BlockFile(path, SHAPE, np.int32).done == 2


@pytest.mark.parametrize(("rows", "done"), [(5, 5), (4, 4), (3, 2), (0, 0)])
def test_whole_blocks_of_the_first_rows_can_be_kept(path, rows, done):
    BlockFile(path, SHAPE, np.int32).keep(rows)
    assert BlockFile(path, SHAPE, np.int32).done == done


@pytest.mark.parametrize(("row", "done"), [(0, 0), (1, 0), (2, 2), (4, 4)])
def test_rows_from_the_first_damaged_block_on_are_not_done(path, capsys, row, done):
    content = bytearray(path.read_bytes())
    content[128 + 8 * row] ^= 1
    path.write_bytes(content)
    blocks = BlockFile(path, SHAPE, np.int32)
    assert blocks.done == done
    assert blocks.array[:done].tolist() == np.concatenate(BLOCKS)[:done].tolist()
    said = capsys.readouterr().err
    assert f"rows.npy is damaged: recomputing it from row {done} on" in said
    while blocks.done < len(blocks.array):
        blocks.append(np.concatenate(BLOCKS)[blocks.done : blocks.done + 1])
    assert BlockFile(path, SHAPE, np.int32).done == 5
    assert capsys.readouterr().err == ""


def pipe_instead(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    "damage",
    [
        *(lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"no array")),
        *(lambda path: os.truncate(path, path.stat().st_size - 1), os.unlink, pipe_instead),
    ],
)
def test_another_shape_or_type_is_started_over(path, capsys, damage):
    damage(path)
    blocks = BlockFile(path, SHAPE, np.int32)
    assert blocks.done == 0
    assert blocks.array.shape == SHAPE
    assert "recomputing it from row" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "{", "[]", '{"rows": 5}', '{"rows": 99, "digest": ""}'])
def test_a_damaged_log_keeps_no_rows(path, content):
    path.with_suffix(".blocks.jsonl").write_text(content + "\n")
    assert BlockFile(path, SHAPE, np.int32).done == 0


def test_every_flipped_byte_of_the_log_leaves_sound_rows_only(path):
    log = path.with_suffix(".blocks.jsonl")
    whole = log.read_bytes()
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1
        log.write_bytes(changed)
        other = BlockFile(path, SHAPE, np.int32, writes=False)
        assert other.array[: other.done].tolist() == np.concatenate(BLOCKS)[: other.done].tolist()


def test_a_link_in_the_place_of_the_file_is_not_followed(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "rows.npy").symlink_to(tmp_path / "victim")
    BlockFile(tmp_path / "rows.npy", SHAPE, np.int32).append(BLOCKS[0])
    assert (tmp_path / "victim").read_text() == "precious"


def failing(*error):
    def fallocate(descriptor, start, size):
        raise OSError(*error)

    return fallocate


def test_a_disk_without_room_is_an_error_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", failing(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError, match=r"cannot reserve 168 bytes \(No space .*room: '.*rows\.npy'"):
        BlockFile(tmp_path / "rows.npy", SHAPE, np.int32)
    assert not (tmp_path / "rows.npy").exists()


def test_a_disk_without_room_keeps_earlier_work(path, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", failing(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError, match="cannot reserve"):
        BlockFile(path, SHAPE, np.int32)
    monkeypatch.undo()
    assert BlockFile(path, SHAPE, np.int32).done == 5


def test_a_file_system_that_cannot_reserve_is_used_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", failing(errno.EOPNOTSUPP, "not supported"))
    blocks = BlockFile(tmp_path / "rows.npy", SHAPE, np.int32)
    blocks.append(BLOCKS[0])
    assert blocks.done == 2


def test_room_for_the_whole_array_is_taken(tmp_path):
    BlockFile(tmp_path / "rows.npy", (2**18, 4), np.int32)
    stat = (tmp_path / "rows.npy").stat()
    assert stat.st_blocks * 512 >= stat.st_size > 2**22


def test_a_complete_array_is_mapped_read_only_and_an_unfinished_one_is_none(path, tmp_path):
    array = complete_array(path, SHAPE, np.int32)
    assert array.tolist() == np.concatenate(BLOCKS).tolist()
    assert not array.flags.writeable
    for shape, dtype in (((6, 2), np.int32), (SHAPE, np.float32)):
        assert complete_array(path, shape, dtype) is None
    assert complete_array(tmp_path / "absent.npy", SHAPE, np.int32) is None
    BlockFile(path, SHAPE, np.int32).keep(4)
    assert complete_array(path, SHAPE, np.int32) is None


@pytest.mark.parametrize("row", [0, 2, 4])
def test_a_damaged_array_is_not_complete(path, row):
    content = bytearray(path.read_bytes())
    content[128 + 8 * row] ^= 1
    path.write_bytes(content)
    assert complete_array(path, SHAPE, np.int32) is None
