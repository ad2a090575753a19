"""Training end to end: the real config, shrunk, on eight devices; resuming changes nothing."""

import contextlib
import importlib.util
import json
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxcl.assignment import uniform_rows
from jaxcl.data.prepare import prepare_data
from jaxcl.data.token_table import TokenTable
from jaxcl.run.checkpoint import Checkpoints
from jaxcl.run.checkpoint_record import CheckpointError
from jaxcl.run.metric_writer import read_metrics
from jaxcl.run.reports import DivergenceError, Reports, _RatesByStep
from jaxcl.settings.read import read_settings
from jaxcl.train import main, train
from tests.helpers import bits, training_of, unclocked

pytestmark = [
    # If a load fails, Orbax leaves unfinished work.
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("nothing_left_behind"),
]

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "code_search.py"


def smoke_config(**changes) -> ConfigDict:
    """`configs/code_search.py:smoke`, with changes by dotted name."""
    spec = importlib.util.spec_from_file_location("code_search", CONFIG)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config("smoke")
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="session")
def tiny(smoke_pairs, tmp_path_factory):
    """A config of 20 steps with a small model, with changes."""
    tokenizer = tmp_path_factory.getbasetemp() / "tokenizer.json"

    def config(**changes) -> ConfigDict:
        small = {
            "data.name": str(smoke_pairs),
            "data.vocabulary_size": 1_000,
            "data.tokenizer": str(tokenizer) if tokenizer.exists() else None,
            "model.dim": 16,
            "optimizer.warmup_steps": 2,
            "run.data_dir": str(smoke_pairs.parents[1]),
            "run.log_every": 2,
            "run.evaluate_every": 10,
            "run.checkpoint_every": 10,
        }
        return smoke_config(**(small | changes))

    if not tokenizer.exists():
        made = tmp_path_factory.mktemp("tokenizer")
        train(config(steps=2), made)
        tokenizer.write_text((made / "tokenizer.json").read_text())
    return config


