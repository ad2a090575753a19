"""Output that cannot be written loses its lines, but never stops the run."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxcl.data import python_functions
from jaxcl.host.command import run_command
from jaxcl.host.command_flags import CommandParser
from jaxcl.host.output import LossyStream, check_output
from jaxcl.host.progress import progress_bar, say

ROOT = Path(__file__).parents[2]
ASCII = {"PYTHONIOENCODING": "ascii"}

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX files and signals")

# Prints in every way that a command can, then creates a file.
CHATTY = """
import sys, warnings
from pathlib import Path
import rich
from absl import logging
from rich.table import Table
from jaxcl.host.command import run_command
from jaxcl.host.command_flags import CommandParser
from jaxcl.host.progress import progress_bar, say

def run(arguments):
    for number in range(3):
        say(f"→ {number} " + "wide " * 4000)
        with progress_bar("training →", 2) as advance:
            advance(2, note="größer")
        logging.warning("→")
        warnings.warn("→")
        print("→ result", flush=True)
        rich.print(Table("→", "name"))
    Path(sys.argv.pop()).write_text("done")
    FAILS

sys.argv, marker = sys.argv[:1], sys.argv[1]
parser = CommandParser("jaxcl.chatty", "Chats.")
def with_marker(arguments):
    sys.argv.append(marker)
    run(arguments)
run_command(parser, with_marker)
"""


def closed_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@contextlib.contextmanager
def broken(kind: str):
    """A file descriptor that accepts no output."""
    number = closed_pipe() if kind == "closed pipe" else os.open("/dev/full", os.O_WRONLY)
    try:
        yield number
    finally:
        os.close(number)


def chat(marker: Path, *, fails: str = "", **options) -> subprocess.CompletedProcess:
    program = CHATTY.replace("FAILS", fails or "pass")
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | options.pop("env", {})
    return subprocess.run(
        [sys.executable, "-c", program, str(marker)],
        cwd=ROOT,
        env=environment,
        timeout=120,
        check=False,
        **options,
    )


@pytest.mark.parametrize("kind", ["closed pipe", "full"])
@pytest.mark.parametrize("streams", [("stdout",), ("stderr",), ("stdout", "stderr")])
def test_a_broken_stream_stops_nothing(tmp_path, kind, streams):
    others = dict.fromkeys(("stdout", "stderr"), subprocess.DEVNULL)
    with broken(kind) as number:
        done = chat(tmp_path / "marker", **others | dict.fromkeys(streams, number))
    assert done.returncode == 0
    assert (tmp_path / "marker").read_text() == "done"


def test_an_error_keeps_its_exit_code_if_it_cannot_be_printed(tmp_path):
    with broken("full") as number:
        for fails, code in (("raise ValueError('no')", 1), ("raise KeyboardInterrupt", 130)):
            done = chat(tmp_path / "marker", fails=fails, stdout=number, stderr=number)
            assert done.returncode == code


@pytest.mark.parametrize("number", [1, 2])
def test_a_stream_that_is_closed_from_the_start_stops_nothing_and_enters_no_file(tmp_path, number):
    # A library prints to the file descriptor while a file is open.
    writes = f"import os; file = open(marker, 'a'); os.write({number}, b'from C')"
    program = CHATTY.replace("FAILS", writes)
    done = subprocess.run(
        ["bash", "-c", f'exec "$0" -c "$1" "$2" {number}>&-', sys.executable, program, "marker"],
        cwd=tmp_path,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0
    assert (tmp_path / "marker").read_text() == "done"


def test_characters_that_the_encoding_lacks_are_escaped(tmp_path):
    done = chat(tmp_path / "marker", env=ASCII, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "\\u2192 result" in done.stdout
    assert "\\u2192 0" in done.stderr
    assert "gr\\xf6\\xdfer" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [["jaxcl"], ["jaxcl.train", "--help"]])
def test_commands_start_where_the_locale_is_ascii(arguments):
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | locale,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("module", ["jaxcl", "jaxcl.train"])
def test_help_for_a_closed_reader_is_not_an_error(module):
    with broken("closed pipe") as number:
        done = subprocess.run(
            [sys.executable, "-m", module, "--help"],
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stdout=number,
            stderr=subprocess.PIPE,
            timeout=120,
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, b"")


class Broken(io.StringIO):
    """A stream that raises."""

    def __init__(self, error: Exception):
        super().__init__()
        self.raised = error

    def write(self, text: str) -> int:
        raise self.raised

    def flush(self) -> None:
        raise self.raised


ERRORS = [
    BrokenPipeError(32, "Broken pipe"),
    OSError(28, "No space left on device"),
    BlockingIOError(11, "try again"),
    ValueError("I/O operation on closed file"),
    RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_program_that_calls_the_library_is_not_stopped_either(monkeypatch, error):
    monkeypatch.setattr(sys, "stderr", Broken(error))
    say("to a closed log")
    with progress_bar("reading", 1) as advance:
        advance()
    monkeypatch.setattr(sys, "stderr", None)
    say("to a closed log")


def test_a_bar_on_a_terminal_that_is_gone_stops_nothing(monkeypatch):
    screen = Broken(OSError(5, "Input/output error"))
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    with progress_bar("outer", 1) as advance, progress_bar("inner", 1) as inner:
        inner()
        say("between")
        advance()


def test_a_lossy_stream_still_raises_errors_of_the_caller():
    with pytest.raises(TypeError):
        LossyStream(io.StringIO()).write(3)


def command(run, error: Exception | None, monkeypatch) -> int:
    """The exit code of a command whose standard output raises an error."""
    if error is not None:
        monkeypatch.setattr(sys, "stdout", Broken(error))
    with pytest.raises(SystemExit) as stopped:
        run_command(CommandParser("jaxcl.x", "X."), run, [])
    return stopped.value.code


def test_results_that_are_nowhere_else_are_an_error_on_a_full_disk(monkeypatch, capsys):
    def run(arguments):
        print("a result")
        check_output()

    assert command(run, ERRORS[1], monkeypatch) == 1
    assert capsys.readouterr().err == (
        "error: cannot write to standard output ([Errno 28] No space left on device)\n"
    )
    assert command(run, ERRORS[0], monkeypatch) == 0
    assert capsys.readouterr().err == ""


def test_output_that_was_written_passes_the_check(capsys):
    run_command(CommandParser("jaxcl.x", "X."), lambda arguments: (print("a"), check_output()), [])
    assert capsys.readouterr().out == "a\n"


INTERRUPTED = """
import sys, time
from jaxcl.host.command import run_command
from jaxcl.host.command_flags import CommandParser
from jaxcl.host.processes import stop_requests

