"""Workdirs: a folder belongs to one config, and its files are complete."""

import contextlib
import json
import os

import jax
import jax.numpy as jnp
import pytest

from jaxcl.data.prepare import RememberedData
from jaxcl.run.checkpoint import Checkpoints
from jaxcl.run.identity import fields_of, run_record
from jaxcl.run.workdir import (
    claim_workdir,
    emptied_unless_begun,
    lock_workdir,
    read_config,
    workdir_id,
)
from jaxcl.settings.read import read_settings
from jaxcl.settings.sections import Settings


def settings(**changes) -> Settings:
    """Settings with other values, by dotted name."""
    config = {
        "steps": 100,
        "seed": 0,
        "data": {"group_field": None},
        "model": {"dim": 64, "name": "transformer", "options": {"num_layers": 2}},
        "loss": {"matryoshka_dims": (16, 32)},
        "run": {"log_every": 10, "mesh": {"data": -1}},
    }
    for name, value in changes.items():
        *parents, leaf = name.split(".")
        section = config
        for parent in parents:
            section = section.setdefault(parent, {})
        section[leaf] = value
    return read_settings(config)


def error_of(workdir, other: Settings) -> str:
    (workdir / "checkpoints" / "10").mkdir(parents=True, exist_ok=True)
    with pytest.raises(ValueError, match="belongs to another config") as error:
        claim_workdir(workdir, other)
    return str(error.value)


def test_a_claimed_workdir_tells_its_config(tmp_path):
    workdir = tmp_path / "runs" / "first"
    claim_workdir(workdir, settings())
    found = read_settings(read_config(workdir))
    assert found.model.dim == 64
    assert found == settings()
    assert sorted(path.name for path in workdir.iterdir()) == ["config.json", "run.json"]


def test_the_same_config_claims_its_workdir_again(tmp_path):
    claim_workdir(tmp_path, settings())
    claim_workdir(tmp_path, settings())


def test_every_field_that_differs_is_named_with_both_values(tmp_path):
    claim_workdir(tmp_path, settings())
    message = error_of(tmp_path, settings(**{"steps": 200, "model.dim": 32}))
    assert message == (
        f"the workdir {tmp_path} belongs to another config: model.dim is 32 here and 64 there; "
        "steps is 200 here and 100 there. Choose another --workdir, or restore the settings"
    )


def test_the_config_of_a_workdir_outlives_a_claim_that_failed(tmp_path):
    claim_workdir(tmp_path, settings())
    error_of(tmp_path, settings(steps=200))
    assert read_settings(read_config(tmp_path)).steps == 100


def test_before_the_first_checkpoint_a_workdir_may_become_another_configs(tmp_path):
    claim_workdir(tmp_path, settings())
    (tmp_path / "checkpoints" / "10.orbax-checkpoint-tmp").mkdir(parents=True)
    for name in ("data.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    claim_workdir(tmp_path, settings(**{"run.log_every": 50}))
    assert (tmp_path / "data.json").exists()
    claim_workdir(tmp_path, settings(steps=200))
    assert read_settings(read_config(tmp_path)).steps == 200
    assert not (tmp_path / "data.json").exists()
    assert not (tmp_path / "tokenizer.json").exists()


def test_two_runs_are_never_at_work_in_one_workdir(tmp_path):
    with lock_workdir(tmp_path / "run"):
        with (
            pytest.raises(ValueError, match=r"another run is at work in .*run; wait"),
            lock_workdir(tmp_path / "run"),
        ):
            pass
        with lock_workdir(tmp_path / "other"):
            pass
    with lock_workdir(tmp_path / "run"):
        pass


def test_a_damaged_config_is_an_error_that_names_the_file(tmp_path):
    claim_workdir(tmp_path, settings())
    (tmp_path / "config.json").write_text("{\0")
    for use in (lambda: claim_workdir(tmp_path, settings()), lambda: read_config(tmp_path)):
        with pytest.raises(ValueError, match=r"config\.json is damaged"):
            use()


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"seed": 1}, "seed is 1 here and 0 there"),
        ({"data.group_field": "topic"}, "data.group_field is topic here and None there"),
        (
            {"loss.matryoshka_dims": (16,)},
            "loss.matryoshka_dims is [16] here and [16, 32] there",
        ),
        ({"model.options.num_layers": 3}, "model.options.num_layers is 3 here and 2 there"),
    ],
)
def test_settings_that_change_the_result_make_another_config(tmp_path, changes, difference):
    claim_workdir(tmp_path, settings())
    assert difference in error_of(tmp_path, settings(**changes))


