"""Checkpoints: states are restored bit for bit, and damaged checkpoints never."""

import contextlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxcl.host.processes import PeerError
from jaxcl.ops.mesh import make_mesh
from jaxcl.run.checkpoint import Checkpoints, _explained, checksum
from jaxcl.run.checkpoint_record import CheckpointError, check_none_lost, newest_record
from tests.helpers import bits

pytestmark = [
    # If a load fails, Orbax leaves unfinished work.
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("nothing_left_behind"),
]

ROWS = PartitionSpec("data")
WHOLE = PartitionSpec()


def mesh_of(num_devices: int):
    return make_mesh({"data": num_devices}, devices=jax.devices()[:num_devices])


def sharding(array, num_devices: int) -> NamedSharding:
    """Matrices sharded by row, everything else replicated."""
    return NamedSharding(mesh_of(num_devices), ROWS if jnp.ndim(array) > 1 else WHOLE)


def make_state(seed: int, *, num_devices: int = 8, rows: int = 256):
    """A leaf of every kind that a run has, with values that arithmetic would change."""
    rng = np.random.default_rng(seed)
    table = rng.normal(size=(rows, 40)).astype(np.float32)
    table.view(np.uint32)[0, :4] = [0x7FC12345, 0x80000000, 0x00000001, 0xFF800000]
    state = {
        "step": jnp.int32(seed),
        "params": {"table": jnp.asarray(table), "half": jnp.asarray(table, jnp.bfloat16)},
        "optimizer": (jnp.asarray(rng.integers(-9, 9, size=7), jnp.int8), (), jnp.uint32(seed)),
        "flags": jnp.asarray(rng.integers(0, 2, size=(8, 3)), bool),
        "key": jax.random.key(seed),
    }
    return jax.tree.map(lambda leaf: jax.device_put(leaf, sharding(leaf, num_devices)), state)


def abstract(state, *, num_devices: int = 8):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding(leaf, num_devices)
        ),
        state,
    )


def assert_same(found, wanted) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True
    ):
        name = jax.tree_util.keystr(path)
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), name
        assert bits(ours) == bits(theirs), name


def save_steps(directory, *steps: int, **options) -> None:
    """Save `make_state(step)` for each step."""
    with Checkpoints(directory, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step))


def restore(directory, *, num_devices: int = 8, **options):
    with Checkpoints(directory, **options) as checkpoints:
        return checkpoints.restore_latest(abstract(make_state(0), num_devices=num_devices))


def files_of(directory) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def biggest_file(directory):
    return max(
        (path for path in directory.rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
    )


def flip_a_bit(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def truncate(path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGES = {
    "one flipped bit": lambda step: flip_a_bit(biggest_file(step)),
    "a file cut short": lambda step: truncate(biggest_file(step)),
    "an empty file": lambda step: biggest_file(step).write_bytes(b""),
    "no manifest": lambda step: (step / "state" / "manifest.ocdbt").unlink(),
    "no checksums": lambda step: shutil.rmtree(step / "checksums"),
}


def test_a_checkpoint_keeps_its_record(tmp_path):
    record = {"settings": {"seed": 3, "names": ["ä", None], "rate": 0.1}}
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(5, make_state(5), record)
    assert restore(tmp_path / "checkpoints").record == {**record, "step": 5}
    assert newest_record(tmp_path / "checkpoints") == {**record, "step": 5}


def test_the_state_of_another_run_is_not_restored(tmp_path):
    def check(record):
        raise ValueError(f"of another run: step {record['step']}")

    save_steps(tmp_path / "checkpoints", 1, 2)
    with (
        Checkpoints(tmp_path / "checkpoints") as checkpoints,
        pytest.raises(ValueError, match="of another run: step 2"),
    ):
        checkpoints.restore_latest(abstract(make_state(0)), check=check)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]


def test_a_folder_that_was_renamed_to_a_later_step_is_set_aside(tmp_path, caplog):
    directory = tmp_path / "checkpoints"
    save_steps(directory, 3, 5)
    (directory / "3").rename(directory / "900")
    restored = restore(directory)
    assert (restored.step, restored.damaged_steps) == (5, (900,))
    assert "it is of step 3, so its folder was renamed" in caplog.text
    with Checkpoints(directory) as checkpoints:  # a later step does not replace an older one
        checkpoints.save(7, make_state(7))
    assert restore(directory).step == 7


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_text("[]"),
        lambda path: path.write_text("{}"),
        lambda path: path.write_text(path.read_text().replace('"seed": 3', '"seed": 4')),
        lambda path: path.write_text('{"record": [5], "sha256": ""}'),
    ],
    ids=["gone", "a list", "empty", "changed", "retyped"],
)
def test_a_damaged_record_is_a_damaged_checkpoint(tmp_path, damage):
    directory = tmp_path / "checkpoints"
    with Checkpoints(directory) as checkpoints:
        for step in (3, 5):
            checkpoints.save(step, make_state(step), {"seed": 3})
    damage(directory / "5" / "record" / "data.json")
    assert newest_record(directory)["step"] == 3
    restored = restore(directory)
    assert (restored.step, restored.damaged_steps) == (3, (5,))