def rest():
    print("ready", flush=True)
    time.sleep(60)

def run(arguments):
    WORK

run_command(CommandParser("jaxcl.x", "X."), run, interrupted="interrupted")
"""
WAITS = "rest()"
# Python drops exceptions in finalisers; JAX has such callbacks in the garbage collector.
LOSES = """
    class Lossy:
        def __del__(self):
            rest()
    Lossy()
    print("lost", flush=True)
    time.sleep(TAIL)
    with stop_requests():
        print("trained")
"""
CLEANS_UP = """
    try:
        rest()
    finally:
        print("lost", flush=True)
        time.sleep(60)
"""


def interrupted(work: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED.replace("WORK", work)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    return process


def test_the_first_interrupt_ends_a_command_cleanly():
    process = interrupted(WAITS)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "interrupted\n")


def test_an_interrupt_ends_the_interpreters_that_parse_without_a_traceback():
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", python_functions.__file__],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdin.write(b" " * 2**20)  # more than a pipe holds, so the reader has started
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (-signal.SIGINT, b"")


def test_an_interrupt_that_python_drops_ends_the_command_before_the_first_step():
    process = interrupted(LOSES.replace("TAIL", "0"))
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == "lost\n"
    assert error.endswith("interrupted\n")


@pytest.mark.parametrize("work", [LOSES.replace("TAIL", "60"), CLEANS_UP])
def test_the_second_interrupt_ends_a_command_at_once(work):
    process = interrupted(work)
    assert process.stdout.readline() == "lost\n"
    process.send_signal(signal.SIGINT)
    begun = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert time.monotonic() - begun < 10


def test_an_interrupt_while_a_command_is_imported_leaves_no_traceback():
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "jaxcl.train", "--help"],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert any("jax._src" in line for line in process.stderr)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert "Traceback" not in error
