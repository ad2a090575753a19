"""The sheets of a run show its pictures, and change nothing."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.data.prepare import prepare_data
from jaxcl.evaluation import sheets as module
from jaxcl.evaluation.held_out import Ranked
from jaxcl.evaluation.known_positives import known_positives
from jaxcl.evaluation.retrieval import dense_scores
from jaxcl.evaluation.sheets import FOLDER, Sheets, as_uint8, augmented_images, hardest_negatives
from jaxcl.run.checkpoint import Checkpoints
from jaxcl.run.training import build_training
from jaxcl.settings.read import read_settings
from jaxcl.step.encode_rows import keys_of_side, make_encode_rows
from jaxcl.train import train
from tests.image_run import image_config

NAMES = ["negatives", "neighbours", "views"]


def files_of(workdir):
    return sorted(path.name for path in (workdir / FOLDER).iterdir())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with captions, its results, and the workdir of the same run without sheets."""
    folder = tmp_path_factory.mktemp("captions")
    results = train(image_config("captions", folder), folder / "run")
    other = image_config("captions", folder, **{"run.sheets": False})
    train(other, folder / "without")
    return folder, results


def test_a_run_with_images_writes_sheets_by_default(trained):
    folder, _ = trained
    expected = sorted(f"{name}.{suffix}" for name in NAMES for suffix in ("html", "png"))
    assert files_of(folder / "run") == expected
    assert not (folder / "without" / FOLDER).exists()
    views = (folder / "run" / FOLDER / "views.html").read_text()
    assert views.count("<tr>") == 8
    assert views.count("query, augmented") == 2 * 8  # the text and its alternative
    assert "key, augmented" not in views  # captions are not augmented
    assert "a red square, number 0" in views
    neighbours = (folder / "run" / FOLDER / "neighbours.html").read_text()
    assert "step 4" in neighbours
    assert neighbours.count('class="own"') >= 8
    negatives = (folder / "run" / FOLDER / "negatives.html").read_text()
    assert negatives.count('class="negative"') == negatives.count('class="own"') > 0
    assert re.search(r"[+-]\d\.\d{3} a \w+ square", negatives)


def test_sheets_do_not_change_the_training(trained):
    folder, _ = trained
    states = []
    for workdir in (folder / "run", folder / "without"):
        config = image_config("captions", folder)
        training = build_training(read_settings(config))
        groups = np.zeros(48, np.int32)
        with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
            states.append(checkpoints.restore_latest(training.abstract_state(48, groups)).state)
    one, other = (jax.tree.leaves(state.params) for state in states)
    assert int(states[0].step) == 4
    for left, right in zip(one, other, strict=True):
        np.testing.assert_array_equal(left, right)


def test_both_directions_are_in_the_results(trained):
    _, results = trained
    metrics = results["metrics"]["test"]
    assert list(metrics) == ["image to text", "text to image"]
    assert all(list(methods) == ["dense"] for methods in metrics.values())


def prepared(settings, folder):
    (folder / "run").mkdir()
    return prepare_data(
        settings.data,
        data_dir=folder / "data",
        workdir=folder / "run",
        open_source=settings.parts.source,
    )


def test_views_are_those_of_the_train_step(tmp_path):
    settings = read_settings(image_config("views", tmp_path))
    training = build_training(settings)
    data = prepared(settings, tmp_path)
    table, rows = data.tables["train"], np.array([5, 3, 20])
    state = training.init(table.num_rows, np.zeros(table.num_rows, np.int32))
    seen = {}

    def encode(params, side, inputs, rngs=None):
        seen[side] = as_uint8(np.asarray(inputs["image"]))
        return jnp.zeros((len(rows), 2))

    encode_rows = make_encode_rows(training.towers._replace(encode=encode), training.mesh, None)
    key = jax.random.fold_in(state.key, 7)
    for number, side in enumerate(("query", "key")):
        encode_rows({}, side, table.side(side, rows), keys_of_side(key, number, jnp.asarray(rows)))
        shown = augmented_images(training, state.key, 7, table, side, rows)
        np.testing.assert_array_equal(shown, seen[side])
    assert not np.array_equal(seen["query"], seen["key"])
    other_step = augmented_images(training, state.key, 8, table, "query", rows)
    assert not np.array_equal(other_step, seen["query"])
    plain = training._replace(towers=training.towers._replace(augment={}))
    assert augmented_images(plain, state.key, 7, table, "query", rows) is None