def test_an_option_that_only_one_config_has_is_named(tmp_path):
    claim_workdir(tmp_path, settings())
    message = error_of(tmp_path, settings(**{"model.options": {"num_heads": 4}}))
    assert "model.options.num_heads is 4 here and nothing there" in message
    assert "model.options.num_layers is nothing here and 2 there" in message


def test_settings_under_run_may_change_and_the_newest_is_kept(tmp_path):
    claim_workdir(tmp_path, settings())
    mesh = {"data": 2, "model": 4}
    changes = {"run.log_every": 50, "run.mesh": mesh, "run.data_dir": "elsewhere"}
    claim_workdir(tmp_path, settings(**changes))
    assert read_settings(read_config(tmp_path)).run == settings(**changes).run


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    claim_workdir(tmp_path / "run", settings())
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("below", ["", "run", "run/deeper"])
def test_a_workdir_at_or_below_a_file_is_an_error_that_names_it(tmp_path, below):
    (tmp_path / "file").write_text("no folder")
    workdir = tmp_path / "file" / below
    with pytest.raises(PermissionError, match="a file has that name") as error:
        claim_workdir(workdir, settings())
    assert str(workdir) in str(error.value)
    assert "choose another --workdir" in str(error.value)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions do not bind root")
def test_a_workdir_without_write_permission_is_an_error_that_names_it(tmp_path):
    workdir = tmp_path / "locked"
    workdir.mkdir(mode=0o500)
    with pytest.raises(PermissionError, match=r"locked \(Permission denied\); make it writable"):
        claim_workdir(workdir, settings())


