"""`mteb` evaluates models from `jaxcl.load`, with the same results as jaxcl's own evaluation.

These tests need mteb, which brings torch:

    pip install -e '.[dev,mteb]' && python -m pytest -n 0 tests/run/test_mteb.py
"""

import csv
import json

import numpy as np
import pytest

import jaxcl
from jaxcl.evaluation.evaluate_set import evaluate_set
from jaxcl.evaluation.sets import open_set
from jaxcl.export import export
from tests.models.pretrained.tiny import WORDS, write_tiny_bert, write_tiny_static
from tests.saved_run import TEXTS, save_run

mteb = pytest.importorskip("mteb", reason="needs mteb: pip install 'jaxcl[mteb]'")
abstasks = pytest.importorskip("mteb.abstasks")
datasets = pytest.importorskip("datasets")

pytestmark = pytest.mark.filterwarnings("default")  # mteb and its dependencies may warn
rng = np.random.default_rng(0)


def some_texts(count):
    """Texts of words that each model's tokenizer knows, so that no two have equal tokens."""
    words = TEXTS[1].replace(",", "").split()
    return [
        " ".join([*rng.choice(words, 2), *rng.choice(WORDS, size=rng.integers(2, 4))])
        for _ in range(count)
    ]


CORPUS = {f"d{row}": ("title" * (row % 2), text) for row, text in enumerate(some_texts(60))}
QUERIES = {f"q{row}": text for row, text in enumerate(some_texts(15))}
QRELS = {
    query: {
        f"d{row}": int(grade) for row, grade in zip(rng.permutation(60), (2, 1, 1), strict=False)
    }
    for query in QUERIES
}
PAIRS = list(zip(some_texts(40), some_texts(40), strict=True))
SCORES = rng.integers(0, 11, 40) / 2


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    run = save_run(folder / "run", data__prompts={"query": "open ", "key": ""})
    export(run, folder / "exported")
    folders = {
        "run": run,
        "exported": folder / "exported",
        "static": write_tiny_static(folder / "static"),
        "bert": write_tiny_bert(folder / "bert"),
    }
    return {name: jaxcl.load(path) for name, path in folders.items()}


def metadata(name, kind, main_score):
    return abstasks.task_metadata.TaskMetadata(
        name=name,
        type=kind,
        main_score=main_score,
        description="texts of a test",
        dataset={"path": "none/none", "revision": "1"},
        eval_langs=["eng-Latn"],
    )


class LocalRetrieval(abstasks.AbsTaskRetrieval):
    metadata = metadata("LocalRetrieval", "Retrieval", "ndcg_at_10")

    def load_data(self, *args, **kwargs):
        corpus = [
            {"id": one, "title": title, "text": text} for one, (title, text) in CORPUS.items()
        ]
        queries = [{"id": one, "text": text} for one, text in QUERIES.items()]
        content = {
            "corpus": datasets.Dataset.from_list(corpus),
            "queries": datasets.Dataset.from_list(queries),
            "relevant_docs": QRELS,
            "top_ranked": None,
        }
        self.dataset = {"default": {"test": content}}
        self.data_loaded = True


class LocalPairs:
    """Loads pairs of texts with the values of a column."""

    column = "score"
    values = SCORES

    def load_data(self, *args, **kwargs):
        first, second = zip(*PAIRS, strict=True)
        columns = {"sentence1": first, "sentence2": second, self.column: self.values}
        self.dataset = {"test": datasets.Dataset.from_dict(columns)}
        self.data_loaded = True


class LocalSts(LocalPairs, abstasks.AbsTaskSTS):
    metadata = metadata("LocalSts", "STS", "cosine_spearman")
    min_score, max_score = 0, 5


class LocalClassification(LocalPairs, abstasks.AbsTaskPairClassification):
    metadata = metadata("LocalClassification", "PairClassification", "max_ap")
    column, values = "labels", (SCORES > 2).astype(int)


def scores_of(model, task):
    found = mteb.evaluate(model, task, cache=None, show_progress_bar=False)
    return found.task_results[0].scores["test"][0]


def write_pairs(path, values):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(
            [*pair, value] for pair, value in zip(PAIRS, values, strict=True)
        )
    return path


