"""Adapters exported for peft: added to the original weights, they are the merged model."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxcl
from jaxcl.export import export
from tests.helpers import relative_error
from tests.models.pretrained.tiny import write_tiny_bert, write_tiny_decoder
from tests.saved_run import save_run, save_tuned_run

LORA = {"rank": 2, "alpha": 5.0}
WRITE = {"bert": write_tiny_bert, "decoder": write_tiny_decoder}


@pytest.mark.parametrize("name", WRITE)
def test_the_adapters_and_the_original_weights_are_the_merged_model(name, tmp_path):
    original = WRITE[name](tmp_path / "tiny")
    workdir = save_tuned_run(tmp_path / "run", original, model__lora=LORA)
    folder = export(workdir, tmp_path / "adapters", format="peft")
    merged = load_file(export(workdir, tmp_path / "merged") / "model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(original)
    assert (config["r"], config["lora_alpha"]) == (2, 5.0)
    adapters = load_file(folder / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapters.values()} == {np.dtype("float32")}
    before = load_file(original / "model.safetensors")
    for module in config["target_modules"]:
        a, b = (adapters.pop(f"base_model.model.{module}.lora_{one}.weight") for one in "AB")
        (weight,) = {f"{module}.weight", f"model.{module}.weight"} & before.keys()
        assert relative_error(merged[weight], before[weight]) > 1e-3
        change = 5.0 / 2 * (b.astype(float) @ a.astype(float))
        assert relative_error(before.pop(weight) + change, merged[weight]) < 1e-6
    assert not adapters
    for rest in before:  # nothing else was trained
        np.testing.assert_array_equal(merged[rest], before[rest], err_msg=rest)


def test_the_folder_has_the_modules_of_the_model_but_not_its_weights(tmp_path):
    original = write_tiny_bert(tmp_path / "tiny")
    workdir = save_tuned_run(tmp_path / "run", original, model__lora=LORA)
    folder = export(workdir, tmp_path / "adapters", format="peft", dtype="bfloat16")
    merged = export(workdir, tmp_path / "merged")
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    wanted = {path.relative_to(merged).as_posix() for path in merged.rglob("*") if path.is_file()}
    assert files == wanted - {"config.json", "model.safetensors"} | {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    card = (folder / "README.md").read_text()
    assert 'library_name: "peft"' in card
    assert "PeftModel.from_pretrained" in card
    assert str(tmp_path) not in card
    with pytest.raises(ValueError, match="it holds an adapter; merge it"):
        jaxcl.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__lora": {}}, r"writes adapters, but model\.lora\.rank is None; export the whole"),
        (
            {"model__lora": LORA | {"also_train": ("*norm*",)}},
            r"trained towers/both/encoder/.*norm.* in addition to its adapters, which an adapter",
        ),
    ],
)
def test_a_model_that_is_no_adapter_is_an_error(changes, message, tmp_path):
    workdir = save_tuned_run(tmp_path / "run", write_tiny_bert(tmp_path / "tiny"), **changes)
    with pytest.raises(ValueError, match=message):
        export(workdir, tmp_path / "adapters", format="peft")
    assert not (tmp_path / "adapters").exists()


def test_an_encoder_of_this_package_has_no_model_for_peft(tmp_path):
    lora = {"rank": 2, "targets": ("projection",)}
    changes = {"model__lora": lora, "model__options": {"hidden_dim": 8, "position_weights": False}}
    workdir = save_run(tmp_path / "run", **changes)
    with pytest.raises(ValueError, match=r"adapters of the model in model\.pretrained, which is "):
        export(workdir, tmp_path / "adapters", format="peft")
