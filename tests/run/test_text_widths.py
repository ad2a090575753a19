"""The widths of a run: chosen from the lengths of its rows, the same on all hosts."""

import json
import sys
from typing import NamedTuple

import numpy as np
import pytest
from jaxcl.configs.base import get_config

from jaxcl.assignment import uniform_rows
from jaxcl.data.prepare import prepare_data
from jaxcl.run.batches import RunBatches
from jaxcl.run.metric_writer import read_metrics
from jaxcl.run.text_widths import choose_text_widths, deal
from jaxcl.run.training import with_text_widths
from jaxcl.settings.read import read_settings
from jaxcl.train import train
from tests.helpers import training_of
from tests.host.test_processes import Run, assert_close_runs
from tests.test_train import differences, half_run

SMALL = {
    "model.name": "transformer",
    "model.dim": 8,
    "model.options.hidden_dim": 12,
    "model.options.num_layers": 1,
    "model.options.num_heads": 2,
    "model.options.mlp_dim": 16,
    "data.vocabulary_size": 60,
    "data.max_tokens.query": 6,
    "data.max_tokens.key": 24,
    "global_batch_size": 16,
    "optimizer.warmup_steps": 2,
    "evaluation.methods": ("dense",),
    "grad_cache.length_buckets": 3,
    "grad_cache.chunk_tokens": 24,
}


class Lengths(NamedTuple):
    """A table of texts that has only their lengths."""

    query: np.ndarray
    key: np.ndarray

    @property
    def num_rows(self):
        return len(self.query)

    def lengths(self, side, rows):
        return getattr(self, side)[rows]

    def labels(self, rows):
        raise AssertionError("only lengths are read")

    side = spec = labels


QUESTIONS = Lengths(np.full(400, 64), np.r_[np.full(200, 30), np.full(199, 100), 512])
LONG = {
    "model.name": "transformer",
    "model.options.max_tokens": 512,
    "data.max_tokens.query": 64,
    "data.max_tokens.key": 512,
    "global_batch_size": 128,
}


def settings_of(**changes):
    config = get_config()
    config.update_from_flattened_dict(changes)
    return read_settings(config)


def choice(table=QUESTIONS, *, num_devices=1, platform="gpu", **changes):
    settings = settings_of(**(LONG | {"grad_cache.length_buckets": None} | changes))
    return choose_text_widths(settings, table, num_devices=num_devices, platform=platform)


def test_a_side_has_several_widths_where_they_save_computation():
    widths = choice()
    assert set(widths.buckets) == {"key"}  # all queries are as long as any may be
    assert widths.buckets["key"].widths == (32, 104, 512)
    assert widths.buckets["key"].rows == (8, 8, 2)  # of at least 1,024 tokens
    assert widths.padding_before("query", "key") > 0.7
    assert widths.padding("query", "key") < 0.2
    assert "each key to 32, 104, 512 tokens: " in widths.description


def test_few_widths_and_small_chunks_are_chosen_where_they_are_set():
    widths = choice(**{"grad_cache.length_buckets": 2, "grad_cache.chunk_tokens": 1_024})
    assert widths.buckets["key"] == ((104, 512), (8, 2))
    assert widths.buckets["query"] == ((64,), (16,))
    rows = choice(**{"grad_cache.chunk_size": 1}).buckets["key"].rows
    assert rows == (4, 4, 1)  # at most the tokens of one row of 512


@pytest.mark.parametrize(
    "changes",
    [
        {"grad_cache.length_buckets": 1},
        {"model.name": "static"},
        {"table": QUESTIONS._replace(key=np.full(400, 500))},
    ],
    ids=("the setting says so", "the encoder is static", "texts are long"),
)
def test_one_width_stays_where(changes):
    assert choice(**changes).buckets == {}


def test_a_cpu_has_few_widths_unless_more_are_set():
    table = QUESTIONS._replace(key=np.random.default_rng(0).integers(1, 400, 400))
    assert len(choice(table, platform="cpu").buckets["key"].widths) == 3
    changes = {"grad_cache.length_buckets": 8}
    assert len(choice(table, platform="cpu", **changes).buckets["key"].widths) == 8


def test_a_setting_of_widths_without_attention_is_an_error():
    config = get_config()
    config.grad_cache.length_buckets = 4
    with pytest.raises(ValueError, match=r"grad_cache\.length_buckets has no effect here"):
        read_settings(config, changed=["grad_cache.length_buckets"])


@pytest.mark.parametrize("num_devices", [1, 4, 8])
def test_rows_are_dealt_to_the_devices_by_length(num_devices):
    rng = np.random.default_rng(0)
    table = Lengths(np.full(400, 3), rng.integers(1, 500, 400))
    rows = rng.permutation(400)[:64]
    dealt = deal(rows, table, num_devices=num_devices)
    assert sorted(dealt) == sorted(rows)
    assert dealt.tolist() == deal(rows, table, num_devices=num_devices).tolist()
    lengths = table.key[dealt].reshape(num_devices, -1)
    if num_devices == 1:
        assert dealt.tolist() == rows.tolist()
    else:  # rank by rank, no device is shorter than the next rank of another
        assert (lengths[:, :-1].min(0) >= lengths[:, 1:].max(0)).all()


