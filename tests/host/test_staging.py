"""Staging folders of killed processes are removed; running processes keep theirs."""

import os
import subprocess
import sys
import time

import pytest

from jaxcl.host.staging import put_in_place, staging_folder

A_DAY_AGO = (time.time() - 25 * 60 * 60,) * 2


def test_a_finished_folder_is_put_in_place_and_the_staging_folder_is_removed(tmp_path):
    with staging_folder(tmp_path / "parent" / "table") as folder:
        (folder / "made").mkdir()
        (folder / "made" / "content").write_text("abc")
        put_in_place(folder / "made", tmp_path / "parent" / "table", replace=False)
    assert [path.name for path in (tmp_path / "parent").iterdir()] == ["table"]
    assert (tmp_path / "parent" / "table" / "content").read_text() == "abc"


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), staging_folder(tmp_path / "table"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("replace", "content"), [(True, "new"), (False, "old")])
def test_a_place_that_is_taken_is_replaced_or_left_alone(tmp_path, replace, content):
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "content").write_text("old")
    with staging_folder(tmp_path / "table") as folder:
        (folder / "made").mkdir()
        (folder / "made" / "content").write_text("new")
        put_in_place(folder / "made", tmp_path / "table", replace=replace)
    assert (tmp_path / "table" / "content").read_text() == content
    assert len(list(tmp_path.iterdir())) == 1


def test_the_folder_has_the_mode_that_the_umask_leaves(tmp_path):
    before = os.umask(0o022)
    try:
        with staging_folder(tmp_path / "table") as folder:
            assert folder.stat().st_mode & 0o777 == 0o755
    finally:
        os.umask(before)


HELD = """
import sys
from pathlib import Path
from jaxcl.host.staging import staging_folder
with staging_folder(Path(sys.argv[1])) as folder:
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_a_killed_process_s_folder_is_removed_and_a_running_one_s_stays(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HELD, str(tmp_path / "table")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        [folder] = [other.stdout.readline().strip()]
        os.utime(folder, A_DAY_AGO)
        with staging_folder(tmp_path / "another"):
            assert os.path.exists(folder)
        other.kill()
        other.wait()
        with staging_folder(tmp_path / "another"):
            assert not os.path.exists(folder)


def test_a_folder_without_a_lock_is_removed_after_a_day(tmp_path):
    """A folder without a lock, as from earlier versions."""
    old, new = tmp_path / "table.unfinished-a", tmp_path / "table.unfinished-b"
    for folder in (old, new):
        folder.mkdir()
    os.utime(old, A_DAY_AGO)
    with staging_folder(tmp_path / "table"):
        assert not old.exists()
        assert new.exists()


def test_a_link_in_the_place_of_a_staging_folder_is_not_followed(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / ".lock").touch()
    (tmp_path / "table.unfinished-a").symlink_to(tmp_path / "precious")
    with staging_folder(tmp_path / "table"):
        assert (tmp_path / "precious" / ".lock").exists()
