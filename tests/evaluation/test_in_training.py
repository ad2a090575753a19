"""The evaluation sets of a run: a real set of each kind of texts, on any number of devices."""

import csv
import json

import jax
import numpy as np
import pytest
from rich.console import Console

from jaxcl.data.prepare import RunData
from jaxcl.evaluation.in_training import TrainingSets, check_best_metric, open_sets, sets_table
from jaxcl.evaluation.sets import KINDS
from jaxcl.ops.mesh import make_mesh, replicated_sharding
from jaxcl.run.opened import open_run
from jaxcl.settings.read import read_settings
from jaxcl.step.embedder import make_embedder
from tests.evaluation.images import write_image
from tests.evaluation.test_retrieval_set import write_folder
from tests.small_models import small_run


def write_pairs(path, scores) -> None:
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["sentence1", "sentence2", "score"])
        rows.writerows([f"query {i}", f"key {i}", score] for i, score in enumerate(scores))


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """The settings of a run with a set of each kind of texts."""
    folder = tmp_path_factory.mktemp("sets")
    write_pairs(folder / "sts.csv", [0.5, 3, 1.5, 5, 2, 4.5, 1, 3.5])
    write_pairs(folder / "labels.csv", [0, 1, 1, 0, 1, 0, 1, 0])
    texts = {name: {f"{name} {i}": f"{name} {i}" for i in range(9)} for name in ("key", "query")}
    qrels = [(f"query {i}", f"key {i}", 1 + i % 2) for i in range(9)]
    (folder / "beir").mkdir()
    write_folder(folder / "beir", texts["key"], texts["query"], qrels)
    paths = {"sts": "sts.csv", "labels": "labels.csv", "beir": "beir"}
    sets = {name: str(folder / path) for name, path in paths.items()}
    return read_settings({"evaluation": {"sets": sets}})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return open_run(small_run(tmp_path_factory.mktemp("run")))


def encoder_on(run, num_devices: int):
    """The encoder of a run on some devices, with about five texts per batch."""
    mesh = make_mesh({"data": num_devices}, devices=jax.devices()[:num_devices])
    towers, params = run.encoder.towers, jax.device_get(run.encoder.params)
    embedder = make_embedder(towers.encode, mesh, batch_size=5)
    placed = jax.device_put(params, replicated_sharding(mesh))
    return run.encoder._replace(mesh=mesh, embedder=embedder, params=placed)


def test_every_kind_of_set_has_the_metrics_that_it_names(settings, run):
    sets = open_sets(settings)
    summary = sets.summary(1, run.encoder)
    kinds = {one["kind"] for one in summary.values()}
    assert kinds == set(KINDS) - {"captions", "classes", "zero_shot"}  # which need images
    scores = sets.scores(1, run.encoder)
    assert len(sets.metrics) > 6
    assert set(sets.metrics) < set(scores)  # sizes are not metrics
    assert (scores["beir/documents"], scores["beir/queries"], scores["sts/pairs"]) == (9, 9, 8)
    assert not {"beir/documents", "sts/pairs", "labels/positives"} & set(sets.metrics)
    assert all(-1 <= scores[name] <= 1 for name in sets.metrics)
    assert len(set(sets.fingerprints.values())) == 3


def test_scores_do_not_depend_on_the_number_of_devices(settings, run):
    one, eight = (open_sets(settings).scores(1, encoder_on(run, count)) for count in (1, 8))
    assert one.keys() == eight.keys()
    for name in one:
        np.testing.assert_allclose(one[name], eight[name], rtol=1e-5, err_msg=name)


def test_another_model_has_other_scores(settings, run):
    shuffled = jax.tree.map(lambda leaf: leaf[::-1], jax.device_get(run.encoder.params))
    other = encoder_on(run, 8)._replace(params=shuffled)
    scores = [open_sets(settings).scores(1, one) for one in (run.encoder, other)]
    for name in ("sts/spearman", "labels/average_precision", "beir/ndcg@10"):
        assert scores[0][name] != scores[1][name]


def test_a_step_is_evaluated_once(settings, run):
    sets = open_sets(settings)
    sides = []

    def embedder(params, side, *arguments, **options):
        sides.append(side)
        return run.encoder.embedder(params, side, *arguments, **options)

    noted = run.encoder._replace(embedder=embedder)
    values = [sets._values(step, noted) for step in (1, 1, 2)]
    assert values[0] is values[1] is not values[2]
    assert len(sides) % 2 == 0
    assert sides[: len(sides) // 2] == sides[len(sides) // 2 :]


def test_a_changed_set_is_named_and_an_unknown_one_is_not(settings):
    sets = open_sets(settings)
    sets.check_unchanged({})
    sets.check_unchanged({"step": 5, "sets": {**sets.fingerprints, "removed": "since"}})
    with pytest.raises(ValueError, match="the evaluation set sts has changed since step 5"):
        sets.check_unchanged({"step": 5, "sets": {**sets.fingerprints, "sts": "another"}})


def test_a_mistyped_metric_is_named_with_the_nearest(settings):
    evaluation = settings.evaluation._replace(best_metric="beir/ncdg@10")
    mistyped = settings._replace(evaluation=evaluation)
    with pytest.raises(ValueError, match=r"did you mean 'beir/ndcg@10'\?\); the metrics of this"):
        check_best_metric(mistyped, open_sets(settings), RunData({}, {}, {}))
    named = evaluation._replace(best_metric="beir/ndcg@10")
    check_best_metric(settings._replace(evaluation=named), open_sets(settings), RunData({}, {}, {}))


def test_no_set_at_all_has_no_scores(run):
    sets = open_sets(read_settings({}))
    assert (sets.scores(1, run.encoder), sets.summary(1, run.encoder)) == ({}, {})
    assert TrainingSets({}).metrics == []


def test_the_table_has_each_metric_and_size(settings, run, tmp_path):
    sets = open_sets(settings)
    with (tmp_path / "table.txt").open("w") as file:
        Console(file=file, width=100).print(sets_table(sets.summary(1, run.encoder)))
    cells = {tuple(line.split()) for line in (tmp_path / "table.txt").read_text().splitlines()}
    scores = sets.scores(1, run.encoder)
    assert ("beir", "retrieval", "documents", "9") in cells
    assert ("sts", "sts", "spearman", f"{scores['sts/spearman']:.4f}") in cells


def test_a_file_of_another_kind_is_named_with_its_setting(tmp_path):
    (tmp_path / "dev.jsonl").write_text(json.dumps({"a": 1}) + "\n")
    settings = read_settings({"evaluation": {"sets": {"dev": str(tmp_path / "dev.jsonl")}}})
    with pytest.raises(ValueError, match=r"^evaluation\.sets\.dev=.*dev\.jsonl: "):
        open_sets(settings)


def test_a_set_of_images_needs_a_side_of_images(tmp_path):
    for name in ("cat", "dog"):
        for number in range(20):
            write_image(tmp_path / "sorted" / name / f"{number}.png", f"{name} {number}")
    settings = read_settings({"evaluation": {"sets": {"sorted": str(tmp_path / "sorted")}}})
    with pytest.raises(
        ValueError, match=r"^evaluation\.sets\.sorted=.*no side of the model embeds the modality"
    ):
        open_sets(settings)
