"""Mining in a corpus gives the lines of a full sort, however often it is interrupted."""

import json

import numpy as np
import pytest
from jaxcl.configs.pairs import get_config

import jaxcl
from jaxcl.data.splits import open_splits
from jaxcl.host.block_file import BlockFile
from jaxcl.mine import main
from jaxcl.negatives import MiningRule
from jaxcl.run import corpus_mining, mined_blocks
from jaxcl.run.corpus_mining import MinedFiles, mine_corpus
from jaxcl.settings.read import read_settings
from tests.models.pretrained.tiny import write_tiny_static

DOCUMENTS, QUERIES = 60, 11
RULE = MiningRule(per_query=3, rank_range=(1, 9), margin=0.05, sampling="top")


def random_texts(seed, count):
    rng = np.random.default_rng(seed)
    return [" ".join(map(str, rng.integers(0, 30, 4))) for _ in range(count)]


def write(path, records):
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return jaxcl.load(write_tiny_static(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def guide(tmp_path_factory):
    return jaxcl.load(write_tiny_static(tmp_path_factory.mktemp("guide"), seed=1))


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A corpus with copies; one query has several positives, one of them not in the corpus."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    texts = random_texts(0, DOCUMENTS)
    texts[20] = f"  {texts[3]}\n"  # a copy
    # A query shares two words with its positive, so some other documents are nearer.
    queries = [f"{text.rpartition(' ')[0]} {n} {n}" for n, text in enumerate(texts[:QUERIES])]
    texts[30] = queries[4]
    pairs = [
        {"query": query, "positives": [texts[place], f"{query} 7"] if place == 5 else texts[place]}
        for place, query in enumerate(queries)
    ]
    corpus = [{"_id": f"d{place}", "text": text} for place, text in enumerate(texts)]
    return MinedFiles(
        write(tmp_path / "pairs.jsonl", pairs),
        tmp_path / "out" / "mined.jsonl",
        corpus=write(tmp_path / "corpus.jsonl", corpus),
    )


def by_hand(model, files, rule, judge=None):
    """The lines of the output, by sorting all similarities of each query."""
    judge = judge or model
    texts = list(dict.fromkeys(" ".join(one["text"].split()) for one in read(files.corpus)))
    for record in read(files.queries):
        query, positives = record["query"], record["positives"]
        positives = positives if isinstance(positives, list) else [positives]
        plain = [" ".join(text.split()) for text in positives]
        rivals = [text for text in texts if text not in (*plain, query)]

        def scores(model, others, query=query):
            return model.encode([query])[0] @ model.encode(others, side="key").T

        order = np.argsort(-scores(model, rivals), kind="stable")
        ranked = [rivals[place] for place in order[slice(*rule.rank_range)]]
        judged, own = scores(judge, ranked), scores(judge, positives)
        kept = [place for place, score in enumerate(judged) if score <= own.min() - rule.margin]
        kept = kept[: rule.per_query]
        negatives, chosen = [ranked[place] for place in kept], [judged[place] for place in kept]
        yield query, positives, negatives, own, chosen


def check(lines, expected):
    expected = list(expected)
    assert len(lines) == len(expected)
    for line, (query, positives, negatives, own, chosen) in zip(lines, expected, strict=True):
        assert list(line) == ["query", "positives", "negatives", "teacher_scores"]
        assert (line["query"], line["positives"]) == (query, positives)
        assert [" ".join(text.split()) for text in line["negatives"]] == negatives
        np.testing.assert_allclose(line["teacher_scores"]["positives"], own, atol=2e-6)
        np.testing.assert_allclose(line["teacher_scores"]["negatives"], chosen, atol=2e-6)


@pytest.mark.parametrize("block_rows", [4096, 5])
def test_lines_agree_with_a_full_sort(model, files, monkeypatch, block_rows):
    monkeypatch.setattr(mined_blocks, "BLOCK_ROWS", block_rows)
    monkeypatch.setitem(corpus_mining._BLOCK_TEXTS, "cpu", block_rows)
    report = mine_corpus(model, files, rule=RULE)
    lines, expected = read(files.output), list(by_hand(model, files, RULE))
    check(lines, expected)
    counts = [len(negatives) for _, _, negatives, _, _ in expected]
    assert min(counts) < 3  # ragged
    assert report["negatives"] == sum(counts) > 0
    assert report["queries without negatives"] == counts.count(0)
    assert report["queries with all negatives"] == counts.count(3)
    assert report["negatives more similar than the positive"] == 0
    assert report["copies of documents"] == 1
    assert report["positives outside of the corpus"] == 1
    margins = [min(own) - score for *_, own, chosen in expected for score in chosen]
    assert report["mean margin to the positive"] == pytest.approx(np.mean(margins), abs=1e-5)
    assert report == json.loads((files.output.parent / "mined.report.json").read_text())
    examples = (files.output.parent / "mined.examples.md").read_text()
    assert examples.count("**positive**") == 10


def test_a_guide_decides_and_its_scores_are_written(model, guide, files):
    report = mine_corpus(model, files, rule=RULE, guide=guide)
    check(read(files.output), by_hand(model, files, RULE, judge=guide))
    assert report["guide"] == guide.source
    assert report["masked as false negatives"] > 0


@pytest.mark.parametrize("form", ["pairs", "mined"])
def test_scores_of_a_file_decide_and_are_written(model, guide, files, tmp_path, form):
    masked = mine_corpus(model, files, rule=RULE, guide=guide)["masked as false negatives"]
    guided = read(files.output)
    path = tmp_path / "scores.jsonl"
    if form == "pairs":
        texts = [one["text"] for one in read(files.corpus)] + [guided[5]["positives"][1]]
        scores = guide.encode([line["query"] for line in guided]) @ guide.encode(texts).T
        records = [
            {"query": line["query"], "document": text, "score": float(score)}
            for line, of_query in zip(guided, scores, strict=True)
            for text, score in zip(texts, of_query, strict=True)
        ]
        unknown = {"query": "?", "document": "1", "score": 1}
        write(path, [*records[:20], unknown, *records[20:]])
    else:  # an output with scores replaced by a re-ranker, which scored no other documents
        path.write_bytes(files.output.read_bytes())
    report = mine_corpus(model, files._replace(scores=path), rule=RULE)
    for ours, theirs in zip(read(files.output), guided, strict=True):
        scores = ours.pop("teacher_scores"), theirs.pop("teacher_scores")
        assert ours == theirs
        for kind in ("positives", "negatives"):
            np.testing.assert_allclose(*(one[kind] for one in scores), atol=1e-5)
    assert report["scores"] == str(path)
    # A document without a score is not a false negative.
    assert report["masked as false negatives"] == (masked if form == "pairs" else 0)
    assert masked > 0


def test_positives_without_a_score_are_named(model, files, tmp_path):
    query = read(files.queries)[0]["query"]
    path = write(tmp_path / "s.jsonl", [{"query": query, "document": query, "score": 1}] * 2)
    with pytest.raises(ValueError, match=r"s\.jsonl scores no pair of these queries"):
        mine_corpus(model, files._replace(scores=path), rule=RULE)
    text = read(files.corpus)[40]["text"]
    write(path, [{"query": query, "document": text, "score": 1}])
    with pytest.raises(ValueError, match=rf"no score for '{query}' and its positive"):
        mine_corpus(model, files._replace(scores=path), rule=RULE)
    with pytest.raises(ValueError, match="scores have no effect without a margin or limit"):
        mine_corpus(model, files._replace(scores=path), rule=RULE._replace(margin=None))


def test_without_a_margin_the_positives_are_still_no_negatives(model, files):
    rule = MiningRule(per_query=70, rank_range=(0, 80), sampling="top")
    mine_corpus(model, files, rule=rule)
    texts = {" ".join(one["text"].split()) for one in read(files.corpus)}
    for line in read(files.output):
        positives = {" ".join(text.split()) for text in line["positives"]}
        negatives = [" ".join(text.split()) for text in line["negatives"]]
        assert set(negatives) == texts - positives - {line["query"]}  # all others, each once
        assert len(negatives) == len(set(negatives))


def test_without_a_corpus_other_positives_are_negatives(model, files):
    rule = MiningRule(per_query=2, rank_range=(0, 5), sampling="top")
    mine_corpus(model, files._replace(corpus=None), rule=rule)
    lines = read(files.output)
    every = {text for line in lines for text in line["positives"]}
    for line in lines:
        assert len(line["negatives"]) == 2
        assert set(line["negatives"]) <= every - set(line["positives"])


def test_qrels_name_the_positives(model, files, tmp_path):
    texts = [one["text"] for one in read(files.corpus)]
    queries = [{"_id": f"q{n}", "text": one["query"]} for n, one in enumerate(read(files.queries))]
    qrels = tmp_path / "train.tsv"
    qrels.write_text("query-id\tcorpus-id\tscore\nq2\td9\t1\nq2\td8\t2\nq2\td7\t0\nq0\td1\t1\n")
    judged = files._replace(queries=write(tmp_path / "queries.jsonl", queries), qrels=qrels)
    rule = MiningRule(per_query=70, rank_range=(0, 80), sampling="top")
    report = mine_corpus(model, judged, rule=rule)
    lines = read(files.output)
    assert [line["positives"] for line in lines] == [[texts[1]], [texts[9], texts[8]]]
    assert texts[7] in lines[1]["negatives"]
    assert (report["records"], report["queries"]) == (QUERIES, 2)


def test_queries_without_negatives_are_written_or_left_out(model, files):
    rule = MiningRule(per_query=1, rank_range=(0, 3), margin=0.2, sampling="top")
    report = mine_corpus(model, files, rule=rule)
    whole = read(files.output)
    empty = [line for line in whole if not line["negatives"]]
    assert 0 < len(empty) == report["queries without negatives"] < QUERIES
    assert empty[0]["teacher_scores"]["negatives"] == []
    mine_corpus(model, files, rule=rule, skip_empty=True)
    assert read(files.output) == [line for line in whole if line["negatives"]]


def test_training_reads_the_lines_as_rows(model, files, tmp_path):
    mine_corpus(model, files, rule=RULE)
    data = get_config("smoke").data.to_dict()
    data |= {"name": str(files.output), "splits": {"train": "train"}}
    settings = read_settings({"data": data}).data
    train = open_splits(settings, settings.name, data_dir=tmp_path / "shared")["train"]
    rows = train.read(np.arange(len(train)))
    expected = [
        {
            "query": line["query"],
            "key": positive,
            "negatives": line["negatives"],
            "teacher_scores": [
                line["teacher_scores"]["positives"][place],
                *line["teacher_scores"]["negatives"],
            ],
        }
        for line in read(files.output)
        for place, positive in enumerate(line["positives"])
    ]
    assert len(rows) == len(expected) == QUERIES + 1
    for row, wanted in zip(rows, expected, strict=True):
        np.testing.assert_allclose(row.pop("teacher_scores"), wanted.pop("teacher_scores"))
        assert {name: row[name] for name in wanted} == wanted


@pytest.mark.parametrize("stop_after", [4, 21, 28])
def test_interrupted_it_resumes_and_writes_the_same(model, files, monkeypatch, stop_after):
    monkeypatch.setattr(mined_blocks, "BLOCK_ROWS", 5)
    monkeypatch.setitem(corpus_mining._BLOCK_TEXTS, "cpu", 5)
    appended, calls = BlockFile.append, []

    def append(self, rows):
        calls.append(len(rows))
        if len(calls) == stop_after:
            raise KeyboardInterrupt
        appended(self, rows)

    rule = RULE._replace(sampling="random")
    whole = files._replace(output=files.output.with_name("whole.jsonl"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(files.output.parent / "other cache"))
    mine_corpus(model, whole, rule=rule)
    monkeypatch.setenv("XDG_CACHE_HOME", str(files.output.parent / "cache"))
    monkeypatch.setattr(BlockFile, "append", append)
    with pytest.raises(KeyboardInterrupt):
        mine_corpus(model, files, rule=rule)
    assert not files.output.exists()
    mine_corpus(model, files, rule=rule)
    assert files.output.read_bytes() == whole.output.read_bytes()
    # 12 blocks of documents, 1 of positives, 3 of queries, and 3 with 5 files each. From before the
    # interruption, only the interrupted block is recomputed.
    in_block = (stop_after - 17) % 5 if stop_after > 16 else 0
    assert len(calls) == 12 + 1 + 3 + 15 + 1 + in_block
    before = len(calls)
    mine_corpus(model, files, rule=rule._replace(margin=0.1))
    assert len(calls) == before + 15  # nothing is embedded again


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": "mined.npz"}, "mined texts are written as .jsonl"),
        ({"corpus": None, "text_field": "text"}, "have no effect without --corpus"),
        ({"text_field": "body"}, "there is no field 'body'"),
        ({"positive_field": "key"}, "has no field 'key'; it has query, positives"),
        ({"corpus": "absent.jsonl"}, "absent.jsonl"),
    ],
)
def test_a_mistake_in_the_files_is_named(model, files, changes, message):
    with pytest.raises((ValueError, OSError), match=message):
        mine_corpus(model, files._replace(**changes), rule=RULE)


def test_an_output_that_cannot_be_written_is_named_first(model, files, tmp_path, monkeypatch):
    monkeypatch.setattr(type(model), "encode", None)  # no text is embedded
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(ValueError, match=r"folder\.jsonl is a folder"):
        mine_corpus(model, files._replace(output=tmp_path / "folder.jsonl"), rule=RULE)
    below_a_file = files.queries / "mined.jsonl"
    with pytest.raises(OSError, match=r"pairs\.jsonl"):
        mine_corpus(model, files._replace(output=below_a_file), rule=RULE)


def test_an_input_is_not_overwritten(model, files, tmp_path):
    link = tmp_path / "link.jsonl"
    link.symlink_to(files.queries)
    for output in (files.corpus, link):
        with pytest.raises(ValueError, match="is also an input; choose another name"):
            mine_corpus(model, files._replace(output=output), rule=RULE)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (RULE._replace(rank_range=(90, 99)), "has 59 different documents, none of rank 90"),
        (RULE._replace(margin=5.0), "the rule leaves no negatives"),
        (RULE._replace(per_query=9), "1:9 has no room for 9"),
    ],
)
def test_a_rule_that_finds_nothing_is_named(model, files, rule, message):
    with pytest.raises(ValueError, match=message):
        mine_corpus(model, files, rule=rule)
    assert not files.output.exists()


