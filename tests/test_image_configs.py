"""The configs of images, shrunk: equal on any mesh, with gradient caching, and after a restart."""

import json
import os
import socket
import string
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxcl.configs import image_text, moco, simclr
from jaxcl.data.modalities import modality_of
from jaxcl.ops.mesh import put_batch
from jaxcl.run.opened import open_run
from jaxcl.settings.read import read_settings
from jaxcl.train import train
from jaxcl.typing import SIDES
from tests.data.images.test_image_files import picture
from tests.helpers import (
    bits,
    final_state,
    relative_errors,
    some_slow,
    training_of,
    unclocked,
)
from tests.models.pretrained.tiny_towers import write_tiny_towers
from tests.test_train_optimizer import half_run

pytestmark = [
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("nothing_left_behind"),
]

CONFIGS = {
    "simclr": lambda: simclr.get_config("smoke"),
    "moco": lambda: moco.get_config("smoke"),
    "image_text": lambda: image_text.get_config("smoke"),
    "image_text, siglip": lambda: image_text.get_config("smoke_siglip"),
}
ROWS, STEPS = 24, 4
ROOT = Path(__file__).parents[1]


def config_of(name, **changes):
    config = CONFIGS[name]()
    small = {"global_batch_size": ROWS, "data.images.size": 12, "run.log_every": 1}
    with config.unlocked():
        config.update_from_flattened_dict(small | changes)
    return config


