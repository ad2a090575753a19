"""The identity of a run: the settings that may change between starts."""

import jax
import pytest

from jaxcl.run.identity import differences, process_report, settings_differences
from jaxcl.settings.read import as_dict, read_settings
from jaxcl.settings.sections import Settings

CONSTANT = {"optimizer": {"schedule": "warmup_constant"}}
MOMENTUM = {
    "negatives": {
        "bank": {"kind": "queue"},
        "tiers": {"full_bank": True},
        "momentum_encoder": {"initial": 0.9},
    }
}
RANDOM = {
    "assignment": {"name": "gcbs", "gcbs": {"block_size": 64, "refresh_every": 50}},
    "global_batch_size": 256,
}


def settings(**sections) -> Settings:
    return read_settings({"steps": 100, **sections})


def changed(before: Settings, after: Settings, *, saved_step: int | None = 50) -> list[str]:
    return settings_differences(as_dict(before), after, saved_step=saved_step)


@pytest.mark.parametrize(
    "section",
    [
        {"run": {"log_every": 3, "mesh": {"data": 2}, "data_dir": "elsewhere"}},
        {"evaluation": {"methods": ("dense",)}},
        {"evaluation": {"rrf_k": 60}},
        {"evaluation": {"sets": {"dev": "sts-dev.csv"}}},
        {"evaluation": {"best_metric": "dev/spearman", "patience": 3, "min_delta": 0.01}},
    ],
)
def test_cadences_devices_and_rankings_are_not_part_of_a_run(section):
    assert changed(settings(), settings(**section)) == []


@pytest.mark.parametrize(
    ("section", "difference"),
    [
        ({"seed": 1}, "seed is 1 here and 0 there"),
        (
            {"optimizer": {"learning_rate": 0.5}},
            "optimizer.learning_rate is 0.5 here and 0.002 there",
        ),
        # Embeddings from larger batches may be rounded differently, and so change the batches.
        ({"evaluation": {"batch_size": 8}}, "evaluation.batch_size is 8 here and 1024 there"),
    ],
)
def test_only_the_settings_that_differ_are_listed(section, difference):
    assert changed(settings(), settings(**section)) == [difference]


@pytest.mark.parametrize("steps", [60, 1_000])
def test_the_number_of_steps_may_change_where_nothing_made_so_far_depends_on_it(steps):
    assert changed(settings(**CONSTANT), settings(**CONSTANT | {"steps": steps})) == []


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({}, "optimizer.schedule depends on it"),
        (CONSTANT | MOMENTUM, "negatives.momentum_encoder depends on it"),
        (
            CONSTANT
            | RANDOM
            | {"assignment": {**RANDOM["assignment"], "gcbs": {"random_initial": 0.5}}},
            "assignment.gcbs.random_final depends on it",
        ),
    ],
)
def test_the_number_of_steps_stays_where_something_depends_on_it(sections, reason):
    found = changed(settings(**sections), settings(**sections | {"steps": 200}))
    assert found == [f"steps is 200 here and 100 there ({reason})"]


def test_steps_that_are_made_cannot_be_taken_back():
    found = changed(settings(**CONSTANT), settings(**CONSTANT | {"steps": 49}))
    assert found == ["steps is 49 here and 100 there (50 steps are already completed)"]


def test_without_a_known_step_the_number_of_steps_stays():
    after = settings(**CONSTANT | {"steps": 200})
    assert changed(settings(**CONSTANT), after, saved_step=None) == [
        "steps is 200 here and 100 there"
    ]


def test_a_missing_field_differs_from_every_value_except_none():
    assert differences({"a": 1, "b": None}, {"c": 2}) == [
        "a is nothing here and 1 there",
        "c is 2 here and nothing there",
    ]


def test_processes_compare_settings_cadences_flags_and_versions_but_no_folders():
    report = process_report(settings())
    for name in ("seed", "steps", "run.checkpoint_every", "jax_enable_x64", "jax", "python"):
        assert name in report
    assert report == process_report(settings(run={"data_dir": "mounted/elsewhere"}))
    metric = {"best_metric": "validation/dense/mrr@10"}
    for changes in (metric, metric | {"patience": 3}, {"sets": {"dev": "sts-dev.csv"}}):
        assert report != process_report(settings(evaluation=changes))
    named = [process_report(settings(evaluation={"sets": {"dev": path}})) for path in "ab"]
    assert named[0] == named[1]  # hosts may mount a data set at different paths
    with jax.enable_x64(True):
        assert report != process_report(settings())


def test_a_recorded_default_encoder_matches_a_config_without_a_name():
    settings = read_settings({"model": {"name": None}})
    assert settings.model.name == "static"
    recorded = as_dict(read_settings({"model": {"name": "static"}}))
    assert settings_differences(recorded, settings, saved_step=None) == []
    other = read_settings({"model": {"name": "transformer"}})
    assert "model.name is transformer here and static there" in settings_differences(
        recorded, other, saved_step=None
    )
