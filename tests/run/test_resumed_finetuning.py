"""Fine-tuning resumes bit for bit: several widths, dropout views, adapters on a bfloat16 base.

Only train steps run, as in `test_resumed_states.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.models.trainable import merge, split
from jaxcl.step.length_buckets import Buckets
from jaxcl.typing import SIDES
from tests.helpers import bits, some_slow
from tests.run.test_resumed_states import (
    ACCUMULATED,
    AVERAGE,
    LONGEST,
    TRANSFORMER,
    assert_resumes,
    batch_of,
    program_of,
    settings_of,
    whole_and_resumed,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

BUCKETS = Buckets((5, LONGEST), (3, 2))  # chunks of sizes that do not divide the rows
SMALL = TRANSFORMER | {"model.options.num_layers": 1}
NARROW_BASE = {"model.lora.rank": 2, "model.lora.base_dtype": "bfloat16"}
CACHED = {"grad_cache.chunk_size": 3}
RATES = {"optimizer.freeze": ("*/narrow/lora_*",), "optimizer.layer_decay": 0.8}
MASKED = {"augmentation.name": "token_dropout", "augmentation.options.rate": 0.3}


def views_of(step, settings):
    """A batch of SimCSE: both sides are the same texts, and only dropout tells them apart."""
    batch = batch_of(step, settings)
    return batch | {"key": batch["query"]}


CASES = {
    "dropout views in several widths": (settings_of(SMALL), {"key": BUCKETS}, views_of),
    "a bfloat16 base": (settings_of(SMALL, NARROW_BASE), {}, batch_of),
    "everything": (
        settings_of(TRANSFORMER, NARROW_BASE, AVERAGE, ACCUMULATED, RATES, CACHED, MASKED),
        dict.fromkeys(SIDES, BUCKETS),
        views_of,
    ),
}
"""The settings, the widths of each side, and the batches of a run."""


@pytest.mark.parametrize("name", some_slow(CASES, ("dropout views in several widths",)))
def test_fine_tuning_resumes_bitwise(name, tmp_path):
    settings, buckets, batches = CASES[name]
    program = program_of(settings, buckets)
    first = jax.device_get(program.init().params)
    state = assert_resumes(program, tmp_path, batch_of=batches)
    trained, held = split(jax.device_get(state.params), program.frozen)
    before, was = split(first, program.frozen)
    assert jax.tree.map(bits, held) == jax.tree.map(bits, was)
    for leaf, initial in zip(jax.tree.leaves(trained), jax.tree.leaves(before), strict=True):
        assert bits(leaf) != bits(initial)
    if settings.model.lora.base_dtype is not None:
        assert held["towers"]["both"]["token_table"].dtype == jnp.bfloat16
        assert {leaf.dtype for leaf in jax.tree.leaves(trained)} == {np.dtype("float32")}


@pytest.mark.slow
@pytest.mark.parametrize("changed", ["a width", "the key of dropout", "the frozen base"])
def test_a_resumed_run_that_differs_fails_these_tests(changed, tmp_path):
    """Negative control: the second program cuts texts, or the restored state is another."""
    settings, buckets, batches = CASES["everything"]
    program, other = program_of(settings, buckets), None
    if changed == "a width":
        other = program_of(settings, dict.fromkeys(SIDES, BUCKETS._replace(widths=(5, 11))))

    def restored(_, state):
        if changed == "the key of dropout":
            return state._replace(key=jax.random.key(1))
        if changed == "the frozen base":
            trained, held = split(state.params, program.frozen)
            held = jax.tree.map(lambda leaf: jnp.asarray(1.01 * leaf, leaf.dtype), held)
            return state._replace(params=merge(trained, held))
        return state

    (whole, _), (resumed, _) = whole_and_resumed(
        program, tmp_path, resumed_by=other, restored=restored, batch_of=batches
    )
    ours, theirs = (split(state.params, program.frozen)[0] for state in (resumed, whole))
    assert jax.tree.map(bits, ours) != jax.tree.map(bits, theirs)
