"""Evaluation of a run with images, in training and by the command, on colours that it can tell."""

import json

import numpy as np
import pytest

from jaxcl.evaluate import evaluate
from jaxcl.run.metric_writer import read_metrics
from jaxcl.train import train
from tests.evaluation.images import write_image
from tests.image_run import COLOURS, image_config, picture

TRUST = ("tests",)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A folder of images by class, templates, and a file of captions."""
    folder = tmp_path_factory.mktemp("sets")
    for part, first in {"train": 0, "validation": 20, "test": 30}.items():
        for name in COLOURS:
            for number in range(first, first + 6):
                path = folder / "colours" / part / name / f"{number}.png"
                write_image(path, "")
                path.write_bytes(picture(name, number))
    (folder / "colours" / "templates.txt").write_text("a {} square\nthe {} one\n")
    records = []
    for number, name in enumerate(COLOURS):
        (folder / f"{name}.png").write_bytes(picture(name, number))
        captions = [f"a {name} square", f"{name}, number {number}"]
        records.append(json.dumps({"image": f"{name}.png", "captions": captions}) + "\n")
    (folder / "captions.jsonl").write_text("".join(records))
    return {
        "colours": folder / "colours",
        "words": folder / "colours" / "templates.txt",
        "captions": folder / "captions.jsonl",
        "rows": "split:train/test",
    }


@pytest.fixture(scope="module")
def run(sets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    changes = {f"evaluation.sets.{name}": str(path) for name, path in sets.items()}
    config = image_config("captions", folder)
    config.evaluation.sets.update({name: str(path) for name, path in sets.items()})
    config.evaluation.best_metric = "rows/knn@20"
    results = train(config, folder / "run", changed=tuple(changes))
    return folder / "run", results


def test_sets_are_evaluated_in_training(run):
    workdir, results = run
    summaries = results["sets"]
    assert {name: one["kind"] for name, one in summaries.items()} == {
        "colours": "classes",
        "words": "zero_shot",
        "captions": "captions",
        "rows": "classes",
    }
    colours = summaries["colours"]["metrics"]
    assert colours["linear_probe"] > 0.5  # chance is 1/6
    assert colours["test_images"] == 36
    assert summaries["rows"]["metrics"]["test_images"] == 12
    logged = [record for record in read_metrics(workdir) if "rows/knn@20" in record]
    assert [record["step"] for record in logged] == [2, 4]
    names = ("colours/knn@200", "words/accuracy", "captions/text_to_image_recall@5")
    assert all(0 <= logged[-1][name] <= 1 for name in names)
    assert results["best"]["metric"] == "rows/knn@20"


def test_a_set_of_rows_names_an_existing_split(tmp_path):
    config = image_config("captions", tmp_path)
    config.evaluation.sets.update({"rows": "split:train/dev"})
    message = (
        r"evaluation\.sets\.rows=split:train/dev: .* the split 'dev', but the splits are test, tr"
    )
    with pytest.raises(ValueError, match=message):
        train(config, tmp_path / "run")


def test_a_set_of_texts_needs_a_run_of_texts(tmp_path):
    (tmp_path / "dev.csv").write_text("a,b,5.0\nc,d,1\n")
    config = image_config("captions", tmp_path)
    config.evaluation.sets.update({"dev": str(tmp_path / "dev.csv")})
    with pytest.raises(ValueError, match=r"evaluation\.sets\.dev=.*'sts' has texts of side query"):
        train(config, tmp_path / "run")


def test_views_are_evaluated_in_training(sets, tmp_path):
    config = image_config("views", tmp_path)
    chosen = {"colours": str(sets["colours"]), "rows": "split:train"}
    config.evaluation.sets.update(chosen)
    config.evaluation.methods = ("dense", "pixels")
    results = train(config, tmp_path / "run")
    methods = results["metrics"]["test"]["plain"]
    assert list(methods) == ["dense", "pixels"]
    assert methods["pixels"]["recall@1"]["mean"] == 1  # both sides are the same pictures here
    assert np.isfinite(results["sets"]["rows"]["metrics"]["linear_probe_standard_error"])


def test_the_command_gives_the_figures_of_the_training(run, sets, tmp_path):
    workdir, results = run
    for name, path in sets.items():
        output = tmp_path / f"{name}.json"
        found = evaluate(workdir, data=path, output=output, against=workdir, trust=TRUST)
        expected = results["sets"][name]["metrics"]
        assert found["metrics"] == pytest.approx(expected, rel=1e-5), name
        assert json.loads(output.read_text()) == found
        assert all(one["difference"] == 0 for one in found["differences"].values())
    with pytest.raises(ValueError, match="--split has no effect with --data split:test; leave it"):
        evaluate(workdir, data="split:test", split="dev", trust=TRUST)
    with pytest.raises(ValueError, match="names the split 'tset', but the splits are test, train"):
        evaluate(workdir, data="split:tset", trust=TRUST)


def test_the_command_evaluates_held_out_rows(run):
    workdir, results = run
    found = evaluate(workdir, trust=TRUST)
    for variant, methods in found["metrics"]["test"].items():
        expected = results["metrics"]["test"][variant]["dense"]
        assert methods["dense"]["recall@1"] == pytest.approx(expected["recall@1"])