def test_a_file_system_that_is_read_only_is_the_same_error(tmp_path, monkeypatch):
    def read_only(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("os.replace", read_only)
    with pytest.raises(PermissionError, match=r"\(Read-only file system\); make it writable"):
        claim_workdir(tmp_path, settings())


def test_a_folder_without_a_run_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ValueError, match="there is no run in") as error:
        read_config(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_settings_of_an_assignment_that_is_not_asked_for_change_nothing():
    options = {"assignment.gcbs.preset": "full", "assignment.gcbs.neighbours": 32}
    assert fields_of(settings(**options)) == fields_of(settings())
    chosen = fields_of(settings(**options, **{"assignment.name": "gcbs"}))
    assert chosen["assignment.gcbs.neighbours"] == 32
    assert chosen != fields_of(settings(**{"assignment.name": "gcbs"}))


def test_a_field_that_a_later_version_adds_has_its_default(tmp_path):
    claim_workdir(tmp_path, settings())
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    earlier = json.loads((tmp_path / "config.json").read_text())
    del earlier["optimizer"]["clip_norm"]
    (tmp_path / "config.json").write_text(json.dumps(earlier))
    claim_workdir(tmp_path, settings())
    message = error_of(tmp_path, settings(**{"optimizer.clip_norm": 2.0}))
    assert "optimizer.clip_norm is 2.0 here and 1.0 there" in message


def test_a_config_from_before_augmentations_is_read(tmp_path):
    claim_workdir(tmp_path, settings(**{"model.name": "static", "model.options": {}}))
    path = tmp_path / "config.json"
    stored = json.loads(path.read_text())
    stored["model"]["options"]["token_dropout"] = 0.3
    del stored["augmentation"]
    path.write_text(json.dumps(stored))
    augmentation = read_settings(read_config(tmp_path)).augmentation
    assert (augmentation.name, augmentation.options) == ("token_dropout", {"rate": 0.3})


def run_record_of(settings: Settings):
    return run_record(settings, RememberedData("pairs", {"train": "abc"}))


def save(workdir, saved: Settings, *, step: int = 10) -> None:
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(step, {"weight": jnp.zeros(3)}, run_record_of(saved))


@pytest.mark.parametrize("content", [None, "", "{}", "[]", '{"seed": 7}'])
def test_the_checkpoint_says_whose_workdir_it_is_whatever_became_of_the_config(tmp_path, content):
    claim_workdir(tmp_path, settings())
    save(tmp_path, settings())
    path = tmp_path / "config.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ValueError, match=r"another config: seed is 1 here and 0 there\. Choose"):
        claim_workdir(tmp_path, settings(seed=1))
    assert claim_workdir(tmp_path, settings()) == {**run_record_of(settings()), "step": 10}
    assert read_settings(read_config(tmp_path)) == settings()


def test_other_flags_of_jax_are_named(tmp_path):
    save(tmp_path, settings())
    with (
        jax.enable_x64(True),
        pytest.raises(ValueError, match="flags of JAX: jax_enable_x64 is True here and False"),
    ):
        claim_workdir(tmp_path, settings())
    claim_workdir(tmp_path, settings())


def test_settings_that_this_version_does_not_know_are_named(tmp_path):
    record = run_record_of(settings())
    record["settings"]["warp"] = 9
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(10, {"weight": jnp.zeros(3)}, record)
    with pytest.raises(ValueError, match=r"another version of jaxcl \(warp is unknown"):
        claim_workdir(tmp_path, settings())


def test_processes_know_by_its_id_that_they_share_a_workdir(tmp_path):
    for name in ("one", "other"):
        claim_workdir(tmp_path / name, settings())
    claim_workdir(tmp_path / "one", settings())
    assert workdir_id(tmp_path / "one") != workdir_id(tmp_path / "other")
    (tmp_path / "one").rename(tmp_path / "mounted elsewhere")
    assert len(workdir_id(tmp_path / "mounted elsewhere")) == 32
    with pytest.raises(ValueError, match="the same --workdir, on a file system that they share"):
        workdir_id(tmp_path / "one")


def fail_to_start(workdir) -> None:
    with (
        contextlib.suppress(KeyboardInterrupt),
        lock_workdir(workdir),
        emptied_unless_begun(workdir),
    ):
        claim_workdir(workdir, settings())
        for name in ("data.json", "tokenizer.json", "metrics.jsonl"):
            (workdir / name).touch()
        (workdir / "checkpoints").mkdir(exist_ok=True)
        (workdir / "tensorboard").mkdir(exist_ok=True)
        raise KeyboardInterrupt


def test_a_failed_start_leaves_nothing(tmp_path):
    fail_to_start(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_start_leaves_files_of_the_user(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    fail_to_start(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_failed_start_leaves_a_tokenizer_that_was_there_before(tmp_path):
    (tmp_path / "tokenizer.json").write_text("mine")
    fail_to_start(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
    assert (tmp_path / "tokenizer.json").read_text() == "mine"


def test_a_failed_start_leaves_the_run_of_an_earlier_one(tmp_path):
    claim_workdir(tmp_path, settings())
    fail_to_start(tmp_path)
    assert {"config.json", "data.json", "tokenizer.json"} <= {p.name for p in tmp_path.iterdir()}


def test_a_run_that_has_begun_is_left(tmp_path):
    with contextlib.suppress(KeyboardInterrupt), emptied_unless_begun(tmp_path):
        claim_workdir(tmp_path, settings())
        (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
        raise KeyboardInterrupt
    assert (tmp_path / "config.json").exists()