def test_a_guide_must_have_an_effect(model, guide, files):
    with pytest.raises(ValueError, match="a guide has no effect without a margin or limit"):
        mine_corpus(model, files, rule=RULE._replace(margin=None), guide=guide)
    with pytest.raises(ValueError, match="is the model itself"):
        mine_corpus(model, files, rule=RULE, guide=model)
    with pytest.raises(ValueError, match="scores and a guide are both given"):
        mine_corpus(model, files._replace(scores="scores.jsonl"), rule=RULE, guide=guide)


def test_distances_have_no_relative_margin(files, tmp_path):
    library = {"similarity_fn_name": "euclidean"}
    folder = write_tiny_static(tmp_path / "euclidean", normalize=False, library=library)
    model = jaxcl.load(folder)
    with pytest.raises(ValueError, match="compares by distances, for which only --margin is"):
        mine_corpus(model, files, rule=RULE._replace(margin=None, relative_margin=0.1))
    mine_corpus(model, files, rule=RULE)
    (query, vectors) = (model.encode([read(files.queries)[0]["query"]]), read(files.output)[0])
    scores = vectors["teacher_scores"]
    texts = [*vectors["positives"], *vectors["negatives"]]
    distances = np.square(model.encode(texts, side="key") - query).sum(1)
    found = np.array([*scores["positives"], *scores["negatives"]])
    # Half the squared distances, up to a constant of the query.
    np.testing.assert_allclose(found - found[0], (distances[0] - distances) / 2, rtol=1e-4)


