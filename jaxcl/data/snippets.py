"""A one-line passage of a text, to show next to a search hit."""

import re

__all__ = ["snippet"]

_SEARCHED = 20_000
"""The number of characters of a text that are searched for the query's words."""
_MOST_WORDS = 32
_SHORT = 4
"""Words with fewer letters only match whole words; others also match the beginning of a word."""
_LEAD = 30
"""The number of characters shown before the first match."""


def snippet(text: str, query: str, *, width: int = 160) -> str:
    """The passage of a text that contains the most words of a query, on one line.

    Long words count for more than short ones, because short words are often common. The first of
    several equally good passages is taken; without any match, the beginning of the text. Control
    characters are kept; escape them before printing.

    Args:
      text: the text.
      query: the words that were searched for.
      width: the maximum number of characters, at least 80, including the dots for omitted text.

    Example:
      >>> snippet("Open a socket. " * 9 + "Then parse a date.", "parse an ISO date", width=80)
      '… a socket. Open a socket. Open a socket. Open a socket. Then parse a date.'
    """
    line = " ".join(text[:_SEARCHED].split())
    cut = len(text) > _SEARCHED
    if len(line) <= width and not cut:
        return line
    first = _start(line, query, width)
    body = line[first : first + width - 2 * (first > 0) - 2]
    rest = line[first + len(body) :]
    if rest and " " in body[width // 2 :] and not rest.startswith(" "):
        body = body.rsplit(" ", 1)[0]
    return ("… " if first else "") + body.rstrip() + (" …" if rest or cut else "")


def _start(line: str, query: str, width: int) -> int:
    """The position where the passage begins: the start of a word, if there is one nearby."""
    words = sorted(set(re.findall(r"\w+", query.lower())), key=len, reverse=True)[:_MOST_WORDS]
    if not words:
        return 0
    # The last letters of a long word are dropped, so that "photos" finds "photo".
    stems = [re.escape(word[: max(_SHORT, len(word) - 2)]) for word in words]
    ends = [r"\b" if len(word) < _SHORT else "" for word in words]
    either = "|".join(stem + end for stem, end in zip(stems, ends, strict=True))
    pattern = re.compile(rf"\b(?:{either})", re.IGNORECASE)
    matches = [(match.start(), match[0].lower()) for match in pattern.finditer(line)]
    best, best_value = 0, 0
    for number, (begin, _) in enumerate(matches):
        inside = {
            word
            for start, word in matches[number : number + width]
            if start < begin + width * 3 // 4
        }
        value = sum(map(len, inside))
        if value > best_value:
            best, best_value = begin, value
    if best < width // 2:  # the beginning of the text shows the match as well
        return 0
    first = min(best - _LEAD, len(line) - (width - 4))
    space = line.find(" ", first, best)
    return best if space < 0 else space + 1
