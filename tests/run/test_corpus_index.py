"""The index of a corpus: built once, resumed, renewed, and never used when damaged."""

import json

import numpy as np
import pytest

from jaxcl.data.documents import read_documents
from jaxcl.run import corpus_index
from jaxcl.run.corpus_index import check_options, open_index, query_vectors
from jaxcl.run.host_vectors import quantized
from jaxcl.typing import PADDING_ID
from tests.small_models import DIM, small_model

WORDS = [
    "parse",
    "date",
    "file",
    "socket",
    "open",
    "close",
    "count",
    "merge",
    "ledger",
    "window",
    "matrix",
    "read",
]
NUM_DOCUMENTS = 50
BLOCK = 16  # 50 = 16 + 16 + 16 + 2


def texts_of(num_texts=NUM_DOCUMENTS, *, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, size=rng.integers(2, 7))) for _ in range(num_texts)]


def write_corpus(path, texts):
    records = [{"id": f"d{number}", "text": text} for number, text in enumerate(texts)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(corpus_index, "_BLOCK_ROWS", BLOCK)


@pytest.fixture(scope="module")
def model():
    return small_model(texts_of())


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "docs.jsonl", texts_of())


@pytest.fixture
def embedded(model, monkeypatch):
    """A list that gets the number of texts whenever documents are embedded."""
    numbers, encode = [], model.encode

    def counting(texts, *, side="query", **options):
        if side == "key":
            numbers.append(len(texts))
        return encode(texts, side=side, **options)

    monkeypatch.setattr(model, "encode", counting)
    return numbers


def opened(model, corpus, *, paths="here", **options):
    return open_index(
        model, read_documents(corpus), corpus.with_name("index"), paths=paths, **options
    )


def folder_of(corpus):
    [folder] = corpus.with_name("index").iterdir()
    return folder


def keys_of(model, texts, dim=None):
    return model.encode(texts, side="key", dim=dim)


