"""Search over images by a text or an image, in a folder and in the rows of a run."""

import errno
import io
import json
import os
import time

import numpy as np
import pytest
from PIL import Image

from jaxcl import search
from jaxcl.data.images import file_index
from jaxcl.data.sources import InMemoryPairs
from jaxcl.run.embedding_model import EmbeddingModel
from jaxcl.run.hit_sheet import write_hits
from jaxcl.run.hits import Hit
from jaxcl.run.image_documents import ImageFolder, ImageRows
from jaxcl.run.image_search import search_of_rows
from tests.image_run import COLOURS, picture

HOSTILE = '<script>alert("x")</script> \x1b[31m'


class ColourModel(EmbeddingModel):
    """Embeds an image by its mean colour, and a text by the colours that it names."""

    def __init__(self):
        self.source, self.dim, self.matryoshka_dims = "colours", 3, ()
        self.normalizes, self.similarity_function = True, "cosine"
        self.modality = {"query": "image", "key": "text"}
        self.made_from = {"model": "colours"}

    def encode(self, texts=None, *, images=None, side=None, progress=None):
        values = texts if images is None else images
        read = self._of_text if images is None else self._of_image
        vectors = np.float32([read(value) for value in values]).reshape(-1, 3) - 128
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def _of_text(self, text):
        return np.sum([COLOURS[word] for word in text.split() if word in COLOURS], axis=0)

    def _of_image(self, content):
        with Image.open(io.BytesIO(content)) as image:
            return np.asarray(image.convert("RGB")).mean((0, 1))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(COLOURS):
        path = tmp_path / "photos" / "sub" / f"{name} <b>{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(name, number))
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    return tmp_path / "photos"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command with the model; return (exit code, stdout, stderr)."""
    monkeypatch.setattr(search, "load", lambda path, trust: ColourModel())

    def run_command(*argv):
        code = 0
        try:
            search.main(["--model", "here", *map(str, argv)])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run_command


def test_a_folder_is_searched_by_texts_and_images(folder, run, tmp_path):
    code, out, error = run("--corpus", folder, "--top", 2, "--json", "a green square")
    assert code == 0, error
    first, _ = json.loads(out)
    assert first["id"] == "sub/green <b>1.png"
    assert set(first) == {"score", "id", "snippet", "text"}
    query = tmp_path / "query.png"
    query.write_bytes(picture("blue", 99))
    sheet = tmp_path / "found" / "blue"
    code, out, error = run("--corpus", folder, "--image", query, "--top", 3, "--sheet", sheet)
    assert code == 0, error
    assert out.splitlines()[0].split()[2:] == ["sub/blue", "<b>2.png"]
    assert sorted(path.name for path in sheet.parent.iterdir()) == ["blue.html", "blue.png"]
    page = (sheet.parent / "blue.html").read_text()
    assert page.count("<img") == 1 + 3
    assert "sub/blue &lt;b&gt;2.png" in page
    assert "<b>" not in page


def test_the_index_is_built_once(folder, monkeypatch):
    calls = []
    encode = ColourModel.encode

    def counting(self, texts=None, *, images=None, **options):
        calls.append(0 if images is None else len(images))
        return encode(self, texts, images=images, **options)

    monkeypatch.setattr(ColourModel, "encode", counting)
    for _ in range(2):
        search.open_search(ColourModel(), corpus=folder)
    assert sum(calls) == len(COLOURS)
    (folder / "new.png").write_bytes(picture("red", 77))
    opened = search.open_search(ColourModel(), corpus=folder)
    assert sum(calls) == 2 * len(COLOURS) + 1
    assert opened.of_images
    assert opened(image=picture("red", 77))[0].record["id"] == "new.png"


def test_images_of_rows_have_their_captions():
    sources = {
        "train": InMemoryPairs([picture("red", 1), picture("blue", 2)], ["one", HOSTILE]),
        "test": InMemoryPairs([picture("green", 3)], ["three"]),
    }
    rows = ImageRows(sources, "query")
    assert rows.ids == ["train:0", "train:1", "test:0"]
    records = rows.records([2, 0, 1])
    assert [record["text"] for record in records] == ["three", "one", HOSTILE]
    assert [record["image"] for record in records] == [
        picture(name, number) for name, number in [("green", 3), ("red", 1), ("blue", 2)]
    ]
    assert rows.fingerprint != ImageRows({"test": sources["test"]}, "query").fingerprint
    views = InMemoryPairs([picture("red", 1)], [picture("red", 2)])
    assert ImageRows({"train": views}, "key").records([0])[0]["text"] == ""
    views.place = lambda side, row: f"{side}/{row}.png"
    both = ImageRows({"test": sources["test"], "train": views}, "key")
    assert [record["text"] for record in both.records([1, 0])] == ["key/0.png", "three"]


def test_a_caption_adds_nothing_to_the_sheet(tmp_path):
    hits = [Hit(0.5, {"id": HOSTILE, "text": HOSTILE, "image": picture("red", 0)})]
    write_hits(tmp_path / "sheet", HOSTILE, hits)
    page = (tmp_path / "sheet.html").read_text()
    assert "<script" not in page
    assert "\x1b" not in page
    assert page.count("&lt;script&gt;") >= 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image", "query.png", "words"], "a query and --image are both given"),
        (["--image", "broken.png"], "cannot be decoded"),
        (["--image", "missing.png"], "missing.png cannot be read: No such file or directory"),
        (["--hybrid", "words"], "hybrid=True has no effect on a folder of images"),
        (["--text-field", "body", "words"], "text_field=body has no effect on a folder"),
    ],
)
def test_options_without_effect_are_errors(folder, run, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "query.png").write_bytes(picture("red", 0))
    (tmp_path / "broken.png").write_bytes(b"no image")
    code, out, error = run("--corpus", folder, *flags)
    assert (code, out) == (1, "")
    assert message in error.splitlines()[-1]


def test_texts_have_no_sheet_and_a_folder_needs_images(run, tmp_path):
    (tmp_path / "docs.txt").write_text("red\ngreen\n")
    code, _, error = run("--corpus", tmp_path / "docs.txt", "--sheet", "x", "red")
    assert code == 1
    assert "--sheet=x has no effect on a search over texts" in error
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no images; give a folder with files of the types"):
        ImageFolder(tmp_path / "empty", tmp_path / "digests")


def test_a_query_is_a_text_or_an_image(folder):
    opened = search.open_search(ColourModel(), corpus=folder)
    for arguments in ({}, {"query": "red", "image": picture("red", 0)}):
        with pytest.raises(ValueError, match="give either a text or an image"):
            opened(**arguments)
    texts = search.Search(lambda queries, top: [], lambda rows: [])
    with pytest.raises(ValueError, match="the model does not embed images"):
        texts(image=picture("red", 0))


def test_a_hit_in_a_folder_is_one_line_with_its_path(folder, run):
    code, out, error = run("--corpus", folder, "--top", 2, "a green square")
    assert code == 0, error
    lines = out.splitlines()
    assert len(lines) == 2
    assert lines[0].endswith("sub/green <b>1.png")


@pytest.mark.parametrize(("queries", "modality"), [("text", "image"), ("image", "text")])
def test_a_query_that_the_model_does_not_embed_is_an_error_at_once(
    folder, run, tmp_path, monkeypatch, queries, modality
):
    class OneSided(ColourModel):
        def __init__(self):
            super().__init__()
            self.modality = dict.fromkeys(("query", "key"), modality)

        def encode(self, *_, **__):
            raise AssertionError("something is embedded")

    monkeypatch.setattr(search, "load", lambda path, trust: OneSided())
    (tmp_path / "query.png").write_bytes(picture("red", 0))
    (tmp_path / "docs.txt").write_text("red\ngreen\n")
    flags = ["red"] if queries == "text" else ["--image", tmp_path / "query.png"]
    for corpus in (folder, tmp_path / "docs.txt"):
        code, out, error = run("--corpus", corpus, *flags)
        assert (code, out) == (1, "")
        assert f"does not embed {queries}s, only {modality}s" in error.splitlines()[-1]


def test_a_text_for_a_run_on_images_fails_before_its_index(monkeypatch, tmp_path):
    model = ColourModel()
    model.modality = {"query": "image", "key": "image"}
    rows = ImageRows({"train": InMemoryPairs([picture("red", 1)], [picture("red", 2)])}, "key")
    with pytest.raises(ValueError, match="does not embed texts, only images; search with --image"):
        search_of_rows(model, rows, tmp_path, "text", hybrid=False)
    assert not list(tmp_path.rglob("*.npy"))
    assert search_of_rows(model, rows, tmp_path, "image", hybrid=False).of_images


def test_unchanged_files_of_a_folder_are_hashed_once(folder, monkeypatch):
    hashed = []
    read = file_index.read_inside

    def noted(folder, name):
        hashed.append(name)
        return read(folder, name)

    monkeypatch.setattr(file_index, "read_inside", noted)
    for _ in range(2):
        search.open_search(ColourModel(), corpus=folder)
    assert len(hashed) == len(COLOURS)
    (folder / "new.png").write_bytes(picture("red", 77))
    search.open_search(ColourModel(), corpus=folder)
    assert hashed[len(COLOURS) :] == ["new.png"]


def test_a_file_that_cannot_be_read_is_named(folder, tmp_path):
    (folder / "gone.png").symlink_to(folder / "nothing.png")
    with pytest.raises(ValueError, match=r"gone\.png cannot be read"):
        ImageFolder(folder, tmp_path / "digests")


def test_another_image_of_the_same_size_and_time_is_noticed(tmp_path):
    path = tmp_path / "photos" / "one.png"
    path.parent.mkdir()
    path.write_bytes(b"first")
    times = path.stat()
    before = ImageFolder(path.parent, tmp_path / "digests").fingerprint
    time.sleep(0.05)  # kernels update the times of files a few hundred times a second
    path.write_bytes(b"other")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert ImageFolder(path.parent, tmp_path / "digests").fingerprint != before


def test_an_index_that_is_no_folder_is_an_error_with_its_flag(folder, tmp_path):
    (tmp_path / "index").write_text("a file")
    with pytest.raises(OSError, match="set another --index folder"):
        search.open_search(ColourModel(), corpus=folder, index=tmp_path / "index")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_digests_in_a_read_only_folder_are_not_kept(folder, tmp_path, monkeypatch, number):
    def refused(*_, **__):
        raise OSError(number, "refused")

    expected = ImageFolder(folder, tmp_path / "digests").fingerprint
    monkeypatch.setattr(file_index, "write_columns", refused)
    assert ImageFolder(folder, tmp_path / "others").fingerprint == expected
