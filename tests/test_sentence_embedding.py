"""The variants of `configs/sentence_embedding.py` on small files, with an evaluation of STS."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.configs import sentence_embedding
from jaxcl.data.prepare import prepare_data
from jaxcl.data.table import table_batch
from jaxcl.ops.mesh import make_mesh, put_batch
from jaxcl.plan import _abstract_batch
from jaxcl.run.build_loss import check_teacher_dim
from jaxcl.run.checkpoint import Checkpoints
from jaxcl.settings.read import read_settings
from jaxcl.step.encode_rows import keys_of_side, make_encode_rows
from jaxcl.train import train
from tests.helpers import bits, some_slow, training_of, unclocked
from tests.host.test_processes import Run, assert_close_runs

TOPICS = ("a red train", "the old garden", "two small dogs", "some cold water", "my new song")
PLACES = ("in the north", "by the sea", "at night", "for a friend")


def sentence(number):
    return f"{TOPICS[number % 5]} {PLACES[number % 4]} {number}"


def scored_pairs():
    """Pairs of sentences; those about one topic have a higher score."""
    pairs = [(row, row + 5 * (row % 3) + row % 2) for row in range(60)]
    return [
        (sentence(first), sentence(second), 4.0 if (first - second) % 5 == 0 else second % 3 / 2)
        for first, second in pairs
    ]


def rows_of(kind):
    if kind == "simcse":
        return [{"text": sentence(row), "source": "x"} for row in range(60)]
    if kind == "pairs":
        return [
            {
                "sentence1": sentence(row),
                "sentence2": sentence(row + 20),
                "negative": sentence(row + 1),
            }
            for row in range(60)
        ]
    return [
        dict(zip(("sentence1", "sentence2", "score"), pair, strict=True)) for pair in scored_pairs()
    ]


@pytest.fixture
def config_of(tmp_path):
    """The smoke config of a kind, with files of this test's folder, in few steps."""
    lines = [f"{first},{second},{score}" for first, second, score in scored_pairs()]
    (tmp_path / "sts.csv").write_text("\n".join(["sentence1,sentence2,score", *lines]) + "\n")

    def changed(kind, **changes):
        path = tmp_path / f"{kind}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows_of(kind)))
        config = sentence_embedding.get_config(f"{kind}_smoke")
        config.evaluation.sets.sts = str(tmp_path / "sts.csv")
        small = {"steps": 4, "data.name": str(path), "run.data_dir": str(tmp_path / "data")}
        small |= {"run.evaluate_every": 2, "run.checkpoint_every": 2, "run.log_every": 1}
        config.update_from_flattened_dict(small | changes)
        return config

    return changed


STATIC = {"model.name": "static", "model.options.hidden_dim": None} | {
    f"model.options.{name}": None for name in ("num_layers", "num_heads", "mlp_dim", "dropout")
}
"""The encoder that compiles fastest."""


def last_state(config, workdir):
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        abstract = training_of(config).abstract_state(60, np.zeros(60, np.int32))
        return checkpoints.restore_latest(abstract).state


@pytest.mark.parametrize("kind", some_slow(sentence_embedding.VARIANTS, ("simcse", "scored")))
def test_a_variant_trains_and_is_evaluated_on_sts(kind, config_of, tmp_path):
    config = config_of(kind, **{"evaluation.best_metric": "sts/spearman"})
    results = train(config, tmp_path / "run")
    assert results["steps"] == 4
    assert -1 <= results["sets"]["sts"]["metrics"]["spearman"] <= 1
    assert results["best"]["metric"] == "sts/spearman"
    losses = [one["loss"] for one in unclocked(tmp_path / "run") if "loss" in one]
    assert len(losses) == 4
    assert np.isfinite(losses).all()
    assert min(losses) > 0


def test_a_run_on_scores_resumes_bit_for_bit(config_of, tmp_path):
    config = config_of("scored", **STATIC, **{"optimizer.schedule": "warmup_constant"})
    train(config, tmp_path / "whole")
    for steps in (2, 4):
        config.steps = steps
        train(config, tmp_path / "halves")
    states = [
        jax.tree.map(bits, last_state(config, tmp_path / name)) for name in ("whole", "halves")
    ]
    assert states[0] == states[1]
    assert unclocked(tmp_path / "whole") == unclocked(tmp_path / "halves")


def test_the_embeddings_of_a_teacher_are_learned(config_of, tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "teacher.npz", query=rng.normal(size=(60, 32)), key=np.ones((60, 32)))
    taught = {"loss.name": "embedding_distillation", "loss.options.directions": None}
    taught |= {"data.guides": str(tmp_path / "teacher.npz"), "data.negatives_per_row": 0}
    config = config_of("pairs", steps=12, **taught, **STATIC)
    train(config, tmp_path / "run")
    losses = [one["loss"] for one in unclocked(tmp_path / "run") if "loss" in one]
    assert 2 > losses[0] > losses[-1] + 0.05 > 0.05
    config.data.guides = None
    with pytest.raises(
        ValueError, match=r"needs a teacher's embeddings; set data\.guides to an .np"
    ):
        read_settings(config)


