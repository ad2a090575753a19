"""Search in a user's corpus: ids, snippets, options of the ranking, and clear errors."""

import json

import numpy as np
import pytest

from jaxcl import search
from jaxcl.evaluation.retrieval import BM25, reciprocal_rank_fusion
from jaxcl.settings.config_files import load_config
from tests.small_models import DIM, small_model

TEXTS = [f"{verb} the {noun}" for verb in ("open", "close", "merge") for noun in ("file", "date")]
HOSTILE = "open \x1b[31m the\u202e\r\n\n\x07socket \u2028 now"
RECORDS = [
    *({"id": f"doc-{number}", "title": "", "text": text} for number, text in enumerate(TEXTS)),
    {"id": "hostile\n\x1b[0m\tid", "title": "Sockets", "text": HOSTILE},
]


@pytest.fixture(scope="module")
def model():
    return small_model([*TEXTS, HOSTILE])


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "docs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


@pytest.fixture
def run(model, monkeypatch, capsys):
    """Run the command with the model; return (exit code, stdout, stderr)."""
    monkeypatch.setattr(search, "load", lambda path, trust: model)

    def run_command(*argv):
        code = 0
        try:
            search.main(["--model", "here", *map(str, argv)])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run_command


def error_of(run, *argv):
    code, out, error = run(*argv)
    assert (code, out) == (1, "")
    last = error.splitlines()[-1]
    assert last.startswith("error: ")
    return last


def ranked_by_the_model(model, query, texts):
    scores = model.similarity(model.encode(query), model.encode(texts, side="key"))
    return sorted(range(len(texts)), key=lambda row: (-scores[row], row)), scores


def test_hits_have_rank_score_id_and_a_snippet(run, model, corpus):
    order, scores = ranked_by_the_model(model, "open the file", [*TEXTS, f"Sockets {HOSTILE}"])
    code, out, error = run("--corpus", corpus, "--top", 2, "open", "the", "file")
    assert code == 0
    assert "embedding documents: 7/7" in error
    assert out.splitlines() == [
        line
        for rank, row in enumerate(order[:2], start=1)
        for line in (f"  {rank}  {scores[row]:.4f}  doc-{row}", f"     {TEXTS[row]}")
    ]


def test_json_has_score_id_snippet_and_text(run, corpus):
    code, out, _ = run("--corpus", corpus, "--json", "--top", 100, "open the socket")
    assert (code, out.count("\n")) == (0, 1)
    hits = json.loads(out)
    assert len(hits) == len(RECORDS)  # a larger top shows all
    assert [list(hit) for hit in hits] == [["score", "id", "snippet", "text"]] * len(hits)
    scores = [hit["score"] for hit in hits]
    assert scores == sorted(scores, reverse=True)
    texts = {hit["id"]: hit["text"] for hit in hits}
    assert texts == {
        record["id"]: f"{record['title']} {record['text']}".strip() for record in RECORDS
    }


def test_hostile_ids_and_texts_are_escaped_and_stay_in_their_lines(run, corpus):
    _, out, _ = run("--corpus", corpus, "--top", 7, "the socket")
    lines = out.splitlines()
    assert len(lines) == 2 * len(RECORDS)
    [head] = [line for line in lines if "hostile" in line]
    assert head.endswith(r"hostile \u001b[0m id")
    text = lines[lines.index(head) + 1].strip()
    assert text == r"Sockets open \u001b[31m the\u202e \u0007socket now"
    assert not set(out) & set("\x1b\x07\u202e\u2028\r")


def test_long_texts_are_shown_where_they_match(model, tmp_path):
    corpus = tmp_path / "docs.txt"
    corpus.write_text("open file " * 200 + "a barometer " + "date " * 100 + "\nshort\n")
    hits = search.open_search(model, corpus=corpus)("a barometer", 2)
    assert {hit.record["id"] for hit in hits} == {"0", "1"}


@pytest.mark.parametrize("precision", ["int8", "binary"])
def test_rescoring_all_documents_is_the_exact_ranking(model, corpus, precision):
    queries = ["open the date", "merge", "socket now"]
    exact = search.open_search(model, corpus=corpus).batch(queries)
    options = {"precision": precision, "rescore": len(RECORDS)}
    assert search.open_search(model, corpus=corpus, **options).batch(queries) == exact


def test_a_cut_is_the_ranking_by_cut_vectors(model, corpus):
    texts = [*TEXTS, f"Sockets {HOSTILE}"]
    cut = search.open_search(model, corpus=corpus, dim=4)
    hits = cut("open the date", 100)
    wanted = model.encode("open the date", dim=4) @ model.encode(texts, side="key", dim=4).T
    np.testing.assert_allclose([hit.score for hit in hits], np.sort(wanted)[::-1], atol=1e-5)
    assert set(cut.kept) == {"dim"}
    whole = search.open_search(model, corpus=corpus)("open the date", 100)
    assert [hit.score for hit in whole] != pytest.approx([hit.score for hit in hits], abs=1e-3)


@pytest.mark.parametrize("precision", ["float32", "binary"])
def test_hybrid_fuses_the_ranks_of_bm25(model, corpus, precision):
    texts = [*TEXTS, f"Sockets {HOSTILE}"]
    _, scores = ranked_by_the_model(model, "merge date", texts)
    fused = reciprocal_rank_fusion([BM25(texts).scores(["merge date"]), scores[None]], k=60)[0]
    opened = search.open_search(
        model,
        corpus=corpus,
        hybrid=True,
        precision=precision,
        rescore=None if precision == "float32" else 100,
    )
    hits = opened("merge date", 100)
    np.testing.assert_allclose([hit.score for hit in hits], np.sort(fused)[::-1], atol=1e-6)


