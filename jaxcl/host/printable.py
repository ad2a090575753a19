"""Texts for people: data made safe to print, counts with nouns, and the faults of a JSON text."""

import json
import re

__all__ = ["counted", "json_fault", "printable"]

# C0 controls except tab and newline, DEL, C1 controls, controls of the writing direction, line and
# paragraph separators, and surrogates, which cannot be encoded.
_UNSAFE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    r"""Escape the characters that control a terminal or change the order of its text.

    They become `\uXXXX`, which JSON decodes to the same character, so a whole JSON text may be
    escaped. Newlines and tabs stay.

    Example:
        >>> printable("\x1b[31mred\n")
        '\\u001b[31mred\n'
    """
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """A number of things, with the noun in the singular for one.

    Args:
      count: the number.
      noun: the noun in the singular.
      plural: the noun in the plural; `None` to append an "s".

    Example:
      >>> counted(1, "step"), counted(2_000, "query", "queries")
      ('1 step', '2,000 queries')
    """
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def json_fault(error: Exception) -> str:
    """Why one line of a file is not JSON, and where in the line.

    The text of the error would count lines from the start of this line, not of the file.

    Example:
      >>> try:
      ...     json.loads('{"a": 1 "b"}')
      ... except ValueError as error:
      ...     json_fault(error)
      "Expecting ',' delimiter, at character 9"
    """
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, at character {error.pos + 1}"
    return str(error)
