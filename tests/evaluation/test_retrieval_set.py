"""Retrieval over a BEIR folder: known answers, the same on any tiling, devices and processes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from jaxcl.evaluation import retrieval_set
from jaxcl.evaluation.graded import GRADED_METRICS
from jaxcl.evaluation.protocol import EvaluationSet
from jaxcl.evaluation.retrieval import BM25, METHODS, reciprocal_rank_fusion
from jaxcl.evaluation.sets import open_set
from jaxcl.ops.mesh import make_mesh
from tests.small_models import small_model

WORDS = ["parse", "iso", "date", "open", "socket", "read", "line", "write", "file", "close"]


def write_folder(folder, corpus, queries, qrels):
    """Write texts by id, and labels as (query id, document id, grade)."""
    for name, texts in {"corpus": corpus, "queries": queries}.items():
        lines = [json.dumps({"_id": one, "text": text}) for one, text in texts.items()]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "qrels").mkdir(exist_ok=True)
    lines = ["\t".join(map(str, judgement)) for judgement in qrels]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")
    return folder


def small_folder(folder):
    corpus = {"a": "1 0", "b": "0.6 0.8", "c": "0 1", "d": "0.8 0.6"}
    queries = {"x": "1 0", "y": "0 1", "unjudged": "0 0"}
    return write_folder(folder, corpus, queries, [("x", "b", 2), ("x", "a", 1), ("y", "d", 1)])


def numbers(side, texts):
    """A model of texts that spell their vectors."""
    return np.float32([[float(word) for word in text.split()] for text in texts])


def test_the_metrics_of_a_small_folder_by_hand(tmp_path):
    found = open_set(small_folder(tmp_path))
    assert isinstance(found, EvaluationSet)
    assert found.kind == "retrieval"
    # Query x ranks a, d, b, c, with a and b relevant; y ranks c, b, d, a, with d relevant.
    metrics = found.evaluate(numbers)
    assert metrics["mrr@10"] == pytest.approx((1 + 1 / 3) / 2)
    assert metrics["map"] == pytest.approx(((1 + 2 / 3) / 2 + 1 / 3) / 2)
    assert metrics["recall@1"] == pytest.approx((1 / 2 + 0) / 2)
    assert metrics["precision@5"] == pytest.approx((2 / 5 + 1 / 5) / 2)
    gain, ideal = 1 + 2 / np.log2(4), 2 + 1 / np.log2(3)
    assert metrics["ndcg@10"] == pytest.approx((gain / ideal + 1 / np.log2(4)) / 2)
    assert metrics["documents"] == 4
    assert metrics["queries"] == 2
    assert metrics["relevant"] == 3
    assert metrics["queries_without_judgements"] == 1


def test_another_model_has_other_metrics(tmp_path):
    found = open_set(small_folder(tmp_path))
    turned = np.float32([[0, 1], [-1, 0]])

    def another(side, texts):
        return numbers(side, texts) @ turned if side == "query" else numbers(side, texts)

    # Query x, now (0, 1), ranks c, b, d, a, and so does y, now (-1, 0).
    assert found.evaluate(another)["mrr@10"] == pytest.approx((1 / 2 + 1 / 3) / 2)


def test_embeddings_that_are_all_equal_are_as_good_as_chance(tmp_path):
    found = open_set(small_folder(tmp_path))
    metrics = found.evaluate(lambda side, texts: np.ones((len(texts), 2), np.float32))
    assert metrics["precision@1"] == pytest.approx((2 / 4 + 1 / 4) / 2)


@pytest.fixture(scope="module")
def random_folder(tmp_path_factory):
    """Some 50 documents with duplicates, 21 queries, and 1 to 4 relevant documents for each."""
    rng = np.random.default_rng(0)
    corpus = {f"d{n}": " ".join(rng.choice(WORDS, 5)) for n in range(50)}
    corpus["d7"] = corpus["d8"] = corpus["d9"]
    queries = {f"q{n}": " ".join(rng.choice(WORDS, 2)) for n in range(21)}
    queries["d7"] = corpus["d7"]
    qrels = [
        (query, f"d{document}", rng.integers(0, 4))
        for query in queries
        for document in rng.choice(50, rng.integers(1, 5), replace=False)
    ]
    folder = tmp_path_factory.mktemp("beir")
    return write_folder(folder, corpus, queries, [*qrels, ("q0", "gone", 1)])


@pytest.fixture(scope="module")
def random_set(random_folder):
    return open_set(random_folder)


@pytest.fixture(scope="module")
def encode():
    """A model's embeddings, computed once, so that they do not depend on the process."""
    model, vectors = small_model(WORDS), {}

    def encode(side, texts):
        new = [text for text in texts if (side, text) not in vectors]
        for text, vector in zip(new, model.encode(new, side=side) if new else [], strict=True):
            vectors[side, text] = vector
        return np.stack([vectors[side, text] for text in texts])

    return encode


