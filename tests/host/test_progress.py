"""Progress: lines in a log, a bar on a terminal."""

import io
import re
import sys

import pytest
from rich.console import Console
from rich.table import Table

from jaxcl.host import progress
from jaxcl.host.progress import progress_bar, say, show


@pytest.fixture
def console(monkeypatch):
    """Replace rich's console by one that writes to memory."""

    def use(*, terminal: bool) -> io.StringIO:
        written = io.StringIO()
        swapped = Console(file=written, force_terminal=terminal, width=100, color_system=None)
        monkeypatch.setattr(progress, "_console", lambda: swapped)
        return written

    return use


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test moves."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_one_line_with_the_final_count(console, clock):
    log = console(terminal=False)
    with progress_bar("reading", 3000) as advance:
        for _ in range(3):
            clock[0] += 2.0
            advance(1000)
    assert log.getvalue() == "reading: 3,000/3,000 6 s\n"


def test_long_work_gets_a_line_every_ten_seconds_with_the_time_left(console, clock):
    log = console(terminal=False)
    with progress_bar("training", 10) as advance:
        for step in range(10):
            clock[0] += 4.0
            advance(1, f"loss {step}")
    assert log.getvalue().splitlines() == [
        "training: 3/10 loss 2 12 s",
        "training: 6/10 loss 5 24 s, 16 s left",
        "training: 9/10 loss 8 36 s, 4 s left",
        "training: 10/10 loss 9 40 s",
    ]


def test_the_remaining_time_ignores_compilation_and_earlier_runs(console, clock):
    log = console(terminal=False)
    with progress_bar("training", 1_000) as advance:
        advance(500)
        for step_seconds in [60.0] + [1.0] * 10 + [2.0] * 5:
            clock[0] += step_seconds
            advance()
    assert log.getvalue().splitlines() == [
        "training: 501/1,000 60 s",
        "training: 511/1,000 70 s, 489 s left",
        "training: 516/1,000 80 s, 645 s left",
    ]


def test_work_that_stops_early_has_no_final_line(console, clock):
    log = console(terminal=False)
    with progress_bar("reading", 3) as advance:
        advance()
    assert log.getvalue() == ""


def test_a_log_holds_no_control_characters(console):
    log = console(terminal=False)
    with progress_bar("reading", 2) as advance:
        advance(2, note="done")
    line = log.getvalue().removesuffix("\n")
    assert line.startswith("reading: 2/2 done ")
    assert line.isprintable()


def test_a_terminal_gets_a_bar_with_count_and_note(console):
    screen = console(terminal=True)
    with progress_bar("reading", 3) as advance:
        advance()
        advance(2, note="loss 0.5")
    last = screen.getvalue().split("\r")[-1]
    assert re.search(r"reading.*━{10,}.*3/3.*loss 0\.5", last)


def test_the_bar_of_work_that_stops_early_keeps_its_count(console):
    screen = console(terminal=True)
    with progress_bar("reading", 4) as advance:
        advance(1)
    last = screen.getvalue().split("\r")[-1]
    assert "1/4" in last
    assert "4/4" not in last


@pytest.mark.parametrize("terminal", [False, True])
def test_square_brackets_are_text(console, terminal):
    screen = console(terminal=terminal)
    with progress_bar("reading [dev]", 1) as advance:
        advance(1, note="[bold] a[/b]")
    assert "reading [dev]" in screen.getvalue()
    assert "[bold] a[/b]" in screen.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_a_message_is_one_unchanged_line(console, terminal):
    screen = console(terminal=terminal)
    text = "a [red]long[/red] line of [1, 2] and 'text' " + "that continues " * 20
    say(text)
    assert screen.getvalue() == text + "\n"


def test_a_message_next_to_a_bar_has_a_separate_line(monkeypatch):
    screen = io.StringIO()
    terminal = {"file": screen, "force_terminal": True, "width": 100, "color_system": None}
    monkeypatch.setattr(progress, "_console", lambda: Console(**terminal))
    with progress_bar("training", 2) as advance:
        advance(1)
        with progress_bar("encoding", 1) as encoded:
            encoded()
        say("reassigned")
    say("done")
    assert re.search(r"\r\x1b\[2Kreassigned *\n", screen.getvalue())
    assert screen.getvalue().endswith("\x1b[?25hdone\n")


def test_standard_output_is_left_to_results(capsys):
    say("to the log")
    assert capsys.readouterr() == ("", "to the log\n")


def test_a_table_for_a_reader_that_has_gone_stops_nothing(capsys, monkeypatch):
    table = Table("method")
    table.add_row("dense")
    show(table)
    assert "dense" in capsys.readouterr().out

    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    for stream in (Gone(), None):
        monkeypatch.setattr(sys, "stdout", stream)
        show(table)
