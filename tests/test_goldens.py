"""Golden results are equal if nothing changed, and every kind of change is reported."""

import collections
import copy
import functools
import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from tests.goldens import losses, pairs, runs
from tests.goldens.adapter import digests
from tests.goldens.comparison import differences

ROOT = Path(__file__).parents[1]
CASE = "losses/infonce/batch/labels/one"


def goldens(*arguments: object) -> tuple[int, str]:
    """The exit code and the output of the command."""
    finished = subprocess.run(
        [sys.executable, "-m", "tests.goldens", *map(str, arguments)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=600,
    )
    assert "Traceback" not in finished.stderr, finished.stderr
    return finished.returncode, finished.stdout


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A file with one loss."""
    path = tmp_path_factory.mktemp("goldens") / "recorded.json"
    code, output = goldens("record", "--to", path, "--only", f"^{CASE}$", "--jobs", 1)
    assert code == 0, output
    return path


def test_a_recorded_file_equals_itself(recorded):
    code, output = goldens("compare", recorded, recorded)
    assert code == 0
    assert output == "1 losses compared: 0 differ\n"


def test_a_changed_last_bit_is_a_difference_and_within_a_tolerance(recorded, tmp_path):
    changed = json.loads(recorded.read_text())
    arrays = changed["cases"][CASE]["arrays"]
    arrays["value"][3] = np.nextafter(arrays["value"][3], 2)
    (tmp_path / "changed.json").write_text(json.dumps(changed))
    code, output = goldens("compare", tmp_path / "changed.json", recorded)
    assert code == 1
    assert output.startswith(f"{CASE}: value by ")
    close = goldens("compare", tmp_path / "changed.json", recorded, "--tolerance", 1e-12)
    assert close[0] == 0


def test_a_case_that_one_file_lacks_is_a_difference(recorded, tmp_path):
    lacking = json.loads(recorded.read_text())
    lacking["cases"]["losses/other"] = lacking["cases"].pop(CASE)
    (tmp_path / "lacking.json").write_text(json.dumps(lacking))
    code, output = goldens("compare", recorded, tmp_path / "lacking.json")
    assert code == 1
    assert f"{CASE}: only in the first file" in output


def test_a_pattern_without_cases_is_an_error(tmp_path):
    code, output = goldens("record", "--to", tmp_path / "file.json", "--only", "no such case")
    assert code == 1
    assert "no case matches" in output


@pytest.mark.slow
@pytest.mark.parametrize("run", ["queue", "simclr", "image-text"])
def test_a_run_is_recorded_twice_with_the_same_bits(tmp_path, run):
    for name in ("one.json", "other.json"):
        code, output = goldens("record", "--to", tmp_path / name, "--only", f"^runs/{run}$")
        assert code == 0, output
    assert goldens("compare", tmp_path / "one.json", tmp_path / "other.json")[0] == 0


def recorded_here() -> dict:
    return {"arrays": {name: array.tolist() for name, array in losses.record(CASE).items()}}


def test_a_mask_that_is_off_by_one_row_is_seen(monkeypatch):
    right = recorded_here()
    case = losses.CASES[CASE]

    def shifted(queries, keys, *, masks, **options):
        masks = masks._replace(ids=jnp.roll(masks.ids, 1))
        return case.variant.loss_fn(queries, keys, masks=masks, **options)

    wrong = case._replace(variant=case.variant._replace(loss_fn=shifted))
    monkeypatch.setattr(losses, "CASES", {CASE: wrong})
    assert differences({CASE: recorded_here()}, {CASE: right}, tolerance=1e-6).keys() == {CASE}


def test_a_temperature_that_is_off_by_a_rounding_error_is_seen(monkeypatch):
    right = recorded_here()
    case = losses.CASES[CASE]

    def warmer(queries, keys, *, temperature, **options):
        return case.variant.loss_fn(queries, keys, temperature=temperature * (1 + 1e-9), **options)

    wrong = case._replace(variant=case.variant._replace(loss_fn=warmer))
    monkeypatch.setattr(losses, "CASES", {CASE: wrong})
    lines = functools.partial(differences, {CASE: recorded_here()}, {CASE: right})
    assert lines(tolerance=1e-12).keys() == {CASE}
    assert lines(tolerance=1e-6) == {}


STATE = {"towers": {"query": jnp.arange(6.0).reshape(2, 3), "key": jnp.zeros(4)}, "step": 3}


def run_of(state: dict, **metrics: float) -> dict:
    return {"metrics": metrics, "state": digests(state)}


def test_a_state_does_not_depend_on_names():
    renamed = {"step": 3, "a": [STATE["towers"]["key"], STATE["towers"]["query"]]}
    assert differences({"run": run_of(renamed)}, {"run": run_of(STATE)}) == {}


def test_one_changed_element_of_a_state_is_a_difference():
    changed = copy.deepcopy(STATE)
    changed["towers"]["query"] = changed["towers"]["query"].at[1, 2].add(1e-3)
    (line,) = differences({"run": run_of(changed)}, {"run": run_of(STATE)}).values()
    assert line.startswith("state float32[2, 3] by ")
    assert differences({"run": run_of(changed)}, {"run": run_of(STATE)}, tolerance=1e-2) == {}


def test_a_missing_or_additional_array_is_a_difference():
    more = STATE | {"bank": jnp.zeros(4)}
    assert differences({"run": run_of(more)}, {"run": run_of(STATE)}, tolerance=1.0)
    assert differences({"run": run_of(STATE)}, {"run": run_of(more)}, tolerance=1.0)


@pytest.mark.parametrize("value", [2.0, float("nan"), float("inf")])
def test_another_metric_is_a_difference(value):
    found, wanted = run_of(STATE, loss=value), run_of(STATE, loss=1.0)
    assert differences({"run": found}, {"run": wanted}, tolerance=1e-3) == {
        "run": f"loss by {1.0 if value == 2.0 else float('inf'):.1e}"
    }


def test_a_metric_that_stays_nan_is_not_a_difference():
    results = {"run": run_of(STATE, loss=float("nan"))}
    assert differences(results, json.loads(json.dumps(results))) == {}


def test_a_case_that_failed_is_a_difference():
    failed = {"run": {"error": "ValueError: no"}}
    assert differences(failed, failed).keys() == {"run"}


def test_the_file_of_pairs_is_the_generators():
    assert list(pairs.read_pairs()) == pairs.make_pairs()


def test_pairs_repeat_texts_and_rows_of_a_group():
    rows = [pair for pair in pairs.read_pairs() if pair.split == "train"]
    for column in ("query", "key"):
        counts = collections.Counter(getattr(row, column) for row in rows)
        assert sum(count > 1 for count in counts.values()) > 20
    assert len(set(rows)) < len(rows)
    assert len({row.group for row in rows}) == len(pairs.TOPICS)


def test_no_two_runs_have_the_same_settings():
    assert len(set(runs.CASES.values())) == len(runs.CASES)