@pytest.mark.parametrize("lose", [shutil.rmtree, lambda path: shutil.rmtree(path / "5")])
def test_checkpoints_that_are_gone_do_not_start_a_run_over(tmp_path, lose):
    directory = tmp_path / "checkpoints"
    save_steps(directory, 5)
    lose(directory)
    for use in (lambda: restore(directory), lambda: check_none_lost(directory)):
        with pytest.raises(CheckpointError, match=r"step 5 was saved in .* mount its .* delete "):
            use()
    directory.with_name("checkpoints.sizes.json").unlink()  # as the message tells the user to do
    assert restore(directory) is None


def test_a_checkpoint_of_an_earlier_version_is_reported_to_lack_a_record(tmp_path):
    save_steps(tmp_path / "checkpoints", 5)
    shutil.rmtree(tmp_path / "checkpoints" / "5" / "record")
    (tmp_path / "checkpoints.sizes.json").unlink()  # that version lists no record in it
    with pytest.raises(CheckpointError, match=r"step 5: it has no record \(.*earlier versions"):
        restore(tmp_path / "checkpoints")


def test_another_step_than_the_only_one_wanted_is_never_restored(tmp_path, monkeypatch):
    directory = tmp_path / "checkpoints"
    save_steps(directory, 3, 4)

    def removed(self, step, *arguments, **options):
        shutil.rmtree(directory / str(step))
        raise CheckpointError("it is gone")

    monkeypatch.setattr(Checkpoints, "_load", removed)
    with (
        Checkpoints(directory, read_only=True) as checkpoints,
        pytest.raises(CheckpointError, match="step 3: "),
    ):
        checkpoints.restore_latest(abstract(make_state(0)), only=3)
    assert (directory / "4").exists()


def test_a_checkpoint_removed_while_it_is_read_is_not_damaged(tmp_path, monkeypatch):
    directory = tmp_path / "checkpoints"
    save_steps(directory, 3)
    load = Checkpoints._load

    def overtaken(self, step, *arguments, **options):
        if step == 3:
            save_steps(directory, 4, 5)  # which removes step 3
        return load(self, step, *arguments, **options)

    monkeypatch.setattr(Checkpoints, "_load", overtaken)
    restored = restore(directory, read_only=True)
    assert (restored.step, restored.damaged_steps) == (5, ())


@pytest.mark.smoke
@pytest.mark.parametrize("num_devices", [8, 4, 1])
def test_a_state_comes_back_bitwise_on_any_number_of_devices(tmp_path, num_devices):
    save_steps(tmp_path, 5)
    restored = restore(tmp_path, num_devices=num_devices)
    assert (restored.step, restored.damaged_steps) == (5, ())
    assert_same(restored.state, make_state(5))
    for leaf in jax.tree.leaves(restored.state):
        assert leaf.sharding.is_equivalent_to(sharding(leaf, num_devices), leaf.ndim)


def test_a_restored_key_draws_what_the_saved_one_draws(tmp_path):
    save_steps(tmp_path, 5)
    drawn = jax.random.normal(restore(tmp_path).state["key"], 3)
    assert bits(drawn) == bits(jax.random.normal(jax.random.key(5), 3))


