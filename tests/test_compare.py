"""Comparisons of settings over seeds: the results, and runs that are not trained twice."""

import json

import numpy as np
import pytest
from jaxcl.configs.code_search import get_config

from jaxcl import compare as comparing
from jaxcl.compare import as_markdown, compare
from jaxcl.metrics import paired_interval
from jaxcl.settings.changed import changed_config

SETTINGS = {"plain": {}, "+ more": {"model.dim": 8, "loss.masks": ["text"]}}


@pytest.fixture
def trained(monkeypatch, trained_on):
    """A list of the trained runs; a stub writes the ranks in each config."""
    runs = []

    def train(config, workdir, *, changed):
        runs.append((config.model.dim, config.seed, config.loss.masks))
        trained_on.append(config.data.name)
        workdir.mkdir(parents=True)
        data = {"data_set": str(workdir.parents[1]), "fingerprints": {"test": "1", "train": "2"}}
        (workdir / "data.json").write_text(json.dumps(data))
        rng = np.random.default_rng(config.seed)
        ranks = rng.integers(1, 12, 50).astype(float)
        if config.model.dim == 8:
            ranks = np.maximum(ranks - 1, 1)
        names = ("validation/plain/dense", "validation/name masked/dense", "validation/plain/bm25")
        np.savez(workdir / "ranks.npz", **dict.fromkeys(names, ranks))
        (workdir / "checkpoints").mkdir()

    monkeypatch.setattr(comparing, "train", train)
    return runs


@pytest.fixture
def trained_on():
    """The data sets of these runs."""
    return []


def test_each_setting_is_trained_with_each_seed_and_compared_query_by_query(trained, tmp_path):
    records = compare(get_config("smoke"), SETTINGS, tmp_path, seeds=2)
    assert trained == [(512, 0, ("row",)), (8, 0, ("text",)), (512, 1, ("row",)), (8, 1, ("text",))]
    assert [record["setting"] for record in records] == ["plain", "+ more"]
    reciprocal = []
    for seed in range(2):
        ranks = np.random.default_rng(seed).integers(1, 12, 50)
        pair = [ranks, np.maximum(ranks - 1, 1)]
        reciprocal.append([np.where(own <= 10, 1 / own, 0) for own in pair])
    plain, more = np.swapaxes(reciprocal, 0, 1)
    result = records[1]["results"]["validation/dense"]
    assert set(records[1]["results"]) == {"validation/dense"}
    assert result["mean"] == pytest.approx(more.mean())
    assert result["seeds"] == pytest.approx(more.mean(1))
    differences = more - plain
    assert result["difference"] == pytest.approx(differences.mean())
    over_queries = differences.mean(0).std(ddof=1) / np.sqrt(50)
    over_seeds = differences.mean(1).std(ddof=1) / np.sqrt(2)
    assert result["error_over_queries"] == pytest.approx(over_queries)
    assert result["error_over_seeds"] == pytest.approx(over_seeds)
    low, high = result["interval"]
    assert [low, high] == [*paired_interval(more, plain)[3:]]
    assert low < result["difference"] - 1.96 * max(over_queries, over_seeds)
    assert result["interval_over"] == "queries and seeds"
    assert not list(tmp_path.rglob("checkpoints"))
    assert json.loads((tmp_path / "comparison.json").read_text()) == records
    assert (tmp_path / "comparison.md").read_text() == as_markdown(records) + "\n"
    table = as_markdown(records)
    assert "validation, dense:" in table
    assert table.splitlines()[2].split(" | ")[1:] == [
        "mean MRR@10",
        "lowest to highest seed",
        "difference from plain",
        "± over queries",
        "± over seeds",
        "95% interval over queries and seeds",
        "seconds per run |",
    ]
    own, other = ([cell.strip() for cell in table.splitlines()[n].split("|")] for n in (4, 5))
    assert own[4:8] == ["baseline", "", "", ""]
    means = [f"{result['difference']:+.4f}", f"{over_queries:.4f}", f"{over_seeds:.4f}"]
    assert other[4:8] == [*means, f"{low:+.4f} to {high:+.4f}"]
    assert "with Student's t quantiles for 2 seeds" in table


def test_one_seed_says_that_it_has_no_error_over_seeds(trained, tmp_path, capsys):
    records = compare(get_config("smoke"), SETTINGS, tmp_path, seeds=1)
    ranks = np.random.default_rng(0).integers(1, 12, 50)
    pair = (ranks, np.maximum(ranks - 1, 1))
    plain, more = (np.where(own <= 10, 1 / own, 0) for own in pair)
    result = records[1]["results"]["validation/dense"]
    error = (more - plain).std(ddof=1) / np.sqrt(50)
    assert result["error_over_queries"] == pytest.approx(error)
    assert result["error_over_seeds"] is None
    half = 2.00957 * error  # the quantile of Student's t with 49 degrees of freedom
    mean = (more - plain).mean()
    assert result["interval"] == pytest.approx([mean - half, mean + half], rel=1e-4)
    printed = capsys.readouterr().out
    assert "not available (1 seed)" in printed
    assert "95% interval over queries only" in printed
    assert "Use --seeds 3 or more" in printed
    assert "NaN" not in (tmp_path / "comparison.json").read_text()
    assert printed == (tmp_path / "comparison.md").read_text()


