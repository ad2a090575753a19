"""Workdirs on an object store, end to end.

Only checkpoints are local here: Orbax and TensorStore access object stores in their own ways, which
tests cannot imitate.
"""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from jaxcl.configs.code_search import get_config

from jaxcl import compare as comparing
from jaxcl.data.row_negatives import read_negatives
from jaxcl.host import lease
from jaxcl.host.files import write_npz, write_whole
from jaxcl.host.paths import as_path
from jaxcl.mine import MiningRule, mine
from jaxcl.run.checkpoint import Checkpoints
from jaxcl.run.initial import copy_prepared_files
from jaxcl.run.metric_writer import read_metrics
from jaxcl.run.workdir import lock_workdir
from jaxcl.search import open_search
from jaxcl.settings.read import read_settings
from jaxcl.topics import topics
from jaxcl.train import train
from tests import buckets
from tests.helpers import unclocked

FILES = {"config.json", "data.json", "metrics.jsonl", "ranks.npz", "results.json", "run.json"}


@pytest.fixture
def config(smoke_pairs):
    """A run of 4 steps with a small model."""
    made = get_config("smoke")
    made.update_from_flattened_dict(
        {
            "steps": 4,
            "data.name": str(smoke_pairs),
            "data.vocabulary_size": 1_000,
            "model.dim": 16,
            "optimizer.warmup_steps": 2,
            "run.data_dir": str(smoke_pairs.parents[1]),
            "run.log_every": 1,
            "run.evaluate_every": 2,
            "run.checkpoint_every": 2,
        }
    )
    return made


@pytest.fixture
def store(tmp_path, monkeypatch):
    """The folder of the object store; the working directory must stay empty."""
    root, here = tmp_path / "store", tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    buckets.install(monkeypatch, root)
    init = Checkpoints.__init__

    def local(self, directory, **options):
        init(self, root / str(directory).removeprefix("gs://"), **options)

    monkeypatch.setattr(Checkpoints, "__init__", local)
    yield root
    assert list(here.iterdir()) == []


class Killed(Exception):
    pass


@pytest.mark.slow
def test_a_remote_run_is_that_of_a_local_workdir(store, config, tmp_path, monkeypatch):
    local, remote = tmp_path / "local", store / "bucket" / "runs" / "a"
    train(config, local)
    save, uploaded = Checkpoints.save, []

    def save_and_die(self, step, state, record):
        uploaded.append(read_metrics(as_path("gs://bucket/runs/a"))[-1]["step"])
        save(self, step, state, record)
        self.wait()
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "save", save_and_die)
        with pytest.raises(Killed):
            train(config, as_path("gs://bucket/runs/a"))
    assert uploaded == [2]  # a later kill loses no record of the checkpoint
    train(config, Path("gs://bucket/runs/a"))  # resumes

    assert unclocked(remote) == unclocked(local)
    assert (remote / "results.json").read_text() == (local / "results.json").read_text()
    assert {path.name for path in remote.iterdir() if path.is_file()} == {
        *FILES,
        *("tokenizer.json", "checkpoints.sizes.json"),
    }
    assert list((tmp_path / "cache").rglob("tensorboard/events*"))

    found, wanted = (
        open_search(where)("a date", 3) for where in (as_path("gs://bucket/runs/a"), local)
    )
    assert found == wanted
    assert (remote / "search_index.npz").exists()
    assert open_search(as_path("gs://bucket/runs/a"))("a date", 3) == wanted  # of the index

    out = as_path("gs://bucket/out/mined.npz")
    rule = MiningRule(per_query=2, rank_range=(1, 20))
    report = mine(as_path("gs://bucket/runs/a"), out, rule=rule)
    assert report == mine(local, tmp_path / "mined.npz", rule=rule)
    mined, local_mined = (
        np.load(path) for path in (store / "bucket/out/mined.npz", tmp_path / "mined.npz")
    )
    assert all(np.array_equal(mined[name], local_mined[name]) for name in local_mined.files)
    assert json.loads((store / "bucket/out/mined.report.json").read_text()) == report
    rows = len(mined["rows"])
    assert read_negatives(out, num_rows=rows, scored=True).rows.shape == (rows, 2)
    topics(as_path("gs://bucket/runs/a"), as_path("gs://bucket/out/topics.npz"), num_topics=3)
    assert (store / "bucket/out/topics.examples.md").exists()
    assert not (remote / "mining").exists()


def test_the_files_of_another_run_are_copied_from_the_store(store, config, tmp_path):
    write_whole(as_path("gs://bucket/first/tokenizer.json"), "{}")
    config.init_from = "gs://bucket/first"
    copy_prepared_files(read_settings(config), tmp_path)
    assert (tmp_path / "tokenizer.json").read_text() == "{}"
    copy_prepared_files(read_settings(config), tmp_path)  # after a failed start
    write_whole(as_path("gs://bucket/first/tokenizer.json"), "{ }")
    with pytest.raises(ValueError, match=r"tokenizer\.json differs from the one in gs://bucket/f"):
        copy_prepared_files(read_settings(config), tmp_path)
    config.init_from = "gs://bucket/second/checkpoints/20"
    with pytest.raises(ValueError, match=r"there is no tokenizer\.json in gs://bucket/second;"):
        copy_prepared_files(read_settings(config), tmp_path)


def test_runs_on_the_store_are_compared(store, config, monkeypatch):
    trained = []

    def write_ranks(config, workdir, *, changed):
        trained.append(config.model.dim)
        ranks = np.arange(1.0, 5.0) + (config.model.dim == 8)
        write_npz(workdir / "ranks.npz", **{"test/plain/dense": ranks})
        write_whole(workdir / "checkpoints" / "4" / "state", b"large")

    monkeypatch.setattr(comparing, "train", write_ranks)
    settings = {"wide": {}, "narrow": {"model.dim": 8}}
    records = comparing.compare(config, settings, as_path("gs://bucket/runs"), seeds=1)
    assert comparing.compare(config, settings, as_path("gs://bucket/runs"), seeds=1) == records
    assert trained == [16, 8]
    expected = np.mean([1 / 2, 1 / 3, 1 / 4, 1 / 5]) - np.mean([1, 1 / 2, 1 / 3, 1 / 4])
    assert records[1]["results"]["test/dense"]["difference"] == pytest.approx(expected)
    assert json.loads((store / "bucket/runs/comparison.json").read_text()) == records
    assert [path for path in store.rglob("checkpoints/**/*") if path.is_file()] == []


def test_a_second_run_is_kept_out_of_the_workdir(store, monkeypatch):
    monkeypatch.setattr(lease, "RENEWAL_SECONDS", 0.05)
    workdir = as_path("gs://bucket/runs/a")
    with (
        lock_workdir(workdir),
        pytest.raises(ValueError, match="another run is at work in gs://bucket/runs/a;"),
        lock_workdir(workdir),
    ):
        pytest.fail("two runs are in the workdir")
    assert not (store / "bucket/runs/a/.lock").exists()


def test_mining_by_several_processes_needs_a_shared_disk(store, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="mount it, or mine with one process"):
        mine(as_path("gs://bucket/runs/a"), as_path("gs://bucket/a.npz"), rule=MiningRule())


def test_a_start_that_fails_leaves_nothing_in_the_bucket(store, config):
    config.global_batch_size = 8_192
    with pytest.raises(ValueError, match="fewer than one batch"):
        train(config, as_path("gs://bucket/runs/a"))
    assert [path for path in store.rglob("*") if path.is_file()] == []