def test_nothing_saved_restores_nothing(tmp_path):
    assert restore(tmp_path / "new") is None


def test_the_state_may_be_donated_right_after_the_save(tmp_path):
    in_place = jax.jit(
        lambda state: jax.tree.map(lambda leaf: leaf * 3 + 1, state), donate_argnums=0
    )
    start = jax.device_put(np.random.default_rng(0).normal(size=(512, 2048)).astype(np.float32))
    state = {"table": jax.device_put(start, sharding(start, 8))}
    wanted = jax.tree.map(np.asarray, state)
    with Checkpoints(tmp_path) as checkpoints:
        for step in range(1, 4):
            checkpoints.save(step, state)
            donated, state = state, in_place(state)
            donated["table"].delete()  # if it was still in use, donation made a copy
            jax.block_until_ready(state)
            checkpoints.wait()
            assert_same(checkpoints.restore_latest(abstract(state)).state, wanted)
            wanted = jax.tree.map(np.asarray, state)


def test_the_newest_are_kept(tmp_path):
    save_steps(tmp_path, 1, 2, 3, 4, 5, keep=3)
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        assert checkpoints.steps == [3, 4, 5]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4", "5"]
    assert restore(tmp_path, keep=3).step == 5


def save_evaluated(directory, best_of: dict[int, int], **options) -> None:
    """Save steps with records that name the best step so far."""
    with Checkpoints(directory, **options) as checkpoints:
        for step, best in best_of.items():
            checkpoints.save(step, make_state(step), {"best": {"metric": "m", "step": best}})


def test_the_best_is_kept_in_addition_to_the_newest(tmp_path):
    save_evaluated(tmp_path, {1: 1, 2: 2, 3: 2, 4: 2, 5: 2})
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps == [2, 4, 5]
        restored = checkpoints.restore_latest(abstract(make_state(0)), only=2)
    assert_same(restored.state, make_state(2))


def test_a_new_best_replaces_the_previous_one_once_no_fall_back_needs_it(tmp_path):
    save_evaluated(tmp_path, {1: 1, 2: 1, 3: 1, 4: 4})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3", "4"]
    save_evaluated(tmp_path, {5: 4})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4", "5"]


def test_a_resumed_run_still_keeps_the_best(tmp_path):
    for step in (1, 2, 3, 4, 5):  # one process each
        save_evaluated(tmp_path, {step: 1})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "4", "5"]
    save_evaluated(tmp_path, {6: 6})  # a fall-back to 5 needs 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "5", "6"]


def test_a_fall_back_finds_its_own_best(tmp_path):
    directory = tmp_path / "checkpoints"
    save_evaluated(directory, {1: 1, 2: 1, 3: 1, 4: 4})
    flip_a_bit(biggest_file(directory / "4"))
    restored = restore(directory)
    assert (restored.step, restored.record["best"]["step"]) == (3, 1)
    assert (directory / "1").exists()


def test_a_damaged_record_names_no_best(tmp_path):
    save_evaluated(tmp_path, {1: 1, 2: 1})
    (tmp_path / "2" / "record" / "data.json").write_text("{}")
    save_evaluated(tmp_path, {3: 3, 4: 3})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4"]


def test_keeping_too_few_to_fall_back_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="keep=1 leaves nothing to fall back to; keep at least 2"):
        Checkpoints(tmp_path, keep=1)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(tmp_path, caplog, damage):
    directory = tmp_path / "checkpoints"
    save_steps(directory, 3, 6)
    DAMAGES[damage](directory / "6")
    damaged_files = files_of(directory / "6")
    with caplog.at_level(logging.WARNING):
        restored = restore(directory)
    assert (restored.step, restored.damaged_steps) == (3, (6,))
    assert_same(restored.state, make_state(3))
    [warning] = [text for text in caplog.messages if text.startswith("the checkpoint of step")]
    assert warning.startswith("the checkpoint of step 6 is damaged (")
    assert warning.endswith("); step 3 is restored instead")
    assert files_of(tmp_path / "checkpoints.damaged" / "6") == damaged_files
    assert [path.name for path in directory.iterdir()] == ["3"]


