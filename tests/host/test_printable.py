"""Control characters of data reach neither the terminal nor Markdown nor JSON."""

import io
import json
import sys
import unicodedata

import numpy as np
import pytest

from jaxcl import compare, search, topics
from jaxcl.data.sources import InMemoryPairs
from jaxcl.host.command import run_command
from jaxcl.host.command_flags import CommandParser
from jaxcl.host.printable import printable
from jaxcl.host.progress import progress_bar, say
from jaxcl.run.mining_report import Example, write_reports
from jaxcl.run.vector_search import Ranking

HOSTILE = "a\x1b[2J\x9b31m\x07\x7f\r\u202eb\u2066c\u2028\u200f\ud800"


def is_unsafe(character: str) -> bool:
    """From Unicode's tables: controls, writing directions, separators, surrogates."""
    direction = unicodedata.bidirectional(character) in {"LRE", "RLE", "PDF", "LRO", "RLO"}
    isolate = unicodedata.bidirectional(character) in {"LRI", "RLI", "FSI", "PDI"}
    mark = character in "\u061c\u200e\u200f"
    kind = unicodedata.category(character) in {"Cc", "Cs", "Zl", "Zp"}
    return (kind and character not in "\n\t") or direction or isolate or mark


def test_exactly_the_unsafe_characters_are_escaped():
    for first in range(0, sys.maxunicode + 1, 2**12):
        characters = [chr(number) for number in range(first, first + 2**12)]
        escaped = [f"\\u{ord(one):04x}" if is_unsafe(one) else one for one in characters]
        assert printable("".join(characters)) == "".join(escaped)


def test_text_that_is_safe_stays():
    text = "def größe(x):\n\treturn '→ 你好 🏴'\u200d\n"
    assert printable(text) == text


def test_json_reads_the_same_text_back():
    text = json.dumps([HOSTILE], ensure_ascii=False)
    assert is_printed_safely(printable(text))
    assert json.loads(printable(text)) == [HOSTILE]


def is_printed_safely(text: str) -> bool:
    return bool(text) and not any(map(is_unsafe, text))


def test_the_check_detects_unsafe_code():
    assert not any(
        is_printed_safely(f"a{character}") for character in HOSTILE[1:] if is_unsafe(character)
    )


def test_messages_are_safe_to_print(capsys):
    say(HOSTILE)
    with progress_bar(HOSTILE, 1) as advance:
        advance(note=HOSTILE)
    assert is_printed_safely(capsys.readouterr().err)


def test_a_bar_on_a_terminal_shows_text_safely(monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "300")
    with progress_bar("\x1b]0;title\x07", 1) as advance:
        advance(note="\u202e")
    shown = screen.getvalue()
    assert "\\u001b]0;title\\u0007" in shown
    assert "\x1b]0;" not in shown
    assert "\u202e" not in shown


@pytest.mark.parametrize("flags", [[], ["--verbose"]])
@pytest.mark.parametrize("error", [ValueError(HOSTILE), OSError(2, HOSTILE, HOSTILE)])
def test_errors_are_printed_safely(capsys, flags, error):
    def fail(arguments):
        raise error

    with pytest.raises(SystemExit):
        run_command(CommandParser("jaxcl.x", "X."), fail, flags)
    assert is_printed_safely(capsys.readouterr().err)


def test_the_traceback_of_a_mistake_is_printed_safely(capsys):
    run_command(CommandParser("jaxcl.x", "X."), lambda arguments: None, [])
    mistake = KeyError(HOSTILE)
    sys.excepthook(KeyError, mistake, None)
    sys.excepthook(ZeroDivisionError, ZeroDivisionError(HOSTILE), None)
    assert is_printed_safely(capsys.readouterr().err)


def test_arguments_that_cannot_be_parsed_are_printed_safely(capsys):
    with pytest.raises(SystemExit):
        CommandParser("jaxcl.x", "X.").parse([f"--{HOSTILE}"])
    assert is_printed_safely(capsys.readouterr().err)


RECORD = {
    "query": HOSTILE,
    "key": f"def f():  # {HOSTILE}",
    "qualified_name": f"f\n  1  0.9999  forged {HOSTILE}",
    "file": HOSTILE,
    HOSTILE: HOSTILE,
}


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_hits_are_printed_safely(monkeypatch, capsys, flags):
    best = Ranking(np.zeros(1, np.int32), np.full(1, 0.5, np.float32))
    opened = search.Search(lambda queries, top: [best], lambda rows: [RECORD])
    monkeypatch.setattr(search, "open_search", lambda *_, **__: opened)
    search.main(["--workdir", "run", *flags, "query"])
    shown = capsys.readouterr().out
    assert is_printed_safely(shown)
    if flags:
        assert json.loads(shown)[0]["query"] == HOSTILE
    else:
        assert len(shown.splitlines()) == 2, "a name forges no line"


def test_examples_for_a_reader_are_safe(tmp_path):
    two, pairs = np.ones((2, 4), np.float32), InMemoryPairs([HOSTILE] * 2, [HOSTILE] * 2)
    assert is_printed_safely(topics._examples(pairs, np.zeros(2, np.int32), two, two[:1]))
    example = Example(HOSTILE, [HOSTILE], 1.0, [(0, 0.5, HOSTILE)])
    write_reports(tmp_path / "mined.npz", {}, [example])
    assert is_printed_safely((tmp_path / "mined.examples.md").read_text())


def test_the_table_of_a_comparison_is_safe_and_has_its_columns():
    place = {"mean": 0.5, "seeds": [0.5], "difference": 0.0, "error_over_queries": 0.1}
    place |= {"error_over_seeds": None, "interval": [-0.2, 0.2], "interval_over": "queries only"}
    record = {"baseline": f"a|b\nc{HOSTILE}", "results": {"test/dense": place}, "seconds": 1.0}
    own, other = ({"setting": name} for name in (record["baseline"], f"d|e\nf{HOSTILE}"))
    table = compare.as_markdown([record | own, record | other])
    assert is_printed_safely(table)
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert [line.replace(r"\|", "").count("|") for line in lines] == [9] * 4
