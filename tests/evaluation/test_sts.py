"""Semantic textual similarity: correlations of a model with known similarities."""

import math

import numpy as np
import pytest
from scipy import stats

from jaxcl.data.scored_pairs import ScoredPairs
from jaxcl.evaluation.protocol import EvaluationSet
from jaxcl.evaluation.sts import StsSet


def scored_pairs(scores, *, sides=("query", "query")) -> ScoredPairs:
    """Pairs `a 0` and `b 0`, and so on."""
    rows = range(len(scores))
    return ScoredPairs(
        first=[f"a {row}" for row in rows],
        second=[f"b {row}" for row in rows],
        scores=np.array(scores, np.float64),
        fields=("text1", "text2", "score"),
        sides=sides,
        fingerprint="some pairs",
    )


def model_of(similarities):
    """Embed the two texts of pair i so that their inner product is `similarities[i]`."""
    calls = []

    def encode(side, texts):
        calls.append((side, list(texts)))
        vectors = []
        for name, row in (text.split() for text in texts):
            scale = 2.0 ** (int(row) % 5)  # its quotients are exact in floating point
            vectors.append((scale, 0) if name == "a" else (similarities[int(row)] / scale, 1))
        return np.array(vectors, np.float32)

    encode.calls = calls
    return encode


def test_correlations_are_those_of_similarities_and_scores():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 11, 80) / 2
    similarities = np.float32(scores / 5 + rng.normal(size=80))
    found = StsSet(scored_pairs(scores)).evaluate(model_of(similarities))
    assert found["spearman"] == pytest.approx(stats.spearmanr(similarities, scores).statistic)
    assert found["pearson"] == pytest.approx(stats.pearsonr(similarities, scores).statistic)
    assert found["spearman"] != pytest.approx(found["pearson"], abs=1e-3)
    assert found["pairs"] == 80


@pytest.mark.parametrize(
    ("name", "reference"), [("spearman", "spearmanr"), ("pearson", "pearsonr")]
)
def test_intervals_are_near_those_of_scipy(name, reference):
    rng = np.random.default_rng(1)
    scores = rng.normal(size=60).round(1)
    similarities = np.float32(scores + rng.normal(size=60))
    found = StsSet(scored_pairs(scores)).evaluate(model_of(similarities))
    expected = stats.bootstrap(
        (similarities, scores),
        lambda x, y: getattr(stats, reference)(x, y).statistic,
        paired=True,
        vectorized=False,
        n_resamples=1000,
        method="percentile",
        rng=np.random.default_rng(2),
    ).confidence_interval
    assert found[f"{name}_low"] == pytest.approx(expected.low, abs=0.04)
    assert found[f"{name}_high"] == pytest.approx(expected.high, abs=0.04)
    assert found[f"{name}_low"] < found[name] - 0.05
    assert found[f"{name}_high"] > found[name] + 0.05


def test_the_seed_changes_intervals_only():
    pairs = scored_pairs(np.arange(20) % 7)
    encode = model_of(np.arange(20.0))
    first, again, other = (StsSet(pairs, seed=seed).evaluate(encode) for seed in (0, 0, 1))
    assert first == again
    changed = {name for name in first if first[name] != other[name]}
    assert changed
    assert all(name.endswith(("_low", "_high")) for name in changed)


@pytest.mark.parametrize("noise", [0, 1e-7])
@pytest.mark.parametrize("similarity", [0.0, 1.0, -0.5, 40.0])
def test_equal_similarities_have_no_correlation(similarity, noise):
    scores = np.arange(30.0)
    similarities = similarity * (1 + noise * np.sin(scores))
    found = StsSet(scored_pairs(scores)).evaluate(model_of(similarities))
    assert found.pop("pairs") == 30
    assert all(map(math.isnan, found.values()))
    assert len(found) == 6


def test_small_differences_of_similarities_count():
    scores = np.arange(30.0)
    found = StsSet(scored_pairs(scores)).evaluate(model_of(0.9 + 1e-5 * scores))
    assert found["spearman"] == pytest.approx(1)


def test_texts_are_embedded_on_their_sides():
    encode = model_of(np.arange(3.0))
    pairs = scored_pairs([1, 2, 4])
    StsSet(pairs).evaluate(encode)
    assert encode.calls == [("query", pairs.first + pairs.second)]
    encode.calls.clear()
    StsSet(scored_pairs([1, 2, 4], sides=("query", "key"))).evaluate(encode)
    assert encode.calls == [("query", pairs.first), ("key", pairs.second)]


@pytest.mark.parametrize("scores", [[], [3], [3, 3, 3]])
def test_scores_without_correlation_are_an_error(scores):
    with pytest.raises(ValueError, match=f"{len(scores)} pairs with scores .* have no correlation"):
        StsSet(scored_pairs(scores))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_embeddings_that_are_not_finite_are_an_error(bad):
    encode = model_of([0.1, bad, 0.2])
    with pytest.raises(
        ValueError, match="1 of 3 pairs have a similarity that is not finite, first"
    ):
        StsSet(scored_pairs([1, 2, 3])).evaluate(encode)


def test_it_is_an_evaluation_set():
    sts = StsSet(scored_pairs([1, 2.5]))
    assert isinstance(sts, EvaluationSet)
    assert (sts.kind, sts.fingerprint) == ("sts", "some pairs")
    assert sts.description == (
        "semantic similarity of 2 pairs (text1, text2), with scores (score) from 1 to 2.5"
    )
