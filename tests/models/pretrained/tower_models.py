"""Load the towers of the tiny models that `reference/make_image_reference.py` writes."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxcl.models.pretrained.description import Computation
from jaxcl.models.pretrained.families import FAMILIES, TWO_TOWERS
from jaxcl.models.pretrained.two_towers import tower_config
from tests.models.pretrained.reference_models import (
    as_parameters,
    read_config,
    read_tensors,
)

PAIRS = ("clip", "siglip")
IMAGES = ("clip", "siglip", "vit", "dinov2")


def config_of(name, modality):
    """The config of one tower."""
    config = read_config(name)
    return tower_config(config, modality) if name in TWO_TOWERS else config


def without_prefixes(config, tensors):
    """The tensors by the names that the family declares."""
    (prefix,) = FAMILIES[config["model_type"]].prefixes
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def parameters_of(config, tensors, dtype=jnp.float32):
    return as_parameters(config, without_prefixes(config, tensors), dtype)


def read_tower(name, modality, dtype=jnp.float32):
    config = config_of(name, modality)
    return parameters_of(config, read_tensors(name), dtype)


def embed_with(config, params, *inputs, own=None, **options):
    """The embeddings of a family's module with exactly these parameters."""
    make = FAMILIES[config["model_type"]].make
    graph, abstract = nnx.split(
        nnx.eval_shape(lambda: make(config, Computation(**options), rngs=nnx.Rngs(0), **own or {})),
        nnx.Param,
    )
    assert jax.tree.structure(nnx.to_pure_dict(abstract)) == jax.tree.structure(params)
    return nnx.merge(graph, params)(*inputs)


def channels_last(pixels):
    return jnp.asarray(np.asarray(pixels).transpose(0, 2, 3, 1))


def mask_of(values):
    return jnp.arange(values["tokens"].shape[1]) < values["length"][:, None]
