"""The hits of a search over images as a contact sheet."""

from collections.abc import Sequence
from typing import Any

from jaxcl.data.images.decoding import ImageRule, decode_image
from jaxcl.host.paths import AnyPath
from jaxcl.run.contact_sheet import Cell, write_sheet
from jaxcl.run.hits import Hit

__all__ = ["write_hits"]

_COLUMNS = 5
_RULE = ImageRule(size=128)


def write_hits(prefix: AnyPath, query: Any, hits: Sequence[Hit]) -> None:
    """Write `PREFIX.png` and `PREFIX.html` with the query and its hits, best first.

    Args:
      prefix: the path of the files without a suffix.
      query: a text, or an image: the bytes of a file, a PIL image or an array.
      hits: hits whose records have an `"image"`.

    Raises:
      ValueError: if an image cannot be decoded.
      OSError: if a file cannot be written.
    """
    if isinstance(query, str):
        asked, title = Cell(f"query: {query}"), f"Images for: {query}"
    else:
        asked, title = Cell("query", decode_image(query, _RULE)), "Images for an image"
    cells = [
        Cell(
            f"{hit.score:.3f} {hit.record['id']} {hit.record['text']}",
            decode_image(hit.record["image"], _RULE),
        )
        for hit in hits
    ]
    rows = [cells[first : first + _COLUMNS] for first in range(0, len(cells), _COLUMNS)]
    write_sheet(prefix.parent, prefix.name, title, [[asked], *rows])
