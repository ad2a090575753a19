"""Private folders of a user, and users without a home directory."""

import os
import stat
import sys
import tempfile
from pathlib import Path

import pytest

from jaxcl.host.command import run_command
from jaxcl.host.command_flags import CommandParser
from jaxcl.host.user_folders import cache_folder, ensure_home, make_private, shared_folder

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX users")
OTHER = 12_345
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


def test_a_private_folder_is_made_with_its_parents(tmp_path):
    folder = tmp_path / "a" / "b"
    make_private(folder)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (folder, folder.parent)] == [0o700] * 2
    make_private(folder)


def test_data_are_shared_in_the_named_folder_or_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert shared_folder(None) == cache_folder() == tmp_path / "jaxcl"
    monkeypatch.setenv("HOME", "/home/someone")
    assert shared_folder("~/data") == Path("/home/someone/data")


@pytest.mark.parametrize("part", ["a", "a/b"])
@pytest.mark.parametrize("mode", [0o720, 0o702])
def test_a_folder_that_others_may_change_is_refused(tmp_path, part, mode):
    folder = tmp_path / "a" / "b"
    make_private(folder)
    (tmp_path / part).chmod(mode)
    with pytest.raises(PermissionError, match=rf"other users can write to .*{part};"):
        make_private(folder)


def test_the_sticky_bit_protects_a_parent_but_not_the_folder_itself(tmp_path):
    make_private(tmp_path / "a" / "b")
    (tmp_path / "a").chmod(0o1777)
    make_private(tmp_path / "a" / "b")
    with pytest.raises(PermissionError):
        make_private(tmp_path / "a")


@as_root
@pytest.mark.parametrize("part", ["a", "a/b"])
def test_a_folder_of_another_user_is_refused(tmp_path, part):
    make_private(tmp_path / "a" / "b")
    os.chown(tmp_path / part, OTHER, OTHER)
    with pytest.raises(PermissionError, match="belongs to another user"):
        make_private(tmp_path / "a" / "b")


def test_a_link_is_as_safe_as_the_folder_that_it_names(tmp_path):
    make_private(tmp_path / "open" / "target")
    (tmp_path / "link").symlink_to(tmp_path / "open" / "target")
    make_private(tmp_path / "link")
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(PermissionError):
        make_private(tmp_path / "link")


def test_a_file_or_a_dangling_link_in_the_way_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "absent")
    for name in ("file", "file/below", "dangling"):
        with pytest.raises((FileExistsError, NotADirectoryError)):
            make_private(tmp_path / name)


@pytest.mark.parametrize(
    ("variable", "folder"),
    [("/caches", "/caches"), ("", "/home/ada/.cache"), ("relative", "/home/ada/.cache")],
)
def test_caches_go_where_the_user_keeps_them(monkeypatch, variable, folder):
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("XDG_CACHE_HOME", variable)
    assert cache_folder() == Path(folder) / "jaxcl"


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    """A user without HOME and without an entry in /etc/passwd; temporary files stay in the test."""

    def no_entry(_):
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr("pwd.getpwuid", no_entry)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tmp_path.chmod(0o1777)
    return tmp_path


@pytest.mark.parametrize("variable", [None, "/"])
def test_a_user_without_a_home_gets_the_same_private_one_at_each_start(
    nobody, monkeypatch, capsys, variable
):
    homes = []
    monkeypatch.setattr(os, "access", lambda *_: False)
    for _ in range(2):
        if variable is None:
            monkeypatch.delenv("HOME", raising=False)
        else:
            monkeypatch.setenv("HOME", variable)
        run_command(CommandParser("jaxcl.x", "X."), lambda arguments: homes.append(Path.home()), [])
    assert homes == [nobody / f"jaxcl-home-{os.getuid()}"] * 2
    assert stat.S_IMODE(homes[0].stat().st_mode) == 0o700
    assert capsys.readouterr().err.count("this user has no home directory") == 2


def test_a_home_that_another_user_prepared_is_not_used(nobody):
    trap = nobody / f"jaxcl-home-{os.getuid()}"
    trap.mkdir()
    trap.chmod(0o777)
    ensure_home()
    assert Path.home() != trap
    assert stat.S_IMODE(Path.home().stat().st_mode) == 0o700


@pytest.mark.parametrize("home", ["/home/ada", "/"])
def test_a_home_that_exists_is_left_alone(monkeypatch, capsys, home):
    monkeypatch.setenv("HOME", home)
    monkeypatch.setattr(os, "access", lambda *_: True)
    ensure_home()
    assert os.environ["HOME"] == home
    assert capsys.readouterr().err == ""
