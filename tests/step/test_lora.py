"""Training with adapters: exact on any mesh and with gradient caching; the base keeps its bits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcl.models import TransformerEncoder, make_towers
from jaxcl.models.lora import Lora, add_adapters, frozen_base
from jaxcl.models.trainable import parameter_paths, split
from jaxcl.step import parameter_sharding
from tests.helpers import bits, relative_errors, some_slow
from tests.step import test_frozen
from tests.step.test_frozen import CHUNKS, SHARDED, start, step_of
from tests.step.test_train_step import on_mesh, some_batch

LORA = Lora(rank=3, alpha=6.0, also_train=("*/projection/*",))


def make_encoder(rngs, **options):
    encoder = TransformerEncoder(
        50,
        dim=8,
        max_tokens=9,
        hidden_dim=16,
        num_layers=2,
        num_heads=2,
        mlp_dim=16,
        compute_dtype="float64",
        rngs=rngs,
        **options,
    )
    return add_adapters(encoder, LORA, rngs=rngs)


def towers_of(**options):
    """Towers whose adapters are not zero, so that both matrices have a gradient at once."""
    towers = make_towers(lambda rngs: make_encoder(rngs, **options))

    def init(key):
        def moved(path, leaf):
            if path[-1].key != "lora_b":
                return leaf
            return 0.1 * jax.random.normal(key, leaf.shape, leaf.dtype)

        return jax.tree_util.tree_map_with_path(moved, towers.init(key))

    return towers._replace(init=init)


TOWERS = {"adapters": towers_of(), "adapters in one loop": towers_of(scan_layers=True, remat=True)}


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    monkeypatch.setattr(parameter_sharding, "_WORTH_CUTTING", 1)
    for name, towers in TOWERS.items():
        monkeypatch.setitem(test_frozen.TOWERS, name, towers)


def frozen_of(name):
    params = {"towers": jax.eval_shape(TOWERS[name].init, jax.random.key(0))}
    return frozen_base(LORA, parameter_paths(params))


def trained(name, shape, chunks, *, steps=3):
    """The trained parameters, the optimizer and the metrics after some steps."""
    frozen, optimizer = frozen_of(name), optax.adam(1e-2, eps=1e-3)
    state, mesh = start(name, frozen=frozen, optimizer=optimizer, shape=shape)
    before = jax.device_get(state.params)
    step = step_of(name, mesh, frozen=frozen, optimizer=optimizer, chunk_sizes=chunks)
    for _ in range(steps):
        state, metrics = step(state, on_mesh(some_batch(), mesh))
    after = jax.device_get(state.params)
    held, was = (split(tree, frozen)[1] for tree in (after, before))
    assert jax.tree.map(bits, held) == jax.tree.map(bits, was)
    moved = jax.tree.map(lambda new, old: np.abs(new - old).max(), after, before)
    assert min(jax.tree.leaves(split(moved, frozen)[0])) > 1e-4
    return split(after, frozen)[0], state.optimizer, metrics.loss, metrics.leaf_gradient_norms


@pytest.mark.parametrize(
    ("shape", "chunks"),
    [
        SHARDED,
        pytest.param({"data": 8}, None, marks=pytest.mark.slow),
        pytest.param({"data": 1}, CHUNKS, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", some_slow(TOWERS, ("adapters in one loop",)))
def test_training_with_adapters_is_that_of_one_device(name, shape, chunks, x64):
    wanted, found = trained(name, {"data": 1}, None), trained(name, shape, chunks)
    assert parameter_paths(found[3]) == parameter_paths(wanted[0])
    errors = relative_errors(*jax.tree.map(np.asarray, (found, wanted)))
    assert max(errors.values()) < 1e-9, errors


def test_the_trained_parameters_are_the_adapters_the_temperature_and_the_chosen_ones():
    params = jax.eval_shape(TOWERS["adapters"].init, jax.random.key(0))
    paths = parameter_paths({"towers": params, "log_temperature": jnp.float32(0)})
    left = {path.rpartition("/")[2] for path in {*paths} - frozen_of("adapters")}
    assert left == {"lora_a", "lora_b", "log_temperature", "kernel", "bias"}
    base = {*paths} - frozen_of("adapters") - {path for path in paths if "lora_" in path}
    assert base == {
        "log_temperature",
        "towers/both/projection/kernel",
        "towers/both/projection/bias",
    }
