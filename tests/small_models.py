"""A small text encoder, quick to compile."""

import jax.numpy as jnp
import numpy as np

from jaxcl.data.text_rule import TextRule
from jaxcl.data.tokenizer import train_tokenizer
from jaxcl.ops.mesh import make_mesh
from jaxcl.ops.vectors import normalise
from jaxcl.run.embedding_model import EmbeddingModel
from jaxcl.typing import PADDING_ID, SIDES

LONGEST, DIM, VOCABULARY = 40, 16, 60


def encode(params, side, inputs, rngs=None):
    """A weighted mean over the tokens; the weights fall with the position."""
    tokens = inputs["tokens"]
    weights = jnp.where(tokens != PADDING_ID, 0.9 ** jnp.arange(tokens.shape[1]), 0)
    return normalise(jnp.einsum("bt,btd->bd", weights, params[side][tokens]))


def small_model(texts, *, encode=encode, **options):
    """An encoder with a vocabulary of its own for each side, and a tokenizer of these texts."""
    rng = np.random.default_rng(0)
    rule = TextRule(max_tokens=LONGEST)
    return EmbeddingModel(
        source="here",
        encode=encode,
        params={side: rng.normal(size=(VOCABULARY, DIM)).astype(np.float32) for side in SIDES},
        mesh=make_mesh({"data": -1}),
        tokenizer=train_tokenizer(texts, vocabulary_size=VOCABULARY),
        rules={"query": rule, "key": rule._replace(prompt="open ")},
        dim=DIM,
        **options,
    )
