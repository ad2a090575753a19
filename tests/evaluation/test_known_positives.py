"""Other keys of the same query are left out of its ranking: exactly, and nothing else is."""

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

from jaxcl.configs import pairs
from jaxcl.data.sources import InMemoryPairs
from jaxcl.evaluate import evaluate
from jaxcl.evaluation import held_out
from jaxcl.evaluation.evaluate_held_out import Contender, evaluate_model
from jaxcl.evaluation.known_positives import known_positives, rank_last, read_known_positives
from jaxcl.evaluation.retrieval import BM25, METHODS, METRICS, dense_scores, evaluate_retrieval
from jaxcl.metrics import mid_ranks, mrr_metric
from jaxcl.ops.mesh import make_mesh
from jaxcl.run.load_model import load
from jaxcl.run.metric_writer import read_metrics
from jaxcl.run.opened import open_run
from jaxcl.train import train
from jaxcl.typing import SIDES

WORDS = ["parse", "iso", "date", "open", "socket", "read", "line", "write", "file", "close"]
NUM_ROWS = 60


def some_rows():
    """Texts of rows: a third repeat a query, and a few repeat a key."""
    rng = np.random.default_rng(1)
    keys = [" ".join(rng.choice(WORDS, 6)) for _ in range(NUM_ROWS)]
    queries = [" ".join(rng.choice(key.split(), 3)) for key in keys]
    for row in rng.choice(NUM_ROWS, 20, replace=False):
        queries[row] = queries[rng.integers(5)]
    for row in rng.choice(NUM_ROWS, 10, replace=False):
        keys[row] = keys[rng.integers(NUM_ROWS)]
    return queries, keys


QUERIES, KEYS = some_rows()


def vectors_of(texts, seed):
    """Unit vectors, equal for equal texts."""
    rng = np.random.default_rng(seed)
    by_text = {text: rng.standard_normal(8) for text in sorted(set(texts))}
    vectors = np.float32([by_text[text] for text in texts])
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


QUERY_VECTORS, KEY_VECTORS = vectors_of(QUERIES, 0), vectors_of(KEYS, 1)


def restated_ranks(tables, *, rrf_k=60):
    """The ranks by the definition, one query at a time, in pools without its other positives."""
    ranks = {method: [] for method in METHODS}
    left_out = 0
    for row, query in enumerate(QUERIES):
        positives = {KEYS[other] for other in range(NUM_ROWS) if QUERIES[other] == query}
        pool = [other for other in range(NUM_ROWS) if KEYS[other] not in positives or other == row]
        left_out += NUM_ROWS - len(pool)
        own = pool.index(row)
        scores = {method: table[row, pool] for method, table in tables.items()}
        places = [mid_ranks(one[None])[0] for one in scores.values()]
        scores["hybrid"] = np.sort([1 / (rrf_k + place) for place in places], axis=0).sum(0)
        for method, one in scores.items():
            ranks[method].append(mid_ranks(one[None])[0][own])
    return ranks, left_out


def tables_of_all_rows():
    return {"bm25": BM25(KEYS).scores(QUERIES), "dense": dense_scores(QUERY_VECTORS, KEY_VECTORS)}


@pytest.mark.parametrize("tile", [1, 7, NUM_ROWS, 512])
def test_ranks_are_those_in_a_pool_without_the_other_positives(tile):
    known = read_known_positives(InMemoryPairs(QUERIES, KEYS))
    found = evaluate_retrieval(
        QUERIES, KEYS, QUERY_VECTORS, KEY_VECTORS, known=known, tile=tile, rrf_k=5
    )
    expected, left_out = restated_ranks(tables_of_all_rows(), rrf_k=5)
    for method in METHODS:
        assert found[method].ranks.tolist() == expected[method]
        assert found[method].num_left_out == left_out == known.total() > 0
    # Negative control: the other positives count as wrong answers without `known`.
    naive = evaluate_retrieval(QUERIES, KEYS, QUERY_VECTORS, KEY_VECTORS, tile=tile, rrf_k=5)
    for method in METHODS:
        worse = naive[method].ranks - found[method].ranks
        assert (worse > 0).sum() > 10
        assert method == "hybrid" or (worse >= 0).all()  # ranks of a fusion depend on all keys
        assert naive[method].num_left_out == 0