def test_a_missing_or_cut_file_is_found_before_anything_is_loaded(tmp_path, caplog, monkeypatch):
    directory = tmp_path / "checkpoints"
    save_steps(directory, 3, 6, 9, keep=3)
    truncate(biggest_file(directory / "9"))
    DAMAGES["no manifest"](directory / "6")
    loaded = []
    load = Checkpoints._load

    def noted(self, step, abstract_state, **options):
        loaded.append(step)
        return load(self, step, abstract_state, **options)

    monkeypatch.setattr(Checkpoints, "_load", noted)
    assert restore(directory, keep=3).damaged_steps == (9, 6)
    assert loaded == [3]
    assert re.search(r"has \d+ of \d+ bytes", caplog.text)
    assert "its file state/manifest.ocdbt is missing" in caplog.text


@pytest.mark.parametrize("sizes", [None, b"", b'{"6": {"state/'])
def test_without_the_list_of_files_a_checkpoint_is_as_good(tmp_path, sizes):
    directory = tmp_path / "checkpoints"
    save_steps(directory, 3, 6)
    listed = tmp_path / "checkpoints.sizes.json"
    listed.unlink() if sizes is None else listed.write_bytes(sizes)
    assert restore(directory).step == 6
    truncate(biggest_file(directory / "6"))
    assert restore(directory).step == 3


def test_the_list_of_an_earlier_checkpoint_is_not_taken_for_that_of_a_later_one(tmp_path):
    directory = tmp_path / "checkpoints"
    save_steps(directory, 3)
    shutil.rmtree(directory)
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(3, make_state(4))
        checkpoints._saving[1].result()  # complete on disk when the process is killed
        assert json.loads((tmp_path / "checkpoints.sizes.json").read_text()) == {}


def test_a_flipped_bit_is_detected_by_the_checksum_of_its_array(tmp_path, caplog):
    save_steps(tmp_path / "checkpoints", 3, 6)
    flip_a_bit(biggest_file(tmp_path / "checkpoints" / "6"))
    restore(tmp_path / "checkpoints")
    assert "checksums differ for ['params']" in caplog.text


def test_a_run_saves_again_over_steps_that_were_damaged(tmp_path):
    directory = tmp_path / "checkpoints"
    save_steps(directory, 3, 6)
    for _ in range(2):  # the second time, a step 6 has already been set aside
        flip_a_bit(biggest_file(directory / "6"))
        with Checkpoints(directory) as checkpoints:
            assert checkpoints.restore_latest(abstract(make_state(0))).step == 3
            assert checkpoints.steps == [3]
            checkpoints.save(6, make_state(6))
        restored = restore(directory)
        assert (restored.step, restored.damaged_steps) == (6, ())
        assert_same(restored.state, make_state(6))


def test_two_damaged_checkpoints_fall_back_to_the_third(tmp_path):
    directory = tmp_path / "checkpoints"
    save_steps(directory, 1, 2, 3, keep=3)
    flip_a_bit(biggest_file(directory / "3"))
    truncate(biggest_file(directory / "2"))
    restored = restore(directory, keep=3)
    assert (restored.step, restored.damaged_steps) == (1, (3, 2))
    assert_same(restored.state, make_state(1))


def test_all_damaged_is_an_error_that_moves_nothing(tmp_path):
    directory = tmp_path / "checkpoints"
    save_steps(directory, 3, 6)
    for step in ("3", "6"):
        flip_a_bit(biggest_file(directory / step))
    before = files_of(tmp_path)
    with pytest.raises(CheckpointError, match="none of the checkpoints in") as error:
        restore(directory)
    assert "step 6: checksums differ" in str(error.value)
    assert "step 3: checksums differ" in str(error.value)
    assert str(error.value).endswith("or start again with another --workdir")
    assert files_of(tmp_path) == before


def test_reading_only_passes_over_damage_and_changes_nothing(tmp_path):
    directory = tmp_path / "checkpoints"
    save_steps(directory, 3, 6)
    flip_a_bit(biggest_file(directory / "6"))
    shutil.copytree(directory / "3", directory / "9.orbax-checkpoint-tmp")
    before = files_of(tmp_path)
    assert restore(directory, read_only=True).step == 3
    assert files_of(tmp_path) == before