def two_steps(name, devices, *, seed=0, **changes):
    """The parameters, the memory and the losses after two steps on random images and texts."""
    # With gradient descent, a wrong factor of a gradient shows.
    descent = {"optimizer.name": "sgd", "optimizer.learning_rate": 0.05, "optimizer.clip_norm": 0.0}
    config = config_of(name, **descent, **{"optimizer.schedule": "constant"}, **changes)
    training = training_of(config, devices=jax.devices()[:devices])
    data, rng = training.settings.data, np.random.default_rng(seed)
    state, losses = training.init(2 * ROWS), []
    for step in range(2):
        rows = np.arange(step * ROWS, (step + 1) * ROWS, dtype=np.int32)
        batch = {
            side: modality_of(data, side).random_inputs(data, side, rng, ROWS) for side in SIDES
        }
        batch |= {"row": rows, "text": rows, "group": rows // 2}
        state, metrics = training.train_step(state, put_batch(batch, training.mesh))
        losses.append(metrics.loss)
    memory = {
        "bank": {side: bank.vectors for side, bank in state.memory.get("bank", {}).items()},
        "momentum": state.memory.get("momentum", {}),
    }
    return jax.device_get({"params": state.params, "memory": memory, "losses": losses})


# MoCo has SimCLR's encoder and more states.
@pytest.mark.parametrize("name", some_slow(CONFIGS, ("moco", "image_text")))
def test_any_mesh_and_any_chunk_give_the_update_of_one_device(name):
    wanted = two_steps(name, 1, **{"loss.implementation": "reference"})
    found = two_steps(
        name,
        8,
        **{"loss.implementation": "tiled", "loss.exchange": "ring", "grad_cache.chunk_size": 2},
    )
    errors = relative_errors(found, wanted)
    assert max(errors.values()) < 1e-3, errors
    assert ("memory" in str(errors)) == (name == "moco")


def test_other_images_give_another_update():
    """The tolerance of the test above would notice."""
    wanted, found = (two_steps("simclr", 1, seed=seed) for seed in range(2))
    errors = relative_errors(found["params"]["towers"], wanted["params"]["towers"])
    assert max(errors.values()) > 1e-2


@pytest.fixture(scope="module")
def glyphs(tmp_path_factory):
    """The folder of the pictures of the letters."""
    from jaxcl.data.images.glyphs import prepare_glyphs

    folder = tmp_path_factory.mktemp("glyphs")
    characters = string.ascii_letters + "".join(map(chr, range(0x410, 0x450)))
    return prepare_glyphs(folder, characters=characters).directory


def run_of(name, glyphs, **changes):
    every = {"evaluate": STEPS, "checkpoint": STEPS // 2}
    small = {f"run.{what}_every": steps for what, steps in every.items()}
    small |= {"steps": STEPS, "data.name": str(glyphs), "run.data_dir": str(glyphs.parent)}
    return config_of(name, **small | changes)


# `test_train_images.py` resumes a run of captions and images.
@pytest.mark.parametrize("name", some_slow(CONFIGS, ("moco",)))
def test_a_stopped_run_resumes_as_if_it_had_not_stopped(name, glyphs, tmp_path, monkeypatch):
    config = run_of(name, glyphs)
    results = train(config, tmp_path / "whole")
    half_run(monkeypatch, config, tmp_path / "halves")
    assert train(config, tmp_path / "halves") == results
    whole, halves = (final_state(tmp_path / one, step=STEPS) for one in ("whole", "halves"))
    for path, leaf in jax.tree_util.tree_leaves_with_path(whole):
        other = dict(jax.tree_util.tree_leaves_with_path(halves))[path]
        assert bits(leaf) == bits(other), jax.tree_util.keystr(path)
    assert unclocked(tmp_path / "whole") == unclocked(tmp_path / "halves")
    assert set(results["metrics"]) == {"validation", "test"}


def test_evaluation_may_leave_the_projection_head_out(glyphs, tmp_path):
    import jaxcl

    options = {"model.options.head": (20,), "steps": 2}
    config = run_of("simclr", glyphs, **options, **{"run.checkpoint_every": 2})
    train(config, tmp_path / "head")
    config.evaluation.projection_head = False
    results = train(config, tmp_path / "features")
    first, second = (final_state(tmp_path / one, step=2) for one in ("head", "features"))
    for ours, theirs in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert bits(ours) == bits(theirs)  # training is the same
    assert results != json.loads((tmp_path / "head" / "results.json").read_text())
    image = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    for folder, width in {"head": 16, "features": 32}.items():
        model = jaxcl.load(tmp_path / folder)
        vectors = model.encode(images=[image])
        assert vectors.shape == (1, width)
        assert model.dim == width
        run = open_run(tmp_path / folder)
        np.testing.assert_allclose(run.encoder.encode("query", [image]), vectors, atol=1e-6)


def test_an_encoder_without_a_projection_head_is_an_error():
    config = config_of("image_text", **{"evaluation.projection_head": False})
    with pytest.raises(ValueError, match=r"model\.key has no projection head \(StaticEncoder\)"):
        read_settings(config)


def test_features_of_different_widths_are_an_error():
    config = config_of("simclr", **{"evaluation.projection_head": False, "model.shared": False})
    with config.unlocked():
        config.model.key.name = "convnet"
        config.model.key.options.update({"widths": (4,), "hidden_dim": 8})
    with pytest.raises(ValueError, match=r"queries and keys have different dimensions, .*32.* 8"):
        training_of(config)


@pytest.mark.parametrize(
    ("module", "variant"), [(simclr, "views"), (moco, "views"), (image_text, "siglip")]
)
def test_other_variants_can_be_read(module, variant):
    config = module.get_config(variant)
    config.data.name = config.data.name or "folder"
    settings = read_settings(config)
    assert settings.evaluation.projection_head == (variant != "views")
    with pytest.raises(ValueError, match="variant 'other' is unknown; use default"):
        module.get_config("other")


def shrunk(config, **changes):
    """A config of files of images, at a size that trains in seconds."""
    small = {"steps": 2, "global_batch_size": 8, "run.checkpoint_every": 2, "run.evaluate_every": 2}
    small |= {"optimizer.warmup_steps": 1, "grad_cache.chunk_size": 4, "run.log_every": 1}
    config.unlock()
    config.update_from_flattened_dict(small | changes)
    config.lock()
    return config


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    """A file of captions of images, in folders of two classes."""
    folder = tmp_path_factory.mktemp("captions")
    rows = []
    for number in range(24):
        name = f"{('cat', 'dog')[number % 2]}/{number}.png"
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(picture(number))
        rows.append({"image": name, "caption": f"read the file number {number}"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


HELD_OUT = {"train": "rest", "validation": "train[:30%]"}


def test_two_views_of_each_image_of_a_folder_train_a_residual_network(captions, tmp_path):
    config = shrunk(
        simclr.get_config("views"),
        **{"data.name": str(captions), "data.splits": HELD_OUT, "data.images.size": 16},
        **{"run.data_dir": str(tmp_path / "data"), "model.dim": 8, "model.options.head": (12,)},
        **{"model.options.width": 8, "model.options.stages": (1, 1)},
        **{"grad_cache.chunk_size": None},
    )
    results = train(config, tmp_path / "run")
    assert sum(results["rows"].values()) == 24
    assert results["metrics"]["validation"]["plain"].keys() == {"dense"}
    losses = [record["loss"] for record in unclocked(tmp_path / "run") if "loss" in record]
    assert len(losses) == 2
    assert np.isfinite(losses).all()


def test_captions_train_with_a_frozen_encoder_of_images(captions, tmp_path):
    folder = write_tiny_towers(tmp_path / "vit", "vit")
    config = shrunk(
        image_text.get_config("locked"),
        **{"data.name": str(captions / "rows.jsonl"), "data.splits": HELD_OUT},
        **{"run.data_dir": str(tmp_path / "data"), "model.pretrained": str(folder)},
        **{"data.vocabulary_size": 300, "data.max_tokens.key": 8, "optimizer.warmup_steps": 0},
        **{"model.key.options.hidden_dim": 8, "model.key.options.num_layers": 1},
        **{"model.key.options.num_heads": 2, "model.key.options.mlp_dim": 8},
    )
    results = train(config, tmp_path / "run")
    assert set(results["metrics"]["validation"]) == {"image to text", "text to image"}
    settings = read_settings(config)
    first = training_of(config).init(16).params["towers"]
    last = final_state(tmp_path / "run", step=2).params["towers"]
    assert settings.optimizer.freeze == ("towers/query/*",)
    equal = {
        side: all(
            bits(ours) == bits(theirs)
            for ours, theirs in zip(
                jax.tree.leaves(first[side]), jax.tree.leaves(last[side]), strict=True
            )
        )
        for side in SIDES
    }
    assert equal == {"query": True, "key": False}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["simclr", "image_text"])
def test_two_processes_train_as_one_does(name, glyphs, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    small = {"steps": STEPS, "global_batch_size": ROWS, "data.images.size": 12, "run.log_every": 1}
    small |= {"data.name": glyphs, "run.data_dir": glyphs.parent, "run.evaluate_every": STEPS}
    flags = [f"--config.{setting}={value}" for setting, value in small.items()]
    command = [sys.executable, "-m", "jaxcl.train", f"--config={ROOT}/configs/{name}.py:smoke"]

    def started(workdir, devices, **environment):
        devices = f"--xla_force_host_platform_device_count={devices}"
        return subprocess.Popen(
            [*command, *flags, f"--workdir={workdir}"],
            cwd=ROOT,
            env=os.environ | {"XLA_FLAGS": devices, "JAX_PLATFORMS": "cpu"} | environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    of_two = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
    processes = [started(tmp_path / "one", 2)]
    processes += [started(tmp_path / "two", 1, **of_two, JAX_PROCESS_ID=str(i)) for i in range(2)]
    try:
        outputs = [one.communicate(timeout=900)[0] for one in processes]
    finally:
        for one in processes:
            one.kill()
    assert [one.returncode for one in processes] == [0, 0, 0], outputs
    one, two = (unclocked(tmp_path / workdir) for workdir in ("one", "two"))
    assert [record["step"] for record in one] == [record["step"] for record in two]
    for ours, theirs in zip(two, one, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    with np.load(tmp_path / "one" / "ranks.npz") as wanted:
        ranks = dict(wanted)
    with np.load(tmp_path / "two" / "ranks.npz") as found:
        for place, of_place in ranks.items():
            np.testing.assert_array_equal(found[place], of_place)