def test_the_methods_rank_by_their_scores(random_set, encode):
    data = random_set.data
    texts = data.corpus.read(np.arange(50))
    tables = {
        "bm25": BM25(texts).scores(data.query_texts),
        "dense": np.float32(
            encode("query", data.query_texts).astype(float) @ encode("key", texts).astype(float).T
        ),
    }
    for table in tables.values():
        table[-1, 7] = table[-1].min() - 1  # the document that is the query itself
    tables["hybrid"] = reciprocal_rank_fusion(list(tables.values()), k=5)
    found = random_set.rank(encode, methods=METHODS, rrf_k=5)
    assert list(found) == list(METHODS)
    for method, ranks in found.items():
        pairs = zip(data.queries, data.documents, ranks.better, ranks.tied, strict=True)
        for query, document, better, tied in pairs:
            row = tables[method][query]
            if document < 0:
                assert (better, tied) == (np.inf, 1)
            else:
                assert better == (row > row[document]).sum()
                assert tied == (row == row[document]).sum()
    assert max(found["dense"].tied) >= 3


@pytest.mark.parametrize("tile", [1, 5, 21, 100])
def test_the_tile_changes_nothing(random_set, encode, monkeypatch, tile):
    expected = random_set.rank(encode, methods=METHODS)
    monkeypatch.setattr(retrieval_set, "_BLOCK_DOCUMENTS", 2 * tile + 1)
    monkeypatch.setattr(retrieval_set, "_ENCODE_DOCUMENTS", 3 * tile)
    found = random_set.rank(encode, methods=METHODS, tile=tile)
    for method in METHODS:
        for ours, theirs in zip(found[method], expected[method], strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_one_device_gives_the_metrics_of_eight(random_set, encode):
    model = small_model(WORDS)
    model._mesh = make_mesh({"data": -1}, devices=jax.devices()[:1])
    alone = random_set.evaluate(lambda side, texts: model.encode(list(texts), side=side))
    assert alone == pytest.approx(random_set.evaluate(encode), rel=1e-6)


def test_each_process_ranks_a_part_of_the_queries(random_set, encode, monkeypatch):
    expected = random_set.rank(encode, methods=METHODS)
    parts = []
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(retrieval_set, "together", lambda make: make())

    def gather(part):
        parts.append(part)
        return np.stack(parts)

    monkeypatch.setattr(multihost_utils, "process_allgather", gather)
    for process in range(3):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        found = random_set.rank(encode, methods=METHODS)
    for method in METHODS:
        for ours, theirs in zip(found[method], expected[method], strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert all((part != 0).any() for part in parts)
    assert (sum((part != 0).astype(int) for part in parts) <= 1).all()


PROCESS = """
import json, sys
from pathlib import Path
import jax
number, port, folder = sys.argv[1:]
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(number))
from jaxcl.evaluation.graded import GRADED_METRICS
from jaxcl.evaluation.sets import open_set
from tests.evaluation.test_retrieval_set import WORDS
from tests.small_models import small_model
assert (jax.process_count(), jax.device_count()) == (2, 8)
model = small_model(WORDS)
found = open_set(Path(folder)).rank(
    lambda side, texts: model.encode(texts, side=side), methods=["bm25", "dense", "hybrid"]
)
print(json.dumps({
    f"{method} {name}": metric(ranks).tolist()
    for method, ranks in found.items() for name, metric in GRADED_METRICS.items()
}))
"""


@pytest.mark.slow
def test_two_processes_give_the_metrics_of_one(random_set, encode, random_folder):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(number), str(port), str(random_folder)],
            cwd=Path(__file__).parents[2],
            env=os.environ | {"XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        outputs = [one.communicate(timeout=300)[0] for one in processes]
    finally:
        for one in processes:
            one.kill()
    expected = random_set.rank(encode, methods=METHODS)
    first, second = (json.loads(output.splitlines()[-1]) for output in outputs)
    assert first == second
    for method, ranks in expected.items():
        for name, metric in GRADED_METRICS.items():
            np.testing.assert_allclose(first[f"{method} {name}"], metric(ranks), rtol=1e-12)


def test_a_query_does_not_find_the_document_with_its_id(tmp_path, capsys):
    corpus = {"a": "1 0", "b": "0.8 0.6", "c": "0 1"}
    folder = write_folder(tmp_path, corpus, {"a": "1 0"}, [("a", "b", 1)])
    found = open_set(folder)
    assert "1 document has the id of a query, and is left out" in capsys.readouterr().err
    metrics = found.evaluate(numbers)
    assert metrics["mrr@1"] == 1
    assert metrics["own_documents"] == 1
    renamed = write_folder(tmp_path, {"other": "1 0", **corpus}, {"q": "1 0"}, [("q", "b", 1)])
    assert open_set(renamed).evaluate(numbers)["mrr@10"] == 1 / 3


def test_documents_missing_from_the_corpus_count_as_not_found_and_are_reported(tmp_path, capsys):
    folder = small_folder(tmp_path)
    with open(folder / "qrels" / "test.tsv", "a") as file:
        file.write("y\tgone\t1\nunknown\ta\t1\nunjudged\ta\t0\n")
    metrics = open_set(folder).evaluate(numbers)
    said = capsys.readouterr().err
    assert "1 relevant document is not in the corpus, and counts as not found" in said
    assert "1 query of the qrels has no text" in said
    assert "1 query has no relevant document, so its metrics are 0" in said
    assert metrics["recall@100"] == pytest.approx((2 / 2 + 1 / 2 + 0) / 3)
    assert metrics["unknown_documents"] == 1


def test_the_fingerprint_depends_on_texts_and_labels(tmp_path):
    folder = small_folder(tmp_path)
    first = open_set(folder).fingerprint
    assert open_set(folder).fingerprint == first
    seen = {first}
    for name, old, new in [
        ("corpus.jsonl", "0.6 0.8", "0.6 0.7"),
        ("queries.jsonl", "1 0", "1 1"),
        ("qrels/test.tsv", "b\t2", "b\t3"),
    ]:
        path = folder / name
        path.write_text(path.read_text().replace(old, new))
        seen.add(open_set(folder).fingerprint)
    assert len(seen) == 4


def test_an_embedding_that_is_not_finite_is_an_error_that_names_its_document(tmp_path, monkeypatch):
    monkeypatch.setattr(retrieval_set, "_ENCODE_DOCUMENTS", 3)
    found = open_set(small_folder(tmp_path))

    def broken(side, texts):
        vectors = numbers(side, texts)
        if side == "key" and len(texts) == 1:  # the last of the 4 documents
            vectors[0] = np.nan
        return vectors

    with pytest.raises(ValueError, match=r"1 of 1 embeddings of documents .* first is row 3\."):
        found.evaluate(broken)


def test_methods_that_cannot_be_used_are_an_error(tmp_path, random_set):
    for methods in ((), ("bm25", "sparse")):
        with pytest.raises(ValueError, match="give one or more of bm25, dense, hybrid"):
            random_set.rank(None, methods=methods)
    with pytest.raises(ValueError, match="give encode"):
        random_set.rank(None, methods=["hybrid"])
    folder = write_folder(tmp_path, {"a": "...", "b": ""}, {"x": "word"}, [("x", "a", 1)])
    with pytest.raises(ValueError, match="none of the 2 key texts has a word"):
        open_set(folder).rank(None, methods=["bm25"])


def test_bm25_needs_no_model(random_set):
    ranks = random_set.rank(None, methods=["bm25"])["bm25"]
    assert GRADED_METRICS["map"](ranks).mean() > 0
