"""A snippet is one line with the query's words, for long and unusual texts too."""

import time

import pytest

from jaxcl.data.snippets import snippet

FILLER = "Lorem ipsum dolor sit amet consectetur. "


def test_a_short_text_is_shown_whole_in_one_line():
    assert snippet(" one\n\n two\t three ", "two") == "one two three"


@pytest.mark.parametrize("repeats", [3, 40, 200])
def test_the_passage_with_the_query_s_words_is_shown(repeats):
    text = FILLER * repeats + "Parse an ISO date from text. " + FILLER * repeats
    shown = snippet(text, "how to parse ISO dates")
    assert "Parse an ISO date" in shown
    assert shown.startswith("… ")
    assert shown.endswith(" …")
    assert len(shown) <= 160


def test_long_words_count_for_more_than_short_ones():
    text = FILLER + "a of to a of to. " + FILLER * 10 + "A barometer stands here. " + FILLER * 10
    assert "barometer" in snippet(text, "a of to barometer")


def test_short_words_match_whole_words_only():
    text = FILLER + "artist artful arts. " + FILLER * 10 + "Some art here. " + FILLER * 10
    assert "Some art here" in snippet(text, "art")


@pytest.mark.parametrize("query", ["", "?!", "absent", "ipsum"])
def test_without_a_match_or_with_an_early_one_it_is_the_beginning(query):
    shown = snippet(FILLER * 20, query)
    assert shown.startswith("Lorem ipsum")
    assert shown.endswith(" …")


@pytest.mark.parametrize("width", [80, 81, 160])
@pytest.mark.parametrize("text", ["x" * 1000, "x " * 1000, "日本語" * 500, "ẞß" * 99, "a" * 161])
def test_no_text_makes_it_longer_than_the_width(text, width):
    for query in ("x", "日本語", "ß", "a" * 200, "[(*"):
        shown = snippet(text, query, width=width)
        assert width // 2 <= len(shown) <= width
        assert "\n" not in shown


def test_the_end_of_a_text_is_shown_without_dots():
    assert snippet(FILLER * 10 + "The barometer", "barometer").endswith("The barometer")


def test_a_huge_text_takes_little_time():
    begin = time.monotonic()
    snippet("ab " * 2_000_000, "ab " * 1000)
    assert time.monotonic() - begin < 5
