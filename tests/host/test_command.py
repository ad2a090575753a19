"""How commands run: flags, errors, exit codes and help."""

import argparse
import ast
import importlib
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import pytest

from jaxcl.host.command import UserError, run_command
from jaxcl.host.command_flags import CommandParser, user_path
from jaxcl.host.command_names import commands
from jaxcl.host.processes import Stopped, stop_requests
from jaxcl.run.checkpoint_record import CheckpointError
from jaxcl.run.reports import DivergenceError

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "jaxcl"
DOC = """Counts.

    python -m jaxcl.count --up-to 3
"""
NAMES = ["bench", "check_grad", "compare", "embed", "evaluate", "export", "mine", "plan"]
NAMES += ["search", "topics", "train"]


def parser() -> CommandParser:
    made = CommandParser("jaxcl.count", DOC)
    made.add_argument("words", nargs="*")
    made.add_argument("--up-to", type=int, default=1, help="the last number")
    made.add_argument("--place", type=user_path, help="a folder")
    made.add_fields("config", help="another value")
    return made


def raising(error: BaseException):
    def run(arguments):
        raise error

    return run


def left(error: BaseException, *argv: str) -> int:
    """The exit code of a command that raises."""
    with pytest.raises(SystemExit) as stopped:
        run_command(parser(), raising(error), argv, interrupted="the end")
    return stopped.value.code


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("too\n   wide"), 1, "error: too wide"),
        (FileNotFoundError("nowhere"), 1, "error: nowhere"),
        (UserError("no"), 1, "error: no"),
        (CheckpointError("damaged"), 1, "error: damaged"),
        (DivergenceError("step 2"), 1, "error: step 2"),
        (ValueError("a:x:b [red]c[/red]"), 1, "error: a:x:b [red]c[/red]"),
        (KeyboardInterrupt(), 130, "the end"),
        (Stopped(signal.SIGTERM, 7), 143, "stopped at step 7; the same command resumes from there"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_an_error_is_one_line_and_an_exit_code(capsys, error, code, line):
    assert left(error) == code
    assert capsys.readouterr().err == line + "\n"


@pytest.mark.parametrize("flag", ["-v", "--verbose"])
def test_verbose_adds_the_traceback(capsys, flag):
    assert left(ValueError("too wide"), flag) == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback")
    assert said.endswith("\nerror: too wide\n")


def test_full_devices_are_one_line_and_verbose_adds_the_traceback(capsys):
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 20G of 16G")
    assert left(error) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert left(error, "-v") == 1
    assert capsys.readouterr().err.startswith("Traceback")


def test_an_error_that_is_not_the_user_s_keeps_its_class():
    with pytest.raises(ZeroDivisionError):
        run_command(parser(), raising(ZeroDivisionError()), [])


def test_a_command_returns_what_its_function_returns(capsys):
    assert run_command(parser(), lambda arguments: arguments.up_to, ["--up-to=3"]) == 3
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("spelling", [["--up-to=3"], ["--up_to=3"], ["--up-to", "3"]])
def test_dashes_and_underscores_are_one_spelling(spelling):
    assert parser().parse(spelling).up_to == 3


def test_values_and_words_keep_their_underscores():
    arguments = parser().parse(["--place=a_b", "c_d", "--", "--e_f"])
    assert arguments.place == Path("a_b")
    assert arguments.words == ["c_d", "--e_f"]


@pytest.mark.parametrize("spelling", [["--config.a_b.c=-1=x"], ["--config.a_b.c", "-1=x"]])
def test_fields_come_with_or_without_an_equals_sign(spelling):
    given = parser().parse(["one", *spelling, "--config.d=", "two"])
    assert given.config_fields == [("a_b.c", "-1=x"), ("d", "")]
    assert given.words == ["one", "two"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--upto=3"], "unrecognized arguments: --upto=3"),
        (["--up=3"], "unrecognized arguments: --up=3"),  # no abbreviations
        (["--up-to=x"], "argument --up-to: invalid int value: 'x'"),
        (["--config.a"], "--config.a needs a value, as in --config.a=VALUE"),
        (["--config.a", "--up-to=3"], "--config.a needs a value"),
        (["--config", "x"], "unrecognized arguments: --config"),
    ],
)
def test_flags_that_cannot_be_read_are_one_line_and_exit_code_2(capsys, argv, message):
    with pytest.raises(SystemExit) as stopped:
        parser().parse(argv)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert line.endswith("; python -m jaxcl.count --help lists the flags")


def test_a_path_may_begin_with_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    assert parser().parse(["--place", "~/run"]).place == Path("/home/ada/run")
    assert parser().parse(["--place", "a~/run"]).place == Path("a~/run")


def test_unknown_arguments_are_passed_on_where_that_is_asked_for():
    outer = CommandParser("jaxcl.outer", DOC, passes_on=True)
    outer.add_argument("--json")
    given = outer.parse(["--json=x", "--inner_flag", "3", "--help"])
    assert (given.json, given.rest) == ("x", ["--inner-flag", "3", "--help"])


