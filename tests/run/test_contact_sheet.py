"""Contact sheets show the hits, and data cannot add anything to the files."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from jaxcl.run.contact_sheet import Cell, draw_sheet, sheet_page, write_sheet

RED = np.broadcast_to(np.uint8([200, 0, 0]), (6, 4, 3))
HOSTILE = [
    '<script>alert("x")</script>',
    '"><img src=x onerror=alert(1)>',
    "' onload='alert(1)",
    "</td></table><iframe src=http://example.org></iframe>",
    "\x1b[31mred\x1b[0m \u202egnp.exe \x00 \ud800",
    "<style>body{background:url(http://example.org)}</style>",
    "&lt;b&gt; and &amp;",
]


class Parsed(HTMLParser):
    """The elements, attributes and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)


def test_a_page_has_each_picture_and_caption():
    page = sheet_page("a title", [[Cell("a cat", RED, "own"), Cell("only text")], [Cell("x", RED)]])
    parsed = Parsed(page)
    images = [attributes for tag, attributes in parsed.elements if tag == "img"]
    assert [image["alt"] for image in images] == ["a cat", "x"]
    assert images[0]["class"] == "own"
    kind, content = images[0]["src"].split(",")
    assert kind == "data:image/png;base64"
    decoded = Image.open(io.BytesIO(base64.b64decode(content)))
    np.testing.assert_array_equal(np.asarray(decoded), RED)
    assert {"a title", "a cat", "only text", "x"} <= set(parsed.texts)
    assert [tag for tag, _ in parsed.elements].count("tr") == 2


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_adds_an_element_or_a_control_character(text):
    harmless = sheet_page("title", [[Cell("caption", RED), Cell("caption")]])
    page = sheet_page(text, [[Cell(text, RED), Cell(text)]])
    elements, expected = Parsed(page).elements, Parsed(harmless).elements
    assert [tag for tag, _ in elements] == [tag for tag, _ in expected]
    assert [set(attributes) for _, attributes in elements] == [set(a) for _, a in expected]
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", page)
    page.encode()
    plain = " ".join(text.split())
    if plain.isprintable():
        assert plain in Parsed(page).texts  # the reader sees the text itself
    draw_sheet(text, [[Cell(text, RED), Cell(text)]])


def test_a_page_loads_nothing():
    page = sheet_page("t", [[Cell("c", RED)]])
    assert "default-src &#x27;none&#x27;; img-src data:" in page
    assert not re.search(r"https?:|//[a-z]|@import|url\(", page)


def test_a_sheet_shows_the_pictures_and_marks():
    cells = [Cell("a", RED), Cell("b", RED, "own"), Cell("c", RED, "negative"), Cell("text")]
    sheet = np.asarray(Image.open(io.BytesIO(draw_sheet("title", [cells, cells[:1]]))))
    assert sheet.ndim == 3
    colours = {tuple(pixel) for pixel in sheet.reshape(-1, 3).tolist()}
    assert {(200, 0, 0), (30, 140, 60), (190, 40, 40), (255, 255, 255)} <= colours
    unmarked = np.asarray(Image.open(io.BytesIO(draw_sheet("title", [cells[:1]]))))
    assert (30, 140, 60) not in {tuple(pixel) for pixel in unmarked.reshape(-1, 3).tolist()}
    assert sheet.shape[0] > unmarked.shape[0]
    assert Image.open(io.BytesIO(draw_sheet("empty", []))).size[0] > 0


def test_other_scripts_and_long_captions_are_drawn():
    for text in ("日本語 Ελληνικά 🙂", "x" * 100_000, "", " \n\t "):
        draw_sheet(text, [[Cell(text, RED)]])
        assert len(sheet_page(text, [[Cell(text)]])) < 3000


def test_files_are_written_and_replaced(tmp_path):
    folder = tmp_path / "new" / "sheets"
    for title in ("first", "second"):
        write_sheet(folder, "views", title, [[Cell("a", RED)]])
        assert sorted(path.name for path in folder.iterdir()) == ["views.html", "views.png"]
        assert f"<h1>{title}</h1>" in (folder / "views.html").read_text()
    with Image.open(folder / "views.png") as image:
        assert image.format == "PNG"
