"""Training on images: from files to a finished run, which resumes bit for bit."""

import json

import jax
import numpy as np
import pytest

from jaxcl.configs import pairs
from jaxcl.data.images.decoding import ImageRule, decode_image
from jaxcl.evaluation import held_out
from jaxcl.run.opened import open_run
from jaxcl.train import train
from tests.data.images.test_image_files import picture
from tests.helpers import bits, final_state, unclocked
from tests.test_train_optimizer import half_run

pytestmark = [
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("nothing_left_behind"),
]

STEPS = 4
COLOURS = ("red", "green", "blue", "grey")


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    """Forty images with two captions each; one image is damaged."""
    folder = tmp_path_factory.mktemp("captions")
    with (folder / "captions.jsonl").open("w") as rows:
        for number in range(40):
            file = picture(number, ("PNG", "JPEG")[number % 2])
            (folder / f"{number}.png").write_bytes(file[:90] if number == 7 else file)
            texts = [f"{COLOURS[number % 4]} picture {number}", f"a picture, number {number}"]
            rows.write(json.dumps({"image": f"{number}.png", "caption": texts}) + "\n")
    return folder


def config_of(captions, **changes):
    config = pairs.get_config("smoke")
    with config.unlocked():
        config.update_from_flattened_dict(
            {
                "steps": STEPS,
                "global_batch_size": 8,
                "data.name": str(captions / "captions.jsonl"),
                "data.splits": {"train": "rest", "validation": "train[:20%]"},
                "data.modality.query": "image",
                "data.images.size": 8,
                "data.images.bad": "skip",
                "data.vocabulary_size": 300,
                "model.name": "tests.pixel_encoder:PixelEncoder",
                "model.shared": False,
                "model.dim": 16,
                "model.key.name": "static",
                "augmentation.name": None,
                "loss.masks": ("text",),
                "optimizer.warmup_steps": 1,
                "evaluation.methods": ("dense",),
                "run.data_dir": str(captions / "data"),
                "run.log_every": 1,
                "run.evaluate_every": STEPS,
                "run.checkpoint_every": STEPS // 2,
                **changes,
            }
        )
    return config


def test_captions_and_images_train_and_resume_bitwise(captions, tmp_path, monkeypatch, capfd):
    config = config_of(captions)
    results = train(config, tmp_path / "whole")
    assert "2 of " in capfd.readouterr().err  # both rows of the damaged image
    assert sum(results["rows"].values()) == 78
    half_run(monkeypatch, config, tmp_path / "halves")
    train(config, tmp_path / "halves")
    whole, halves = (final_state(tmp_path / name, step=STEPS) for name in ("whole", "halves"))
    assert jax.tree.map(bits, whole) == jax.tree.map(bits, halves)
    assert unclocked(tmp_path / "whole") == unclocked(tmp_path / "halves")

    run = open_run(tmp_path / "whole", trust=("tests",))
    source = run.sources()["validation"]
    record = source.read([0])[0]
    reader = run.encoder.readers["query"]
    np.testing.assert_array_equal(
        reader([record["query"]])["image"][0], decode_image(record["query"], ImageRule(8))
    )
    (captions / "11.png").write_bytes(picture(1_000))
    with pytest.raises(ValueError, match=r"was trained on other data: .*holds other rows for"):
        train(config, tmp_path / "whole")
    (captions / "11.png").write_bytes(picture(11, "JPEG"))


def test_two_views_of_one_image_train(captions, tmp_path):
    config = config_of(
        captions,
        **{"data.modality.key": "image", "model.shared": True, "model.key.name": None, "steps": 2},
        **{"run.checkpoint_every": 2, "run.evaluate_every": 2, "loss.masks": ("row",)},
    )
    results = train(config, tmp_path)
    assert sum(results["rows"].values()) == 39  # an image is one row, whatever its captions


def test_contents_are_compared_once_for_all_evaluations_of_a_run(captions, tmp_path, monkeypatch):
    reads = []
    read_numbers = held_out.read_numbers

    def noted(*arguments):
        reads.append("read")
        return read_numbers(*arguments)

    monkeypatch.setattr(held_out, "read_numbers", noted)
    train(config_of(captions, **{"run.evaluate_every": 1}), tmp_path)
    assert len(reads) == 2  # in training, and in the final evaluation
    names = [set(record) for record in unclocked(tmp_path)]
    assert sum("validation/dense/mrr@10" in record for record in names) == STEPS