@pytest.fixture(scope="session")
def uninterrupted(tiny, tmp_path_factory):
    """An uninterrupted run of 20 steps."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    results = train(tiny(), workdir)
    return workdir, results


def final_state(config: ConfigDict, workdir: Path):
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        table = train_table(config, workdir)
        abstract_state = training_of(config).abstract_state(table.num_rows, table.group)
        return checkpoints.restore_latest(abstract_state).state


def train_table(config: ConfigDict, workdir: Path) -> TokenTable:
    workdir.mkdir(exist_ok=True)
    data_dir = Path(config.run.data_dir)
    return prepare_data(read_settings(config).data, data_dir=data_dir, workdir=workdir).tables[
        "train"
    ]


def differences(config: ConfigDict, workdir: Path, other: Path) -> list[str]:
    """The bitwise differences between two finished runs of one config."""
    ours, theirs = final_state(config, workdir), final_state(config, other)
    different = [
        jax.tree_util.keystr(path)
        for (path, leaf), leaf_there in zip(
            jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True
        )
        if bits(leaf) != bits(leaf_there)
    ]
    if unclocked(workdir) != unclocked(other):
        different.append("metrics.jsonl")
    if (workdir / "results.json").read_text() != (other / "results.json").read_text():
        different.append("results.json")
    return different


class _Interrupted(Exception):
    pass


def stop_after(monkeypatch, step: int) -> None:
    """Make a run fail right after it has saved a step."""
    save = Checkpoints.save

    def save_and_die(self, saved_step, state, record):
        save(self, saved_step, state, record)
        if saved_step == step:
            self.wait()
            raise _Interrupted

    monkeypatch.setattr(Checkpoints, "save", save_and_die)


def half_run(monkeypatch, config: ConfigDict, workdir: Path, *, until: int = 10) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, until)
        with pytest.raises(_Interrupted):
            train(config, workdir)


@pytest.mark.smoke
def test_the_smoke_config_trains_evaluates_and_leaves_its_files(smoke_pairs, tmp_path):
    small = {"model.dim": 32, "data.vocabulary_size": 2_000}
    small |= {"optimizer.learning_rate": 2e-2, "optimizer.warmup_steps": 2}
    data_dir = str(smoke_pairs.parents[1])  # without a path, the run finds the pairs itself
    config = smoke_config(**small, **{"run.data_dir": data_dir, "run.log_every": 1})
    results = train(config, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert results["steps"] == 20
    assert set(results["metrics"]) == {"validation", "test"}
    for split, variants in results["metrics"].items():
        assert set(variants) == {"plain", "name masked"}
        for variant, methods in variants.items():
            for method in ("bm25", "dense", "hybrid"):
                figures = methods[method]["mrr@10"]
                assert 0 < figures["mean"] <= 1, (split, variant, method)
                assert 0 < figures["standard_error"] < 0.2, (split, variant, method)
    with np.load(tmp_path / "ranks.npz") as ranks:
        for split, rows in results["rows"].items():
            if split in results["metrics"]:
                assert ranks[f"{split}/plain/dense"].shape == (rows,)
    records = read_metrics(tmp_path)
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == 20
    assert np.mean(losses[-4:]) < np.mean(losses[:4])
    assert [record["step"] for record in records if "loss" in record] == list(range(1, 21))
    assert {"gradient_norm", "temperature", "learning_rate", "time/pairs_per_second"} <= set(
        records[0]
    )
    assert "validation/dense/mrr@10" in records[-1]
    assert any((tmp_path / "tensorboard").glob("events.out.tfevents.*"))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["20"]


@pytest.mark.smoke
def test_a_stopped_run_resumes_as_if_it_had_not_stopped(tiny, uninterrupted, tmp_path, monkeypatch):
    half_run(monkeypatch, tiny(), tmp_path)
    assert not (tmp_path / "results.json").exists()
    results = train(tiny(), tmp_path)
    workdir, wanted = uninterrupted
    assert results == wanted
    assert differences(tiny(), tmp_path, workdir) == []
    assert int(final_state(tiny(), tmp_path).step) == 20
    assert len(unclocked(tmp_path)) == 10 + 2  # every second step, with two evaluations


@pytest.mark.parametrize(
    "changes",
    [
        {
            "negatives.bank.kind": "queue",
            "negatives.bank.slots": 150,
            "negatives.tiers.full_bank": True,
        },
        pytest.param(  # which "every tier" has, too
            {"negatives.bank.kind": "instance", "negatives.tiers.full_bank": True},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"loss.name": "running_estimate", "loss.options": {"temperature_rate": 0.1}},
            marks=pytest.mark.slow,
        ),
        pytest.param(  # takes a minute; test_every_tier.py moves such a run from 8 devices to 4
            {
                "loss.masks": ("text",),
                "loss.relative_margin": 0.05,
                "negatives.guide": "momentum",
                "negatives.momentum_encoder.initial": 0.9,
                "negatives.bank.kind": "instance",
                "negatives.mined.refresh_every": 5,
                "negatives.mined.per_query": 2,
                "negatives.mined.rank_range": (1, 20),
                "negatives.proportions": "equal",
                "negatives.tiers.uniform": 20,
                "negatives.tiers.stratified": 20,
                "negatives.tiers.nearest": 3,
                "negatives.tiers.hardest": 5,
                "negatives.tiers.mixed": 2,
                "negatives.tiers.mixed_with_query": 2,
                "negatives.tiers.perturbed": 2,
            },
            marks=pytest.mark.slow,
        ),
        pytest.param(  # it stops in the middle of an epoch; test_reassign.py kills one
            {
                "assignment.name": "gcbs",
                "assignment.gcbs.refresh_every": 4,
                "assignment.gcbs.block_size": 16,
                "assignment.gcbs.method": "rcm_device",
                "assignment.gcbs.picture": False,
            },
            marks=pytest.mark.slow,
        ),
    ],
    ids=["queue", "instance", "running estimate", "every tier", "chosen batches"],
)
def test_a_run_with_memory_resumes_as_if_it_had_not_stopped(tiny, tmp_path, monkeypatch, changes):
    config = tiny(**changes)
    train(config, tmp_path / "whole")
    half_run(monkeypatch, config, tmp_path / "halves")
    train(config, tmp_path / "halves")
    assert differences(config, tmp_path / "halves", tmp_path / "whole") == []
    if "negatives.mined.refresh_every" in changes:
        last = unclocked(tmp_path / "whole")[-1]
        kinds = {name.split("/")[1] for name in last if name.startswith("negatives/")}
        assert kinds == {
            *("batch", "explicit", "uniform", "stratified"),
            *("nearest", "mixed", "mixed_with_query", "perturbed"),
        }
        assert all(last[f"negatives/{kind}/counted"] > 0 for kind in kinds), last
        assert last["bank/key/age"] > 0
    if "assignment.name" in changes:
        found = [one["step"] for one in unclocked(tmp_path / "whole") if "assignment/gap" in one]
        assert found == [4, 8, 12, 16]
        rows = train_table(config, tmp_path / "whole").num_rows
        assert rows < 8 * config.global_batch_size < 10 * config.global_batch_size < 2 * rows


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["infonce", "distillation"])
def test_a_run_trains_on_explicit_negatives_of_a_file_and_resumes(
    tiny, tmp_path, monkeypatch, loss
):
    size = train_table(tiny(), tmp_path / "look").num_rows
    rng = np.random.default_rng(0)
    rows = rng.integers(-1, size, (size, 2))
    file = tmp_path / "negatives.npz"
    np.savez(file, rows=rows, teacher_scores=rng.normal(size=(size, 3)))
    masks = ("row",) if loss == "infonce" else ()
    changes = {"data.negatives": str(file), "loss.name": loss, "loss.masks": masks}
    config = tiny(**changes, **{"grad_cache.chunk_size": 3})
    train(config, tmp_path / "whole")
    half_run(monkeypatch, config, tmp_path / "halves")
    train(config, tmp_path / "halves")
    assert differences(config, tmp_path / "halves", tmp_path / "whole") == []
    np.savez(file, rows=rows[::-1], teacher_scores=rng.normal(size=(size, 3)))
    with pytest.raises(ValueError, match=r"data\.guides or data\.topics has changed"):
        train(config, tmp_path / "halves")


def zero_first_moment(state):
    adam = state.optimizer[1]
    assert any(bool(jnp.any(leaf)) for leaf in jax.tree.leaves(adam.mu))
    first_moment = jax.tree.map(jnp.zeros_like, adam.mu)
    optimizer = (*state.optimizer[:1], adam._replace(mu=first_moment), *state.optimizer[2:])
    return state._replace(optimizer=optimizer)


def zero_schedule(state):
    optimizer = jax.tree.map(
        lambda leaf: jnp.zeros_like(leaf) if leaf.dtype == jnp.int32 else leaf, state.optimizer
    )
    return state._replace(optimizer=optimizer)


def other_key(state):
    key = jax.device_put(jax.random.key(77), state.key.sharding)
    return state._replace(key=key)


def moved_temperature(state):
    params = {**state.params, "log_temperature": state.params["log_temperature"] + 1e-3}
    return state._replace(params=params)


@pytest.mark.parametrize(
    "forget",
    [
        zero_first_moment,
        pytest.param(other_key, marks=pytest.mark.slow),
        pytest.param(zero_schedule, marks=pytest.mark.slow),
        pytest.param(moved_temperature, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_loses_a_leaf_resumes_differently(
    tiny, uninterrupted, tmp_path, monkeypatch, forget
):
    half_run(monkeypatch, tiny(), tmp_path)
    restore = Checkpoints.restore_latest

    def forgetful(self, abstract_state, **options):
        restored = restore(self, abstract_state, **options)
        return restored._replace(state=forget(restored.state))

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "restore_latest", forgetful)
        train(tiny(), tmp_path)
    different = differences(tiny(), tmp_path, uninterrupted[0])
    assert "metrics.jsonl" in different
    assert any(".params" in name for name in different)


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_costs_steps_but_changes_nothing(
    tiny, uninterrupted, tmp_path, monkeypatch, caplog
):
    config = tiny(**{"run.checkpoint_every": 5})
    half_run(monkeypatch, config, tmp_path)
    newest = tmp_path / "checkpoints" / "10"
    biggest = max(newest.rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    content = bytearray(biggest.read_bytes())
    content[len(content) // 2] ^= 1
    biggest.write_bytes(content)
    train(config, tmp_path)
    assert "the checkpoint of step 10 is damaged (checksums differ for ." in caplog.text
    assert "step 5 is restored instead" in caplog.text
    assert (tmp_path / "checkpoints.damaged" / "10").exists()
    assert differences(config, tmp_path, uninterrupted[0]) == []


def test_a_run_resumes_on_another_mesh(tiny, uninterrupted, tmp_path, monkeypatch):
    half_run(monkeypatch, tiny(), tmp_path)
    mesh = ConfigDict({"replica": 2, "data": 4})
    config = tiny()
    with config.unlocked():
        config.run.mesh = mesh
    train(config, tmp_path)
    ours, wanted = unclocked(tmp_path), unclocked(uninterrupted[0])
    assert [record["step"] for record in ours] == [record["step"] for record in wanted]
    for record, other in zip(ours, wanted, strict=True):
        if "loss" in record:
            # Sums over devices have another order, and Adam amplifies the difference.
            assert record["loss"] == pytest.approx(other["loss"], rel=1e-4)
    assert ours[-2]["loss"] != pytest.approx(ours[0]["loss"], rel=1e-4), "nothing was learnt"


def test_a_finished_run_evaluates_again_and_trains_no_more(tiny, uninterrupted, capsys):
    workdir, wanted = uninterrupted
    before = unclocked(workdir)
    assert train(tiny(), workdir) == wanted
    assert unclocked(workdir) == before
    assert f"{workdir}: has completed its 20 steps, and is evaluated. " in capsys.readouterr().err


@pytest.mark.slow
def test_settings_under_run_may_change(tiny, tmp_path, monkeypatch):
    half_run(monkeypatch, tiny(), tmp_path)
    changes = {"run.checkpoint_every": 7, "run.log_every": 5, "run.keep_checkpoints": 3}
    train(tiny(**changes), tmp_path)
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [10, 14, 20]


TRANSFORMER = {
    "max_tokens": 64,
    "hidden_dim": 16,
    "num_layers": 1,
    "num_heads": 2,
    "mlp_dim": 32,
}


@pytest.mark.slow
@pytest.mark.parametrize("model", ["one tower each", "transformer"])
def test_other_models_train(tiny, tmp_path, model):
    config = tiny(steps=6, **{"run.log_every": 1, "data.max_tokens.key": 64})
    if model == "transformer":
        config.model.name = "transformer"
        config.model.options = ConfigDict(TRANSFORMER)
    else:
        config.model.shared = False
    train(config, tmp_path)
    losses = [record["loss"] for record in unclocked(tmp_path) if "loss" in record]
    assert len(losses) == 6
    assert np.isfinite(losses).all()
    towers = final_state(config, tmp_path).params["towers"]
    assert set(towers) == ({"both"} if model == "transformer" else {"query", "key"})
    start = training_of(config).init().params["towers"]
    moved = [
        bits(leaf) != bits(was)
        for leaf, was in zip(jax.tree.leaves(towers), jax.tree.leaves(start), strict=True)
    ]
    assert all(moved), "some parameters were never trained"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model.name": "statik"},
            "model.name='statik' is unknown (did you mean 'static'?); use one of convnet, decoder, "
            "resnet, static, transformer, vit",
        ),
        (
            {"model.options": {"hiden_dim": 8}},
            "model.options.hiden_dim is unknown to 'static' (did you mean 'hidden_dim'?)",
        ),
        (
            {"loss.name": "info"},
            "loss.name='info' is unknown (did you mean 'infonce'?); use one of cosent",
        ),
        (
            {"loss.options": {"direction": "symmetric"}},
            "loss.options.direction is unknown to 'infonce' (did you mean 'directions'?); it has ",
        ),
        (
            {"loss.masks": ("rows",)},
            "loss.masks names 'rows'; use some of row, text, group",
        ),
        (
            {"loss.masks": ("row", "group"), "data.group_field": None},
            "loss.masks names 'group', but data.group_field is None",
        ),
        (
            {"optimizer.name": "adamv"},
            "optimizer.name='adamv' is unknown (did you mean 'adam'?); use one of adam, adamw, ",
        ),
        (
            {"optimizer.options": {"beta": 0.9}},
            "optimizer.options.beta is unknown to 'adam'; it has b1, b2, ",
        ),
        (
            {"global_batch_size": 100},
            "global_batch_size=100 does not divide over 8 devices; use a multiple of 8",
        ),
        ({"global_batch_size": 0}, "global_batch_size=0; set it to at least 1"),
        ({"steps": -5}, "steps=-5; set it to at least 1"),
        ({"model.dim": 0}, "model.dim=0; set it to at least 1"),
        ({"data.max_tokens.key": 0}, "data.max_tokens.key=0; set it to at least 1"),
        ({"run.checkpoint_every": 0}, "run.checkpoint_every=0; set it to at least 1"),
        ({"run.evaluate_every": 0}, "run.evaluate_every=0; set it to at least 1"),
        ({"run.keep_checkpoints": 1}, "run.keep_checkpoints=1; set it to at least 2"),
        ({"optimizer.learning_rate": -1.0}, "optimizer.learning_rate=-1.0; set it above 0"),
        ({"loss.temperature.initial": 0.0}, "loss.temperature.initial=0.0; set it above 0"),
        ({"model.options.max_tokens": 1}, "data.max_tokens."),
        (
            {"run.mesh": {"data": 3}},
            "mesh={'data': 3} does not fit 8 devices; the product of its sizes must be 8",
        ),
    ],
)
def test_a_config_that_cannot_run_says_why_and_writes_nothing(tiny, tmp_path, changes, message):
    config = tiny()
    with config.unlocked():
        for name, value in changes.items():
            place, _, last = name.rpartition(".")
            parent = config[place] if place else config
            parent[last] = ConfigDict(value) if isinstance(value, dict) else value
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the text is compared below
        train(config, tmp_path / "run")
    assert str(error.value).startswith(message)
    assert not (tmp_path / "run").exists()


def test_more_rows_than_there_are_is_an_error(tiny, tmp_path, smoke_pairs):
    sizes = json.loads((smoke_pairs / "dataset_info.json").read_text())["splits"]
    rows = next(sum(map(int, s["shardLengths"])) for s in sizes if s["name"] == "train")
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the text is compared below
        train(tiny(global_batch_size=1_024), tmp_path)
    assert str(error.value) == (
        f"the training split has {rows} rows, fewer than one batch of 1024; set "
        f"global_batch_size to at most {rows}"
    )


def test_one_batch_of_rows_is_enough(tiny, tmp_path):
    config = tiny(steps=2, **{"data.splits.train": "train[:64]"})
    assert config.global_batch_size == 64
    assert train(config, tmp_path)["rows"]["train"] == 64


def test_another_seed_reads_the_rows_in_another_order(tiny, tmp_path, monkeypatch):
    seeds = []

    def noting(*args, seed, **options):
        seeds.append(seed)
        return uniform_rows(*args, seed=seed, **options)

    monkeypatch.setattr("jaxcl.run.batches.uniform_rows", noting)
    train(tiny(steps=2, seed=5), tmp_path)
    assert set(seeds) == {5}


def signal_while_updating(monkeypatch, *steps: int) -> None:
    """Send SIGTERM before the metrics of each of these steps are written."""
    add = Reports.add

    def add_and_signal(self, step, metrics, **more):
        if step in steps:
            signal.raise_signal(signal.SIGTERM)
        add(self, step, metrics, **more)

    monkeypatch.setattr(Reports, "add", add_and_signal)


def test_a_signal_in_the_last_step_ends_a_run_that_is_done(tiny, tmp_path, monkeypatch):
    signal_while_updating(monkeypatch, 2)
    assert train(tiny(steps=2), tmp_path)["steps"] == 2
    assert (tmp_path / "results.json").exists()


def test_a_second_signal_takes_effect_at_once(tiny, tmp_path, monkeypatch):
    def obey(number, _):
        raise _Interrupted

    before = signal.signal(signal.SIGTERM, obey)
    try:
        signal_while_updating(monkeypatch, 2)
        flush = Reports.flush

        def flush_and_signal(self):
            signal.raise_signal(signal.SIGTERM)
            flush(self)

        monkeypatch.setattr(Reports, "flush", flush_and_signal)
        with pytest.raises(_Interrupted):
            train(tiny(steps=4), tmp_path)
        assert signal.getsignal(signal.SIGTERM) is obey
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_run_that_cannot_save_does_not_say_that_it_stopped_with_its_state_saved(
    tiny, tmp_path, monkeypatch
):
    def wait(self):
        if self._saving:
            self._saving = None
            raise CheckpointError("no space")

    signal_while_updating(monkeypatch, 2)
    monkeypatch.setattr(Checkpoints, "wait", wait)
    with pytest.raises(CheckpointError, match="no space"):
        train(tiny(steps=4), tmp_path)


def test_the_speed_leaves_evaluations_out(tiny, tmp_path, monkeypatch):
    calls = []
    paused = Reports.paused

    @contextlib.contextmanager
    def noted(self):
        calls.append("paused")
        with paused(self):
            yield
        calls.append("resumed")

    monkeypatch.setattr(
        "jaxcl.train.quick_metrics", lambda *_, **__: calls.append("evaluated") or {}
    )
    monkeypatch.setattr(Reports, "paused", noted)
    train(tiny(steps=2), tmp_path)
    assert calls == ["paused", "resumed", "paused", "evaluated", "resumed"]  # negatives come first


def test_an_empty_split_is_an_error(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"(?i)train\[:0\].*(empty|no pairs|no rows)"):
        train(tiny(**{"data.splits.train": "train[:0]"}), tmp_path)


def test_a_workdir_of_another_config_is_an_error_that_lists_the_fields(tiny, uninterrupted):
    workdir, _ = uninterrupted
    other = tiny(seed=1, **{"model.dim": 24})
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the text is compared below
        train(other, workdir)
    assert str(error.value) == (
        f"the workdir {workdir} belongs to another config: model.dim is 24 here and 16 there; "
        "seed is 1 here and 0 there. Choose another --workdir, or restore the settings"
    )


def test_a_workdir_that_cannot_be_written_is_an_error(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PermissionError, match=r"the workdir .* cannot be created") as error:
        train(tiny(), tmp_path / "file" / "run")
    assert str(error.value).endswith("choose another --workdir")


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_good_state(tiny, tmp_path):
    config = tiny(
        **{
            "optimizer.learning_rate": 1e30,
            "optimizer.clip_norm": 0.0,
            "run.checkpoint_every": 1,
        }
    )
    with pytest.raises(DivergenceError) as error:
        train(config, tmp_path)
    message = str(error.value)
    assert message.startswith("step ")
    step = int(message.split()[1])
    assert f"step {step} diverged: loss " in message
    assert "['towers']['both']" in message
    assert "optimizer.learning_rate (now 1e+30)" in message
    assert not (tmp_path / "results.json").exists()
    state = final_state(config, tmp_path)
    assert 1 <= int(state.step) < step
    for leaf in jax.tree.leaves((state.params, state.optimizer)):
        assert np.isfinite(np.asarray(leaf)).all()
    assert all(np.isfinite(record.get("loss", 0.0)) for record in read_metrics(tmp_path))


def test_a_state_that_is_not_finite_is_never_saved(tiny, tmp_path):
    # The first learning rate is 0. The second update overflows float32, though its loss does not.
    huge = {"optimizer.learning_rate": 1e3, "optimizer.weight_decay": 1e38}
    config = tiny(steps=3, **huge, **{"run.checkpoint_every": 1})
    with pytest.raises(DivergenceError, match="step 2 diverged: after its update"):
        train(config, tmp_path)
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.steps == [1]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (
            ["--config.stepz=3"],
            "--config.stepz=3: there is no such field as stepz (did you mean 'steps'?)",
        ),
        (["--config.model.dimm", "3"], "no such field as dimm (did you mean 'dim'?); model has"),
        (["--config.steps=many"], "--config.steps=many: give an integer"),
        (["--config.global_batch_size=7", "--config.run.mesh.data=3"], "mesh={'data': 3"),
        (["--config.assignment.gcbs.swaps=2"], "assignment.gcbs.swaps has no effect here"),
        (["--profile=9:2"], "--profile=9:2; give the first step to trace and"),
    ],
)
def test_the_command_names_the_problem_and_fails(tmp_path, capsys, arguments, wanted):
    with pytest.raises(SystemExit) as stopped:
        main([f"--config={CONFIG}:smoke", f"--workdir={tmp_path / 'run'}", *arguments])
    assert stopped.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert wanted in line
    assert not (tmp_path / "run").exists()


REFRESHED = {
    "optimizer.schedule": "warmup_constant",
    "assignment.name": "gcbs",
    "assignment.gcbs.refresh_every": 5,
    "assignment.gcbs.picture": False,
    "negatives.bank.kind": "instance",
    "negatives.mined.refresh_every": 5,
}


@pytest.mark.slow
def test_a_finished_run_that_is_extended_is_the_longer_run(tiny, tmp_path):
    train(tiny(**REFRESHED), tmp_path / "longer")
    # Step 10 is the last: nothing is mined or assigned after it, until the run is extended.
    train(tiny(**REFRESHED, steps=10), tmp_path / "extended")
    assert train(tiny(**REFRESHED), tmp_path / "extended")["steps"] == 20
    train(tiny(**REFRESHED), tmp_path / "extended")  # a finished run is only evaluated again
    assert differences(tiny(**REFRESHED), tmp_path / "extended", tmp_path / "longer") == []


def test_a_run_of_a_falling_learning_rate_is_not_extended(tiny, uninterrupted):
    workdir, _ = uninterrupted
    with pytest.raises(ValueError, match=r"steps is 30 here and 20 there \(optimizer.schedule dep"):
        train(tiny(steps=30), workdir)


@pytest.mark.parametrize("lost", ["config.json", "data.json", "run.json", "all"])
def test_a_finished_run_whose_small_files_are_lost_is_still_that_run(
    tiny, uninterrupted, tmp_path, lost
):
    workdir = shutil.copytree(uninterrupted[0], tmp_path / "workdir")
    for name in ["config.json", "data.json", "run.json"] if lost == "all" else [lost]:
        (workdir / name).unlink()
    with pytest.raises(ValueError, match="another config: seed is 1 here and 0 there"):
        train(tiny(seed=1), workdir)
    assert train(tiny(), workdir) == uninterrupted[1]
    assert differences(tiny(), workdir, uninterrupted[0]) == []


def test_a_run_whose_checkpoints_are_gone_does_not_start_over(tiny, uninterrupted, tmp_path):
    workdir = shutil.copytree(uninterrupted[0], tmp_path / "workdir")
    shutil.rmtree(workdir / "checkpoints")
    with pytest.raises(CheckpointError, match=r"step 20 was saved in .* has no checkpoint"):
        train(tiny(), workdir)
    assert unclocked(workdir) == unclocked(uninterrupted[0])


def test_a_start_that_fails_after_its_data_are_prepared_leaves_no_workdir(tiny, tmp_path):
    with pytest.raises(ValueError, match="fewer than one batch"):
        train(tiny(global_batch_size=8 * 10**6), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_batch_without_allowed_negatives_is_a_warning(tiny, tmp_path, capsys):
    train(tiny(**{"loss.margin": 2.0, "steps": 2}), tmp_path)
    warned = " ".join(capsys.readouterr().err.split())
    assert warned.count("the gradient of step 1 is 0") == 1
    assert "the gradient of step 2" not in warned
    assert "no negative is allowed" not in warned  # the same, reported once


def test_negatives_that_are_all_masked_are_a_warning(capsys, monkeypatch):
    monkeypatch.setattr(Reports, "__init__", lambda self: setattr(self, "_warned", False))
    reports = Reports()
    reports.check_negatives(1, {"bank/key/age": 0.0})
    reports.check_negatives(2, {"negatives/batch/counted": 0.0, "negatives/bank/counted": 3.0})
    assert capsys.readouterr().err == ""
    for step in (3, 4):
        reports.check_negatives(step, {"negatives/batch/counted": 0.0})
    assert capsys.readouterr().err.count("no negative is allowed in the batch of step 3") == 1


def test_learning_rates_are_computed_for_all_steps():
    rate_of = _RatesByStep(lambda step: 1e-3 * step)
    for step in (0, 65_535, 65_536, 2**31 - 2, 7):
        assert rate_of(step) == pytest.approx(1e-3 * step)


@pytest.mark.parametrize("named", ["workdir", "checkpoint"])
def test_a_run_starts_with_the_encoders_and_the_tokenizer_of_another(
    tiny, uninterrupted, tmp_path, named
):
    other = shutil.copytree(uninterrupted[0], tmp_path / "other")
    origin, step = (other, 20) if named == "workdir" else (other / "checkpoints" / "10", 10)
    config = tiny(
        **{
            "init_from": str(origin),
            "data.tokenizer": None,
            "steps": 1,
            "optimizer.schedule": "warmup_constant",  # the first learning rate is 0
            "negatives.bank.kind": "queue",
            "negatives.tiers.full_bank": True,
            "negatives.momentum_encoder.initial": 0.5,
            "negatives.momentum_encoder.final": 0.5,
        }
    )
    train(config, tmp_path / "run")
    state = final_state(config, tmp_path / "run")
    abstract = training_of(tiny()).abstract_state().params["towers"]
    with Checkpoints(uninterrupted[0] / "checkpoints", read_only=True) as checkpoints:
        wanted = checkpoints.restore_latest(
            {"params": {"towers": abstract}}, partial=True, only=step
        ).state["params"]["towers"]
    assert jax.tree.map(bits, state.params["towers"]) == jax.tree.map(bits, wanted)
    assert jax.tree.map(bits, state.memory["momentum"]) == jax.tree.map(bits, wanted)
    tokenizer = (uninterrupted[0] / "tokenizer.json").read_text()
    assert (tmp_path / "run" / "tokenizer.json").read_text() == tokenizer
    assert float(state.params["log_temperature"]) == pytest.approx(np.log(0.05), abs=1e-6)
    shutil.rmtree(other)
    train(config, tmp_path / "run")  # the other run is no longer needed
    config.init_from = None
    with pytest.raises(ValueError, match="init_from is None here and"):
        train(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_from": "nowhere"}, "no tokenizer.json in nowhere"),
        ({"model.dim": 8}, r"different shapes: both/.* is \(.*8.*\) here and \(.*16.*\) there"),
        ({"data.tokenizer": "mine.json"}, "brings its own weights and tokenizer"),
    ],
)
def test_a_run_that_cannot_start_from_another_says_why(
    tiny, uninterrupted, tmp_path, changes, message
):
    config = {"init_from": str(uninterrupted[0]), "data.tokenizer": None, **changes}
    with pytest.raises(ValueError, match=message):
        train(tiny(**config), tmp_path / "run")
    assert not (tmp_path / "run").exists()