def test_one_query_has_no_interval(tmp_path, monkeypatch):
    def train(config, workdir, *, changed):
        workdir.mkdir(parents=True)
        np.savez(workdir / "ranks.npz", **{"test/plain/dense": np.ones(1) + config.seed})

    monkeypatch.setattr(comparing, "train", train)
    records = compare(get_config("smoke"), SETTINGS, tmp_path, seeds=2)
    result = records[1]["results"]["test/dense"]
    assert (result["difference"], result["error_over_seeds"]) == (0, 0)
    assert (result["error_over_queries"], result["interval"]) == (None, None)
    assert "not available (1 query)" in as_markdown(records)


def test_methods_that_the_baseline_lacks_are_not_compared(tmp_path, monkeypatch):
    def train(config, workdir, *, changed):
        workdir.mkdir(parents=True)
        names = [f"test/plain/{method}" for method in config.evaluation.methods]
        np.savez(workdir / "ranks.npz", **dict.fromkeys(names, np.ones(3)))

    monkeypatch.setattr(comparing, "train", train)
    methods = {"few": ("dense",), "more": ("dense", "hybrid")}
    settings = {name: {"evaluation.methods": chosen} for name, chosen in methods.items()}
    records = compare(get_config("smoke"), settings, tmp_path, seeds=1)
    assert [list(record["results"]) for record in records] == [["test/dense"]] * 2
    compare(get_config("smoke"), settings, tmp_path, seeds=1, baseline="more")
    reverse = dict(reversed(settings.items()))
    records = compare(get_config("smoke"), reverse, tmp_path, seeds=1)  # the baseline has more
    assert [list(one["results"]) for one in records] == [
        ["test/dense", "test/hybrid"],
        ["test/dense"],
    ]
    assert as_markdown(records).count("| few |") == 1


def test_a_finished_run_is_not_trained_again_and_another_config_is_refused(trained, tmp_path):
    compare(get_config("smoke"), SETTINGS, tmp_path, seeds=1)
    compare(get_config("smoke"), SETTINGS, tmp_path, seeds=2)
    assert len(trained) == 4
    changed = get_config("smoke")
    changed.run.log_every = 3  # computes nothing else
    compare(changed, SETTINGS, tmp_path, seeds=2)
    for name, value in {"evaluation.rrf_k": 7, "steps": 7}.items():
        other = changed_config(changed, {name: value})
        with pytest.raises(ValueError, match="holds a run of another config"):
            compare(other, SETTINGS, tmp_path, seeds=2)
    assert len(trained) == 4


def test_all_runs_have_the_data_of_the_first_one(trained, trained_on, tmp_path):
    compare(get_config("smoke"), SETTINGS, tmp_path, seeds=1)
    assert trained_on == ["code_pairs", str(tmp_path)]
    compare(get_config("smoke"), SETTINGS, tmp_path, seeds=2)
    assert trained_on[2:] == [str(tmp_path)] * 2


def test_a_setting_of_the_data_set_is_not_ignored(trained, trained_on, tmp_path):
    settings = {"all": {}, "few": {"data.code_pairs.max_pairs": 500}}
    compare(get_config("smoke"), settings, tmp_path, seeds=2)
    assert trained_on == ["code_pairs", "code_pairs", str(tmp_path), str(tmp_path)]


def test_runs_whose_queries_differ_are_not_compared(trained, tmp_path):
    compare(get_config("smoke"), SETTINGS, tmp_path, seeds=1)
    path = tmp_path / "plain" / "seed-0" / "data.json"
    path.write_text(path.read_text().replace('"1"', '"3"'))
    with pytest.raises(ValueError, match=r"the test rows of .* differ from those of"):
        compare(get_config("smoke"), SETTINGS, tmp_path, seeds=2)
    assert len(trained) == 2
    path.write_text(path.read_text().replace('"3"', '"1"').replace('"2"', '"4"'))
    compare(get_config("smoke"), SETTINGS, tmp_path, seeds=1)  # training rows may differ


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({}, {}, "give at least one of each"),
        (SETTINGS, {"seeds": 0}, "give at least one of each"),
        (SETTINGS, {"baseline": "other"}, "'other' is none of plain, "),
        ({"a": {"model.dimension": 3}}, {}, r"of 'a': the setting model\.dimension=3 does not fit"),
        ({"a": {"model.dim": "wide"}}, {}, r"model\.dim='wide' does not fit"),
        ({"a+": {}, "a-": {}}, {}, "would share a folder"),
    ],
)
def test_settings_that_cannot_be_compared_are_named(trained, tmp_path, settings, options, message):
    with pytest.raises(ValueError, match=message):
        compare(get_config("smoke"), settings, tmp_path, **options)
    assert not trained