@pytest.mark.parametrize(
    "harm", [lambda path: path.unlink(), truncate, flip_a_bit], ids=["gone", "cut", "flipped"]
)
def test_no_harm_to_any_file_gives_a_wrong_state(tmp_path, harm):
    save_steps(tmp_path / "whole", 3, 6)
    names = [name for name in files_of(tmp_path / "whole") if name.startswith("6")]
    assert len(names) > 5
    outcomes = set()
    for number, name in enumerate(names):
        directory = tmp_path / str(number) / "checkpoints"
        shutil.copytree(tmp_path / "whole", directory)
        harm(directory / name)
        restored = restore(directory)
        assert_same(restored.state, make_state(restored.step))
        outcomes.add(restored.step)
    assert 3 in outcomes, "no harm was noticed: this test shows nothing"


def with_leaf(state, path: str, leaf):
    return {**state, "params": {**state["params"], path: leaf}}


def whole_f32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh_of(8), WHOLE))


def without_half(state):
    return {**state, "params": {"table": state["params"]["table"]}}


@pytest.mark.parametrize(
    "changed",
    [
        lambda state: with_leaf(state, "bias", whole_f32(3)),
        without_half,
        lambda state: with_leaf(state, "table", whole_f32(256, 41)),
        lambda state: with_leaf(state, "table", whole_f32(128, 40)),
        lambda state: with_leaf(state, "table", whole_f32(256 * 40)),
        lambda state: with_leaf(state, "half", whole_f32(256, 40)),
    ],
    ids=["not saved", "not wanted", "larger", "smaller", "other rank", "other type"],
)
def test_a_state_of_another_form_is_an_error(tmp_path, changed):
    save_steps(tmp_path, 5)
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(CheckpointError, match=r"none of the checkpoints in .*step 5: "),
    ):
        checkpoints.restore_latest(changed(abstract(make_state(0))))
    assert (tmp_path / "5").exists()


def test_a_killed_save_is_skipped_and_removed(tmp_path):
    save_steps(tmp_path, 3)
    unfinished = tmp_path / "6.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "3", unfinished)
    (unfinished / "commit_success.txt").unlink(missing_ok=True)
    restored = restore(tmp_path)
    assert (restored.step, restored.damaged_steps) == (3, ())
    assert not unfinished.exists()
    save_steps(tmp_path, 6)
    assert restore(tmp_path).step == 6


def test_a_directory_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot use .*file/checkpoints for checkpoints: "):
        Checkpoints(tmp_path / "file" / "checkpoints")


HINT = ". Free some space, then run the same command again to resume from the last one"