def test_rows_without_equal_contents_keep_every_bit_of_their_ranks():
    distinct = [f"{query} {row}" for row, query in enumerate(QUERIES)]
    keys = [f"{key} {row}" for row, key in enumerate(KEYS)]
    known = read_known_positives(InMemoryPairs(distinct, keys))
    inputs = (distinct, keys, QUERY_VECTORS, KEY_VECTORS)
    found, plain = evaluate_retrieval(*inputs, known=known), evaluate_retrieval(*inputs)
    for method in METHODS:
        assert found[method].ranks.tobytes() == plain[method].ranks.tobytes()
    assert known.total() == 0


def test_a_query_with_two_keys_by_hand():
    known = read_known_positives(InMemoryPairs(["a", "a", "b"], ["x", "y", "z"]))
    queries = np.float32([[1, 0], [1, 0], [0, 1]])
    keys = np.float32([[1, 0], [0.9, 0.1], [0.95, 0.2]])
    found = evaluate_retrieval(None, None, queries, keys, known=known, methods=["dense"])["dense"]
    # Query a ranks x, z, y: row 0 finds x first, and row 1 finds y after z, without x.
    assert found.ranks.tolist() == [1, 2, 1]
    assert found.num_left_out == 2
    naive = evaluate_retrieval(None, None, queries, keys, methods=["dense"])["dense"]
    assert naive.ranks.tolist() == [1, 3, 1]


def test_positives_are_those_of_the_same_query_and_equal_keys_but_no_further():
    # Rows 0 and 1 share query 0; rows 1 and 2 share key 1; rows 2 and 3 share query 2.
    known = known_positives(np.array([0, 0, 2, 2]), np.array([0, 1, 1, 3]))
    others = known.others(slice(0, 4), np.arange(4))
    assert {row: sorted(rows) for row, rows in others.items()} == {
        0: [1, 2],  # not 3: it is a positive of query 2 alone
        1: [0, 2],
        2: [1, 3],
        3: [1, 2],
    }
    assert known.total() == 8


def test_memory_is_linear_where_all_queries_are_equal():
    known = known_positives(np.zeros(5000, int), np.arange(5000))
    assert sum(part.size for part in known) < 10 * 5000
    assert known.total() == 5000 * 4999
    others = known.others(slice(7, 9), np.array([7, 8]))
    assert [len(rows) for rows in others.values()] == [4999, 4999]
    assert 7 not in others[0]
    assert 8 not in others[1]


def test_only_rows_with_a_shared_label_are_read():
    read = []

    class Noting(InMemoryPairs):
        def read(self, rows):
            read.extend(rows)
            return super().read(rows)

    source = Noting(["a", "a", "a", "b"], ["w", "x", "y", "z"])
    known = read_known_positives(source, np.array([5, 5, 9, 7], np.int32))
    assert read == [0, 1]
    assert known.queries.tolist() == [0, 0, 2, 3]
    # A label that other rows share too, such as that of texts cut to equal tokens, joins no others.
    known = read_known_positives(source, np.zeros(4, np.int32))
    assert known.queries.tolist() == [0, 0, 0, 3]
    assert known.total() == 6


def test_arrays_are_compared_by_content_and_other_values_are_not_equal():
    images = [np.zeros(3), np.zeros(3), np.zeros(3, np.float32), np.ones(3)]
    known = read_known_positives(InMemoryPairs(images, ["0", "array", "2", "3"]))
    assert known.queries.tolist() == [0, 0, 2, 3]
    known = read_known_positives(InMemoryPairs([None, None], ["a", "b"]))
    assert known.queries.tolist() == [0, 1]


def test_scores_of_any_sign_are_ranked_last():
    scores = np.float32([[3, -2, 5], [0, 0, 0], [1e30, 2e30, 3e30]])
    rank_last(scores, {0: np.array([2]), 1: np.array([0, 1]), 2: np.array([1, 2])})
    assert np.isfinite(scores).all()
    assert [row.argmax() for row in scores] == [0, 2, 0]
    assert mid_ranks(scores).tolist() == [[1, 2, 3], [2.5, 2.5, 1], [1, 2.5, 2.5]]


def test_positives_of_other_rows_are_an_error():
    known = known_positives(np.arange(3), np.arange(3))
    with pytest.raises(ValueError, match="3 queries and 3 keys do not fit 60 queries and 60 keys"):
        evaluate_retrieval(QUERIES, KEYS, None, None, known=known, methods=["bm25"])