def test_the_list_of_commands_is_that_of_the_modules_that_run():
    assert list(commands()) == NAMES
    assert all(re.fullmatch(r"[A-Z].+\.", summary) for summary in commands().values())
    printed = python("-m", "jaxcl").stdout
    listed = re.findall(r"^  (\w+) +(.+)$", printed.partition("example:")[0], re.MULTILINE)
    assert dict(listed) == commands()
    assert "  python -m jaxcl.train --config configs/code_search.py\n" in printed


@pytest.mark.parametrize("name", NAMES)
def test_help_lists_all_flags_and_shows_an_example(capsys, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "200")
    module = importlib.import_module(f"jaxcl.{name}" + (".__main__" if name == "bench" else ""))
    shown = help_of(module.main, capsys)
    assert missing_flags(shown, {*flags_in(Path(module.__file__)), "--verbose"}) == set()
    assert missing_flags(shown, {"--no-such-flag"}) == {"--no-such-flag"}
    assert f"\n    python -m jaxcl.{name} " in shown
    if name in ("train", "compare", "plan", "check_grad"):
        assert missing_flags(shown, {"--config", "--config.FIELD"}) == set()


def help_of(main, capsys) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert not stopped.value.code
    return capsys.readouterr().out


def flags_in(path: Path) -> set[str]:
    """The flags that a file defines, in calls or in loops over their names."""
    return {
        node.value
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.fullmatch(r"--[a-z][a-z-]+", node.value)
    }


def missing_flags(shown: str, flags: set[str]) -> set[str]:
    options = shown.partition("\noptions:\n")[2]
    heads = re.findall(r"^  (-.*?)(?:  |$)", options, re.MULTILINE)  # flags, before their text
    return flags - set(re.findall(r"--[\w.-]+", " ".join(heads)))


def test_the_example_in_help_is_one_that_can_be_read():
    """Every example can be parsed with the flags of its command."""
    for name in set(NAMES) - {"bench"}:
        module = importlib.import_module(f"jaxcl.{name}")
        example = re.search(rf"python -m jaxcl\.{name} ((?:.*\\\n)*.*)", module.__doc__)[1]
        parsed = []

        def note(parser, run, argv, parsed=parsed, **_):
            parsed.append(parser.parse(argv))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "run_command", note)
            module.main(example.replace("\\\n", " ").split())
        assert len(parsed) == 1, name


@pytest.mark.parametrize("module", ["losses.softmax", "metrics", "evaluation", "host.command"])
def test_a_module_that_is_not_a_command_is_refused(module):
    done = python("-m", f"jaxcl.{module}")
    assert done.returncode == 1
    assert done.stderr == (
        f"error: jaxcl.{module} is not a command; python -m jaxcl lists the commands\n"
    )


@pytest.mark.parametrize(
    "program", ["import jaxcl", "import sys; sys.argv = ['x', '-m']; import jaxcl.metrics"]
)
def test_a_program_that_imports_jaxcl_is_not_refused(program):
    done = python("-c", program, "-m", "jaxcl.metrics")
    assert (done.returncode, done.stderr) == (0, "")


def test_importing_the_commands_defines_no_flags():
    names = ", ".join(f"jaxcl.{name}" for name in NAMES)
    program = f"""
from absl import flags
before = set(flags.FLAGS)
import {names}
print({{flag for flag in set(flags.FLAGS) - before
       if flags.FLAGS.find_module_defining_flag(flag).startswith("jaxcl")}})
"""
    done = python("-c", program)
    assert done.stdout == "set()\n", done.stderr


def test_signal_handlers_are_left_alone_outside_of_the_main_thread():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def train():
        with stop_requests() as asked_to_stop:
            seen.extend([signal.getsignal(signal.SIGTERM), asked_to_stop(1)])

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert seen == [before, None]
    with stop_requests():  # replaces the main thread's handlers
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_each_signal_asks_for_a_stop_once(number, capsys):
    outer = signal.signal(number, signal.SIG_DFL)  # SIGHUP is ignored under `nohup`
    try:
        with stop_requests() as asked_to_stop:
            assert asked_to_stop(1) is None
            os.kill(os.getpid(), number)
            assert asked_to_stop(1) == number
            assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, outer)
    assert f"{number.name} received: saving, then stopping" in capsys.readouterr().err


def test_a_hangup_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_requests() as asked_to_stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert asked_to_stop(1) is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_argparse_alone_would_neither_join_spellings_nor_print_one_line(capsys):
    plain = argparse.ArgumentParser()
    plain.add_argument("--up-to", type=int)
    with pytest.raises(SystemExit):
        plain.parse_args(["--up_to=3"])
    assert len(capsys.readouterr().err.splitlines()) > 1


def python(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