@pytest.fixture(scope="module")
def beir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("beir")
    corpus = [{"_id": one, "title": title, "text": text} for one, (title, text) in CORPUS.items()]
    queries = [{"_id": one, "text": text} for one, text in QUERIES.items()]
    for name, records in {"corpus": corpus, "queries": queries}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    (folder / "qrels").mkdir()
    judgements = [(q, d, grade) for q, grades in QRELS.items() for d, grade in grades.items()]
    lines = ["\t".join(map(str, one)) for one in judgements]
    (folder / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]))
    return folder


every_model = pytest.mark.parametrize("name", ["run", "exported", "static", "bert"])


@every_model
def test_a_retrieval_has_the_figures_of_jaxcl(models, beir, name):
    theirs = scores_of(models[name], LocalRetrieval())
    ours = evaluate_set(models[name], open_set(beir), methods=("dense",))["metrics"]["dense"]
    for metric in ("ndcg", "recall", "precision"):
        for k in (1, 5, 10):
            mean = ours[f"{metric}@{k}"]["mean"]
            assert theirs[f"{metric}_at_{k}"] == pytest.approx(mean, abs=2e-5)
    assert 0.02 < theirs["main_score"] < 0.9


@every_model
def test_semantic_similarity_has_the_figures_of_jaxcl(models, tmp_path, name):
    theirs = scores_of(models[name], LocalSts())
    data = open_set(write_pairs(tmp_path / "pairs.csv", SCORES))
    ours = evaluate_set(models[name], data)["metrics"]
    for metric in ("spearman", "pearson"):
        assert theirs[metric] == pytest.approx(ours[metric], abs=1e-5)
        assert abs(theirs[metric]) > 1e-3


@every_model
def test_pair_classification_has_the_figures_of_jaxcl(models, tmp_path, name):
    theirs = scores_of(models[name], LocalClassification())
    labels = LocalClassification.values
    ours = evaluate_set(models[name], open_set(write_pairs(tmp_path / "pairs.csv", labels)))
    for metric, name_of_theirs in {
        "average_precision": "ap",
        "f1": "f1",
        "accuracy": "accuracy",
    }.items():
        assert theirs[f"similarity_{name_of_theirs}"] == pytest.approx(
            ours["metrics"][metric], abs=1e-5
        )


@pytest.mark.parametrize("task", [LocalRetrieval, LocalSts, LocalClassification])
def test_prompts_of_tasks_are_those_of_sentence_transformers(tmp_path, task):
    texts = {"query": "query : ", "document": "key 7 : ", "Retrieval-document": "read 2 3 : "}
    texts |= {"STS": "file 1 ", "PairClassification": "29 "}
    folder = write_tiny_bert(tmp_path / "bert", library={"prompts": texts})
    library = pytest.importorskip("sentence_transformers")
    model = library.SentenceTransformer(str(folder), device="cpu")
    theirs, ours = scores_of(model, task()), scores_of(jaxcl.load(folder), task())
    without = scores_of(jaxcl.load(write_tiny_bert(tmp_path / "without")), task())
    name = task.metadata.main_score
    assert ours[name] == pytest.approx(theirs[name], abs=2e-5)
    assert ours[name] != pytest.approx(without[name], abs=1e-3)


def test_the_description_changes_with_the_model(models):
    metas = [model.mteb_model_meta for model in models.values()]
    assert [meta.name for meta in metas] == [f"jaxcl/{name}" for name in models]
    assert len({meta.revision for meta in metas}) == len(metas)
    assert metas[0].embed_dim == models["run"].dim
    assert [meta.max_tokens for meta in metas] == [12, 12, 24, 24]
    assert metas[0].use_instructions
    assert not metas[2].use_instructions


def test_results_are_kept_under_the_name_of_the_model(models, tmp_path):
    model = models["static"]
    cache = mteb.ResultCache(tmp_path)
    mteb.evaluate(model, LocalSts(), cache=cache, show_progress_bar=False)
    meta = model.mteb_model_meta
    assert list(tmp_path.rglob(f"jaxcl__static/{meta.revision}/LocalSts.json"))