def test_floats_are_rounded_to_levels():
    images = np.array([-0.1, 0, 0.5 / 255, 1.5001 / 255, 1, 2]).reshape(1, 2, 1, 3)
    assert as_uint8(images).ravel().tolist() == [0, 0, 0, 2, 255, 255]
    whole = np.zeros((1, 2, 2, 3), np.uint8)
    assert as_uint8(whole) is whole


def test_the_hardest_negatives_have_the_largest_margins():
    queries = np.eye(4)
    keys = np.eye(4)
    keys[2] = [0.9, 0.5, 0.1, 0]
    keys[3] = [0.95, 0, 0, 0.2]
    known = known_positives(np.arange(4), np.arange(4))
    asked, wrong, margins = hardest_negatives(queries, keys, known, count=3)
    # Query 0: own 1, key 3 has 0.95. Query 2: own 0.1, others 0. Query 3: own 0.2, others 0.
    assert asked.tolist() == [0, 2, 3]
    assert wrong[0] == 3
    np.testing.assert_allclose(margins, [0.95 - 1, 0 - 0.1, 0 - 0.2], rtol=1e-6)
    same = known_positives(np.array([0, 1, 2, 0]), np.arange(4))  # queries 0 and 3 are equal
    asked, wrong, margins = hardest_negatives(queries, keys, same, count=4)
    assert dict(zip(asked.tolist(), wrong.tolist(), strict=True))[0] == 2
    alone = known_positives(np.zeros(2, int), np.arange(2))
    assert len(hardest_negatives(np.eye(2), np.eye(2), alone, count=4)[0]) == 0


def test_a_full_disk_does_not_stop_the_run(tmp_path, capsys):
    settings = read_settings(image_config("captions", tmp_path))
    data = prepared(settings, tmp_path)
    (tmp_path / "run" / FOLDER).write_text("a file where the folder should be")
    sheets = Sheets(settings, data, tmp_path / "run")
    training = build_training(settings)
    state = training.init(48, np.zeros(48, np.int32))
    sheets.views(training, state)
    sheets.views(training, state)
    assert capsys.readouterr().err.count("warning: the sheets of this run are not written") == 1


def test_sheets_of_texts_are_an_error():
    assert read_settings({}).run.sheets is None
    with pytest.raises(ValueError, match=r"run\.sheets=True shows images, and data\.modality is"):
        read_settings({"run": {"sheets": True}})


def test_the_folder_of_the_sheets_is_announced_once(tmp_path, capsys):
    settings = read_settings(image_config("captions", tmp_path))
    data = prepared(settings, tmp_path)
    sheets = Sheets(settings, data, tmp_path / "run")
    rng = np.random.default_rng(0)
    known = known_positives(np.arange(12), np.arange(12))
    ranked = Ranked(rng.normal(size=(12, 4)), rng.normal(size=(12, 4)), known)
    capsys.readouterr()
    sheets.evaluated(1, ranked)
    sheets.evaluated(2, ranked)
    said = capsys.readouterr().err.replace("\n", "")
    assert said == f"sheets of images are written to {tmp_path / 'run' / FOLDER}"


def test_of_many_queries_a_sample_is_ranked_in_bounded_tiles(monkeypatch):
    rng = np.random.default_rng(0)
    queries, keys = rng.normal(size=(2, 60, 6))
    numbers = np.arange(60) // 2 * 2  # every two queries are equal
    known = known_positives(numbers, np.arange(60))
    whole = hardest_negatives(queries, keys, known, count=60)
    sizes = []

    def noted(some, keys):
        sizes.append(len(some) * len(keys))
        return dense_scores(some, keys)

    monkeypatch.setattr(module, "dense_scores", noted)
    monkeypatch.setattr(module, "_SCORES_AT_ONCE", 7 * 60)
    for ours, theirs in zip(hardest_negatives(queries, keys, known, count=60), whole, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert max(sizes) == 7 * 60
    monkeypatch.setattr(module, "_MOST_QUERIES", 13)
    asked, wrong, margins = hardest_negatives(queries, keys, known, count=60)
    assert len(asked) == 13
    order = [whole[0].tolist().index(row) for row in asked]
    assert order == sorted(order)
    np.testing.assert_array_equal(wrong, whole[1][order])
    np.testing.assert_array_equal(margins, whole[2][order])
    assert sorted(asked.tolist())[::12] == [0, 59]
