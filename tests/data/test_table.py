"""Tables of any modality: the Protocol, and sides of two modalities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.data import modalities
from jaxcl.data import table as table_module
from jaxcl.data.sources import InMemoryPairs
from jaxcl.data.table import (
    SidesTable,
    Table,
    join_sides,
    label_column,
    row_lengths,
    table_batch,
)
from jaxcl.models import StaticEncoder, make_towers
from jaxcl.models.augmentations import token_dropout
from jaxcl.run.opened import OpenedRun
from jaxcl.settings.read import read_settings

TEXTS = ["red", "blue", "red", "green"]
NUMBERS = [3.0, 5.0, 7.0, 5.0]


class NumberTable:
    """A toy table with one number per row, as a vector of two features."""

    def __init__(self, values):
        self.values = np.asarray(values, np.float32)

    @property
    def num_rows(self):
        return len(self.values)

    def labels(self, rows):
        _, text = np.unique(self.values, return_inverse=True)
        return {
            "row": rows.astype(np.int32),
            "text": text[rows].astype(np.int32),
            "group": 0 * rows,
        }

    def side(self, side, rows):
        return {"number": np.stack([self.values[rows]] * 2, 1)}

    def spec(self, side):
        return {"number": jax.ShapeDtypeStruct((2,), np.float32)}


class Numbers:
    """The modality of `NumberTable`."""

    files = ("numbers.txt",)

    def usable(self, data, source, split):
        return source

    def changed(self, workdir):
        return "the numbers have changed"

    def prepare(self, data, train, sides, workdir):
        (workdir / "numbers.txt").write_text("prepared")

    def open_table(self, data, source, split, workdir):
        return NumberTable([record["query"] for record in source.read(np.arange(len(source)))])

    def reader(self, data, side, workdir):
        return lambda values: {"number": np.stack([np.asarray(values, np.float32)] * 2, 1)}

    def fingerprint(self, workdir):
        return "numbers"

    def encoder_argument(self, data, side):
        return self.spec(data, side)

    def spec(self, data, side):
        return {"number": jax.ShapeDtypeStruct((2,), np.float32)}

    def random_inputs(self, data, side, rng, num_rows):
        return {"number": rng.normal(size=(num_rows, 2)).astype(np.float32)}

    def length(self, data, side):
        return 1

    def count(self, inputs):
        return jnp.int32(len(inputs["number"]))


@pytest.fixture
def mixed(monkeypatch, tmp_path):
    """Settings and tables with numbers on one side and texts on the other."""
    known = {**modalities.MODALITIES, "numbers": Numbers()}
    monkeypatch.setattr(modalities, "MODALITIES", known)
    config = {
        "data": {"modality": {"query": "numbers", "key": "text"}, "vocabulary_size": 300},
        "model": {"shared": False},
        "evaluation": {"methods": ("dense",)},
    }
    data = read_settings(config).data
    sources = {"train": InMemoryPairs(NUMBERS, TEXTS)}
    tables = modalities.open_tables(data, sources, data_dir=tmp_path, workdir=tmp_path)
    return data, tables["train"], tmp_path


def test_two_sides_of_different_kinds_are_one_table(mixed):
    data, table, workdir = mixed
    assert isinstance(table, SidesTable)
    assert isinstance(table, Table)
    batch = table_batch(table, np.array([3, 0]))
    np.testing.assert_array_equal(batch["query"]["number"], [[5, 5], [3, 3]])
    assert batch["key"]["tokens"].shape == (2, data.max_tokens.key)
    assert batch["row"].tolist() == [3, 0]
    assert (workdir / "numbers.txt").exists()
    assert (workdir / "tokenizer.json").exists()


def test_only_texts_have_lengths(mixed):
    _, table, _ = mixed
    rows = np.array([[3, 0], [1, 1]])
    tokens = table.side("key", rows.ravel())["tokens"]
    lengths = row_lengths(table, "key", rows)
    assert lengths.tolist() == np.count_nonzero(tokens, axis=1).reshape(2, 2).tolist()
    assert (lengths > 0).all()
    assert row_lengths(table, "query", rows) is None
    assert row_lengths(NumberTable(NUMBERS), "query", rows) is None


def test_rows_that_are_equal_on_either_side_share_a_number(mixed):
    _, table, _ = mixed
    text = table.labels(np.arange(4))["text"]
    # Rows 0 and 2 share a text, rows 1 and 3 a number.
    assert (text[0] == text[2], text[1] == text[3], text[0] == text[1]) == (True, True, False)


def test_a_table_and_its_modality_state_the_shapes_that_batches_have(mixed):
    data, table, _ = mixed
    for side in ("query", "key"):
        inputs = table.side(side, np.arange(4))
        spec = table.spec(side)
        assert jax.tree.map(lambda leaf: (leaf.shape[1:], leaf.dtype), inputs) == jax.tree.map(
            lambda leaf: (leaf.shape, leaf.dtype), spec
        )
        assert spec == modalities.modality_of(data, side).spec(data, side)


def test_values_are_read_as_the_table_reads_them(mixed):
    data, table, workdir = mixed
    readers = modalities.build_readers(data, workdir)
    for side, values in (("query", NUMBERS), ("key", TEXTS)):
        wanted = table.side(side, np.arange(4))
        assert jax.tree.all(jax.tree.map(np.array_equal, readers[side](values), wanted))


def test_sides_of_different_lengths_are_an_error():
    with pytest.raises(ValueError, match="2 queries and 3 keys"):
        join_sides({"query": NumberTable([1, 2]), "key": NumberTable([1, 2, 3])})


def test_an_unknown_modality_is_an_error():
    data = read_settings({}).data
    data = data._replace(modality=data.modality._replace(query="smell"))
    with pytest.raises(ValueError, match=r"data\.modality\.query='smell' is unknown; use one of"):
        modalities.modality_of(data, "query")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"data": {"modality": {"query": "numbers"}}}, "which one encoder cannot read"),
        (
            {
                "data": {"modality": {"query": "numbers"}},
                "model": {"shared": False},
                "evaluation": {"methods": ("bm25", "dense")},
            },
            "bm25 and hybrid compare texts",
        ),
        ({"augmentation": {"sides": ()}}, "name one or both of query, key"),
        (
            {"augmentation": {"name": "span_masking", "options": {"mask_id": 16_384}}},
            "mask_id=16384 is not a token",
        ),
        ({"augmentation": {"name": "token_drop"}}, "did you mean 'token_dropout'"),
    ],
)
def test_invalid_sides_and_augmentations_are_errors(config, message):
    with pytest.raises(ValueError, match=message):
        read_settings(config)


def test_commands_for_texts_refuse_other_modalities(mixed, tmp_path):
    data, _, _ = mixed
    settings = read_settings({})
    texts = OpenedRun(tmp_path, settings, None, "", {})
    texts.check_texts("jaxcl.search")
    with pytest.raises(ValueError, match=r"jaxcl\.search reads and prints texts, but the run in"):
        texts._replace(settings=settings._replace(data=data)).check_texts("jaxcl.search")


def test_encoders_of_texts_refuse_other_inputs():
    numbers = {"number": jnp.ones((2, 2))}
    towers = make_towers(lambda rngs: StaticEncoder(10, dim=2, rngs=rngs))
    with pytest.raises(ValueError, match="StaticEncoder reads texts, but this side has number"):
        towers.encode(towers.init(jax.random.key(0)), "query", numbers)
    with pytest.raises(ValueError, match="this augmentation reads texts, but this side has number"):
        token_dropout(rate=0.1)({"number": jnp.ones(2)}, jax.random.key(0))


def test_large_arrays_that_differ_have_different_fingerprints():
    first = np.zeros((32, 32, 3), np.uint8)
    second = first.copy()
    second[16, 16] = 255  # an array's text would have only dots there
    same = InMemoryPairs([first], [first]).fingerprint
    assert InMemoryPairs([first.copy()], [first]).fingerprint == same
    assert InMemoryPairs([second], [first]).fingerprint != same


def test_an_augmentation_is_turned_off_by_its_name_alone():
    off = {"augmentation": {"name": None, "options": {"rate": 0.4}}}
    assert read_settings(off).augmentation == read_settings({}).augmentation
    for field in ("augmentation.options.rate", "augmentation.sides"):
        with pytest.raises(ValueError, match=f"{field} has no effect here: augmentation.name"):
            read_settings(off, changed=[field])


@pytest.mark.parametrize("rows_at_once", [1, 3, 4, 5])
def test_a_label_of_all_rows_is_read_in_parts(monkeypatch, rows_at_once):
    monkeypatch.setattr(table_module, "_ROWS_AT_ONCE", rows_at_once)
    table = NumberTable(NUMBERS)
    assert label_column(table, "text").tolist() == [0, 1, 2, 1]
    assert label_column(table, "row").tolist() == [0, 1, 2, 3]
    assert label_column(table, "row").dtype == np.int32