def test_the_vectors_are_those_of_the_model(model, corpus):
    index = opened(model, corpus)
    np.testing.assert_allclose(index.search.keys, keys_of(model, texts_of()), atol=1e-6)
    assert index.search.codes is None
    assert index.kept == {}
    cut = opened(model, corpus, dim=8).search.keys
    np.testing.assert_allclose(cut, keys_of(model, texts_of(), dim=8), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(cut, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("dim", [None, 8])
@pytest.mark.parametrize("precision", ["int8", "binary"])
def test_the_codes_are_those_of_the_cut_vectors(model, corpus, precision, dim):
    search = opened(model, corpus, dim=dim, precision=precision, rescore=3).search
    assert (search.precision, search.rescore) == (precision, 3)
    np.testing.assert_array_equal(search.codes, quantized(np.asarray(search.keys), precision))


def test_documents_are_embedded_once_for_all_dimensions_and_precisions(model, corpus, embedded):
    opened(model, corpus)
    for dim in (None, DIM, 8, 4):
        for precision in ("float32", "int8", "binary"):
            opened(model, corpus, dim=dim, precision=precision)
    assert embedded == [BLOCK, BLOCK, BLOCK, NUM_DOCUMENTS - 3 * BLOCK]


def test_an_interrupted_embedding_resumes_after_its_last_block(
    model, corpus, embedded, monkeypatch
):
    encode = model.encode

    def interrupted(*arguments, **options):
        if len(embedded) == 2:
            raise KeyboardInterrupt
        return encode(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(model, "encode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            opened(model, corpus)
    assert embedded == [BLOCK, BLOCK]
    search = opened(model, corpus).search
    assert embedded == [BLOCK, BLOCK, BLOCK, NUM_DOCUMENTS - 3 * BLOCK]
    np.testing.assert_allclose(search.keys, keys_of(model, texts_of()), atol=1e-6)


def test_another_corpus_replaces_the_index_of_the_same_place_only(model, corpus, embedded):
    opened(model, corpus)
    first = folder_of(corpus)
    opened(model, write_corpus(corpus, texts_of(20)), paths="elsewhere")
    assert first.exists()
    texts = texts_of()
    texts[7] = "merge the ledger"
    search = opened(model, write_corpus(corpus, texts)).search
    np.testing.assert_allclose(search.keys, keys_of(model, texts), atol=1e-6)
    assert not first.exists()
    names = sorted(path.name.split("-")[0] for path in corpus.with_name("index").iterdir())
    assert names == ["elsewhere", "here"]


@pytest.mark.parametrize(
    "texts",
    [texts_of()[:-1], texts_of()[::-1], [*texts_of()[:-1], "merge a file"]],
    ids=["shorter", "other order", "one changed"],
)
def test_any_change_of_the_corpus_is_noticed(model, corpus, embedded, texts):
    opened(model, corpus)
    write_corpus(corpus, texts)
    np.testing.assert_allclose(opened(model, corpus).search.keys, keys_of(model, texts), atol=1e-6)


def test_another_model_is_noticed(model, corpus):
    opened(model, corpus)
    other = small_model(texts_of(), similarity_function="dot")
    other._params = {side: 2 + table for side, table in other._params.items()}
    found = opened(other, corpus).search.keys
    np.testing.assert_allclose(found, keys_of(other, texts_of()), atol=1e-6)


def test_an_index_whose_corpus_was_moved_is_used(model, corpus, embedded):
    opened(model, corpus)
    embedded.clear()
    opened(model, corpus, paths="moved")
    assert embedded == []


def test_no_flipped_bit_is_believed(model, corpus):
    options = {"dim": 8, "precision": "int8", "rescore": 2}
    whole = opened(model, corpus, **options)
    wanted = [np.array(array) for array in (whole.search.keys, whole.search.codes)]
    files = {path: path.read_bytes() for path in folder_of(corpus).iterdir() if path.stat().st_size}
    assert {path.name for path in files} >= {"keys.npy", "keys-8.npy", "int8-8.npy"}
    rng = np.random.default_rng(0)
    for path, content in files.items():
        for bit in rng.integers(8 * len(content), size=2).tolist():
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            found = opened(model, corpus, **options)
            for array, other in zip(wanted, (found.search.keys, found.search.codes), strict=True):
                np.testing.assert_allclose(array, other, atol=1e-6)
            assert found.kept == whole.kept


@pytest.mark.parametrize("size", [0, 100, 500])
def test_a_file_that_was_cut_is_computed_again(model, corpus, embedded, size):
    opened(model, corpus)
    path = folder_of(corpus) / "keys.npy"
    path.write_bytes(path.read_bytes()[:size])
    embedded.clear()
    np.testing.assert_allclose(
        opened(model, corpus).search.keys, keys_of(model, texts_of()), atol=1e-6
    )
    assert sum(embedded) == 2 * NUM_DOCUMENTS  # of the index, and of the test


def test_only_damaged_blocks_and_those_after_are_embedded_again(model, corpus, embedded):
    opened(model, corpus)
    path = folder_of(corpus) / "keys.npy"
    content = bytearray(path.read_bytes())
    content[128 + 4 * DIM * (2 * BLOCK + 1)] ^= 1  # a row of the third block, after the header
    path.write_bytes(content)
    embedded.clear()
    opened(model, corpus)
    assert embedded == [BLOCK, NUM_DOCUMENTS - 3 * BLOCK]


def test_shares_are_measured_once_and_equal_their_definition(model, corpus, monkeypatch):
    options = {"dim": 8, "precision": "binary", "rescore": 2}
    kept = opened(model, corpus, **options).kept
    texts = texts_of()
    queries, keys = model.encode(texts, dim=8), keys_of(model, texts, dim=8)
    exact = queries.astype(np.float64) @ keys.T.astype(np.float64)
    whole = model.encode(texts).astype(np.float64) @ keys_of(model, texts).T.astype(np.float64)

    def first(scores, row, pool):
        order = sorted(pool, key=lambda other: (-np.float32(scores[row, other]), other))
        return [other for other in order if other != row][:10]

    bits = ((queries[:, None] > 0) == (keys[None] > 0)).sum(axis=2)
    shares = {"dim": [], "search": [], "codes": []}
    for row in range(NUM_DOCUMENTS):
        everything = range(NUM_DOCUMENTS)
        wanted = first(exact, row, everything)
        by_bits = sorted(everything, key=lambda other: (-bits[row, other], other))
        found = {
            "dim": (wanted, first(whole, row, everything)),
            "search": (first(exact, row, by_bits[:22]), wanted),  # 2 · (10 + the query's own)
            "codes": (first(exact, row, by_bits[:11]), wanted),
        }
        for name, (one, other) in found.items():
            shares[name].append(len(set(one) & set(other)) / 10)
    assert kept == pytest.approx({name: np.mean(each) for name, each in shares.items()}, abs=0.01)
    assert 0 < kept["codes"] < kept["search"] < 1

    monkeypatch.setattr(corpus_index, "_measure", lambda *arguments: {"search": -1.0})
    assert opened(model, corpus, **options).kept == kept
    assert opened(model, corpus, **options | {"rescore": 3}).kept == {"search": -1.0}
    (folder_of(corpus) / "search_index.json").write_text("{}")
    assert opened(model, corpus, **options).kept == {"search": -1.0}


@pytest.mark.parametrize("num_documents", [1, 2])
def test_a_tiny_corpus_keeps_everything(model, tmp_path, num_documents):
    corpus = write_corpus(tmp_path / "docs.jsonl", texts_of(num_documents))
    assert opened(model, corpus, precision="binary", rescore=2).kept == {"search": 1, "codes": 1}


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
@pytest.mark.parametrize("dim", [None, 8])
def test_every_similarity_ranks_as_the_model_does(corpus, similarity, dim):
    def encode(params, side, inputs, rngs=None):
        tokens = inputs["tokens"]
        weights = (tokens != PADDING_ID)[..., None]
        return (params[side][tokens] * weights).sum(axis=1)  # of various lengths

    model = small_model(texts_of(), encode=encode, normalizes=False, similarity_function=similarity)
    search = opened(model, corpus, dim=dim).search
    queries, keys = model.encode(texts_of(5, seed=1), dim=dim), keys_of(model, texts_of(), dim)
    wanted = model.similarity(queries, keys)
    for scores, ranking in zip(
        wanted, search.best(query_vectors(model, queries, dim), 9), strict=True
    ):
        np.testing.assert_allclose(scores[ranking.rows], np.sort(scores)[::-1][:9], rtol=1e-4)


def test_a_similarity_without_inner_products_is_an_error_before_any_work(corpus, embedded):
    model = small_model(texts_of(), similarity_function="manhattan")
    with pytest.raises(ValueError, match="cannot be ranked by similarity 'manhattan'"):
        opened(model, corpus)
    assert embedded == []


def test_an_embedding_that_is_not_finite_names_its_document(corpus):
    model = small_model(texts_of())
    encode = model.encode

    def broken(texts, *, side="query", **options):
        vectors = encode(texts, side=side, **options)
        vectors[3] = np.nan
        return vectors

    model.encode = broken
    with pytest.raises(ValueError, match="the embedding of document 'd3' is not finite"):
        opened(model, corpus)


def test_options_are_checked(model):
    assert check_options(model, None, "float32", None) == 1
    assert check_options(model, 8, "int8", 7) == 7
    with pytest.raises(ValueError, match="precision='int4' is unknown; use float32, int8, binary"):
        check_options(model, None, "int4", None)
    with pytest.raises(ValueError, match="rescore=4 has no effect with precision='float32'"):
        check_options(model, None, "float32", 4)
    with pytest.raises(ValueError, match="rescore=0 must be at least 1"):
        check_options(model, None, "int8", 0)
    for dim in (0, -1, DIM + 1):
        with pytest.raises(ValueError, match=f"dim={dim} is out of range"):
            check_options(model, dim, "float32", None)


def test_vectors_of_any_length_have_no_int8_codes():
    model = small_model(texts_of(), normalizes=False, similarity_function="dot")
    with pytest.raises(ValueError, match="precision='int8' needs unit vectors"):
        check_options(model, None, "int8", None)
    check_options(model, None, "binary", None)
    check_options(small_model(texts_of(), normalizes=False), None, "int8", None)  # cosine


def test_a_length_that_was_not_trained_is_an_error_if_the_model_says_so(model, capsys):
    trained = small_model(texts_of(), matryoshka_dims=(4, 8))
    for dim in (4, 8, DIM):
        check_options(trained, dim, "float32", None)
    assert capsys.readouterr().err == ""
    with pytest.raises(ValueError, match=r"was not trained at dim=5; use one of 4, 8, 16"):
        check_options(trained, 5, "float32", None)
    check_options(model, 5, "float32", None)
    assert "may not have been trained at shorter lengths" in capsys.readouterr().err
