"""`jaxcl.evaluate`: any model on held-out pairs and on evaluation sets."""

import json

import numpy as np
import pytest

from jaxcl import evaluate
from jaxcl.data.prepare import prepare_data
from jaxcl.evaluation import check_held_out
from jaxcl.evaluation.differences import query_difference
from jaxcl.evaluation.graded import GRADED_METRICS
from jaxcl.evaluation.held_out import evaluate_run
from jaxcl.run.host_vectors import for_inner_products, similarities
from jaxcl.run.opened import open_run
from tests.small_models import DIM, small_config, small_model, small_run

rng = np.random.default_rng(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(scope="module")
def workdir(folder):
    return small_run(folder)


@pytest.fixture
def config(folder, workdir):
    return small_config(folder)


def model_of(vectors, **options):
    """A model that embeds `query 3` and `key 3` as row 3 of their side's `vectors`."""
    model = small_model(["query key 0 1 2 3 4 5 6 7 8 9"], **options)
    model.encode = lambda texts, *, side, **_: np.float32(
        [vectors[side][int(text.split()[1])] for text in texts]
    )
    return model


def test_every_held_out_query_is_ranked_among_the_keys_of_its_split(config):
    keys = np.eye(26)
    queries = keys + 2 * keys[[*range(20), 21, 20, 22, 23, 24, 25]]  # 20 and 21 are swapped
    found = evaluate.evaluate(model_of({"query": queries, "key": keys}), config=config)
    dense = found["metrics"]["validation"]["plain"]["dense"]
    assert dense["mrr@10"]["mean"] == pytest.approx((4 + 2 * 1 / 2) / 6)
    assert found["rows"] == {"train": 20, "validation": 6}
    assert set(found["metrics"]) == {"validation"}
    assert found["prompts"] == {"query": "", "key": "open "}


def test_an_unknown_field_is_an_error_wherever_it_is(config):
    with config.unlocked():
        config.optimizer.rate = 1
    with pytest.raises(ValueError, match=r"optimizer\.rate"):
        evaluate.evaluate(small_model(["a"]), config=config)


def test_a_run_is_evaluated_on_its_own_data_as_at_the_end_of_training(workdir, folder, tmp_path):
    found = evaluate.evaluate(workdir)
    run = open_run(workdir)
    data = prepare_data(run.settings.data, data_dir=folder / "data", workdir=workdir)
    wanted = evaluate_run(run.settings, run.encoder, data, tmp_path)
    assert found["metrics"] == wanted["metrics"]
    assert found["fingerprints"] == wanted["fingerprints"]


def test_the_command_prints_a_table_and_writes_the_results(workdir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "keep_compiled", lambda: None)
    output = tmp_path / "results.json"
    evaluate.main(["--model", str(workdir), "--output", str(output)])
    printed = capsys.readouterr().out
    assert "validation" in printed
    assert "dense" in printed
    results = json.loads(output.read_text())
    assert results["model"] == str(workdir)
    assert results == json.loads(json.dumps(evaluate.evaluate(workdir)))


def test_a_config_of_a_pretrained_encoder_needs_no_folder_of_it(config):
    expected = evaluate.evaluate(model_of({"query": np.eye(26), "key": np.eye(26)}), config=config)
    config.model.name = "pretrained"
    config.data.max_tokens.key = 10_000
    found = evaluate.evaluate(model_of({"query": np.eye(26), "key": np.eye(26)}), config=config)
    assert found["metrics"] == expected["metrics"]


@pytest.mark.parametrize(
    "field",
    ["model.dim", "data.max_tokens.key", "steps", "evaluation.sets.dev", "evaluation.patience"],
)
def test_a_changed_field_without_effect_is_an_error(config, field):
    with pytest.raises(ValueError, match=f"{field} has no effect here"):
        evaluate.evaluate(model_of({}), config=config, changed=["data.name", field])


def test_an_output_in_no_folder_fails_before_the_model_is_loaded(config, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load", None)
    with pytest.raises(FileNotFoundError, match=r"absent for the output does not exist"):
        evaluate.evaluate("anywhere", config=config, output=tmp_path / "absent" / "results.json")


def error(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        evaluate.main([str(word) for word in argv])
    assert stop.value.code == 1
    return capsys.readouterr().err


def test_a_field_without_a_config_is_an_error(capsys, workdir, monkeypatch):
    monkeypatch.setattr(evaluate, "keep_compiled", lambda: None)
    message = error(capsys, "--model", workdir, "--config.steps=3")
    assert "--config.steps changes a field of --config" in message


def test_a_model_without_a_run_needs_a_config(tmp_path):
    with pytest.raises(ValueError, match="is not a run with its own data; name the data with --d"):
        evaluate.evaluate(tmp_path)
    with pytest.raises(ValueError, match=r"EmbeddingModel.* is not a run with its own data"):
        evaluate.evaluate(small_model(["a"]))


def test_data_without_a_held_out_split_are_an_error(config):
    config.data.splits = {"train": "train"}
    with pytest.raises(ValueError, match="the data have only the splits train; add validation or"):
        evaluate.evaluate(small_model(["a"]), config=config)


def test_unusable_methods_fail_before_the_model_is_loaded(config, monkeypatch):
    monkeypatch.setattr(evaluate, "load", None)
    monkeypatch.setattr(check_held_out, "_has_words", lambda source: False)
    with pytest.raises(ValueError, match="no key of the validation split has a word"):
        evaluate.evaluate("anywhere", config=config)


@pytest.mark.parametrize("function", ["cosine", "dot", "euclidean"])
def test_keys_are_ranked_by_the_similarity_of_the_model(function):
    queries, keys = (rng.normal(size=(n, DIM)).astype(np.float32) for n in (20, 30))
    wanted = np.argsort(-similarities(function, queries, keys), axis=1)
    queries, keys = (
        for_inner_products(function, side, vectors)
        for side, vectors in {"query": queries, "key": keys}.items()
    )
    np.testing.assert_array_equal(np.argsort(-(queries @ keys.T), axis=1), wanted)


def test_a_similarity_without_inner_products_is_an_error(config):
    vectors = {"query": np.eye(26), "key": np.eye(26)}
    model = model_of(vectors, similarity_function="manhattan")
    with pytest.raises(ValueError, match="cannot be ranked by similarity 'manhattan'"):
        evaluate.evaluate(model, config=config)


@pytest.fixture
def beir(tmp_path):
    """A BEIR folder in which document i answers query i best, except for two swapped ones."""
    texts = {"corpus": [f"key {n} word{n}" for n in range(8)], "queries": []}
    texts["queries"] = [f"query {n} word{n}" for n in range(4)]
    for name, lines in texts.items():
        records = [{"_id": f"{name}{n}", "text": text} for n, text in enumerate(lines)]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "qrels").mkdir()
    relevant = {"test": [0, 1, 3, 2], "dev": [0, 1, 2, 3]}
    for split, documents in relevant.items():
        pairs = "".join(f"queries{n}\tcorpus{row}\t1\n" for n, row in enumerate(documents))
        (tmp_path / "qrels" / f"{split}.tsv").write_text(pairs)
    return tmp_path


def identity_model(**options):
    return model_of(
        {"query": np.eye(8) + 0.5 * np.eye(8)[[0, 1, 3, 2, 4, 5, 6, 7]], "key": np.eye(8)},
        **options,
    )


def test_a_beir_folder_is_ranked_by_all_methods(beir, tmp_path, capsys):
    found = evaluate.evaluate(identity_model(), data=beir, output=tmp_path / "results.json")
    dense = found["metrics"]["dense"]
    assert dense["mrr@10"]["mean"] == pytest.approx((1 + 1 + 1 / 2 + 1 / 2) / 4)
    spread = np.std([1, 1, 1 / 2, 1 / 2], ddof=1) / np.sqrt(4)
    assert dense["mrr@10"]["standard_error"] == pytest.approx(spread)
    # BM25 finds the document with the query's word, then the rest in random order.
    rest = np.mean([1 / rank for rank in range(2, 9)])
    assert found["metrics"]["bm25"]["mrr@100"]["mean"] == pytest.approx((1 + 1 + 2 * rest) / 4)
    assert set(found["metrics"]) == {"bm25", "dense", "hybrid", "dense - bm25", "hybrid - bm25"}
    assert found["sizes"] == {"documents": 8, "queries": 4, "relevant": 4}
    assert (found["kind"], found["data"]) == ("retrieval", str(beir))
    assert json.loads((tmp_path / "results.json").read_text()) == found
    printed = capsys.readouterr()
    assert "retrieval for 4 queries from 8 documents, with 4 relevant pairs" in printed.err
    heading, *rows = [line.split() for line in printed.out.splitlines() if line.strip(" ─")]
    assert heading[:4] == ["method", "queries", "documents", "ndcg@10"]
    assert [row[:3] for row in rows] == [[m, "4", "8"] for m in ("bm25", "dense", "hybrid")]
    assert max(map(len, printed.out.splitlines())) <= 80


def test_a_split_chooses_the_labels_and_methods_choose_the_rankings(beir):
    model = identity_model()
    found = evaluate.evaluate(model, data=beir, split="dev", methods=["dense"])
    assert set(found["metrics"]) == {"dense"}
    assert found["metrics"]["dense"]["recall@1"]["mean"] == 1
    same = evaluate.evaluate(model, data=beir / "qrels" / "dev.tsv", methods=["dense"])
    assert {**same, "data": found["data"]} == found
    with pytest.raises(ValueError, match="of the split 'train'"):
        evaluate.evaluate(model, data=beir, split="train")


def test_the_prompts_of_the_model_apply_by_side(beir):
    seen = {}
    model = small_model(["key query word open 0 1 2 3 4 5 6 7"])

    tokenize = model._tokenize

    def noting(texts, text):
        rows = tokenize(texts, text)
        seen[text.rule.prompt] = len(rows)
        return rows

    model._tokenize = noting
    evaluate.evaluate(model, data=beir, methods=["dense"])
    assert seen == {"": 4, "open ": 8}


@pytest.mark.parametrize("function", ["dot", "euclidean"])
def test_documents_are_ranked_by_the_similarity_of_the_model(beir, function):
    found = evaluate.evaluate(
        identity_model(similarity_function=function), data=beir, split="dev", methods=["dense"]
    )
    assert found["metrics"]["dense"]["recall@1"]["mean"] == 1
    with pytest.raises(ValueError, match="cannot be ranked by similarity 'manhattan'"):
        evaluate.evaluate(identity_model(similarity_function="manhattan"), data=beir)


def test_one_query_has_no_standard_error(beir, tmp_path):
    (beir / "qrels" / "one.tsv").write_text("queries0\tcorpus0\t1\n")
    output = tmp_path / "results.json"
    found = evaluate.evaluate(identity_model(), data=beir, split="one", output=output)
    assert found["metrics"]["dense"]["map"] == {"mean": 1, "standard_error": None}
    assert json.loads(output.read_text()) == found


def test_pairs_of_texts_are_evaluated_too(tmp_path, capsys):
    path = tmp_path / "pairs.csv"
    path.write_text("sentence1,sentence2,score\nquery 0,query 0,5\nquery 0,query 1,1.5\n")
    found = evaluate.evaluate(identity_model(), data=path)
    assert found["kind"] == "sts"
    assert found["metrics"]["pearson"] == pytest.approx(1)
    printed = capsys.readouterr()
    assert "semantic similarity of 2 pairs" in printed.err
    lines = [line.split() for line in printed.out.splitlines() if line.strip()]
    assert ["pearson", "1.0000", "1.0000", "to", "1.0000"] in lines
    assert [line[0] for line in lines if line[0].isalpha()] == [
        "metric",
        "spearman",
        "pearson",
        "pairs",
    ]
    with pytest.raises(
        ValueError, match="this is not a retrieval set: semantic similarity of 2 pairs"
    ):
        evaluate.evaluate(identity_model(), data=path, methods=["bm25"])
    with pytest.raises(ValueError, match=r"--split chooses .*pairs\.csv is no BEIR folder"):
        evaluate.evaluate(identity_model(), data=path, split="dev")
    with pytest.raises(ValueError, match="compares embeddings by 'euclidean'"):
        evaluate.evaluate(identity_model(similarity_function="euclidean"), data=path)


def test_data_and_options_that_exclude_each_other_are_an_error(beir, config, workdir):
    with pytest.raises(ValueError, match="both name what to evaluate on"):
        evaluate.evaluate(identity_model(), data=beir, config=config)
    for option in ({"split": "dev"}, {"kind": "sts"}, {"methods": ["bm25"]}):
        with pytest.raises(ValueError, match=f"--{next(iter(option))} has no effect without"):
            evaluate.evaluate(workdir, **option)


def test_wrong_data_fail_before_the_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load", None)
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        evaluate.evaluate("anywhere", data=tmp_path / "absent")
    with pytest.raises(
        ValueError, match=r"is not an evaluation set; give a folder with corpus\.jsonl"
    ):
        evaluate.evaluate("anywhere", data=tmp_path)


def test_the_command_evaluates_data(beir, workdir, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "keep_compiled", lambda: None)
    argv = ["--model", str(workdir), "--data", str(beir), "--methods", "dense", "--split", "dev"]
    evaluate.main(argv)
    assert "dense" in capsys.readouterr().out
    assert "error: --split chooses" in error(capsys, *argv[:2], "--data", workdir, *argv[-2:])


def other_model(**options):
    """A model with another number of dimensions, which finds every document but two."""
    turned = np.eye(8, 12)[[0, 1, 2, 3, 4, 5, 7, 6]]
    return model_of({"query": np.eye(8, 12), "key": turned}, **options)


def test_two_models_are_compared_query_by_query(beir, tmp_path, capsys):
    output = tmp_path / "results.json"
    found = evaluate.evaluate(identity_model(), against=other_model(), data=beir, output=output)
    # Queries 0 to 3 find their document at ranks 1, 1, 2, 2. With the other model the ranks are 1
    # and 1, and then ties: one document scores higher, and 6 others have the same score.
    alone = [evaluate.evaluate(one, data=beir) for one in (identity_model(), other_model())]
    assert {name: found[name] for name in alone[0]} == alone[0]
    assert set(found["against"]["metrics"]) == {"dense", "hybrid"}
    for method in ("dense", "hybrid"):
        assert found["against"]["metrics"][method] == alone[1]["metrics"][method]
    behind = np.mean([1 / rank for rank in range(2, 9)])
    values, baseline = np.array([1, 1, 1 / 2, 1 / 2]), np.array([1, 1, behind, behind])
    expected = query_difference(values, baseline)
    one = found["differences"]["dense"]["mrr@10"]
    assert one["difference"] == pytest.approx(expected.difference)
    assert one["standard_error"] == pytest.approx(expected.standard_error)
    assert one["interval"] == pytest.approx([expected.low, expected.high])
    assert list(found["differences"]) == ["dense", "hybrid"]  # BM25 does not depend on the model
    assert list(found["differences"]["dense"]) == list(GRADED_METRICS)
    assert json.loads(output.read_text()) == found
    printed = capsys.readouterr().out
    assert printed.index("model: here") < printed.index("against: here")
    assert "95% interval" in printed
    assert f"{expected.difference:+.4f}" in printed


def test_two_models_are_compared_on_pairs(tmp_path, capsys):
    rows = [f"query {n},query {m},{(n + m) % 5}" for n in range(6) for m in range(n)]
    path = tmp_path / "pairs.csv"
    path.write_text("\n".join(["sentence1,sentence2,score", *rows]) + "\n")
    ours, theirs = (
        model_of({"query": np.random.default_rng(seed).normal(size=(8, dim))})
        for seed, dim in enumerate((5, 9))
    )
    found = evaluate.evaluate(ours, against=theirs, data=path)
    alone = [evaluate.evaluate(one, data=path)["metrics"] for one in (ours, theirs)]
    assert [found["metrics"], found["against"]["metrics"]] == alone
    for name in ("spearman", "pearson"):
        one = found["differences"][name]
        assert one["difference"] == pytest.approx(alone[0][name] - alone[1][name])
        low, high = one["interval"]
        assert low < one["difference"] < high
    assert "± over pairs" in capsys.readouterr().out
    path.write_text(path.read_text().replace(",2\n", ",1\n").replace(",3\n", ",0\n"))
    path.write_text(path.read_text().replace(",4\n", ",1\n"))
    labelled = evaluate.evaluate(ours, against=theirs, data=path)
    assert list(labelled["differences"]) == ["average_precision", "f1", "accuracy"]


def test_each_of_two_models_has_its_own_prompts(beir):
    seen = []
    models = [small_model(["key query word open 0 1 2 3 4 5 6 7"]) for _ in range(2)]
    models[1]._rules = {**models[1]._rules, "key": models[1]._rules["key"]._replace(prompt="read ")}
    models[1].prompts = {**models[1].prompts, "key": "read "}
    for model in models:

        def noting(texts, text, tokenize=model._tokenize):
            seen.append(text.rule.prompt)
            return tokenize(texts, text)

        model._tokenize = noting
    found = evaluate.evaluate(models[0], against=models[1], data=beir, methods=["dense"])
    assert seen == ["", "open ", "", "read "]
    assert found["prompts"]["key"] == "open "
    assert found["against"]["prompts"]["key"] == "read "


def test_two_models_are_compared_on_the_held_out_rows_of_a_run(workdir, config, capsys):
    vectors = {"query": np.eye(26, 40), "key": np.eye(26, 40)}
    found = evaluate.evaluate(workdir, against=model_of(vectors))
    assert found["metrics"] == evaluate.evaluate(workdir)["metrics"]
    against = found["against"]["metrics"]["validation"]["plain"]["dense"]["mrr@10"]
    assert against == {"mean": 1, "standard_error": 0}
    ours = found["metrics"]["validation"]["plain"]["dense"]["mrr@10"]
    one = found["differences"]["validation"]["plain"]["dense"]["mrr@10"]
    assert one["difference"] == pytest.approx(ours["mean"] - 1)
    assert one["standard_error"] == pytest.approx(ours["standard_error"])
    assert "bm25" not in found["differences"]["validation"]["plain"]
    printed = capsys.readouterr().out
    assert printed.count("± over queries") == 1
    assert "model: " in printed
    turned = evaluate.evaluate(model_of(vectors), against=workdir, config=config)
    other = turned["differences"]["validation"]["plain"]["dense"]["mrr@10"]
    assert other["difference"] == pytest.approx(-one["difference"])


def test_the_command_compares_a_run_with_itself(beir, workdir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "keep_compiled", lambda: None)
    output = tmp_path / "results.json"
    argv = ["--model", str(workdir), "--against", str(workdir), "--output", str(output)]
    evaluate.main([*argv, "--data", str(beir), "--methods", "dense"])
    found = json.loads(output.read_text())
    same = {"difference": 0, "standard_error": 0, "interval": [0, 0]}
    assert all(one == same for one in found["differences"]["dense"].values())
    assert "+0.0000 to +0.0000" in capsys.readouterr().out
    message = error(capsys, *argv, "--data", beir, "--methods", "bm25")
    assert "bm25 ranks without one; add dense" in message


def test_a_second_model_that_is_not_there_is_an_error(beir, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        evaluate.evaluate(identity_model(), against=tmp_path / "absent", data=beir)


def test_methods_that_compare_nothing_fail_before_the_models_are_loaded(config, monkeypatch):
    monkeypatch.setattr(evaluate, "load", None)
    config.evaluation.methods = ("bm25",)
    with pytest.raises(ValueError, match="add 'dense'"):
        evaluate.evaluate("anywhere", against="elsewhere", config=config)