def test_each_process_ranks_its_part_without_the_other_positives(monkeypatch):
    known = read_known_positives(InMemoryPairs(QUERIES, KEYS))
    inputs = (QUERIES, KEYS, QUERY_VECTORS, KEY_VECTORS, known)
    expected, left_out = restated_ranks(tables_of_all_rows())
    parts = []
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(held_out, "together", lambda make: make())

    def gather(part):
        parts.append(part)
        return {method: np.stack([one[method] for one in parts]) for method in part}

    monkeypatch.setattr(multihost_utils, "process_allgather", gather)
    for process in range(3):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        found = held_out._ranked(*inputs, methods=METHODS)
    for method in METHODS:
        assert found[method].ranks.tolist() == expected[method]
        assert found[method].num_left_out == left_out


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on eight devices, whose held-out queries have two keys each."""
    folder = tmp_path_factory.mktemp("trained")
    records = [
        {"query": f"how to {WORDS[i % 10]} in way{i}", "positives": [f"use way{i}", f"or {i} ways"]}
        for i in range(40)
    ]
    lines = [json.dumps(record) + "\n" for record in records]
    (folder / "pairs.jsonl").write_text("".join(lines[:28]))
    (folder / "dev.jsonl").write_text("".join(lines[28:]))
    config = pairs.get_config("smoke")
    config.update_from_flattened_dict(
        {
            "steps": 4,
            "global_batch_size": 16,
            "model.dim": 16,
            "data.vocabulary_size": 300,
            "data.name": str(folder / "pairs.jsonl"),
            "data.splits.validation": str(folder / "dev.jsonl"),
            "run.data_dir": str(folder / "data"),
        }
    )
    return folder / "run", train(config, folder / "run")


def restated_of_run(workdir):
    """MRR@10 of dense retrieval in pools without the other key of each query."""
    source = open_run(workdir).sources()["validation"]
    records = source.read(np.arange(len(source)))
    model = load(workdir)
    query, key = (model.encode([one[side] for one in records], side=side) for side in SIDES)
    ranks, naive = [], []
    scores = dense_scores(query, key)
    for row, record in enumerate(records):
        others = [row for row, other in enumerate(records) if other["query"] != record["query"]]
        assert len(others) == len(records) - 2
        for pool, found in ((others, ranks), (np.delete(np.arange(len(records)), row), naive)):
            better = (scores[row, pool] > scores[row, row]).sum()
            found.append(1 + better + (scores[row, pool] == scores[row, row]).sum() / 2)
    return [mrr_metric(np.array(found)).mean() for found in (ranks, naive)]


def test_a_run_leaves_out_the_other_keys_as_it_trains_and_after_it(trained):
    workdir, results = trained
    expected, naive = restated_of_run(workdir)
    assert expected > naive + 0.01
    found = results["metrics"]["validation"]["plain"]["dense"]["mrr@10"]["mean"]
    assert found == pytest.approx(expected, rel=1e-6)
    assert results["left_out"] == {"validation": 24}
    reported = [one for one in read_metrics(workdir) if "validation/dense/mrr@10" in one]
    assert reported[-1]["validation/dense/mrr@10"] == pytest.approx(expected, rel=1e-6)


def test_one_device_leaves_out_the_same_keys_as_eight(trained):
    workdir, results = trained
    assert evaluate(workdir)["metrics"] == results["metrics"]
    run = open_run(workdir)
    model = load(workdir)
    model._mesh = make_mesh({"data": -1}, devices=jax.devices()[:1])
    alone = evaluate_model(run.settings, Contender(model), run.sources())
    found, wanted = (one["metrics"]["validation"]["plain"] for one in (alone, results))
    for method in METHODS:
        for metric in METRICS:
            assert found[method][metric] == pytest.approx(wanted[method][metric], rel=1e-6)
    assert alone["left_out"] == results["left_out"]


PROCESS = """
import json, sys
import jax
number, port, workdir = sys.argv[1:]
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(number))
from jaxcl.evaluate import evaluate
assert (jax.process_count(), jax.device_count()) == (2, 8)
found = evaluate(workdir)
print(json.dumps({name: found[name] for name in ("metrics", "left_out")}))
"""


@pytest.mark.slow
def test_two_processes_leave_out_the_same_keys_as_one(trained):
    workdir, results = trained
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(number), str(port), str(workdir)],
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
    first, second = (json.loads(output.splitlines()[-1]) for output in outputs)
    assert first == second
    assert first["left_out"] == results["left_out"]
    found, wanted = (one["metrics"]["validation"]["plain"] for one in (first, results))
    for method in METHODS:
        for metric in METRICS:
            assert found[method][metric] == pytest.approx(wanted[method][metric], rel=1e-6)