def test_a_model_without_finite_vectors_is_named(model, files, monkeypatch):
    encode = type(model).encode

    def broken(self, texts, **options):
        vectors = encode(self, texts, **options)
        vectors[-1] = np.nan
        return vectors

    monkeypatch.setattr(type(model), "encode", broken)
    with pytest.raises(ValueError, match="an embedding that is not finite; use another model"):
        mine_corpus(model, files, rule=RULE)


def test_the_command_prints_what_it_read_and_found(model, files, capsys):
    main(
        [
            *("--model", model.source, "--queries", str(files.queries)),
            *("--corpus", str(files.corpus), "--output", str(files.output)),
            *("--per-query", "2", "--rank-range", "0:9", "--max-score", "0.9"),
        ]
    )
    captured = capsys.readouterr()
    assert "queries from 'query', positives from 'positives'" in captured.err
    assert f"--config.data.name={files.output}" in captured.err.replace("\n", "")
    assert "queries with all negatives" in captured.out
    assert len(read(files.output)) == QUERIES


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --workdir with a run, or --model with --queries"),
        (["--model", "m", "--workdir", "w"], "give either --workdir"),
        (["--model", "m"], "--model needs --queries with a file, and --output"),
        (["--model", "m", "--split", "train"], "--split: no effect without --workdir"),
        (["--workdir", "w", "--skip-empty", "--guide", "g"], "--guide, --skip-empty: no effect"),
    ],
)
def test_flags_that_do_not_fit_are_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 1
    said = " ".join(capsys.readouterr().err.split())
    assert message in said
    assert "Traceback" not in said
