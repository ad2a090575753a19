"""Training with the options of `config.optimizer`, end to end, and a run that was stopped."""

import jax
import pytest
from ml_collections import ConfigDict

from jaxcl.export import export
from jaxcl.models.trainable import merge, parameter_paths, split
from jaxcl.run.checkpoint import Checkpoints
from jaxcl.run.exported import open_exported
from jaxcl.run.opened import open_run
from jaxcl.run.training import build_training
from jaxcl.settings.read import as_dict, read_settings, with_steps
from jaxcl.train import train
from tests.helpers import bits, final_state, unclocked
from tests.small_models import small_config

pytestmark = [
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("nothing_left_behind"),
]

STEPS = 6
MOMENTUM = {
    "negatives.bank.kind": "queue",
    "negatives.bank.slots": 24,
    "negatives.tiers.full_bank": True,
    "negatives.momentum_encoder.initial": 0.9,
}
FREEZE = {"optimizer.freeze": ("*/table",), "model.options.hidden_dim": 24}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A config of a few steps with a static encoder for each side, by changes."""
    folder = tmp_path_factory.mktemp("data")

    def config(**changes) -> ConfigDict:
        made = small_config(folder)
        made.update_from_flattened_dict(
            {
                "steps": STEPS,
                "optimizer.warmup_steps": 1,
                "evaluation.methods": ("dense",),
                "run.log_every": 1,
                "run.evaluate_every": STEPS,
                "run.checkpoint_every": STEPS // 2,
                **changes,
            }
        )
        return made

    return config


class _Interrupted(Exception):
    pass


def half_run(monkeypatch, config, workdir) -> None:
    """Trains half of the steps, and dies right after they are saved."""
    save = Checkpoints.save

    def save_and_die(self, step, state, record):
        save(self, step, state, record)
        self.wait()
        raise _Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_and_die)
        with pytest.raises(_Interrupted):
            train(config, workdir)


def assert_resumes_bitwise(monkeypatch, config, folder):
    """Train in one go and in two halves, and return the state of both."""
    train(config, folder / "whole")
    half_run(monkeypatch, config, folder / "halves")
    train(config, folder / "halves")
    whole, halves = (final_state(folder / name, step=STEPS) for name in ("whole", "halves"))
    assert jax.tree.map(bits, whole) == jax.tree.map(bits, halves)
    assert unclocked(folder / "whole") == unclocked(folder / "halves")
    return whole


def test_a_run_with_frozen_parameters_resumes_bitwise(small, tmp_path, monkeypatch, capfd):
    config = small(**MOMENTUM, **FREEZE)
    state = assert_resumes_bitwise(monkeypatch, config, tmp_path)
    assert f"{2 * 60 * 24:,} of them frozen" in capfd.readouterr().err
    frozen = build_training(read_settings(config)).frozen
    assert frozen == {"towers/query/table", "towers/key/table"}
    start = build_training(read_settings(config)).init().params
    (trained, held), (first, was) = (split(params, frozen) for params in (state.params, start))
    assert jax.tree.map(bits, held) == jax.tree.map(bits, was)
    for leaf, before in zip(jax.tree.leaves(trained), jax.tree.leaves(first), strict=True):
        assert bits(leaf) != bits(before)
    assert parameter_paths(state.memory["momentum"]) == parameter_paths(trained["towers"])


def test_frozen_parameters_of_another_run_keep_their_bits(small, tmp_path):
    train(small(**{"model.options.hidden_dim": 24}), tmp_path / "other")
    train(small(init_from=str(tmp_path / "other"), **MOMENTUM, **FREEZE), tmp_path / "run")
    before, after = (
        final_state(tmp_path / name, step=STEPS).params["towers"]["query"]["table"]
        for name in ("other", "run")
    )
    assert bits(before) == bits(after)


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        (("*/tabel",), r"optimizer\.freeze has '\*/tabel', which matches no parameter"),
        (("towers/*", "log_*"), r"leaves no parameter to train"),
    ],
)
def test_patterns_that_match_nothing_or_everything_are_errors(small, freeze, message):
    with pytest.raises(ValueError, match=message):
        build_training(read_settings(small(**{"optimizer.freeze": freeze})))


def test_a_run_with_an_average_resumes_bitwise_and_evaluates_and_exports_it(
    small, tmp_path, monkeypatch
):
    average = {"optimizer.average_decay": 0.5, "evaluation.weights": "average"}
    config = small(**average, **FREEZE)
    state = assert_resumes_bitwise(monkeypatch, config, tmp_path)
    averaged = state.memory["average"]
    assert int(averaged.updates) == STEPS
    frozen = build_training(read_settings(config)).frozen
    trained, held = split(state.params, frozen)
    wanted = {
        "trained": state.params["towers"],
        "average": merge(averaged.towers, held["towers"]),
    }
    assert bits(averaged.towers["query"]["projection"]["kernel"]) != bits(
        trained["towers"]["query"]["projection"]["kernel"]
    )
    workdir = tmp_path / "whole"
    for weights, params in wanted.items():
        opened = open_run(workdir, weights=weights)
        assert jax.tree.map(bits, opened.encoder.params) == jax.tree.map(bits, params)
        folder = export(workdir, tmp_path / weights, format="jaxcl", weights=weights)
        exported = open_exported(folder).encoder.params
        assert jax.tree.map(bits, exported) == jax.tree.map(bits, params)
        card = (folder / "README.md").read_text()
        assert ("moving average of the weights, with a decay of 0.5" in card) == (
            weights == "average"
        )
        # The run evaluated the average.
        assert ("The run has no results" in card) == (weights == "trained")
    assert open_run(workdir).weights == "average"
    with pytest.raises(ValueError, match="weights='mean' is unknown; use one of trained, average"):
        open_run(workdir, weights="mean")


def test_weights_that_a_run_does_not_keep_are_an_error(small):
    needed = r"evaluation\.weights='average' needs .* optimizer\.average_decay, such as 0\.999"
    with pytest.raises(ValueError, match=needed):
        read_settings(small(**{"evaluation.weights": "average"}))
    with pytest.raises(ValueError, match=r"evaluation\.weights='mean' is unknown"):
        read_settings(small(**{"evaluation.weights": "mean"}))


@pytest.mark.slow  # `run/test_resumed_states.py` resumes them without a command
def test_a_run_of_accumulated_gradients_resumes_bitwise_between_two_updates(
    small, tmp_path, monkeypatch, capfd
):
    config = small(**{"optimizer.accumulate_steps": 2, "optimizer.average_decay": 0.5})
    state = assert_resumes_bitwise(monkeypatch, config, tmp_path)  # after 3 of 6 steps
    assert int(state.optimizer.gradient_step) == STEPS // 2
    assert int(state.memory["average"].updates) == STEPS // 2
    rates = [line["learning_rate"] for line in unclocked(tmp_path / "whole") if "loss" in line]
    assert rates[0::2] == rates[1::2]
    logged = capfd.readouterr().err
    assert "averages the gradients of 2 batches and adds no negatives" in logged
    assert "grad_cache.chunk_size" in logged


@pytest.mark.parametrize(("steps", "advice"), [(5, "use 4 or 6 steps"), (1, "use 2 steps")])
def test_steps_that_accumulation_does_not_divide_are_an_error(small, steps, advice):
    changes = {"steps": steps, "optimizer.accumulate_steps": 2}
    with pytest.raises(
        ValueError, match=f"accumulate_steps=2 does not divide steps={steps}; {advice}"
    ):
        read_settings(small(**changes))


def test_epochs_are_the_steps_of_the_rows_and_the_run_is_that_of_these_steps(
    small, tmp_path, monkeypatch, capfd
):
    # 20 rows in batches of 8: two epochs are five batches.
    config = small(steps=None, epochs=2.0)
    train(small(steps=5), tmp_path / "steps")
    half_run(monkeypatch, config, tmp_path / "epochs")
    train(config, tmp_path / "epochs")
    ours, theirs = (final_state(tmp_path / name, step=5) for name in ("epochs", "steps"))
    assert jax.tree.map(bits, ours) == jax.tree.map(bits, theirs)
    assert unclocked(tmp_path / "epochs") == unclocked(tmp_path / "steps")
    # Its identity is the number of steps.
    train(small(steps=5), tmp_path / "epochs")
    with pytest.raises(ValueError, match=r"steps is 10 here and 5 there"):
        train(small(steps=None, epochs=4.0), tmp_path / "epochs")
    assert "2 epochs of 20 rows are 5 steps" in capfd.readouterr().err


def test_a_run_of_epochs_keeps_its_prepared_files_and_can_be_opened(small, tmp_path):
    train(small(steps=None, epochs=2.0), tmp_path / "run")
    assert (tmp_path / "run" / "data.json").exists()
    assert len(open_run(tmp_path / "run").encoder.encode("query", ["a text"])) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 2.0}, "steps=6 and epochs=2.0 are both given; set one to None"),
        ({"steps": None}, "steps and epochs are both None; set one of them"),
        ({"steps": None, "epochs": 0.0}, "epochs=0.0; set it above 0"),
    ],
)
def test_exactly_one_of_steps_and_epochs_is_given(small, changes, message):
    with pytest.raises(ValueError, match=message):
        read_settings(small(**changes))


def test_a_refresh_is_checked_against_the_steps_of_the_epochs():
    assignment = {"name": "gcbs", "gcbs": {"refresh_every": 400, "block_size": 8}}
    settings = read_settings({"epochs": 3.0, "global_batch_size": 8, "assignment": assignment})
    assert read_settings(as_dict(settings)).epochs == 3.0
    assert with_steps(settings, num_rows=1_100).steps == 413
    with pytest.raises(ValueError, match="refresh_every=400 never comes in 375 steps"):
        with_steps(settings, num_rows=1_000)


def test_epochs_end_with_a_whole_update():
    config = {"epochs": 1.0, "global_batch_size": 8, "optimizer": {"accumulate_steps": 4}}
    assert with_steps(read_settings(config), num_rows=100).steps == 16  # 12.5 batches
