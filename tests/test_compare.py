"""Several settings, several seeds: what is compared, and what is not trained twice."""

import json

import numpy as np
import pytest
from jaxcl.configs.code_search import get_config

from jaxcl import compare as comparing
from jaxcl.compare import as_markdown, compare
from jaxcl.settings.changed import changed_config

SETTINGS = {"plain": {}, "+ more": {"model.dim": 8, "loss.masks": ["text"]}}


@pytest.fixture
def trained(monkeypatch, trained_on):
    """What was trained; each run leaves the ranks that its config gives it."""
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
    plain, more = np.mean(reciprocal, axis=0)
    place = records[1]["places"]["validation/dense"]
    assert set(records[1]["places"]) == {"validation/dense"}
    assert place["mean"] == pytest.approx(more.mean())
    assert place["difference"] == pytest.approx((more - plain).mean())
    error = (more - plain).std(ddof=1) / np.sqrt(50)
    assert place["standard_error"] == pytest.approx(error)
    assert not list(tmp_path.rglob("checkpoints"))
    assert json.loads((tmp_path / "comparison.json").read_text()) == records
    assert (tmp_path / "comparison.md").read_text() == as_markdown(records) + "\n"
    assert "− plain" in as_markdown(records)


def test_what_is_finished_is_not_trained_again_and_another_config_is_refused(trained, tmp_path):
    compare(get_config("smoke"), SETTINGS, tmp_path, seeds=1)
    compare(get_config("smoke"), SETTINGS, tmp_path, seeds=2)
    assert len(trained) == 4
    changed = get_config("smoke")
    changed.run.log_every = 3  # which computes nothing else
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


def test_a_setting_of_the_data_set_is_not_passed_over(trained, trained_on, tmp_path):
    settings = {"all": {}, "few": {"data.code_pairs.max_pairs": 500}}
    compare(get_config("smoke"), settings, tmp_path, seeds=2)
    assert trained_on == ["code_pairs", "code_pairs", str(tmp_path), str(tmp_path)]


def test_runs_whose_queries_differ_are_not_compared(trained, tmp_path):
    compare(get_config("smoke"), SETTINGS, tmp_path, seeds=1)
    path = tmp_path / "plain" / "seed-0" / "data.json"
    path.write_text(path.read_text().replace('"1"', '"3"'))
    with pytest.raises(ValueError, match=r"the test rows of .* are others than those of"):
        compare(get_config("smoke"), SETTINGS, tmp_path, seeds=2)
    assert len(trained) == 2
    path.write_text(path.read_text().replace('"3"', '"1"').replace('"2"', '"4"'))
    compare(get_config("smoke"), SETTINGS, tmp_path, seeds=1)  # rows to train on may differ


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