def test_a_teacher_of_another_width_is_an_error_before_the_data_are_prepared(config_of, tmp_path):
    np.savez(tmp_path / "teacher.npz", query=np.ones((60, 48)), key=np.ones((60, 48)))
    taught = {"loss.name": "embedding_distillation", "loss.options.directions": None}
    taught |= {"data.guides": str(tmp_path / "teacher.npz"), "data.negatives_per_row": 0}
    config = config_of("pairs", **taught, **STATIC)
    wanted = r"has embeddings with 48 features, and the model's have 32; use a model with 48 feat"
    with pytest.raises(ValueError, match=wanted + "ures, or set loss.options.truncate_teacher"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    check_teacher_dim(read_settings(config_of("scored")))
    config.loss.options.truncate_teacher = True
    check_teacher_dim(read_settings(config))
    config.model.dim = 64
    with pytest.raises(ValueError, match=r"the model's have 64; use a model with 48 features$"):
        check_teacher_dim(read_settings(config))


def test_other_scores_are_other_data(config_of, tmp_path):
    config = config_of("scored", steps=2, **STATIC)
    train(config, tmp_path / "run")
    path = tmp_path / "scored.jsonl"
    path.write_text(path.read_text().replace("4.0", "3.0"))
    with pytest.raises(ValueError, match=r"was trained on other data: .* other rows for train"):
        train(config, tmp_path / "run")


def test_the_two_views_of_a_text_differ_by_dropout_alone(config_of, tmp_path):
    config = config_of("simcse")
    settings, training = read_settings(config), training_of(config)
    data = prepare_data(settings.data, data_dir=tmp_path / "data", workdir=tmp_path)
    batch = put_batch(table_batch(data.tables["train"], np.arange(16)), training.mesh)
    assert jax.tree.map(bits, batch["query"]) == jax.tree.map(bits, batch["key"])
    state = training.init(60)
    encode = make_encode_rows(training.towers, training.mesh, None)

    def views(key):
        rows = jnp.arange(16)
        return [
            encode(state.params["towers"], side, batch[side], keys_of_side(key, number, rows))
            for number, side in enumerate(("query", "key"))
        ]

    same, different = views(None), views(jax.random.key(0))
    np.testing.assert_array_equal(*same)
    similarities = jnp.einsum("bd,bd->b", *different)
    assert (similarities < 0.999).all()
    assert (similarities > 0.3).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.score_field": None}, "the loss 'cosent' needs the score of each pair; set data.sc"),
        ({"loss.margin": 0.1}, r"loss\.margin=0\.1, but 'cosent' takes none"),
        ({"data.negatives_per_row": 2}, "the loss 'cosent' takes no explicit negatives"),
    ],
)
def test_settings_that_do_not_fit_scores_are_errors(config_of, changes, message):
    with pytest.raises(ValueError, match=message):
        read_settings(config_of("scored", **changes))


@pytest.mark.parametrize(
    ("kind", "field"),
    [("pairs", "data.score_field"), ("scored", "loss.exchange"), ("scored", "loss.masks")],
)
def test_settings_that_a_loss_does_not_read_have_no_effect(config_of, kind, field):
    config = config_of(kind)
    if field == "data.score_field":
        config.data.score_field = "score"
    with pytest.raises(ValueError, match=f"{field} has no effect here"):
        read_settings(config, changed=(field,))


def test_a_column_of_scores_that_the_file_lacks_is_named(config_of, tmp_path):
    config = config_of("scored", **{"data.score_field": "rating"})
    with pytest.raises(
        ValueError, match=r"data\.score_field='rating', but .* has only the columns"
    ):
        train(config, tmp_path / "run")


def test_a_plan_has_the_scores(config_of):
    mesh = make_mesh({"data": 8})
    [scored, paired] = [
        _abstract_batch(read_settings(config_of(kind)), mesh) for kind in ("scored", "pairs")
    ]
    assert (scored["score"].shape, scored["score"].dtype) == ((16,), np.float32)
    assert "score" not in paired


def test_an_unknown_variant_lists_the_known_ones():
    with pytest.raises(ValueError, match="simcse, pairs, scored, simcse_smoke, pairs_smoke"):
        sentence_embedding.get_config("simcsee")


PROCESSES = """
from jaxcl.configs import sentence_embedding

def get_config():
    config = sentence_embedding.get_config("scored_smoke")
    config.data.name, config.run.data_dir = "{folder}/scored.jsonl", "{folder}/data"
    config.steps, config.run.log_every = 3, 1
    return config
"""


@pytest.mark.slow
def test_processes_train_on_scores_as_one(config_of, tmp_path):
    config_of("scored")
    config = tmp_path / "scored.py"
    config.write_text(PROCESSES.format(folder=tmp_path))
    command = [sys.executable, "-m", "jaxcl.train", "--config", str(config)]
    for processes, devices in ((1, 1), (1, 4), (2, 2)):
        workdir = tmp_path / f"{processes}-{devices}"
        Run([*command, f"--workdir={workdir}"], processes=processes, devices=devices).finish()
    assert_close_runs(tmp_path / "2-2", tmp_path / "1-4", tolerance=1e-5)
    assert_close_runs(tmp_path / "2-2", tmp_path / "1-1", tolerance=1e-4)
