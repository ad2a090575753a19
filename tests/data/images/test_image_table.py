"""Batches of images: the array of a row depends on the row alone, and damaged files are named."""

import io
import threading

import jax
import numpy as np
import pytest
from PIL import Image

from jaxcl.data.images import image_table
from jaxcl.data.images.checked_images import check_images, usable_images
from jaxcl.data.images.decoding import ImageRule, decode_image
from jaxcl.data.images.image_table import ImageTable, decode_images
from jaxcl.data.images.image_threads import in_threads
from jaxcl.data.modalities import MODALITIES, build_readers, check_inputs, open_tables
from jaxcl.data.prepare import prepare_data, read_remembered_data
from jaxcl.data.source_fields import SelectedPairs
from jaxcl.data.sources import InMemoryPairs
from jaxcl.data.splits import ConcatenatedPairs
from jaxcl.data.table import SidesTable, Table, table_batch
from jaxcl.settings.read import read_settings
from jaxcl.typing import SIDES

RULE = ImageRule(8)


def picture(seed, *, size=(12, 10), format_="PNG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format_)
    return file.getvalue()


QUERIES = [picture(seed) for seed in (0, 1, 2, 0, 4, 5, 6)]
KEYS = [picture(seed) for seed in (10, 11, 12, 13, 11, 15, 16)]
PAIRS = InMemoryPairs(QUERIES, KEYS, groups=[3, 1, 4, 1, 5, 9, 2])


def settings(**images):
    config = {
        "data": {
            "name": "memory",
            "splits": {"train": "train"},
            "modality": {"query": "image", "key": "image"},
            "images": {"size": 8, **images},
            "group_field": "group",
        },
        "evaluation": {"methods": ("dense",)},
    }
    return read_settings(config).data


def prepared(data, source, folder, workdir="run"):
    (folder / workdir).mkdir(exist_ok=True)
    return prepare_data(
        data, data_dir=folder, workdir=folder / workdir, open_source=lambda role: source
    )


def table_of(source, sides=SIDES, *, folder, **options):
    checked = check_images(source, sides, RULE, role="train", directory=folder)
    text = np.arange(len(source), dtype=np.int32)
    return ImageTable(source, RULE, group=checked.group, text=text, **options)


def test_a_batch_has_the_decoded_images_of_its_rows(tmp_path):
    table = prepared(settings(), PAIRS, tmp_path).tables["train"]
    assert isinstance(table, Table)
    batch = table_batch(table, np.array([5, 0, 5]))
    for side, values in (("query", QUERIES), ("key", KEYS)):
        wanted = [decode_image(values[row], RULE) for row in (5, 0, 5)]
        np.testing.assert_array_equal(batch[side]["image"], wanted)
        assert batch[side]["image"].dtype == np.uint8
    assert batch["row"].tolist() == [5, 0, 5]
    assert batch["group"].tolist() == [9, 3, 9]


def test_transparent_images_have_the_background_of_the_settings(tmp_path):
    file = io.BytesIO()
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(file, "PNG")
    source = InMemoryPairs([file.getvalue()] * 7, KEYS, groups=range(7))
    table = prepared(settings(background=(1, 2, 3)), source, tmp_path).tables["train"]
    images = table_batch(table, np.array([0]))["query"]["image"]
    assert (images == (1, 2, 3)).all()


def test_equal_pixels_share_a_number_whatever_the_file(tmp_path):
    source = InMemoryPairs([*QUERIES[:4], picture(4, format_="BMP"), *QUERIES[4:6]], KEYS)
    text = prepared(settings(), source, tmp_path).tables["train"].labels(np.arange(7))["text"]
    # Rows 0 and 3 share a query, rows 1 and 4 a key, rows 4 and 5 a query in two formats.
    assert text.tolist() == [0, 1, 2, 0, 1, 1, 3]


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("rows_at_once", [1, 3, 100])
def test_a_row_does_not_depend_on_the_batch_or_the_threads(
    tmp_path, monkeypatch, threads, rows_at_once
):
    monkeypatch.setattr(image_table, "_ROWS_AT_ONCE", rows_at_once)
    table = table_of(PAIRS, folder=tmp_path, threads=threads)
    rows = np.random.default_rng(0).integers(0, 7, 50)
    whole = table.side("query", np.arange(7))["image"]
    np.testing.assert_array_equal(table.side("query", rows)["image"], whole[rows])
    assert table.side("query", rows[:0])["image"].shape == (0, 8, 8, 3)


class CountedPairs(InMemoryPairs):
    num_read = 0

    def read(self, rows):
        self.num_read += len(rows)
        return super().read(rows)


def test_two_sides_with_the_same_images_are_decoded_once(tmp_path):
    source = CountedPairs(QUERIES, QUERIES)
    table = prepared(settings(), source, tmp_path)
    table = table.tables["train"]
    alone = table_of(source, folder=tmp_path / "alone")
    for rows in (np.array([1, 2, 2]), np.array([4]), np.arange(7)):
        source.num_read = 0
        query, key = (table.side(side, rows)["image"] for side in SIDES)
        assert source.num_read == len(rows)
        np.testing.assert_array_equal(query, alone.side("query", rows)["image"])
        np.testing.assert_array_equal(query, key)
    first = table.side("query", np.array([0]))["image"]
    np.testing.assert_array_equal(
        table.side("query", np.array([1]))["image"][0],
        alone.side("query", np.array([1]))["image"][0],
    )
    assert not np.array_equal(first, table.side("key", np.array([1]))["image"])


def test_tables_can_be_read_by_several_threads(tmp_path):
    table = prepared(settings(), InMemoryPairs(QUERIES, QUERIES), tmp_path).tables["train"]
    wanted = table.side("query", np.arange(7))["image"]
    failures = []

    def read(seed):
        for rows in np.random.default_rng(seed).integers(0, 7, (30, 4)):
            for side in SIDES:
                if not np.array_equal(table.side(side, rows)["image"], wanted[rows]):
                    failures.append(rows)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_the_modality_states_what_batches_have(tmp_path):
    data = settings()
    run = prepared(data, PAIRS, tmp_path)
    modality = MODALITIES["image"]
    for side in SIDES:
        spec = modality.spec(data, side)
        assert spec == run.tables["train"].spec(side)
        assert spec == {"image": jax.ShapeDtypeStruct((8, 8, 3), np.uint8)}
        random = modality.random_inputs(data, side, np.random.default_rng(0), 5)
        assert (random["image"].shape, random["image"].dtype) == ((5, 8, 8, 3), np.uint8)
    assert modality.encoder_argument(data, "query") == 8
    large = data._replace(images=data.images._replace(size=224))
    assert modality.length(large, "query") == 14 * 14
    assert int(modality.count(random)) == 5 * modality.length(data, "query")


def test_a_reader_takes_files_paths_images_and_arrays(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(QUERIES[0])
    array = np.asarray(Image.open(path))
    read = build_readers(settings(), tmp_path)["key"]
    images = read([QUERIES[0], path, str(path), Image.open(path), array])["image"]
    assert images.shape == (5, 8, 8, 3)
    assert (images == images[0]).all()
    with pytest.raises(ValueError, match=r"image at position 1 cannot be decoded: .*not an image"):
        read([QUERIES[0], b"text"])


def test_images_and_texts_are_one_table(tmp_path):
    data = settings()
    data = data._replace(modality=data.modality._replace(key="text"), vocabulary_size=300)
    captions = ["red", "blue", "red", "green", "blue", "grey", "black"]
    table = prepared(data, InMemoryPairs(QUERIES, captions, groups=range(7)), tmp_path)
    table = table.tables["train"]
    assert isinstance(table, SidesTable)
    batch = table_batch(table, np.array([2, 1]))
    np.testing.assert_array_equal(batch["query"]["image"][1], decode_image(QUERIES[1], RULE))
    assert batch["key"]["tokens"].shape == (2, data.max_tokens.key)
    # Rows 0 and 3 share an image, rows 0 and 2 and rows 1 and 4 a caption.
    assert table.labels(np.arange(7))["text"].tolist() == [0, 1, 0, 0, 1, 2, 3]
    assert batch["group"].tolist() == [2, 1]


# Images that cannot be read

BAD = InMemoryPairs(
    [*QUERIES[:5], QUERIES[5][:150], QUERIES[6]], [KEYS[0], b"text", *KEYS[2:]], groups=range(7)
)


def test_bad_images_are_named_before_the_first_step(tmp_path):
    message = (
        r"2 of 7 rows of train have images that cannot be read: row 1: it is not an image file "
        r"\(AVIF, .*\); row 5: .*Truncated.*Repair or remove them, or set data\.images\.bad=skip"
    )
    with pytest.raises(ValueError, match=message):
        prepared(settings(), BAD, tmp_path)


def test_rows_with_bad_images_are_left_out_on_request(tmp_path, capsys):
    data = settings(bad="skip")
    run = prepared(data, BAD, tmp_path)
    assert "2 of 7 rows of train have images that cannot be read and are left out: row 1: " in (
        capsys.readouterr().err
    )
    source, table = run.sources["train"], run.tables["train"]
    assert isinstance(source, SelectedPairs)
    assert len(source) == table.num_rows == 5
    kept = [0, 2, 3, 4, 6]
    assert [record["group"] for record in source.read(np.arange(5))] == kept
    np.testing.assert_array_equal(
        table.side("key", np.arange(5))["image"], [decode_image(KEYS[row], RULE) for row in kept]
    )
    assert table.labels(np.arange(5))["group"].tolist() == kept
    again = prepared(data, BAD, tmp_path)  # reads the cache
    assert again.remembered == run.remembered
    assert run.remembered.fingerprints["train"] != BAD.fingerprint


def test_the_checks_are_read_from_the_cache(tmp_path):
    source = CountedPairs(QUERIES, KEYS)
    first = check_images(source, SIDES, RULE, role="train", directory=tmp_path)
    assert source.num_read == 7
    second = check_images(source, SIDES, RULE, role="train", directory=tmp_path)
    assert source.num_read == 7
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(one, other)
    check_images(source, SIDES, ImageRule(9), role="train", directory=tmp_path)
    assert source.num_read == 14  # another rule decodes again


def test_concatenated_data_sets_are_checked_one_by_one(tmp_path, capsys):
    good = InMemoryPairs(QUERIES[:3], KEYS[:3], groups=[0, 1, 2])
    checked = check_images(BAD, SIDES, RULE, role="train", directory=tmp_path)
    kept = usable_images(BAD, checked, role="train", bad="skip")
    both = ConcatenatedPairs([good, kept])
    checked = check_images(both, SIDES, RULE, role="train", directory=tmp_path)
    assert checked.bad.tolist() == []
    assert checked.group.tolist() == [0, 1, 2, 0, 2, 3, 4, 6]
    np.testing.assert_array_equal(checked.digests["key"][0], checked.digests["key"][3])
    table = table_of(both, folder=tmp_path)
    np.testing.assert_array_equal(
        table.side("key", np.array([4]))["image"][0], decode_image(KEYS[2], RULE)
    )
    checked = check_images(
        ConcatenatedPairs([good, BAD]), SIDES, RULE, role="train", directory=tmp_path
    )
    assert checked.bad.tolist() == [4, 8]


def test_a_split_without_any_image_is_an_error(tmp_path):
    source = InMemoryPairs([b"a", b"b"], [b"c", b"d"], groups=[0, 1])
    with pytest.raises(ValueError, match=r"no image of train can be read: row 0: .*; row 1: "):
        prepared(settings(bad="skip"), source, tmp_path)


def test_many_bad_images_are_counted(tmp_path):
    source = InMemoryPairs([b"x"] * 8, QUERIES[:1] * 8, groups=[0] * 8)
    with pytest.raises(ValueError, match=r"8 of 8 rows .*row 4: [^;]*; and 3 more\. Repair"):
        prepared(settings(), source, tmp_path)


def test_texts_are_no_images(tmp_path):
    source = InMemoryPairs(["/etc/passwd"], [KEYS[0]], groups=[0])
    with pytest.raises(ValueError, match=r"the query in row 0 is a text.*set data\.query_field"):
        prepared(settings(bad="skip"), source, tmp_path)


class ChangedPairs(InMemoryPairs):
    """Pairs whose second image is damaged after the check."""

    damaged = False

    def read(self, rows):
        records = super().read(rows)
        for row, record in zip(rows, records, strict=True):
            if self.damaged and row == 1:
                record["key"] = record["key"][:100]
        return records

    def place(self, side, row):
        return f"folder/{side}{row}.png"


def test_an_image_that_is_damaged_later_is_named(tmp_path):
    source = ChangedPairs(QUERIES, KEYS)
    table = prepared(settings(), source, tmp_path).tables["train"]
    source.damaged = True
    table.side("key", np.array([0, 2]))
    message = r"the image of the key in row 1 \(folder/key1\.png\) cannot be decoded: .*truncated"
    with pytest.raises(ValueError, match=message):
        table.side("key", np.array([0, 1]))


# Another version of Pillow


def test_a_run_notices_that_images_are_decoded_differently(tmp_path, monkeypatch):
    data = settings()
    prepared(data, PAIRS, tmp_path)
    workdir = tmp_path / "run"
    recorded = read_remembered_data(workdir).fingerprints
    check_inputs(data, workdir, recorded)
    for module in ("image_modality", "checked_images"):
        monkeypatch.setattr(f"jaxcl.data.images.{module}.decoder_fingerprint", lambda: "another")
    monkeypatch.setattr("jaxcl.data.images.image_modality.decoder_name", lambda: "Pillow 99")
    message = "Pillow 99 decodes images differently from Pillow .*, with which the run in .*install"
    with pytest.raises(ValueError, match=message):
        check_inputs(data, workdir, recorded)
    with pytest.raises(ValueError, match=message):
        open_tables(data, {}, data_dir=tmp_path, workdir=workdir, recorded=recorded)
    (workdir / "images.json").unlink()
    with pytest.raises(ValueError, match="differently from another version of Pillow"):
        check_inputs(data, workdir, recorded)


def test_results_of_threads_are_in_order_and_errors_end_the_work():
    asked = []

    def values():
        for value in range(1000):
            asked.append(value)
            yield value

    assert list(in_threads(lambda value: value * 2, range(20), threads=3)) == list(range(0, 40, 2))

    def fail_at_five(value):
        if value == 5:
            raise ValueError("five")
        return value

    with pytest.raises(ValueError, match="five"):
        list(in_threads(fail_at_five, values(), threads=2))
    assert len(asked) < 20  # values are taken only a few ahead


def test_no_images_are_an_empty_array():
    assert decode_images([], RULE).shape == (0, 8, 8, 3)
