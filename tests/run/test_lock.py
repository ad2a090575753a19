"""The lock of a workdir is a regular file; a link or a pipe in its place is refused."""

import os
import socket

import pytest

from jaxcl.run.workdir import lock_workdir

fcntl = pytest.importorskip("fcntl", reason="Windows has no such lock")


def link_to_a_file(path):
    path.with_name("target").write_text("precious")
    path.symlink_to("target")


def listening_socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


@pytest.mark.parametrize(
    "put",
    [
        link_to_a_file,
        lambda path: path.symlink_to("absent"),
        lambda path: path.symlink_to("/dev/zero"),
        os.mkfifo,
        os.mkdir,
        listening_socket,
    ],
    ids=["link", "dangling link", "link to a device", "pipe", "folder", "socket"],
)
def test_a_path_that_is_not_a_regular_file_is_refused_and_left_alone(tmp_path, monkeypatch, put):
    monkeypatch.chdir(tmp_path)
    put(tmp_path / ".lock")
    before = sorted(os.listdir(tmp_path))
    with (
        pytest.raises(ValueError, match=r"\.lock is not a regular file; remove it"),
        lock_workdir(tmp_path),
    ):
        pass
    assert sorted(os.listdir(tmp_path)) == before
    assert "target" not in before or (tmp_path / "target").read_text() == "precious"


@pytest.mark.parametrize("name", ["best", "20"])
def test_a_checkpoint_of_a_run_is_not_a_workdir(tmp_path, name):
    folder = tmp_path / "checkpoints" / name
    with lock_workdir(folder):  # nothing says that this is a run
        pass
    (tmp_path / "run.json").write_text("{}")
    message = rf"{name} is a checkpoint of a run; give {tmp_path} to resume .* init_from"
    with pytest.raises(ValueError, match=message), lock_workdir(folder):
        pass


def test_a_lock_keeps_the_content_of_its_file(tmp_path):
    (tmp_path / ".lock").write_text("a note")
    with lock_workdir(tmp_path):
        pass
    assert (tmp_path / ".lock").read_text() == "a note"


def test_a_lock_that_a_failed_start_removed_is_taken_again(tmp_path, monkeypatch):
    flock = fcntl.flock
    removed = []

    def removed_meanwhile(file, operation):
        if not removed:
            removed.append((tmp_path / ".lock").unlink())
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", removed_meanwhile)
    with lock_workdir(tmp_path):
        monkeypatch.undo()
        with (
            pytest.raises(ValueError, match="another run is at work"),
            lock_workdir(tmp_path),
        ):
            pass