def test_dealt_rows_need_little_more_padding_on_several_devices():
    table = QUESTIONS._replace(key=np.random.default_rng(0).integers(1, 500, 400))
    changes = {"global_batch_size": 1_024}
    one, eight = (choice(table, num_devices=n, **changes).padding("key") for n in (1, 8))
    assert one <= eight < one + 0.06


def test_other_devices_count_the_longest_row_of_all_of_them():
    """Of 8 devices with two rows each, one has a long row: all compute its width."""
    lengths = np.where(np.arange(16) == 5, 512, 8)
    table = Lengths(np.full(16, 64), lengths)
    changes = {"global_batch_size": 16, "grad_cache.length_buckets": 2, "grad_cache.chunk_size": 1}
    one, eight = (choice(table, num_devices=count, **changes) for count in (1, 8))
    assert one.padding("key") < eight.padding("key") < one.padding_before("key")


def run_config(folder, **changes):
    """The config of a small run on texts of 1 to 24 words."""
    rng = np.random.default_rng(0)
    lengths = np.r_[rng.integers(1, 9, 40), rng.integers(9, 25, 20)]
    texts = [" ".join(map(str, rng.integers(0, 9, count))) for count in lengths]
    rows = [{"query": f"{text[:5]} {row}", "key": text} for row, text in enumerate(texts)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = get_config()
    config.update_from_flattened_dict(SMALL | changes)
    config.data.name = str(folder / "pairs.jsonl")
    config.data.splits = {"train": "rest", "validation": "train[:20%]"}
    config.run.update(data_dir=str(folder / "data"), log_every=1, checkpoint_every=2)
    config.steps = 5
    return config


@pytest.mark.parametrize("num_widths", [1, 3])
def test_a_run_with_several_widths_deals_the_rows_of_each_batch(num_widths, tmp_path):
    config = run_config(tmp_path, **{"grad_cache.length_buckets": num_widths})
    (tmp_path / "run").mkdir()
    settings = read_settings(config)
    data = prepare_data(settings.data, data_dir=tmp_path / "data", workdir=tmp_path / "run")
    table = data.tables["train"]
    training = with_text_widths(training_of(config), table)
    batches = RunBatches(training, data, tmp_path / "run")
    rows_of = batches.rows_of(training.init(table.num_rows))
    for step in range(4):
        rows = uniform_rows(
            step, num_rows=table.num_rows, batch_size=settings.global_batch_size, seed=config.seed
        )
        dealt = deal(rows, table, num_devices=training.mesh.size)
        assert dealt.tolist() != rows.tolist()
        assert rows_of(step).tolist() == (rows if num_widths == 1 else dealt).tolist()


def logged(workdir, name):
    return [record[name] for record in read_metrics(workdir) if "loss" in record]


@pytest.mark.slow
def test_a_run_with_several_widths_follows_the_run_with_one_and_resumes_bitwise(
    tmp_path, monkeypatch, capsys
):
    """With dropout, on eight devices."""
    config = run_config(tmp_path)
    train(config, tmp_path / "several")
    assert "the train step is one program for all widths" in capsys.readouterr().err
    train(run_config(tmp_path, **{"grad_cache.length_buckets": 1}), tmp_path / "one")
    losses = [logged(tmp_path / name, "loss") for name in ("several", "one")]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    less, more = (logged(tmp_path / name, "padding") for name in ("several", "one"))
    assert all(0 < few <= many < 1 for few, many in zip(less, more, strict=True))
    assert sum(less) < sum(more)
    half_run(monkeypatch, config, tmp_path / "halves", until=2)
    train(config, tmp_path / "halves")
    assert differences(config, tmp_path / "halves", tmp_path / "several") == []


@pytest.mark.slow
def test_two_processes_train_with_several_widths_as_one(tmp_path):
    run_config(tmp_path)
    changes = SMALL | {"steps": 3, "run.log_every": 1, "run.data_dir": str(tmp_path / "data")}
    changes |= {"data.distinct_tokens": False}
    command = [sys.executable, "-m", "jaxcl.train", "--config=pairs"]
    command += [f"--config.{name}={value}" for name, value in changes.items()]
    command += [f"--config.data.name={tmp_path / 'pairs.jsonl'}"]
    for processes in (1, 2):
        arguments = [*command, f"--workdir={tmp_path / str(processes)}"]
        Run(arguments, processes=processes, devices=4 // processes).finish()
    assert_close_runs(tmp_path / "2", tmp_path / "1", tolerance=1e-4)
    assert all(0 < share < 1 for share in logged(tmp_path / "2", "padding"))
