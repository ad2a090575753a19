"""Evaluation sets, the best checkpoint and early stopping in training, killed and resumed."""

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import jaxcl
from jaxcl.evaluation import in_training
from jaxcl.run.checkpoint import Checkpoints
from jaxcl.run.metric_writer import read_metrics
from jaxcl.train import train
from tests.helpers import unclocked
from tests.small_models import small_config

METRIC = "dev/agreement"
STEPS = 12
TEXTS = ["query 3", "key 4", "key 5"]
SCRIPT = {2: 0.1, 4: 0.5, 6: 0.2, 8: 0.3, 10: 0.4, 12: 0.1}
"""Step -> value, for runs with a known best step."""

pytestmark = [
    # After a failed load, Orbax leaves unfinished work.
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("nothing_left_behind"),
]


class _Interrupted(Exception):
    pass


class TwoTexts:
    """An `EvaluationSet`: the similarity of two texts, one of each side."""

    kind = "two texts"
    metrics = ("agreement",)
    inputs = ("query", "key")

    def __init__(self, path: Path):
        self.texts = path.read_text().split(",")
        self.fingerprint = f"of {path.read_text()}"
        self.description = f"two texts of {path.name}"

    def evaluate(self, encode):
        query, key = encode("query", self.texts[:1]), encode("key", self.texts[1:])
        return {"agreement": float((query @ key.T)[0, 0]), "texts": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("selection")


def config_maker(data: Path, dev: Path):
    """A function that returns configs of 12 steps, evaluated every second step."""
    dev.write_text("query 3,key 3")

    def make(**changes):
        config = small_config(data)
        config.steps = STEPS
        config.optimizer.schedule = "warmup_constant"
        config.run.evaluate_every, config.run.checkpoint_every = 2, 5
        config.run.log_every = 1
        config.evaluation.methods = ("dense",)
        config.evaluation.sets = {"dev": str(dev)}
        config.evaluation.best_metric = METRIC
        config.update_from_flattened_dict(changes)
        return config

    return make


def follow_script(monkeypatch) -> list[int]:
    """Replace the values of the set by scripted ones; return the steps of the evaluations."""
    asked = []

    def values(self, step, encoder):
        asked.append(step)
        return {"dev": {"agreement": SCRIPT[step], "texts": 2}}

    monkeypatch.setattr(in_training.TrainingSets, "_values", values)
    return asked


@pytest.fixture
def config(data, tmp_path, monkeypatch):
    monkeypatch.setattr(in_training, "open_set", TwoTexts)
    return config_maker(data, tmp_path / "dev.txt")


@pytest.fixture
def script(monkeypatch):
    return follow_script(monkeypatch)


@pytest.fixture(scope="module")
def whole(data):
    """The workdir of an uninterrupted run with the scripted values."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_training, "open_set", TwoTexts)
        follow_script(patch)
        train(config_maker(data, data / "dev.txt")(), data / "whole")
    return data / "whole"


def saved_steps(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def die_after_saving(monkeypatch, step: int) -> None:
    save = Checkpoints.save

    def save_and_die(self, saved_step, state, record):
        save(self, saved_step, state, record)
        if saved_step == step:
            self.wait()
            raise _Interrupted

    monkeypatch.setattr(Checkpoints, "save", save_and_die)


def die_before_saving(monkeypatch, step: int) -> None:
    save = Checkpoints.save

    def die(self, saved_step, state, record):
        if saved_step == step:
            self.wait()
            raise _Interrupted
        save(self, saved_step, state, record)

    monkeypatch.setattr(Checkpoints, "save", die)


def interrupted(monkeypatch, config, workdir: Path, die, step: int) -> None:
    with monkeypatch.context() as patch, contextlib.suppress(_Interrupted):
        die(patch, step)
        train(config, workdir)
        pytest.fail(f"step {step} was not saved")


def vectors(path: Path) -> bytes:
    return jaxcl.load(path).encode(TEXTS, side="key").tobytes()


def assert_same_run(workdir: Path, other: Path) -> None:
    assert unclocked(workdir) == unclocked(other)
    assert (workdir / "results.json").read_text() == (other / "results.json").read_text()
    assert saved_steps(workdir) == saved_steps(other)
    for step in saved_steps(workdir):
        name = Path("checkpoints") / str(step)
        assert vectors(workdir / name) == vectors(other / name), step


@pytest.mark.smoke
def test_a_run_scores_its_sets_while_it_trains_and_at_the_end(config, tmp_path, capsys):
    workdir = tmp_path / "run"
    results = train(config(), workdir)
    scores = {one["step"]: one[METRIC] for one in read_metrics(workdir) if METRIC in one}
    assert list(scores) == [2, 4, 6, 8, 10, 12]
    assert len(set(scores.values())) == 6
    assert all(one["dev/texts"] == 2 for one in read_metrics(workdir) if METRIC in one)
    assert results["sets"] == {
        "dev": {
            "kind": "two texts",
            "fingerprint": "of query 3,key 3",
            "metrics": {"agreement": scores[12], "texts": 2},
        }
    }
    best = max(scores, key=scores.get)
    assert results["best"] == {"metric": METRIC, "step": best, "value": scores[best]}
    assert json.loads((workdir / "results.json").read_text()) == results
    assert f"{scores[12]:.4f}" in capsys.readouterr().out
    model = jaxcl.load(workdir / "checkpoints" / "best")
    query, key = (model.encode(f"{side} 3", side=side) for side in ("query", "key"))
    np.testing.assert_allclose(query @ key, scores[best], rtol=1e-5)


def test_the_best_step_is_saved_and_kept(config, script, whole, capsys):
    results = json.loads((whole / "results.json").read_text())
    assert results["best"] == {"metric": METRIC, "step": 4, "value": 0.5}
    assert saved_steps(whole) == [4, 10, 12]
    best = whole / "checkpoints" / "best"
    assert vectors(best) == vectors(best.with_name("4")) != vectors(best.with_name("12"))


def test_a_finished_run_is_evaluated_again_and_names_its_best_step(
    config, script, whole, tmp_path, capsys
):
    workdir = shutil.copytree(whole, tmp_path / "run")
    train(config(), workdir)
    assert script == [STEPS]
    assert_same_run(workdir, whole)
    best = workdir / "checkpoints" / "best"
    assert f"the best step is 4, with {METRIC} = 0.5000: {best}" in capsys.readouterr().err


@pytest.mark.slow
def test_without_a_metric_nothing_else_is_saved(config, script, tmp_path):
    results = train(config(**{"evaluation.best_metric": None}), tmp_path / "run")
    assert "best" not in results
    assert saved_steps(tmp_path / "run") == [10, 12]
    assert results["sets"]["dev"]["metrics"]["agreement"] == SCRIPT[12]


@pytest.mark.slow
def test_the_validation_split_may_select_the_best(config, tmp_path):
    metric = "validation/dense/mrr@10"
    results = train(config(**{"evaluation.best_metric": metric}), tmp_path / "run")
    values = {one["step"]: one[metric] for one in read_metrics(tmp_path / "run") if metric in one}
    assert results["best"]["value"] == max(values.values())
    assert results["best"]["step"] == max(values, key=values.get)  # the first of equal values


@pytest.mark.parametrize(
    ("die", "step"),
    [
        (die_before_saving, 4),
        pytest.param(die_after_saving, 4, marks=pytest.mark.slow),
        pytest.param(die_after_saving, 5, marks=pytest.mark.slow),
        pytest.param(die_before_saving, 10, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_resumes_to_the_same_best_checkpoint(
    config, script, whole, tmp_path, monkeypatch, die, step
):
    interrupted(monkeypatch, config(), tmp_path / "run", die, step)
    train(config(), tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


def test_a_run_stops_early_with_a_message(config, script, tmp_path, capsys):
    workdir, patient = tmp_path / "run", {"evaluation.patience": 2}
    results = train(config(**patient), workdir)
    assert results["steps"] == 8
    assert results["stopped_early"] == {"step": 8, "evaluations": 2}
    assert results["best"] == {"metric": METRIC, "step": 4, "value": 0.5}
    assert set(results["metrics"]) == {"validation"}  # the final evaluation
    assert saved_steps(workdir) == [4, 5, 8]
    said = f"stopped early after 8 of 12 steps: {METRIC} has not increased by more than 0 in 2 eva"
    assert said in capsys.readouterr().err
    metrics = (workdir / "metrics.jsonl").read_text()
    script.clear()
    assert train(config(**patient), workdir) == results
    assert "has stopped early after 8 steps, and is evaluated" in capsys.readouterr().err
    assert script == [8]
    assert (workdir / "metrics.jsonl").read_text() == metrics


@pytest.mark.slow
def test_a_run_that_stopped_early_continues_with_more_patience(config, script, whole, tmp_path):
    workdir = tmp_path / "run"
    for patience, steps in {2: 8, 3: 10, None: 12}.items():
        results = train(config(**{"evaluation.patience": patience}), workdir)
        assert results["steps"] == steps
        assert results.get("stopped_early", {}).get("step", 12) == steps
    assert_same_run(workdir, whole)


@pytest.mark.slow
def test_less_patience_stops_a_resumed_run_where_it_is(
    config, script, whole, tmp_path, monkeypatch, capsys
):
    workdir = tmp_path / "run"
    interrupted(monkeypatch, config(), workdir, die_after_saving, 10)
    results = train(config(**{"evaluation.patience": 2}), workdir)
    assert results["stopped_early"] == {"step": 10, "evaluations": 3}
    assert script[-1] == 10
    assert "has stopped early after 10 steps" in capsys.readouterr().err
    train(config(), workdir)  # without patience, it continues training
    assert_same_run(workdir, whole)


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, 6, 8])
def test_a_killed_run_stops_early_at_the_same_step(config, script, tmp_path, monkeypatch, step):
    patient = config(**{"evaluation.patience": 2, "run.checkpoint_every": 2})
    train(patient, tmp_path / "whole")
    for number, die in enumerate([die_after_saving, die_before_saving]):
        workdir = tmp_path / str(number)
        interrupted(monkeypatch, patient, workdir, die, step)
        assert train(patient, workdir)["stopped_early"]["step"] == 8
        assert_same_run(workdir, tmp_path / "whole")


@pytest.mark.slow
def test_a_small_increase_does_not_count_as_an_improvement(config, script, tmp_path, monkeypatch):
    for step, value in {4: 0.15, 6: 0.16}.items():
        monkeypatch.setitem(SCRIPT, step, value)
    patient = {"evaluation.patience": 2, "evaluation.min_delta": 0.1}
    results = train(config(**patient), tmp_path / "run")
    assert results["stopped_early"]["step"] == 6
    assert results["best"]["step"] == 6


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_falls_back_with_its_own_best(
    config, script, whole, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setitem(SCRIPT, 8, 0.9)
        interrupted(patch, config(), tmp_path / "run", die_after_saving, 8)
    assert saved_steps(tmp_path / "run") == [4, 5, 8]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "8" / "checksums")
    train(config(), tmp_path / "run")  # step 8 is no longer the best, and 4 still exists
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.slow
def test_a_missing_best_checkpoint_is_reported_and_selected_again(
    config, script, tmp_path, monkeypatch, capsys
):
    workdir = tmp_path / "run"
    interrupted(monkeypatch, config(), workdir, die_after_saving, 5)
    shutil.rmtree(workdir / "checkpoints" / "4")
    assert train(config(), workdir)["best"] == {"metric": METRIC, "step": 10, "value": 0.4}
    said = f"the best checkpoint, of step 4 with {METRIC} = 0.5000, is missing; the next evaluation"
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_another_metric_restarts_the_selection_with_a_message(
    config, script, tmp_path, monkeypatch, capsys
):
    workdir = tmp_path / "run"
    interrupted(monkeypatch, config(), workdir, die_after_saving, 5)
    metric = "validation/dense/recall@10"
    results = train(config(**{"evaluation.best_metric": metric}), workdir)
    assert results["best"]["metric"] == metric
    assert results["best"]["step"] > 5
    assert f"evaluation.best_metric was {METRIC!r} and is {metric!r}" in capsys.readouterr().err


@pytest.mark.parametrize("metric", ["dev/texts", "dev/agrement", "validation/dense/loss"])
def test_an_unknown_metric_is_an_error_before_training(config, tmp_path, metric):
    message = (
        f"evaluation.best_metric='{metric}' is unknown.*; the metrics of this run are "
        f"validation/dense/mrr@10, validation/dense/recall@10, {METRIC}"
    )
    with pytest.raises(ValueError, match=message):
        train(config(**{"evaluation.best_metric": metric}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_without_a_validation_split_its_metrics_are_unknown(config, tmp_path):
    changed = config(**{"evaluation.best_metric": "validation/dense/mrr@10"})
    changed.data.splits = {"train": "train"}
    with pytest.raises(ValueError, match=rf"is unknown.*the metrics of this run are {METRIC}$"):
        train(changed, tmp_path / "run")
    changed.evaluation.sets = {}
    with pytest.raises(ValueError, match=r"are none: add a validation split or evaluation\.sets$"):
        train(changed, tmp_path / "run")


def test_a_set_that_cannot_be_opened_is_an_error_before_training(config, tmp_path):
    changed = config(**{"evaluation.sets": {"dev": str(tmp_path / "absent.csv")}})
    with pytest.raises(ValueError, match=r"evaluation\.sets\.dev=.*absent\.csv: .*No such file"):
        train(changed, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_set_that_changed_is_refused_and_a_further_set_is_not(
    config, tmp_path, monkeypatch, capsys
):
    workdir, dev = tmp_path / "run", tmp_path / "dev.txt"
    interrupted(monkeypatch, config(), workdir, die_after_saving, 5)
    dev.write_text("query 4,key 4")
    with pytest.raises(ValueError, match=r"the evaluation set dev has changed since step 5 of"):
        train(config(), workdir)
    assert saved_steps(workdir)[-1] == 5
    other = {"evaluation.sets": {"other": str(dev)}, "evaluation.best_metric": None}
    assert set(train(config(**other), workdir)["sets"]) == {"other"}


def test_a_set_that_fails_is_named(config, tmp_path, monkeypatch):
    def fail(self, encode):
        raise ValueError("an embedding is not finite")

    monkeypatch.setattr(TwoTexts, "evaluate", fail)
    message = "the evaluation set dev cannot be evaluated: an embedding is not finite"
    with pytest.raises(ValueError, match=message):
        train(config(), tmp_path / "run")


def test_a_metric_without_a_value_is_never_the_best(config, script, tmp_path, monkeypatch):
    for step in SCRIPT:
        monkeypatch.setitem(SCRIPT, step, float("nan"))
    results = train(config(**{"evaluation.patience": 3}), tmp_path / "run")
    assert results["steps"] == 6
    assert results["best"] == {"metric": METRIC, "step": None, "value": None}
    assert results["sets"]["dev"]["metrics"] == {"agreement": None, "texts": 2}
    assert not any(METRIC in record for record in read_metrics(tmp_path / "run"))
    with pytest.raises(ValueError, match="no best checkpoint is known"):
        jaxcl.load(tmp_path / "run" / "checkpoints" / "best")
