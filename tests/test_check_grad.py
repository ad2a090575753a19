"""The check of gradients: it accepts correct gradients, and rejects wrong ones."""

import jax
import numpy as np
import pytest

from jaxcl import check_grad
from jaxcl.check_grad import compare_gradients
from jaxcl.configs import code_search, code_search_transformer
from jaxcl.settings.read import read_settings


@pytest.mark.parametrize(
    "changes",
    [
        {"run.mesh": {"replica": 2, "data": 4}, "loss.masks": ("row", "group")},
        {"loss.exchange": "ring", "loss.implementation": "tiled"},
        {"grad_cache.chunk_tokens": 100, "model.shared": False},
        {"data.negatives": "some.npz", "loss.exchange": "ring", "loss.implementation": "tiled"},
        {"data.negatives": "some.npz", "loss.name": "distillation", "loss.masks": ()},
        {"data.score_field": "score", "loss.name": "cosent", "loss.masks": ()},
        pytest.param(
            {
                "negatives.bank.kind": "instance",
                "negatives.tiers.uniform": 10,
                "negatives.tiers.stratified": 6,
                "negatives.tiers.nearest": 3,
                "negatives.tiers.mixed_with_query": 2,
                "negatives.tiers.gradient": True,
                "loss.masks": ("text",),
                "loss.relative_margin": 0.05,
            },
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_every_gradient_agrees_with_one_device(changes):
    comparisons = compare_gradients(settings_of(code_search, changes))
    assert all(comparison.agrees for comparison in comparisons), comparisons
    assert {"log_temperature"} < {comparison.parameter for comparison in comparisons}
    np.testing.assert_allclose([comparison.ratio for comparison in comparisons], 1, atol=1e-3)


@pytest.mark.slow
def test_a_transformer_is_shrunk_and_agrees():
    comparisons = compare_gradients(
        read_settings(config_of(code_search_transformer, {"run.mesh": {"data": 8}}))
    )
    assert len(comparisons) > 20
    assert all(comparison.agrees for comparison in comparisons), comparisons


def test_a_gradient_that_is_too_large_shows_by_how_much(monkeypatch):
    build_loss = check_grad.build_loss

    def summed_over_devices(settings, towers, mesh):
        loss = build_loss(settings, towers, mesh)
        return lambda *arguments: (mesh.size * loss(*arguments)[0], {})

    monkeypatch.setattr(check_grad, "build_loss", summed_over_devices)
    comparisons = compare_gradients(settings_of(code_search, {}))
    assert not any(comparison.agrees for comparison in comparisons)
    np.testing.assert_allclose(
        [comparison.ratio for comparison in comparisons], jax.device_count(), rtol=1e-3
    )


def settings_of(module, changes):
    config = module.get_config("smoke")
    with config.unlocked():
        for name, value in changes.items():
            place, _, last = name.rpartition(".")
            (config[place] if place else config)[last] = value
    return read_settings(config)
