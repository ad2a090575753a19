"""Reports during training: one step late, and never of a diverged state."""

import time

import jax
import jax.numpy as jnp
import pytest
from jaxcl.configs.code_search import get_config

from jaxcl.run.metric_writer import MetricWriter, read_metrics
from jaxcl.run.reports import DivergenceError, Reports
from jaxcl.step.train_state import TrainState
from jaxcl.step.train_step import StepMetrics
from tests.helpers import training_of


@pytest.fixture
def notes():
    return []


@pytest.fixture
def reports(tmp_path, notes):
    config = get_config("smoke")
    config.model.dim = 4
    config.data.vocabulary_size = 10
    config.run.log_every = 2
    training = training_of(config)
    writer = MetricWriter(tmp_path, step=0)
    yield Reports(training, writer, lambda done, note: notes.append(note))
    writer.close()


def test_a_step_is_read_when_the_next_has_begun(reports, notes):
    reports.add(1, metrics(loss=3.0))
    assert notes == []
    reports.add(2, metrics(loss=2.0))
    assert notes == ["loss 3.000"]
    reports.flush()
    assert notes[1].startswith("loss 2.000 · ")


def test_steps_are_written_at_the_given_interval(reports, tmp_path):
    for step in range(1, 6):
        reports.add(step, metrics(loss=float(step)))
    assert [(record["step"], record["loss"]) for record in read_metrics(tmp_path)] == [
        (2, 2.0),
        (4, 4.0),
    ]


def test_the_rate_written_is_that_of_the_update(reports, tmp_path):
    run = reports._settings.run._replace(log_every=1)
    reports._settings = reports._settings._replace(run=run)
    for step in (1, 2, 3, 4):
        reports.add(step, metrics())
    rates = [record["learning_rate"] for record in read_metrics(tmp_path)]
    peak = reports._settings.optimizer.learning_rate
    assert rates == pytest.approx([0.0, peak / 2, peak])  # two steps of warmup


def test_where_a_step_s_time_went_is_written(reports, tmp_path):
    for step in range(1, 4):
        reports.add(step, metrics(), input_seconds=0.25)
    (record,) = read_metrics(tmp_path)
    parts = {part: record[f"time/step_{part}_seconds"] for part in ("input", "device", "host")}
    assert parts["input"] == 0.75 / 2  # the second is read once the third is done
    assert parts["device"] >= 0
    seconds = reports._settings.global_batch_size / record["time/pairs_per_second"]
    assert sum(parts.values()) == pytest.approx(seconds)


def test_no_part_of_a_step_s_time_is_below_zero(reports, tmp_path):
    run = reports._settings.run._replace(log_every=1)
    reports._settings = reports._settings._replace(run=run)
    for step in range(1, 6):
        begun = time.perf_counter()
        time.sleep(0.01)
        reports.add(step, metrics(), input_seconds=time.perf_counter() - begun)
    reports.flush()
    for record in read_metrics(tmp_path):
        for part in ("input", "device", "host"):
            assert record[f"time/step_{part}_seconds"] >= 0


def test_tokens_and_the_share_of_the_peak_are_those_of_the_seconds(reports, tmp_path):
    assert reports._peak_flops is None  # the peak of a CPU is unknown
    reports._peak_flops, reports._model_flops = 1e12, 5e9
    size, longest = reports._settings.global_batch_size, reports._settings.data.max_tokens
    full = size * (longest.query + longest.key)
    for step in range(1, 4):
        reports.add(step, metrics(tokens=1_000, padded=full // 4))
    (record,) = read_metrics(tmp_path)
    assert record["padding"] == pytest.approx(1 - 1_000 / (full // 4))
    steps_per_second = record["time/pairs_per_second"] / size
    assert record["time/tokens_per_second"] == pytest.approx(1_000 * steps_per_second)
    share = 5e9 / 4 * steps_per_second / 1e12  # a quarter of the longest texts' tokens
    assert record["time/model_flop_utilization"] == pytest.approx(share)


def test_the_last_step_is_written_whatever_its_number(reports, tmp_path):
    reports._settings = reports._settings._replace(steps=3)
    for step in (1, 2, 3):
        reports.add(step, metrics())
    reports.flush()
    assert [record["step"] for record in read_metrics(tmp_path)] == [2, 3]


def test_the_speed_is_that_since_the_report_before(reports, tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr("jaxcl.run.reports.time.perf_counter", lambda: now)
    reports._restart_clock(0.0)
    for step, seconds in enumerate([1.0, 1.0, 0.25, 0.25, 0.0], start=1):
        reports.add(step, metrics())  # reads the previous step
        now += seconds
    batch = reports._settings.global_batch_size
    speeds = [record["time/pairs_per_second"] for record in read_metrics(tmp_path)]
    assert speeds == [2 * batch / 2.0, 2 * batch / 0.5]


def test_work_while_paused_is_excluded_from_the_throughput(reports, tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr("jaxcl.run.reports.time.perf_counter", lambda: now)
    reports._restart_clock(0.0)
    for step in (1, 2):
        reports.add(step, metrics())
        now += 1.0
        if step == 1:
            with reports.paused():
                now += 100.0
    reports.flush()
    batch = reports._settings.global_batch_size
    assert [record["time/pairs_per_second"] for record in read_metrics(tmp_path)] == [batch]


def test_the_time_of_writing_is_part_of_the_throughput(reports, tmp_path, monkeypatch):
    now, write = 0.0, reports._writer.write

    def slow_write(*record):
        nonlocal now
        now += 1.0
        write(*record)

    monkeypatch.setattr("jaxcl.run.reports.time.perf_counter", lambda: now)
    monkeypatch.setattr(reports._writer, "write", slow_write)
    reports._restart_clock(0.0)
    for step in range(1, 6):
        now += 1.0
        reports.add(step, metrics())
    batch = reports._settings.global_batch_size
    speeds = [record["time/pairs_per_second"] for record in read_metrics(tmp_path)]
    assert speeds == [2 * batch / 3.0, 2 * batch / 3.0]  # the first steps had none to read


@pytest.mark.parametrize("field", ["loss", "gradient_norm"])
def test_a_nonfinite_loss_stops_the_run_with_step_cause_and_advice(reports, field):
    reports.add(7, metrics(**{field: float("nan")}, leaf=float("inf")))
    with pytest.raises(DivergenceError) as error:
        reports.flush()
    for part in ("step 7 diverged", "['table']", "learning rate", "Earlier checkpoints are kept"):
        assert part in str(error.value)


def test_a_state_that_is_not_finite_is_never_passed_for_saving(reports):
    good = state(table=[0.0, 1.0])
    reports.check(3, good)
    with pytest.raises(DivergenceError, match=r"step 3 diverged: after its update \['table'\]"):
        reports.check(3, good._replace(params={"table": jnp.array([0.0, jnp.inf]), "bias": 0.0}))


def metrics(*, loss=1.0, gradient_norm=1.0, leaf=1.0, tokens=0, padded=0):
    fields = (loss, gradient_norm, 0.05)
    leaves = {"table": jnp.float32(leaf), "bias": jnp.float32(1.0)}
    return StepMetrics(*map(jnp.float32, fields), leaves, jnp.int32(tokens), jnp.int32(padded))


def state(*, table):
    params = {"table": jnp.array(table), "bias": jnp.float32(0.0)}
    return TrainState(jnp.int32(3), params, None, {}, jax.random.key(0))
