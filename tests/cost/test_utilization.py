"""The arithmetic of a model, compared with a formula."""

import jax
import pytest
from jaxcl.configs.code_search_transformer import get_config

from jaxcl.cost.chips import CHIPS
from jaxcl.cost.utilization import model_flops, peak_flops
from jaxcl.run.training import build_towers
from jaxcl.settings.read import read_settings


def test_a_transformer_s_products_are_those_of_the_formula():
    config = get_config("smoke")
    options, size = config.model.options, config.global_batch_size
    h, mlp, layers = options.hidden_dim, options.mlp_dim, options.num_layers
    forward = 0
    for width in config.data.max_tokens.values():
        projections = 2 * width * (4 * h**2 + 2 * h * mlp)
        attention = 2 * 2 * width**2 * h
        pooling = 2 * width * h + 2 * h * config.model.dim
        forward += size * (layers * (projections + attention) + pooling)
    scores = 2 * size**2 * config.model.dim
    for remat in (False, True):  # recomputation is not counted
        config.model.options.remat = remat
        settings = read_settings(config)
        towers = build_towers(settings)
        assert model_flops(settings, towers) == 3 * (forward + scores)


class Device:
    def __init__(self, kind):
        self.device_kind = kind


def test_the_peak_is_known_of_chips_that_are_known():
    v5e = CHIPS["v5e"].flops
    assert peak_flops([Device("TPU v5 lite")] * 4) == pytest.approx(4 * v5e)
    assert peak_flops([Device("TPU v5 lite"), Device("cpu")]) is None
    assert peak_flops(jax.devices()) is None
    assert peak_flops([Device("NVIDIA H100 80GB HBM3")]) == CHIPS["H100"].flops


def test_a_frozen_matrix_saves_the_product_of_its_gradient():
    config = get_config("smoke")
    h, size = config.model.options.hidden_dim, config.global_batch_size
    tokens = size * sum(config.data.max_tokens.values())
    for remat in (False, True):
        config.model.options.remat = remat
        settings = read_settings(config)
        towers = build_towers(settings)
        whole = model_flops(settings, towers)
        # The second layer, since the inputs of the first need no gradient in any case.
        saved = whole - model_flops(settings, towers, frozen={"towers/both/blocks/1/output/kernel"})
        assert saved == 2 * tokens * h**2