def test_a_batch_is_each_query_on_its_own(model, corpus):
    opened = search.open_search(model, corpus=corpus, precision="int8")
    queries = ["open the date", "merge", "open the date"]
    batch = opened.batch(queries, top=3)
    assert batch == [opened(query, 3) for query in queries]
    assert opened.batch([]) == []
    with pytest.raises(ValueError, match="batch takes a list of queries"):
        opened.batch("merge")
    with pytest.raises(ValueError, match="the query is empty"):
        opened.batch(["merge", " "])
    with pytest.raises(ValueError, match="must be at least 1"):
        opened.batch(["merge"], top=0)


def test_the_shares_are_printed(run, corpus):
    _, _, error = run("--corpus", corpus, "--dim", 4, "--precision", "binary", "open")
    assert "4 dimensions keep " in error
    assert "% of the top 10 by all dimensions, measured with random documents" in error
    assert "binary with rescoring keeps 100.0% of the top 10 by float32 (" in error
    _, _, error = run("--corpus", corpus, "open")
    assert "keep" not in error


def test_the_index_is_kept_in_the_cache_or_the_given_folder(run, corpus, tmp_path):
    for options, folder in (
        ([], tmp_path / "cache" / "jaxcl" / "search"),
        (["--index", tmp_path / "index"], tmp_path / "index"),
    ):
        assert not folder.exists()
        for _ in range(2):
            code, out, error = run("--corpus", corpus, *options, "open")
            assert code == 0
        assert "embedding" not in error
        [index] = folder.iterdir()
        assert {path.name for path in index.iterdir()} >= {"keys.npy", "keys.blocks.jsonl"}
    corpus.write_text(corpus.read_text().replace("open the date", "count the dates"))
    _, out, error = run("--corpus", corpus, "--index", tmp_path / "index", "count the dates")
    assert "embedding documents: 7/7" in error
    assert "     count the dates\n" in out


def test_an_index_that_cannot_be_written_names_the_flag(run, corpus, tmp_path):
    (tmp_path / "file").write_text("")
    error = error_of(run, "--corpus", corpus, "--index", tmp_path / "file", "open")
    assert "cannot write the index" in error
    assert "set another --index folder" in error
    assert "is a URL, but a local path" in error_of(
        run, "--corpus", corpus, "--index", "gs://bucket/index", "open"
    )


def test_fields_are_chosen_by_flags(run, tmp_path):
    path = tmp_path / "docs.csv"
    path.write_text("name,summary\na,open the file\nb,merge the date\n")
    flags = ["--corpus", path, "--id-field", "name", "--text-field", "summary"]
    _, out, _ = run(*flags, "--json", "merge the date")
    texts = {hit["id"]: hit["text"] for hit in json.loads(out)}
    assert texts == {"a": "open the file", "b": "merge the date"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no documents"),
        ('{"id": "a", "text": "x"}\n{"id": "a", "text": "y"}\n', "the id 'a' is also that of"),
        ('{"id": "a", "text": 5}\n', "text is 5, which is not a text"),
        ("[]\n", "line 1 is not a JSON object"),
    ],
)
def test_a_corpus_that_is_not_valid_is_an_error_in_one_line(run, tmp_path, content, message):
    path = tmp_path / "docs.jsonl"
    path.write_text(content)
    error = error_of(run, "--corpus", path, "open")
    assert message in error
    assert str(path) in error


def test_a_corpus_without_words_cannot_be_searched_by_bm25(run, tmp_path):
    path = tmp_path / "docs.txt"
    path.write_text("?!\n--\n")
    assert run("--corpus", path, "open")[0] == 0
    assert "has a word or a number to index" in error_of(run, "--corpus", path, "--hybrid", "open")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dim", 4], "dim=4 has no effect without a corpus"),
        (["--precision", "int8"], "precision=int8 has no effect without a corpus"),
        (["--rescore", 2], "rescore=2 has no effect without a corpus"),
        (["--index", "here"], "index=here has no effect without a corpus"),
        (["--text-field", "body"], "text_field=body has no effect without a corpus"),
    ],
)
def test_options_of_a_corpus_without_one_are_errors(run, flags, message):
    assert message in error_of(run, *flags, "open")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dim", DIM + 1], f"dim={DIM + 1} is out of range"),
        (["--rescore", 2], "rescore=2 has no effect"),
        (["--config", "base"], "a corpus and a config are both given"),
        (["--top", 0], "--top=0 must be at least 1"),
    ],
)
def test_options_out_of_range_are_errors(run, corpus, flags, message):
    assert message in error_of(run, "--corpus", corpus, *flags, "open")


def test_an_unknown_precision_is_an_error_of_the_flag(run, corpus):
    code, _, error = run("--corpus", corpus, "--precision", "int4", "open")
    assert code == 2
    assert "int4" in error


def test_a_model_alone_has_nothing_to_search(model):
    with pytest.raises(ValueError, match="a loaded model comes without data; give a corpus"):
        search.open_search(model)
    with pytest.raises(ValueError, match="a corpus and a config are both given"):
        search.open_search(model, corpus="docs.txt", config=load_config("base"))


def test_a_query_whose_embedding_is_not_finite_is_an_error(model, corpus, monkeypatch):
    opened = search.open_search(model, corpus=corpus)
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda texts: encode(texts) * np.nan)
    with pytest.raises(ValueError, match="the embedding of a query is not finite"):
        opened("open the file")
