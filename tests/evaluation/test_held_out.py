"""Evaluation on held-out rows: tokens by side, keys by variant, and signs of differences."""

import json

import numpy as np
import pytest
from jaxcl.configs.code_search import get_config

from jaxcl.data.modalities import build_readers
from jaxcl.data.prepare import RunData
from jaxcl.data.sources import InMemoryPairs
from jaxcl.data.text_rule import TextRule
from jaxcl.data.token_table import build_token_table
from jaxcl.data.tokenizer import train_tokenizer
from jaxcl.evaluation import held_out as evaluate
from jaxcl.settings.read import read_settings
from tests.helpers import training_of

QUERIES = ["moon phase", "open socket", "merge ledger"]
KEYS = [
    "def moon ( moon , phase , day ) : return day",
    "def open ( socket , socket ) : return socket",
    "def merge ( ledger ) : return ledger",
]
NAMES = ["moon", "open", "merge"]


@pytest.fixture
def config():
    config = get_config("smoke")
    config.model.dim = 4
    config.data.vocabulary_size = 400
    config.data.max_tokens = {"query": 2, "key": 12}
    return config


@pytest.fixture
def make_data(config, tmp_path):
    """The data of a run, from split -> names of functions."""
    tokenizer = train_tokenizer(QUERIES + KEYS, vocabulary_size=400)

    def make(**names) -> RunData:
        sources = {
            split: InMemoryPairs(
                [f"{split} {query}" for query in QUERIES], KEYS, metadata={"name": own}
            )
            for split, own in names.items()
        }
        tables = {
            split: build_token_table(
                source,
                tokenizer,
                rules={
                    side: TextRule(width, distinct=config.data.distinct_tokens)
                    for side, width in config.data.max_tokens.items()
                },
                directory=tmp_path,
            )
            for split, source in sources.items()
        }
        workdir = tmp_path / "run"
        workdir.mkdir(exist_ok=True)
        tokenizer.save(str(workdir / "tokenizer.json"))
        return RunData(sources, tables, build_readers(read_settings(config).data, workdir))

    return make


@pytest.fixture
def encoder_with(config):
    """A run's encoder with given embeddings by side, and the texts that it was given."""

    def encoder(queries, keys):
        asked = {"query": [], "key": []}
        vectors = {"query": np.array(queries, np.float32), "key": np.array(keys, np.float32)}

        def embed(params, side, read, num_rows, **_):
            asked[side].append(read(np.arange(num_rows))["tokens"])
            return vectors[side]

        training = training_of(config)._replace(evaluation_embed=embed)
        # The embedder does not read the parameters, so their shapes are enough.
        return training.encoder(training.abstract_state(), {}), asked

    return encoder


def evaluated(config, encoder, data, workdir):
    encoder = encoder._replace(readers=data.readers)
    return evaluate.evaluate_run(read_settings(config), encoder, data, workdir)


def test_a_run_reports_the_queries_of_its_validation_split(config, make_data, encoder_with):
    data = make_data(validation=NAMES, test=NAMES)
    # Query 1 finds key 0 first and its own second; every key finds its own query first.
    encoder, asked = encoder_with([[1, 0, 0], [0.9, 0.1, 0], [0, 0, 1]], np.eye(3))
    found = evaluate.quick_metrics(read_settings(config), encoder, data)
    assert found["validation/dense/mrr@10"] == pytest.approx((1 + 1 / 2 + 1) / 3)
    assert found["validation/dense/recall@10"] == 1.0
    assert found["validation/keys"] == data.tables["validation"].num_rows
    for side in ("query", "key"):
        wanted = data.tables["validation"].side(side, np.arange(3))["tokens"]
        np.testing.assert_array_equal(asked[side], [wanted])


def test_without_a_validation_split_a_run_reports_nothing(config, make_data, encoder_with):
    encoder, _ = encoder_with(np.eye(3), np.eye(3))
    assert evaluate.quick_metrics(read_settings(config), encoder, make_data(train=NAMES)) == {}


def test_a_key_without_its_name_is_tokenised_as_the_table_is(
    config, make_data, encoder_with, tmp_path
):
    encoder, asked = encoder_with(np.eye(3), np.eye(3))
    evaluated(config, encoder, make_data(test=["absent"] * 3), tmp_path)
    plain, masked = asked["key"]
    np.testing.assert_array_equal(plain, masked)


def test_names_are_hidden_in_the_keys_of_one_variant(config, make_data, encoder_with, tmp_path):
    encoder, asked = encoder_with(np.eye(3), np.eye(3))
    data = make_data(test=NAMES)
    evaluated(config, encoder, data, tmp_path)
    hidden = data.readers["key"](["moon"])["tokens"]
    hidden = hidden[hidden > 0].tolist()
    plain, masked = asked["key"]
    assert set(hidden) <= set(plain[0].tolist())
    assert not set(hidden) & set(masked[0].tolist())


def test_differences_are_those_from_bm25(config, make_data, encoder_with, tmp_path, monkeypatch):
    # Every query finds its own key last by its embedding, and first by its words.
    encoder, _ = encoder_with(-np.eye(3), np.eye(3))
    constants, ranked = [], evaluate.evaluate_retrieval

    def noting(*args, rrf_k, **options):
        constants.append(rrf_k)
        return ranked(*args, rrf_k=rrf_k, **options)

    monkeypatch.setattr(evaluate, "evaluate_retrieval", noting)
    config.evaluation.rrf_k = 3
    results = evaluated(config, encoder, make_data(test=NAMES), tmp_path)
    figures = results["metrics"]["test"]["plain"]
    assert set(figures) == {"bm25", "dense", "hybrid", "dense - bm25", "hybrid - bm25"}
    assert figures["bm25"]["mrr@10"]["mean"] == 1.0
    assert figures["dense"]["mrr@10"]["mean"] == pytest.approx(1 / 3)
    assert figures["dense - bm25"]["mrr@10"]["mean"] == pytest.approx(1 / 3 - 1)
    assert constants == [3, 3]
    assert json.loads((tmp_path / "results.json").read_text()) == results


def test_dense_ranking_reads_no_texts(config, make_data, encoder_with, tmp_path, monkeypatch):
    config.evaluation.methods = ("dense",)
    config.data.metadata_fields = ()
    config.data.max_tokens.query = 12  # or queries of different texts have equal tokens
    encoder, _ = encoder_with(np.eye(3), np.eye(3))
    data = make_data(test=NAMES)

    def read(self, rows):
        raise AssertionError("the texts were read")

    monkeypatch.setattr(InMemoryPairs, "read", read)
    results = evaluated(config, encoder, data, tmp_path)
    assert results["metrics"]["test"]["plain"]["dense"]["mrr@10"]["mean"] == 1.0
    config.data.metadata_fields = ("name",)
    with pytest.raises(AssertionError, match="the texts were read"):
        evaluated(config, encoder, data, tmp_path)
