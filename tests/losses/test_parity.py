"""Losses agree with sentence-transformers, whose values are stored in `values/`."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.losses import (
    ExplicitNegatives,
    cosent_loss,
    embedding_distillation_loss,
    infonce_loss,
    margin_mse_loss,
    matryoshka,
)
from jaxcl.losses.comparison import DIRECTIONS
from tests.helpers import loss_arguments, unit_vectors

pytestmark = pytest.mark.usefixtures("x64")

RECORD = json.loads(
    (Path(__file__).parent / "values" / "sentence_transformers_losses.json").read_text()
)
VALUES = RECORD["values"]
ROWS, DIM, NEGATIVES = 7, 12, 3
ONE_WAY = {"directions": ("query_to_key",)}
JOINT = {"directions": DIRECTIONS, "partition": "joint"}
EXPLICIT = {**ONE_WAY, "negatives": (2, ROWS, NEGATIVES, DIM)}
GIST = {"directions": ("query_to_key", "query_to_query", "key_to_key"), "partition": "joint"}

# In addition to options of infonce_loss, vectors are given by seed and shape.
OPTIONS = {
    "query_to_doc": ONE_WAY,
    "symmetric": {},
    "joint, two": {"partition": "joint"},
    "joint, all": JOINT,
    "explicit": EXPLICIT,
    "explicit, joint, all": {**EXPLICIT, **JOINT},
    "explicit, hardness of in_batch_negatives": {**EXPLICIT, "hardness": 5.0},
    "explicit, hardness of hard_negatives": {**EXPLICIT, "negative_hardness": 5.0},
    "explicit, hardness of all_negatives": {
        **EXPLICIT,
        "hardness": 5.0,
        "negative_hardness": 5.0,
    },
    "gist": {**GIST, "margin": 0.0, "guides": True},
    "gist, margin": {**GIST, "margin": 0.2, "guides": True},
    "gist, relative margin": {**GIST, "relative_margin": 0.2, "guides": True},
    "gist, keys alone": {**ONE_WAY, "margin": 0.0, "guides": True},
    "gist, explicit": {
        "directions": ("query_to_key", "query_to_query"),
        "partition": "joint",
        "negatives": (2, ROWS, 1, DIM),
        "negative_guides": (5, ROWS, 1, 5),
        "margin": 0.0,
        "guides": True,
    },
    "matryoshka": ONE_WAY,
}


def test_every_value_is_compared():
    assert set(OPTIONS) == set(VALUES)
    assert len(set(VALUES.values())) == len(VALUES)


@pytest.mark.parametrize("implementation", ["reference", "tiled"])
@pytest.mark.parametrize("name", VALUES)
def test_the_mean_is_that_of_sentence_transformers(name, implementation):
    loss_fn, options = infonce_loss, dict(OPTIONS[name])
    vectors = {
        name: unit_vectors(*options.pop(name))
        for name in ("negatives", "negative_guides")
        if name in options
    }
    if vectors:
        explicit = ExplicitNegatives(vectors["negatives"], guides=vectors.get("negative_guides"))
        options["negatives"] = {"explicit": explicit}
    if options.pop("guides", False):
        options["guides"] = unit_vectors(3, ROWS, 5), unit_vectors(4, ROWS, 5)
    if name == "matryoshka":
        loss_fn = matryoshka(infonce_loss, dims=(12, 8, 3), weights=(1.0, 0.5, 0.25))
    sides = unit_vectors(0, ROWS, DIM), unit_vectors(1, ROWS, DIM)
    loss = loss_fn(
        *sides, temperature=0.05, implementation=implementation, **loss_arguments(**options)
    )
    assert float(loss.mean()) == pytest.approx(VALUES[name], rel=1e-5)


def labelled_losses():
    """The losses that compare embeddings with scores, or with the embeddings of a teacher."""
    rng = np.random.default_rng(6)
    ratings = jnp.asarray(rng.integers(0, 5, ROWS) / 4)
    scores = jnp.asarray(rng.normal(size=(ROWS, 1 + NEGATIVES)))
    sides = unit_vectors(0, ROWS, DIM), unit_vectors(1, ROWS, DIM)
    negatives = unit_vectors(2, ROWS, NEGATIVES, DIM)
    several, one = ({"explicit": ExplicitNegatives(negatives[:, :n])} for n in (NEGATIVES, 1))
    teacher = {"query": unit_vectors(7, ROWS, DIM), "key": unit_vectors(8, ROWS, DIM)}
    cosines = embedding_distillation_loss(*sides, teacher_vectors=teacher)
    return {
        "cosent": cosent_loss(*sides, scores=ratings),
        "cosent, scale": cosent_loss(*sides, scores=ratings, temperature=1 / 3),
        "margin_mse": margin_mse_loss(*sides, teacher_scores=scores, negatives=several),
        "margin_mse, one": margin_mse_loss(*sides, teacher_scores=scores[:, :2], negatives=one),
        "embeddings, cosine": cosines,
        "embeddings, mse": cosines * 2 / DIM,  # of unit vectors
    }


def test_the_mean_of_a_labelled_loss_is_that_of_sentence_transformers():
    found = {name: float(loss.mean()) for name, loss in labelled_losses().items()}
    assert found == pytest.approx(RECORD["labelled"], rel=1e-5)


def test_lengths_that_do_not_fit_are_named():
    for options in ({"dims": ()}, {"dims": (2, 2)}, {"dims": (0,)}, {"dims": (1,), "weights": ()}):
        with pytest.raises(ValueError, match="one weight per length"):
            matryoshka(infonce_loss, **options)
    with pytest.raises(ValueError, match=r"dims=\(5,\) exceed the 4 features"):
        matryoshka(infonce_loss, dims=(5,))(jnp.eye(4), jnp.eye(4))
