"""Files on object stores, and the lease that is their lock."""

import os
import threading
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest

from jaxcl.host import lease, remote
from jaxcl.host.files import read_text, write_npz, write_whole
from jaxcl.host.lease import leased
from jaxcl.host.npz import read_npz
from jaxcl.host.paths import as_path, local_path
from jaxcl.host.remote import (
    RemoteLog,
    create_file,
    file_sizes,
    local_folder,
    move_tree,
    open_log,
    remove_tree,
)
from tests import buckets


@pytest.fixture
def store(tmp_path, monkeypatch):
    """The folder of an object store."""
    buckets.install(monkeypatch, tmp_path / "store")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "store"


@pytest.fixture(params=["local", "remote"])
def folder(request, store, tmp_path):
    """A folder for files, local or not."""
    (tmp_path / "local").mkdir()
    return {"local": tmp_path / "local", "remote": as_path("gs://bucket/folder")}[request.param]


# Paths


@pytest.mark.parametrize("given", ["gs://bucket/run", Path("gs://bucket/run"), "gs:/bucket/run"])
def test_the_path_of_an_object_store_is_kept(store, given):
    path = as_path(given)
    assert str(path) == "gs://bucket/run"
    assert str(path / "config.json") == "gs://bucket/run/config.json"
    assert as_path(path) == path


def test_a_store_whose_package_is_missing_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"gs://bucket/run cannot be opened .*install gcsfs") as it:
        as_path("gs://bucket/run")
    assert "mount the bucket" in str(it.value)
    assert "\n" not in str(it.value)


def test_a_scheme_without_a_file_system_is_refused():
    with pytest.raises(ValueError, match="ftp://host/run is a URL, but a local path is needed"):
        as_path("ftp://host/run")


def test_a_path_that_must_be_local_cannot_be_a_url(store):
    with pytest.raises(ValueError, match="gs://bucket/data is a URL, but a local path is needed"):
        local_path("gs://bucket/data")


def test_a_listing_is_never_kept(store):
    as_path("gs://bucket/run")
    assert not fsspec.filesystem("gs").dircache.use_listings_cache


def test_each_remote_folder_has_its_own_local_one(store, tmp_path):
    one, other = (local_folder(as_path(f"gs://bucket/{name}")) for name in ("a-b", "a/b"))
    assert one != other
    assert one.is_relative_to(tmp_path / "cache")
    assert local_folder(tmp_path) == tmp_path


# Files


def test_sizes_are_listed_by_name(folder):
    write_whole(folder / "b", "12")
    (folder / "a").mkdir(exist_ok=True)
    write_whole(folder / "a" / "c", "123")
    assert list(file_sizes(folder).items()) == [("a/c", 3), ("b", 2)]


def test_a_folder_is_moved_and_removed_with_its_files(folder):
    for name in ("here", "there"):
        (folder / name).mkdir(exist_ok=True)
    write_whole(folder / "here" / "a", "1")
    move_tree(folder / "here", folder / "there" / "moved")
    assert not (folder / "here").exists()
    assert read_text(folder / "there" / "moved" / "a") == "1"
    remove_tree(folder / "there")
    remove_tree(folder / "there")  # already removed
    assert not (folder / "there" / "moved" / "a").exists()


def test_arrays_are_read_from_a_store(store, folder):
    arrays = {"a": np.array([1.5, 2.5]), "b": np.array(3)}
    write_npz(folder / "new" / "arrays.npz", **arrays)
    read = read_npz(folder / "new" / "arrays.npz", ["a", "b"])
    assert all(np.array_equal(read[name], arrays[name]) for name in arrays)


def test_a_file_is_created_once(store):
    path = as_path("gs://bucket/once")
    create_file(path, b"first")
    with pytest.raises(FileExistsError):
        create_file(path, b"second")
    assert path.read_bytes() == b"first"


def test_a_log_is_appended_to(folder):
    for line in (b"1\n", b"2\n"):
        with open_log(folder / "log") as log:
            log.write(line)
            log.write(line)
    assert read_text(folder / "log") == "1\n1\n2\n2\n"


def test_a_log_is_uploaded_at_intervals_and_on_demand(store, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(remote.time, "monotonic", lambda: now[0])
    log = RemoteLog(as_path("gs://bucket/log"))
    uploads = []
    monkeypatch.setattr(remote, "write_whole", lambda path, content: uploads.append(content))
    for second in range(61):
        now[0] = float(second)
        log.write(b"x")
        log.flush()
    assert [len(content) for content in uploads] == [1, 31, 61]
    log.write(b"y")
    log.flush()
    log.upload()
    log.upload()  # nothing new
    log.close()
    assert [len(content) for content in uploads] == [1, 31, 61, 62]


def test_uploads_take_a_small_part_of_the_time(store, monkeypatch):
    now, uploading = [0.0], []

    def slow(path, content):
        now[0] += 10
        uploading.append(10)

    monkeypatch.setattr(remote.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(remote, "write_whole", slow)
    log = RemoteLog(as_path("gs://bucket/log"))
    while now[0] < 10_000:
        now[0] += 1
        log.write(b"x")
        log.flush()
    assert 0 < sum(uploading) / now[0] < 0.025
    log.close()


# The lease


@pytest.fixture
def quick(monkeypatch):
    """Shorten the times of renewal and expiry."""
    monkeypatch.setattr(lease, "RENEWAL_SECONDS", 0.05)
    monkeypatch.setattr(lease, "EXPIRY_SECONDS", 0.6)


def test_a_lease_is_held_by_one_and_ends(store, quick):
    path = as_path("gs://bucket/run/.lock")
    with (
        leased(path),
        pytest.raises(ValueError, match=r"another run is at work in gs://bucket/run;"),
        leased(path),
    ):
        pytest.fail("there are two holders")
    assert not path.exists()
    with leased(path):
        assert path.exists()


def test_the_lease_of_a_killed_process_is_taken_over_once(store, quick, monkeypatch):
    path = as_path("gs://bucket/run/.lock")
    write_whole(path, "killed 7\n")

    def write_late(path, content):
        time.sleep(0.4)  # so that every process has read the file before one writes it
        write_whole(path, content)

    monkeypatch.setattr(lease, "write_whole", write_late)
    outcomes = []

    def start():
        try:
            with leased(path):
                outcomes.append("holds")
                time.sleep(1.5)
        except ValueError:
            outcomes.append("refused")

    starts = [threading.Thread(target=start) for _ in range(4)]
    for one in starts:
        one.start()
    for one in starts:
        one.join()
    assert sorted(outcomes) == ["holds", "refused", "refused", "refused"]
    assert [name for _, _, names in os.walk(store) for name in names] == []


def test_a_lost_lease_is_reported_and_left_to_its_holder(store, quick, capsys):
    path = as_path("gs://bucket/run/.lock")
    with leased(path):
        write_whole(path, "other 1\n")
        time.sleep(0.3)
    assert "another process has taken" in " ".join(capsys.readouterr().err.split())
    assert path.read_text() == "other 1\n"
