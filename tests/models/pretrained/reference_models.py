"""Load the tiny models in `reference/`, which `make_reference.py` writes."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from jaxcl.models.pretrained.description import Computation, Pooling, PretrainedModel
from jaxcl.models.pretrained.encoder import PretrainedEncoder
from jaxcl.models.pretrained.families import FAMILIES

REFERENCE = Path(__file__).parent / "reference"
ENCODERS = ("bert", "distilbert", "modernbert", "mpnet", "roberta", "xlm-roberta")
DECODERS = (
    *("gemma3", "gemma3-bidirectional", "llama", "mistral", "mistral-bidirectional"),
    *("qwen2", "qwen3"),
)
TRANSFORMERS = (*ENCODERS, *DECODERS)


def read_config(name):
    return json.loads((REFERENCE / name / "config.json").read_text())


def family_of(name):
    return FAMILIES[read_config(name)["model_type"]]


def read_values(name):
    with np.load(REFERENCE / name / "values.npz") as values:
        return dict(values)


def describe(config, **changes):
    """A `PretrainedModel` with this config and no files."""
    family = FAMILIES[config["model_type"]]
    return PretrainedModel(
        path=REFERENCE,
        family=config["model_type"],
        config=config,
        encoder_folder="",
        pooling=Pooling(),
        dense=(),
        normalize=False,
        prompts={},
        similarity="cosine",
        special_tokens=True,
        skip_unknown=False,
        max_tokens=family.max_tokens(config),
        vocabulary_size=family.vocabulary_size(config),
        dim=family.hidden_dim(config),
        tensors={},
        files={},
    )._replace(**changes)


def as_parameters(config, tensors, dtype=jnp.float32):
    """Build the parameters of a family's module from named tensors."""
    nested = {}
    for path, tensor in FAMILIES[config["model_type"]].tensors(config).items():
        value = tensors[tensor.name]
        *parents, leaf = (int(part) if part.isdigit() else part for part in path.split("/"))
        node = nested
        for part in parents:
            node = node.setdefault(part, {})
        node[leaf] = jnp.asarray(value.T if tensor.transposed else value, dtype)
    return nested


def read_tensors(name):
    return load_file(REFERENCE / name / "model.safetensors")


def read_parameters(name, dtype=jnp.float32):
    return as_parameters(read_config(name), read_tensors(name), dtype)


def hidden_states(config, params, tokens, mask, rngs=None, **options):
    """Compute the states of a family's module with exactly these parameters."""
    make = FAMILIES[config["model_type"]].make
    graph, abstract = nnx.split(
        nnx.eval_shape(lambda: make(config, Computation(**options), rngs=nnx.Rngs(0))), nnx.Param
    )
    assert jax.tree.structure(nnx.to_pure_dict(abstract)) == jax.tree.structure(params)
    return nnx.merge(graph, params)(jnp.asarray(tokens), jnp.asarray(mask), rngs)


def embed(model, params, inputs, rngs=None, **options):
    """Compute the embeddings of a `PretrainedEncoder` with these parameters."""
    options = {"normalize": model.normalize} | options
    graph, _ = nnx.split(
        nnx.eval_shape(lambda: PretrainedEncoder(model, rngs=nnx.Rngs(0), **options)), nnx.Param
    )
    inputs = {key: jnp.asarray(value) for key, value in inputs.items()}
    return jax.jit(lambda params, *given: nnx.merge(graph, params)(*given))(params, inputs, rngs)


def without_key_biases(gradients):
    """Leave out key biases, which shift all scores of a query: their gradient is rounding error.

    This does not hold for rotary positions.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: None if "['key']['bias']" in jax.tree_util.keystr(path) else leaf,
        gradients,
    )
