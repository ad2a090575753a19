"""The fault suite: it detects losses, and a few faults lose nothing."""

import json
import os
import shutil
import sys

import numpy as np
import pytest

from jaxcl.run.metric_writer import MetricWriter
from tests.fault_suite import STEPS, TURNS, Wrong, check_epochs, compare, run_suite

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")


@pytest.fixture
def runs(tmp_path):
    """Two equal runs, each with a workdir and a log."""
    for name in ("ours", "theirs"):
        workdir = tmp_path / name
        workdir.mkdir()
        writer = MetricWriter(workdir, step=0)
        for step in range(1, STEPS + 1):
            writer.write(step, {"loss": 1 / step})
        writer.close()
        (workdir / "results.json").write_text("{}")
        (workdir / "data.json").write_text('{"fingerprints": {"train": "a"}}')
        np.savez(workdir / "ranks.npz", dense=np.arange(4))
        lines = [{"step": step, "rows": rows(step)} for step in range(1, STEPS + 1)]
        lines += [{"step": 80, "saved": "a"}, {"step": 80, "restored": "a"}]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 8')
    return tmp_path


def rows(step):
    return [(4 * step + number) % 16 for number in range(4)]


def held(runs):
    return compare(runs / "ours", runs / "ours.jsonl", runs / "theirs", exact=True)


def test_equal_runs_are_equal(runs):
    found = held(runs)
    assert found == {"runs": 1, "rows held": 4 * STEPS, "states held": 2, "records held": STEPS}
    assert check_epochs(runs / "theirs") == STEPS // 4


def replaced(old, new):
    def harm(path):
        path.write_text(path.read_text().replace(old, new, 1))

    return harm


@pytest.mark.parametrize(
    ("file", "harm", "message"),
    [
        ("ours.jsonl", replaced('"rows": [8, ', '"rows": [9, '), "has other rows"),
        ("ours.jsonl", replaced('"saved": "a"', '"saved": "b"'), "step 80 is another one"),
        ("ours.jsonl", replaced('"restored": "a"', '"restored": "b"'), "was never saved"),
        ("theirs.jsonl", replaced('"saved": "a"', '"saved": "b"'), "step 80 is another one"),
        ("ours/metrics.jsonl", replaced('"loss": 0.5', '"loss": 0.51'), "metrics of step 2"),
        ("ours/metrics.jsonl", replaced('"step": 2,', '"step": 3,'), "metrics are missing"),
        ("ours/results.json", replaced("{}", "{ }"), "results.json differs"),
        ("ours/data.json", replaced('"a"', '"b"'), "fingerprints of data differ"),
        ("ours/ranks.npz", lambda path: np.savez(path, dense=np.ones(4)), "ranks differ"),
    ],
)
def test_each_kind_of_loss_is_detected(runs, file, harm, message):
    harm(runs / file)
    with pytest.raises(Wrong, match=message):
        held(runs)


def test_a_row_repeated_within_an_epoch_is_detected(runs):
    replaced('"rows": [8, ', '"rows": [9, ')(runs / "theirs.jsonl")
    with pytest.raises(Wrong, match="lost or repeated"):
        check_epochs(runs / "theirs")


def test_a_run_of_less_than_an_epoch_repeats_no_row(tmp_path):
    steps = {step: [8 * step, 8 * step + 2] for step in range(1, STEPS + 1)}

    def log():
        lines = [json.dumps({"step": step, "rows": of_step}) for step, of_step in steps.items()]
        (tmp_path / "run.jsonl").write_text("\n".join(lines))

    log()
    assert check_epochs(tmp_path / "run") == 0
    steps[2][0] = steps[1][0]
    log()
    with pytest.raises(Wrong, match="lost or repeated"):
        check_epochs(tmp_path / "run")


@pytest.mark.slow
def test_a_few_faults_lose_nothing():
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("a full disk is a small one that is mounted, which needs root")
    found = run_suite(len(TURNS), workers=2, seed=1)
    assert found["failures"] == []
    assert found["faults"] >= len(TURNS)
