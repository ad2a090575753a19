"""Untrusted files, and files that are cut short by a kill or a full disk."""

import errno
import os
import socket

import numpy as np
import pytest

from jaxcl.host import files
from jaxcl.host.files import (
    open_regular,
    read_json_lines,
    read_json_object,
    read_regular,
    read_text,
    write_npz,
    write_whole,
)

READERS = [
    open_regular,
    lambda path: read_regular(path, limit=1000),
    read_text,
    read_json_object,
    read_json_lines,
]


@pytest.mark.parametrize("read", READERS)
def test_a_pipe_is_refused_and_does_not_hang(tmp_path, read):
    os.mkfifo(tmp_path / "content")
    with pytest.raises(ValueError, match="content is a pipe or a device; give a regular file"):
        read(tmp_path / "content")


@pytest.mark.parametrize("read", READERS)
def test_a_folder_is_refused(tmp_path, read):
    with pytest.raises(ValueError, match="is a folder; give a regular file"):
        read(tmp_path)


@pytest.mark.parametrize("read", READERS)
def test_a_link_to_a_device_without_end_is_refused(tmp_path, read):
    (tmp_path / "content").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="content is a pipe or a device"):
        read(tmp_path / "content")


def test_a_socket_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # names of sockets must be short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("content")
        with pytest.raises(OSError, match="content"):
            read_regular(tmp_path / "content", limit=10)


def test_a_link_to_a_file_is_followed(tmp_path):
    (tmp_path / "content").write_text("abc")
    (tmp_path / "link").symlink_to(tmp_path / "content")
    assert read_regular(tmp_path / "link", limit=3) == b"abc"


def test_a_file_has_a_largest_size(tmp_path):
    path = tmp_path / "content"
    path.write_bytes(b"abc")
    assert read_regular(path, limit=3) == b"abc"
    with pytest.raises(ValueError, match="content has more than 2 bytes"):
        read_regular(path, limit=2)


def test_a_sparse_file_of_a_terabyte_is_refused_at_once(tmp_path):
    path = tmp_path / "content.json"
    with path.open("wb") as file:
        file.truncate(2**40)
    for read in (read_text, read_json_object):
        with pytest.raises(ValueError, match=r"content\.json has more than 67,108,864 bytes"):
            read(path)


def test_a_json_file_has_a_largest_size(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_MAX_BYTES", 10)
    path = tmp_path / "content.json"
    path.write_text('{"a": 100}')
    assert read_json_object(path) == {"a": 100}
    path.write_text('{"a": 1000}')
    with pytest.raises(ValueError, match=r"content\.json has more than 10 bytes"):
        read_json_object(path)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "null", "[" * 100_000, '{"a": ' * 100_000])
def test_anything_but_an_object_is_an_error(tmp_path, content):
    path = tmp_path / "content.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"content\.json is damaged .*; restore it from a copy"):
        read_json_object(path)


def test_the_message_of_a_damaged_file_has_the_caller_s_remedy(tmp_path):
    path = tmp_path / "content.json"
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"does not hold a JSON object\); prepare it again"):
        read_json_object(path, remedy="prepare it again")


@pytest.mark.parametrize("read", [read_json_object, read_text])
def test_another_encoding_is_an_error(tmp_path, read):
    path = tmp_path / "content.json"
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match=r"content\.json is (damaged|not UTF-8)"):
        read(path)


def test_damaged_lines_are_counted_and_the_others_read(tmp_path):
    path = tmp_path / "content.jsonl"
    path.write_bytes(b'{"a": 1}\n\xff\n\n[]\n{"a": "' + "é".encode() + b'"}\n{"a": 2')
    records, damaged = read_json_lines(path)
    assert records == [{"a": 1}, {"a": "é"}]
    assert len(damaged) == 3


def test_a_remote_file_is_read_and_written_through_its_own_class():
    class Remote:
        content = b""

        def __fspath__(self):
            return "gs://bucket/content.json"

        def open(self, mode):
            assert mode == "rb"
            return files.io.BytesIO(self.content)

        def write_bytes(self, content):
            self.content = content

    remote = Remote()
    write_whole(remote, '{"a": 1}')
    assert read_json_object(remote) == {"a": 1}
    with pytest.raises(ValueError, match="more than 3 bytes"):
        read_regular(remote, limit=3)


# Writing


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    done = []

    def recorded(name):
        function = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args: [done.append(name), function(*args)][1])

    recorded("fsync")
    recorded("replace")
    write_whole(tmp_path / "content", "abc")
    assert done == ["fsync", "replace", "fsync"]  # the file, then its folder
    assert (tmp_path / "content").read_text() == "abc"


WRITERS = [
    lambda path: write_whole(path, b"0" * 100),
    lambda path: write_npz(path, numbers=np.zeros(100)),
]


@pytest.mark.parametrize("write", WRITERS)
def test_a_full_disk_leaves_the_earlier_file_and_nothing_else(tmp_path, monkeypatch, write):
    path = tmp_path / "content"
    path.write_text("earlier")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*content'"):
        write(path)
    assert path.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("write", WRITERS)
def test_a_link_in_the_place_of_the_unfinished_file_is_not_followed(tmp_path, monkeypatch, write):
    path, victim = tmp_path / "content", tmp_path / "victim"
    victim.write_text("precious")
    monkeypatch.setattr(files.secrets, "token_hex", lambda count: "0")
    for name in ("content.unfinished", "content.unfinished-0"):
        (tmp_path / name).symlink_to(victim)
    with pytest.raises(FileExistsError):
        write(path)
    assert victim.read_text() == "precious"


def test_two_writers_of_one_file_do_not_share_the_unfinished_one(tmp_path):
    path = tmp_path / "content"
    with files.replacing(path) as first:
        first.write(b"first")
        write_whole(path, "second")
    assert path.read_text() == "first"


def test_a_new_file_has_the_mode_that_the_umask_leaves_and_an_old_one_keeps_its_own(tmp_path):
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "new", "abc")
        (tmp_path / "private").touch(mode=0o600)
        write_whole(tmp_path / "private", "abc")
    finally:
        os.umask(before)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o600