FILE_SIZE_LIMIT = f"""
    import resource, sys
    from pathlib import Path

    import jax, numpy as np
    from jaxcl.run.checkpoint import CheckpointError, Checkpoints
    from jaxcl.ops.mesh import make_mesh, replicated_sharding

    whole = replicated_sharding(make_mesh({{"data": -1}}))

    def table(seed):
        values = np.random.default_rng(seed).normal(size=(256, 512)).astype(np.float32)
        return {{"table": jax.device_put(values, whole)}}

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    form = {{"table": jax.ShapeDtypeStruct((256, 512), np.float32, sharding=whole)}}
    try:
        with Checkpoints(Path(sys.argv[1])) as checkpoints:
            checkpoints.save(1, table(1))
            checkpoints.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
            checkpoints.save(2, table(2))
    except CheckpointError as error:
        message = str(error)
    assert "cannot save step 2 to" in message, message
    assert "File too large" in message, message
    assert message.endswith({HINT!r}), message
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with Checkpoints(Path(sys.argv[1])) as checkpoints:
        restored = checkpoints.restore_latest(form)
        assert restored.step == 1 and restored.damaged_steps == (), restored
        np.testing.assert_array_equal(restored.state["table"], table(1)["table"])
        checkpoints.save(2, table(2))
        checkpoints.wait()
        restored = checkpoints.restore_latest(form)
        assert restored.step == 2, restored
        np.testing.assert_array_equal(restored.state["table"], table(2)["table"])
    print("all is well")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
def test_a_file_that_cannot_grow_is_an_error_and_harms_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FILE_SIZE_LIMIT), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "all is well" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_a_failed_save_is_reported_before_the_next_begins(tmp_path):
    class Failed:
        def result(self):
            raise OSError("no space left")

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints._saving = (1, Failed())
        with pytest.raises(CheckpointError, match=r"cannot save step 1 to .*: no space left"):
            checkpoints.save(2, make_state(2))
        assert checkpoints.steps == []


@pytest.mark.parametrize(
    ("reason", "advice"),
    [
        ("[Errno 13] Permission denied: 'x'", ". Make it writable, or choose another --workdir"),
        ("Read-only file system", ". Make it writable, or choose another --workdir"),
        ("Disk quota exceeded", HINT),
    ],
)
def test_a_failed_save_is_reported_with_a_remedy(tmp_path, reason, advice):
    class Failed:
        def result(self):
            raise OSError(reason)

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints._saving = (1, Failed())
        with pytest.raises(CheckpointError) as error:
            checkpoints.wait()
    assert str(error.value) == f"cannot save step 1 to {tmp_path}: {reason}{advice}"


def test_the_reason_of_a_failed_save_is_the_one_at_the_bottom(tmp_path):
    class Failed:
        def result(self):
            middle = RuntimeError("in the middle")
            middle.__cause__ = OSError("at the bottom")
            raise RuntimeError("on top") from middle

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints._saving = (1, Failed())
        with pytest.raises(CheckpointError, match=r"at the bottom$"):
            checkpoints.wait()


@contextlib.contextmanager
def small_disk(directory, *, megabytes: int):
    if not sys.platform.startswith("linux") or os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("mounting a small disk needs root on Linux")
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(directory)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def test_a_full_disk_is_an_error_and_harms_nothing(tmp_path):
    # Each state takes 1.9 MB: the first two fit into 5 MB, the third does not.
    states = {step: make_state(step, rows=8 * 1_000) for step in (1, 2, 3)}
    with small_disk(tmp_path / "disk", megabytes=5) as disk:
        with Checkpoints(disk / "checkpoints") as checkpoints:
            checkpoints.save(1, states[1])
            checkpoints.save(2, states[2])

        def save_a_third():
            with Checkpoints(disk / "checkpoints") as checkpoints:
                checkpoints.save(3, states[3])

        with pytest.raises(CheckpointError, match="cannot save step 3 to") as error:
            save_a_third()
        assert str(error.value).endswith(HINT)
        assert sorted(path.name for path in disk.glob("*/*")) == ["1", "2"]
        with Checkpoints(disk / "checkpoints") as checkpoints:
            restored = checkpoints.restore_latest(abstract(states[2]))
            assert (restored.step, restored.damaged_steps) == (2, ())
            assert_same(restored.state, states[2])
            shutil.rmtree(disk / "checkpoints" / "1")
        with Checkpoints(disk / "checkpoints") as checkpoints:
            checkpoints.save(3, states[3])
            checkpoints.wait()
            assert_same(checkpoints.restore_latest(abstract(states[3])).state, states[3])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool"])
def test_a_checksum_does_not_depend_on_sharding(dtype):
    values = np.random.default_rng(0).normal(size=(16, 24)) * 50
    array = jnp.asarray(values).astype(dtype)
    two_axes = make_mesh({"data": 2, "model": 4})
    shardings = [
        NamedSharding(mesh_of(count), spec)
        for count in (1, 4, 8)
        for spec in (WHOLE, ROWS, PartitionSpec(None, "data"))
    ] + [NamedSharding(two_axes, PartitionSpec("model", "data"))]
    sums = {int(checksum(jax.device_put(array, sharding))) for sharding in shardings}
    assert len(sums) == 1


DTYPES = ["float32", "bfloat16", "float16", "float8_e4m3fn", "int8", "uint8", "int16", "int32"]


def as_array(raw, dtype: str):
    return jnp.asarray(raw.view(jnp.dtype(dtype)))


def check_flips(make, raw) -> None:
    """Check that each of some single-bit flips of the bytes `raw` changes the checksum."""
    rng = np.random.default_rng(1)
    whole = int(checksum(make(raw)))
    assert int(checksum(make(raw.copy()))) == whole
    for place, bit in zip(rng.integers(raw.size, size=60), rng.integers(8, size=60), strict=True):
        changed = raw.copy()
        changed[place] ^= 1 << bit
        assert int(checksum(make(changed))) != whole, (place, bit)


@pytest.mark.parametrize("fill", ["random", "zeros"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_flipped_bit_changes_the_checksum(dtype, fill):
    raw = np.random.default_rng(0).integers(256, size=4 * 77, dtype=np.uint8)
    check_flips(lambda raw: as_array(raw, dtype), raw if fill == "random" else raw * 0)


@pytest.mark.parametrize("dtype", ["float64", "int64"])
def test_any_flipped_bit_of_a_wide_type_changes_the_checksum(dtype, x64):
    raw = np.random.default_rng(0).integers(256, size=8 * 33, dtype=np.uint8)
    check_flips(lambda raw: as_array(raw, dtype), raw)


def test_any_flipped_bit_of_a_key_changes_the_checksum():
    raw = np.random.default_rng(0).integers(256, size=8, dtype=np.uint8)
    check_flips(lambda raw: jax.random.wrap_key_data(jnp.asarray(raw.view(np.uint32))), raw)


def test_any_flipped_flag_changes_the_checksum():
    flags = np.random.default_rng(0).integers(0, 2, size=77).astype(bool)
    whole = int(checksum(jnp.asarray(flags)))
    for place in range(len(flags)):
        changed = flags.copy()
        changed[place] ^= True
        assert int(checksum(jnp.asarray(changed))) != whole, place


def test_a_scalar_has_a_checksum_of_its_value():
    sums = {int(checksum(jnp.int32(value))) for value in range(100)}
    assert len(sums) == 100


def test_swapping_two_unequal_words_changes_the_checksum():
    rng = np.random.default_rng(0)
    words = rng.normal(size=(9, 31)).astype(np.float32)
    whole = int(checksum(jnp.asarray(words)))
    for _ in range(60):
        (row, other_row), (column, other_column) = rng.integers(9, size=2), rng.integers(31, size=2)
        swapped = words.copy()
        swapped[row, column], swapped[other_row, other_column] = (
            words[other_row, other_column],
            words[row, column],
        )
        same = (row, column) == (other_row, other_column)
        assert (int(checksum(jnp.asarray(swapped))) == whole) == same


def test_a_transposed_or_shifted_array_has_another_checksum():
    words = jnp.asarray(np.random.default_rng(0).normal(size=(8, 8)), jnp.float32)
    others = [words.T, jnp.roll(words, 1), words[::-1], jnp.sort(words, axis=None).reshape(8, 8)]
    sums = {int(checksum(array)) for array in (words, *others)}
    assert len(sums) == 1 + len(others)


@pytest.mark.parametrize(
    ("outer", "inner"),
    [
        (ValueError("wrapped"), jax.errors.JaxRuntimeError("connection reset by peer")),
        (jax.errors.JaxRuntimeError("wrapper"), ValueError("connection reset by peer")),
        (ValueError("wrapped"), ValueError("connection reset by peer in Gloo AllGather")),
    ],
)
def test_a_save_that_fails_since_another_process_is_gone_says_that(monkeypatch, outer, inner):
    def fail():
        with _explained("cannot save step 3"):
            raise outer from inner

    with pytest.raises(CheckpointError, match="cannot save step 3: connection reset"):
        fail()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(PeerError, match="cannot save step 3: connection reset"):
        fail()


def test_full_devices_do_not_make_a_checkpoint_a_damaged_one(monkeypatch):
    full = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    def fail(outer, inner):
        with _explained("cannot read step 3"):
            raise outer from inner

    for outer, inner in ((full, None), (ValueError("wrapped"), full)):
        with pytest.raises(jax.errors.JaxRuntimeError) as raised:
            fail(outer, inner)
        assert raised.value is full
    # All of several processes reject this checkpoint together.
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises((CheckpointError, PeerError), match="out of memory"):
        fail(full, None)
