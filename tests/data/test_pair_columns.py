"""Columns are found by common names; ambiguous names are an error that lists them."""

import pytest

from jaxcl.data.pair_columns import PAIRS, find_columns
from jaxcl.settings.data_sections import DataSet, FileSettings


def found(*names, **settings):
    files = {name: settings.pop(name) for name in list(settings) if name in FileSettings._fields}
    return find_columns(names, DataSet(**settings, files=FileSettings(**files)), where="a.jsonl")


@pytest.mark.parametrize(("query", "keys"), PAIRS)
def test_every_known_pair_of_names_is_found(query, keys):
    for key in keys:
        columns = found("id", query, key)
        assert (columns.query, columns.key) == (query, key)
        assert columns.unused == ("id",)
        assert columns.split_by == query


@pytest.mark.parametrize(
    ("names", "negatives", "scores"),
    [
        (("anchor", "positive", "negative"), ("negative",), ()),
        (
            ("query", "pos", "neg", "pos_scores", "neg_scores"),
            ("neg",),
            ("pos_scores", "neg_scores"),
        ),
        (
            ("query", "positives", "negatives", "teacher_scores"),
            ("negatives",),
            ("teacher_scores",),
        ),
        (
            ("query", "key", "negative_10", "negative_2"),
            ("negative_2", "negative_10"),
            (),
        ),
    ],
)
def test_negatives_and_scores_are_found(names, negatives, scores):
    columns = found(*names)
    assert columns.negatives == negatives
    assert columns.scores == scores
    assert columns.unused == ()


def test_scores_without_negatives_are_not_used():
    assert found("query", "key", "teacher_scores").unused == ("teacher_scores",)


def test_labels_are_found_unless_they_are_groups():
    assert found("sentence1", "sentence2", "score").label == "score"
    columns = found("sentence1", "sentence2", "label", group_field="label")
    assert (columns.group, columns.label) == ("label", None)


def test_a_column_of_scores_is_no_label():
    columns = found("sentence1", "sentence2", "score", score_field="score")
    assert (columns.score, columns.label) == ("score", None)
    assert columns.needed == ["sentence1", "sentence2", "score"]
    assert columns.described() == "query from 'sentence1', key from 'sentence2', scores from score"
    both = found("query", "key", "score", score_field="score", label_field="score")
    assert (both.score, both.label) == ("score", "score")


def test_the_names_of_the_config_go_before_common_names():
    names = ("query", "key", "positive", "hard", "neg", "s", "score", "kind", "url")
    columns = found(
        *names,
        key_field="positive",
        negatives_field="hard",
        scores_field="s",
        label_field="score",
        group_field="kind",
        metadata_fields=("url",),
        split_by="url",
    )
    assert columns.needed == ["query", "positive", "score", "kind", "url", "hard", "s"]
    assert columns.unused == ("key", "neg")
    assert found("q", "answer", query_field="q").key == "answer"
    assert found("question", "k", key_field="k").query == "question"


def test_a_pattern_names_several_columns_of_negatives():
    assert found("query", "key", "n1", "n2", "o", negatives_field="n*").negatives == ("n1", "n2")


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        (("a", "b"), {}, "a.jsonl has no columns that are known to be pairs; .*are a, b. Set data"),
        (("query", "pos", "positives"), {}, "'query' with 'pos' or 'query' with 'positives'. Set"),
        (("query", "key"), {"query_field": "q"}, "data.query_field='q', but .* columns query, key"),
        (("query", "key"), {"key_field": "k"}, "data.key_field='k', but"),
        (("query", "key"), {"group_field": "g"}, "data.group_field='g', but"),
        (("query", "key"), {"metadata_fields": ("m",)}, "data.metadata_fields='m', but"),
        (("query", "key"), {"score_field": "s"}, "data.score_field='s', but"),
        (
            ("query", "key", "s", "score"),
            {"score_field": "s", "metadata_fields": ("score",)},
            "data.score_field='s' becomes the rows' 'score', so data.metadata_fields cannot have",
        ),
        (("query", "key"), {"split_by": "s"}, "data.files.split_by='s', but"),
        (("query", "key"), {"negatives_field": "n*"}, r"data.files.negatives_field='n\*', but"),
        (("query", "key"), {"scores_field": "s"}, "data.files.scores_field='s', but"),
        (("query", "key"), {"label_field": "s"}, "data.files.label_field='s', but"),
        (("query", "key", "neg", "negative_1"), {}, "could be negatives: neg or negative_1; set"),
        (("query", "key", "neg", "scores", "teacher_scores"), {}, "could be a teacher's scores"),
        (("query", "key", "label", "score"), {}, "could be a label: label, score; set"),
    ],
)
def test_unknown_or_ambiguous_columns_are_an_error(names, settings, message):
    with pytest.raises(ValueError, match=message):
        found(*names, **settings)


def test_the_description_names_used_and_unused_columns():
    assert found("anchor", "positive", "neg", "url").described() == (
        "query from 'anchor', key from 'positive', negatives from neg, not used: url"
    )
