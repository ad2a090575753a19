"""Traces, cached programs, and warnings about recompiled steps."""

import stat
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxcl.run import watch as watch_module
from jaxcl.run.watch import Watch, keep_compiled, profiled_steps


def test_a_recompiled_step_is_reported(tmp_path, capsys):
    step = jax.jit(lambda x: x + 1)
    with Watch(tmp_path, None) as watch:
        for number, size in enumerate((4, 4, 5, 5), 1):
            batch = jnp.zeros(size)
            watch.before(number)
            step(batch)
            watch.dispatched(number)
            jnp.ones((number, 7)) * 3.0  # other compilations in the meantime are not steps
    said = capsys.readouterr().err
    assert said.count("was compiled again") == 1
    assert "step 3 was compiled again" in said
    assert not list(tmp_path.iterdir())


def test_the_requested_steps_are_traced(tmp_path):
    step = jax.jit(lambda x: x + 1)
    with Watch(tmp_path, (2, 3)) as watch:
        for number in (1, 2, 3):
            watch.before(number)
            step(jnp.zeros(4)).block_until_ready()
            assert watch._tracing == (number >= 2)
            watch.after(number)
            assert watch._tracing == (number == 2)  # until the next step has started
    assert any(path.name.endswith(".xplane.pb") for path in tmp_path.rglob("*"))


def test_a_run_that_resumes_within_the_traced_steps_traces_the_rest(tmp_path, capsys):
    with Watch(tmp_path / "a", (2, 9)) as watch:
        watch.before(5)
        assert watch._tracing
    assert "wrote a trace of the steps to" in capsys.readouterr().err
    with Watch(tmp_path / "b", (2, 9)) as watch:
        watch.before(9)
        watch.after(9)
    assert "no trace, since no step from 2 to 8 was trained here" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_a_trace_ends_with_its_run(tmp_path):
    def stopped_run():
        with Watch(tmp_path, (1, 9)) as watch:
            watch.before(1)
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        stopped_run()
    assert any(path.name.endswith(".xplane.pb") for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("given", ["10", "9:3", "0:4", "a:b"])
def test_steps_that_cannot_be_traced_are_named(given):
    with pytest.raises(ValueError, match=f"--profile={given}; give the first step"):
        profiled_steps(given)
    assert profiled_steps("10:12") == (10, 12)
    assert profiled_steps(None) is None


@pytest.fixture
def updates(monkeypatch, tmp_path):
    """The updates of JAX's config, with the user's cache in the test's folder."""
    told = {}
    monkeypatch.setattr(jax.config, "update", lambda name, value: told.update({name: value}))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return told


def test_compiled_programs_are_kept_in_the_cache_of_the_user_alone(tmp_path, updates, capsys):
    keep_compiled()
    folder = Path(updates["jax_compilation_cache_dir"])
    assert folder.parent == tmp_path / "jaxcl" / "compiled"
    assert folder.name.startswith("cpu-")
    for made in (folder, folder.parent, folder.parents[1]):
        assert stat.S_IMODE(made.stat().st_mode) == 0o700
    assert capsys.readouterr().err == ""


def test_a_folder_that_the_environment_names_wins(tmp_path, updates, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    keep_compiled()
    assert updates == {}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_programs_that_others_may_have_written_are_not_loaded(tmp_path, updates, capsys, mode):
    keep_compiled()
    folder = Path(updates.pop("jax_compilation_cache_dir"))
    folder.chmod(mode)
    keep_compiled()
    assert "jax_compilation_cache_dir" not in updates
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: compiled programs are not cached")


def test_a_cache_that_cannot_be_created_gives_one_warning(tmp_path, updates, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    keep_compiled()
    assert "jax_compilation_cache_dir" not in updates
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(watch_module, "_SECONDS_UNTIL_LINES", (0.01, 0.01, 0.01))


def until_said(capsys, text):
    """The lines that are said until one has a text; fails after a minute without it."""
    said, deadline = "", time.monotonic() + 60
    while text not in said:
        assert time.monotonic() < deadline, said
        time.sleep(0.005)
        said += capsys.readouterr().err
    return said


def test_a_slow_first_step_says_that_it_is_compiled_and_computed(tmp_path, impatient, capsys):
    done = []
    with Watch(tmp_path, None) as watch:
        advance = watch.ending_first(lambda *arguments: done.append(arguments))
        watch.before(7)
        assert "step 7 is still being compiled after 0 s" in until_said(capsys, "compiled")
        watch.dispatched(7)
        until_said(capsys, "step 7 is not complete yet")
        advance(1, "loss 0.5")
        capsys.readouterr()
        watch.before(8)
        time.sleep(0.05)
        watch.dispatched(8)
    assert capsys.readouterr().err == ""
    assert done == [(1, "loss 0.5")]


def test_a_first_step_that_fails_ends_the_messages(tmp_path, impatient, capsys):
    def failing():
        with Watch(tmp_path, None) as watch:
            watch.before(1)
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        failing()
    capsys.readouterr()
    time.sleep(0.05)
    assert capsys.readouterr().err == ""


def test_a_quick_first_step_says_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(watch_module, "_SECONDS_UNTIL_LINES", (0.5, 0.5, 0.5))
    with Watch(tmp_path, None) as watch:
        advance = watch.ending_first(lambda *_: None)
        watch.before(1)
        watch.dispatched(1)
        advance(1, "loss 0.5")
        time.sleep(0.8)
    assert capsys.readouterr().err == ""
