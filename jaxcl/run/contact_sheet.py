"""Contact sheets: rows of images with captions, as a PNG and as one HTML page.

The page needs no network: images are part of it. Captions and titles come from data, so they are
escaped in the page, and control characters are removed from both files.
"""

import base64
import html
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxcl.data.images.decoding import pillow
from jaxcl.host.files import write_whole
from jaxcl.host.paths import AnyPath
from jaxcl.host.printable import printable
from jaxcl.typing import UInt8

__all__ = ["Cell", "draw_sheet", "sheet_page", "write_sheet"]

_CELL, _GAP, _LINE, _LINES = 128, 8, 13, 3  # pixels, and the lines of text below a picture
_TITLE = 24
_CHARACTERS = 22  # per line of text below a picture
_LONGEST = 200  # characters of a caption in the page
_MARKS = {"own": (30, 140, 60), "negative": (190, 40, 40)}
_STYLE = (
    "body{font:14px sans-serif;margin:1em}table{border-spacing:6px}"
    "td{vertical-align:top;width:140px;overflow-wrap:anywhere}img{width:128px;display:block}"
    ".own{outline:3px solid #1e8c3c}.negative{outline:3px solid #be2828}"
)
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


class Cell(NamedTuple):
    """A picture with a caption.

    Attributes:
      caption: a text from the data; of any length and with any characters.
      image: `None` shows the caption only.
      mark: `"own"` or `"negative"` draws a green or a red frame.
    """

    caption: str
    image: UInt8[np.ndarray, "h w 3"] | None = None
    mark: str | None = None


def write_sheet(folder: AnyPath, name: str, title: str, rows: Sequence[Sequence[Cell]]) -> None:
    """Write `NAME.png` and `NAME.html`, each completely or not at all.

    Args:
      folder: the folder, which is created if necessary.
      name: the name of both files without a suffix; it must not come from data.
      title: a line above the rows.
      rows: the cells, row by row.

    Raises:
      OSError: if a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / f"{name}.png", draw_sheet(title, rows))
    write_whole(folder / f"{name}.html", sheet_page(title, rows))


def draw_sheet(title: str, rows: Sequence[Sequence[Cell]]) -> bytes:
    """Draw a sheet as a PNG."""
    from PIL import ImageDraw, ImageFont

    module = pillow()
    columns = max((len(row) for row in rows), default=1)
    step = _CELL + _GAP
    height = _CELL + _LINES * _LINE + _GAP
    size = (max(columns, 3) * step + _GAP, _TITLE + len(rows) * height + _GAP)
    sheet = module.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    _write(draw, (_GAP, 4), _line(title, size[0] // 6), font)
    for number, row in enumerate(rows):
        for column, cell in enumerate(row):
            left, top = _GAP + column * step, _TITLE + number * height
            if cell.image is not None:
                picture = module.fromarray(np.ascontiguousarray(cell.image))
                resampling = module.Resampling
                small = max(cell.image.shape) < _CELL
                picture = picture.resize(
                    _fitted(cell.image.shape), resampling.NEAREST if small else resampling.BICUBIC
                )
                sheet.paste(picture, (left, top))
            if cell.mark is not None:
                corners = (left - 3, top - 3, left + _CELL + 2, top + _CELL + 2)
                draw.rectangle(corners, outline=_MARKS[cell.mark], width=3)
            below = top + (_CELL + 2 if cell.image is not None else _GAP)
            for line, text in enumerate(_wrapped(cell.caption)):
                _write(draw, (left, below + line * _LINE), text, font)
    return _png(sheet)


def sheet_page(title: str, rows: Sequence[Sequence[Cell]]) -> str:
    """The page of a sheet, whose content policy allows only the style and the embedded images."""
    safe_title = html.escape(_line(title, _LONGEST))
    lines = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{html.escape(_POLICY)}">',
        f"<title>{safe_title}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{safe_title}</h1><table>",
    ]
    for row in rows:
        lines.append(f"<tr>{''.join(map(_cell_of_page, row))}</tr>")
    lines.append("</table></body></html>")
    return "\n".join(lines) + "\n"


def _cell_of_page(cell: Cell) -> str:
    caption = html.escape(_line(cell.caption, _LONGEST))
    if cell.image is None:
        return f'<td class="{cell.mark or "text"}">{caption}</td>'
    content = base64.b64encode(_png(pillow().fromarray(np.ascontiguousarray(cell.image))))
    source = f"data:image/png;base64,{content.decode()}"
    return f'<td><img class="{cell.mark or "image"}" src="{source}" alt="{caption}">{caption}</td>'


def _line(text: str, length: int) -> str:
    """A text on one line, of limited length, without control characters."""
    short = " ".join(text[: 4 * length].split())
    return printable(short if len(short) <= length else short[: length - 1] + "…")


def _wrapped(text: str) -> list[str]:
    line = _line(text, _CHARACTERS * _LINES)
    return [line[first : first + _CHARACTERS] for first in range(0, len(line), _CHARACTERS)][
        :_LINES
    ]


def _write(draw: Any, corner: tuple[int, int], text: str, font: Any) -> None:
    try:
        draw.text(corner, text, fill="black", font=font)
    except UnicodeEncodeError:  # Pillow without FreeType draws only Latin letters
        draw.text(corner, text.encode("ascii", "replace").decode(), fill="black", font=font)


def _fitted(shape: Sequence[int]) -> tuple[int, int]:
    """The width and height of a picture in its cell."""
    height, width = shape[:2]
    scale = _CELL / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _png(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
