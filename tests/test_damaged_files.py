"""Every file that a run reads, damaged at random: restored, refused by name, or ignored.

A run of four steps is stopped after the second. One of its files is damaged, and the run is
resumed. Either it ends with the same bits, or one line names the file. The result is never another
one, and no other exception escapes.
"""

import contextlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxcl.configs import tfds_pairs
from jaxcl.host.command import UserError
from jaxcl.run.checkpoint import Checkpoints
from jaxcl.train import train
from tests.helpers import bits, some_slow, training_of, unclocked
from tests.prepared_data import NUM_TRAIN, prepare_pairs

pytestmark = [
    # If a load fails, Orbax leaves unfinished coroutines.
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("nothing_left_behind", "unchecked_annotations"),
]

STEPS, STOP = 4, 2
ROUNDS = 6
"""Rounds of damage in the slow test; an environment variable can set another number."""


def config_in(place: Path) -> ConfigDict:
    config = tfds_pairs.get_config()
    config.update_from_flattened_dict(
        {
            "data.name": str(place / "data" / "tiny_pairs" / "1.0.0"),
            "data.splits.train": "train",
            "data.splits.validation": "dev",
            "data.vocabulary_size": 100,
            "data.negatives": str(place / "negatives.npz"),
            "data.guides": str(place / "guides.npz"),
            "evaluation.methods": ("dense",),
            "global_batch_size": 8,
            "model.dim": 8,
            "negatives.guide": "data",
            "loss.relative_margin": 0.05,
            "run.data_dir": str(place / "data"),
            "run.checkpoint_every": 1,
            "run.log_every": 1,
            "steps": STEPS,
        }
    )
    return config


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A folder with a stopped run, and the final state and metrics of an uninterrupted one."""
    place = tmp_path_factory.mktemp("run") / "whole"
    place.mkdir()
    prepare_pairs(place / "data")
    rng = np.random.default_rng(0)
    rows = rng.integers(0, NUM_TRAIN, (NUM_TRAIN, 2))
    np.savez(place / "negatives.npz", rows=rows)
    sides = {side: rng.normal(size=(NUM_TRAIN, 4)).astype(np.float32) for side in ("query", "key")}
    np.savez(place / "guides.npz", **sides)
    save = Checkpoints.save

    def save_and_stop(self, step, *arguments):
        save(self, step, *arguments)
        if step == STOP:
            self.wait()
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_and_stop)
        with contextlib.suppress(Stop):
            train(config_in(place), place / "run")
    shutil.copytree(place / "run", place / "stopped")
    train(config_in(place), place / "run")
    outcome = final_bits(config_in(place), place / "run"), unclocked(place / "run")
    shutil.rmtree(place / "run")
    (place / "stopped").rename(place / "run")
    shutil.copytree(place, place.with_name("copy"))
    return place, outcome


def final_bits(config: ConfigDict, workdir: Path) -> list[bytes]:
    abstract = training_of(config).abstract_state(NUM_TRAIN, np.zeros(NUM_TRAIN, np.int32))
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        restored = checkpoints.restore_latest(abstract)
    assert restored.step == STEPS
    return [bits(leaf) for leaf in jax.tree.leaves(restored.state)]


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def cut(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def empty(path: Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def remove(path: Path, rng: random.Random) -> None:
    path.unlink()


def swap(path: Path, rng: random.Random) -> None:
    """Replace the content by that of another file of the run."""
    others = [one for one in sorted(path.parent.iterdir()) if one.is_file() and one != path]
    if others:
        shutil.copyfile(rng.choice(others), path)


def retype(path: Path, rng: random.Random) -> None:
    """Replace the content, or a value in it, by JSON of another type."""
    new = rng.choice([[], {}, 5, "text", None, -1.5, [[]], {"a": {}}])
    try:
        content = json.loads(path.read_text())
    except ValueError:
        content = None
    if isinstance(content, dict) and content and rng.random() < 0.8:
        content[rng.choice(sorted(content))] = new
        new = content
    path.write_text(json.dumps(new))


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "flipped": flip,
    "cut": cut,
    "empty": empty,
    "removed": remove,
    "swapped": swap,
    "retyped": retype,
}


def files_of(place: Path) -> dict[str, Path]:
    """The files that a resumed run reads, by names that are equal in all copies."""
    run = place / "run"
    files = [run / name for name in ("config.json", "data.json", "run.json", "metrics.jsonl")]
    files += [run / "tokenizer.json", run / "checkpoints.sizes.json"]
    files += [path for path in (run / "checkpoints" / str(STOP)).rglob("*") if path.is_file()]
    files += [path for path in (place / "data").rglob("*") if path.is_file()]
    files += [place / "negatives.npz", place / "guides.npz"]
    return {str(path.relative_to(place)): path for path in sorted(files)}


def outcome_of(place: Path, wanted: tuple, name: str) -> str:
    """The outcome of a resumed run; fails for a silent change or a traceback."""
    config = config_in(place)
    try:
        train(config, place / "run")
    except (ValueError, OSError, UserError) as error:
        folders = {"checkpoints", "tiny_pairs"} & set(Path(name).parts)
        known = [Path(name).name, *folders]
        if not any(part in str(error) for part in known):
            raise AssertionError(f"{name} is not named") from error
        return "refused"
    states, records = wanted
    assert final_bits(config, place / "run") == states, f"{name}: another final state, silently"
    if name.endswith("metrics.jsonl"):  # a damaged record is lost
        assert [one for one in unclocked(place / "run") if one["step"] > STOP] == [
            one for one in records if one["step"] > STOP
        ]
    else:
        assert unclocked(place / "run") == records, f"{name}: other metrics, silently"
    return "unchanged"


def damaged(stopped, names: list[str], kinds: list[str], seed: int) -> dict:
    """The outcomes of damaging these files, each in all of these ways."""
    place, wanted = stopped
    outcomes, failures = {}, []
    for name in names:
        for kind in kinds:
            restore(place)
            rng = random.Random(f"{seed} {name} {kind}")
            DAMAGES[kind](files_of(place)[name], rng)
            try:
                outcomes[name, kind] = outcome_of(place, wanted, name)
            except Exception as error:  # any other error is a finding
                failures.append(f"{name}, {kind}, seed {seed}: {type(error).__name__}: {error}")
    restore(place)
    assert not failures, "\n".join(failures)
    return outcomes


def restore(place: Path) -> None:
    """Undo all damage; the paths are part of the config, so they stay."""
    shutil.rmtree(place)
    shutil.copytree(place.with_name("copy"), place)


def test_an_undamaged_run_is_unchanged(stopped):
    restore(stopped[0])
    assert outcome_of(*stopped, "nothing") == "unchanged"


@pytest.mark.parametrize("kind", some_slow(DAMAGES, ("flipped", "removed", "swapped")))
def test_a_damaged_small_file_changes_nothing_silently(stopped, kind):
    names = ["run/metrics.jsonl", "run/tokenizer.json", f"run/checkpoints/{STOP}/record/data.json"]
    assert damaged(stopped, names, [kind], seed=0).keys()


@pytest.mark.slow
@pytest.mark.parametrize("kind", DAMAGES)
def test_no_damaged_file_of_a_run_changes_anything_silently(stopped, kind):
    outcomes: dict = {}
    for seed in range(int(os.environ.get("JAXCL_ROUNDS_OF_DAMAGE", ROUNDS))):
        outcomes |= damaged(stopped, list(files_of(stopped[0])), [kind], seed)
    assert set(outcomes.values()) == {"refused", "unchanged"}  # otherwise, nothing was damaged
