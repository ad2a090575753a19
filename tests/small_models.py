"""A small text encoder that is quick to compile, and a small run."""

import jax.numpy as jnp
import numpy as np

from jaxcl.data.prepare import prepare_data
from jaxcl.data.text_rule import TextRule
from jaxcl.data.tokenizer import train_tokenizer
from jaxcl.ops.mesh import make_mesh
from jaxcl.ops.vectors import normalise
from jaxcl.run.checkpoint import Checkpoints
from jaxcl.run.embedding_model import EmbeddingModel
from jaxcl.run.initial import keep_pretrained_files
from jaxcl.run.training import build_training
from jaxcl.run.workdir import claim_workdir
from jaxcl.settings.config_files import load_config
from jaxcl.settings.read import read_settings
from jaxcl.typing import PADDING_ID, SIDES
from tests.helpers import record_of
from tests.prepared_data import prepare_pairs

LONGEST, DIM, VOCABULARY = 40, 16, 60


def encode(params, side, inputs, rngs=None):
    """A weighted mean over the tokens, with weights that decrease with the position."""
    tokens = inputs["tokens"]
    weights = jnp.where(tokens != PADDING_ID, 0.9 ** jnp.arange(tokens.shape[1]), 0)
    return normalise(jnp.einsum("bt,btd->bd", weights, params[side][tokens]))


def small_model(texts, *, encode=encode, **options):
    """A model with a table for each side, and a tokenizer trained on these texts."""
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


def small_config(folder):
    """The config of a static encoder for each side, with queries of up to three tokens."""
    config = load_config("base")
    config.data.name = str(prepare_pairs(folder / "data"))
    config.data.splits = {"train": "train", "validation": "dev"}
    config.data.vocabulary_size = 60
    config.data.max_tokens = {"query": 3, "key": 12}
    config.model.dim = DIM
    config.model.shared = False
    config.global_batch_size = 8
    config.run.data_dir = str(folder / "data")
    return config


def small_run(folder, **changes):
    """Write the workdir of a run with its initial parameters as the only checkpoint."""
    config = small_config(folder)
    config.update_from_flattened_dict(changes)
    workdir, settings = folder / "run", read_settings(config)
    claim_workdir(workdir, settings)
    keep_pretrained_files(settings, workdir)
    prepare_data(settings.data, data_dir=folder / "data", workdir=workdir)
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(1, build_training(settings).init(), record_of(workdir))
    return workdir
