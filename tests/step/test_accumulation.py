"""Accumulated gradients: the updates and the state of `optax.MultiSteps`, from fewer of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcl.step.accumulation import accumulate
from tests.helpers import relative_errors

EVERY = 3
PARAMS = {"kernel": jnp.ones((3, 2)), "bias": jnp.arange(1.0, 3.0)}
OPTIMIZER = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1), optax.scale(-0.1))


def gradients_of(step):
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), PARAMS)


def run(optimizer, *, steps):
    """The parameters, updates and states after each step."""
    params, state, history = PARAMS, optimizer.init(PARAMS), []
    update = jax.jit(optimizer.update)
    for step in range(steps):
        updates, state = update(gradients_of(step), state, params)
        params = optax.apply_updates(params, updates)
        history.append((params, updates, state))
    return history


def test_the_updates_and_the_states_are_those_of_multi_steps():
    theirs = optax.MultiSteps(OPTIMIZER, every_k_schedule=EVERY).gradient_transformation()
    for found, wanted in zip(
        run(accumulate(OPTIMIZER, every=EVERY), steps=2 * EVERY + 2),
        run(theirs, steps=2 * EVERY + 2),
        strict=True,
    ):
        assert jax.tree.structure(found) == jax.tree.structure(wanted)
        for ours, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            assert ours.dtype == other.dtype
            np.testing.assert_allclose(ours, other, rtol=1e-6, atol=1e-7)


def test_an_update_is_that_of_the_mean_of_its_gradients():
    wanted, state = PARAMS, OPTIMIZER.init(PARAMS)
    for update in range(2):
        steps = range(EVERY * update, EVERY * (update + 1))
        mean = jax.tree.map(lambda *of_step: sum(of_step) / EVERY, *map(gradients_of, steps))
        updates, state = OPTIMIZER.update(mean, state, wanted)
        wanted = optax.apply_updates(wanted, updates)
    history = run(accumulate(OPTIMIZER, every=EVERY), steps=2 * EVERY)
    params, _, state = history[-1]
    assert max(relative_errors(params, wanted).values()) < 1e-6
    assert int(state.gradient_step) == 2
    for step in (0, 1, 3, 4):
        assert not any(leaf.any() for leaf in jax.tree.leaves(history[step][1]))


@pytest.mark.parametrize("kind", ["accumulate", "MultiSteps"])
def test_the_optimizer_runs_in_the_last_batch_of_an_update_only(kind):
    """With `optax.MultiSteps`, it runs in every batch."""
    calls = []

    def update(gradients, state, params=None):
        jax.debug.callback(lambda: calls.append(None))
        return gradients, state

    counted = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    if kind == "accumulate":
        optimizer = accumulate(counted, every=EVERY)
    else:
        optimizer = optax.MultiSteps(counted, every_k_schedule=EVERY).gradient_transformation()
    run(optimizer, steps=2 * EVERY)
    jax.effects_barrier()
    assert len(calls) == (2 if kind == "accumulate" else 2 * EVERY)
