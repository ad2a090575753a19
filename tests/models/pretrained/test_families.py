import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.models.pretrained.families import FAMILIES
from tests.helpers import relative_error, relative_errors
from tests.models.pretrained.reference_models import (
    TRANSFORMERS,
    as_parameters,
    hidden_states,
    read_config,
    read_parameters,
    read_values,
)


@pytest.fixture(scope="module", params=TRANSFORMERS)
def name(request):
    return request.param


def mask_of(values):
    return np.arange(values["tokens"].shape[1]) < values["length"][:, None]


def states_of(name, **changes):
    """The hidden states at the tokens of the reference's texts, and the reference's own."""
    values = read_values(name)
    mask = mask_of(values)
    config = read_config(name) | changes
    found = jax.jit(lambda p: hidden_states(config, p, values["tokens"], mask))(
        read_parameters(name)
    )
    return np.asarray(found)[mask], values["last"][mask]


@pytest.mark.smoke
def test_hidden_states_are_those_of_transformers(name):
    found, wanted = states_of(name)
    assert relative_error(found, wanted) < 1e-5
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("bert", {"hidden_act": "gelu_new"}),
        ("bert", {"layer_norm_eps": 1e-4}),
        ("distilbert", {"activation": "gelu_new"}),
        ("modernbert", {"hidden_activation": "gelu_new"}),
        ("modernbert", {"local_attention": 6}),
        ("modernbert", {"local_attention": 10}),
        ("modernbert", {"layer_types": ["full_attention"] * 4}),
        ("modernbert", {"rope_parameters": {"full_attention": {"rope_theta": 10_000.0}}}),
        ("modernbert", {"rope_parameters": {"sliding_attention": {"rope_theta": 160_000.0}}}),
        ("modernbert", {"norm_eps": 1e-4}),
        ("mpnet", {"layer_norm_eps": 1e-4}),
        ("roberta", {"pad_token_id": 0}),
        ("roberta", {"layer_norm_eps": 1e-4}),
        ("xlm-roberta", {"pad_token_id": 2}),
    ],
)
def test_another_value_in_the_config_gives_other_states(name, change):
    found, wanted = states_of(name, **change)
    assert relative_error(found, wanted) > 3e-5


def test_gradients_are_those_of_transformers(name):
    values, config = read_values(name), read_config(name)
    mask = jnp.asarray(mask_of(values))
    cotangent = np.cos(np.arange(values["mean"].size)).reshape(values["mean"].shape)

    def scalar(params):
        hidden = hidden_states(config, params, values["tokens"], mask)
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
        return (mean * cotangent).sum()

    gradients = jax.jit(jax.grad(scalar))(read_parameters(name))
    stored = {
        key.removeprefix("gradient "): value
        for key, value in values.items()
        if key.startswith("gradient ")
    }
    assert set(stored) == {t.name for t in FAMILIES[name].tensors(config).values()}
    errors = relative_errors(
        _without_key_biases(gradients), _without_key_biases(as_parameters(config, stored))
    )
    assert max(errors.values()) < 1e-4, errors


def _without_key_biases(gradients):
    """A key's bias adds the same to all scores of a query: its gradient is rounding errors."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: None if "['key']['bias']" in jax.tree_util.keystr(path) else leaf,
        gradients,
    )
