"""Every part of training resumes bit for bit: 2N steps are N, a checkpoint, and N in a new program.

`tests/test_train_optimizer.py` and `tests/test_resume.py` resume whole runs. Here only train steps
run, which is fast enough for every optimizer and for parts of training in combination.
"""

import jax
import numpy as np
import pytest

from jaxcl.ops.mesh import put_batch
from jaxcl.run.checkpoint import Checkpoints
from jaxcl.run.training import build_training
from jaxcl.settings.optimizers import OPTIMIZERS
from jaxcl.settings.read import read_settings
from tests.helpers import bits, some_slow

ROWS, LONGEST, VOCABULARY = 16, 12, 20
STEPS, SAVED = 6, 3

pytestmark = [
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

STATIC = {"model.name": "static", "model.options.hidden_dim": 12}
TRANSFORMER = {
    "model.name": "transformer",
    "model.options.max_tokens": LONGEST,
    "model.options.hidden_dim": 12,
    "model.options.num_layers": 2,
    "model.options.num_heads": 2,
    "model.options.mlp_dim": 16,
    "model.options.dropout": 0.2,
    "model.options.scan_layers": True,  # compiles faster
}
GROUPS = {
    "optimizer.rates": (("*table", 0.5),),
    "optimizer.clip_groups": (("log_temperature", 1.0),),
    "optimizer.freeze": ("*/position_weight",),
    "optimizer.weight_decay": 0.01,
    "optimizer.no_decay": ("*table",),
}
ADAPTERS = {"model.lora.rank": 2}
AVERAGE = {"optimizer.average_decay": 0.7}
ACCUMULATED = {"optimizer.accumulate_steps": 2}  # an update is half made when the state is saved


def settings_of(*changes):
    """The settings of a small run, with changes in order."""
    config = {
        "steps": STEPS,
        "global_batch_size": ROWS,
        "data.vocabulary_size": VOCABULARY,
        "data.max_tokens.query": LONGEST,
        "data.max_tokens.key": LONGEST,
        "model.dim": 8,
        "optimizer.learning_rate": 0.02,
        "optimizer.warmup_steps": 2,
    }
    for change in changes:
        config |= change
    return read_settings(_nested(config))


def _nested(flat):
    nested = {}
    for name, value in flat.items():
        *sections, field = name.split(".")
        section = nested
        for one in sections:
            section = section.setdefault(one, {})
        section[field] = value
    return nested


def optimizer_case(name):
    options = {"adafactor": {"optimizer.options.min_dim_size_to_factor": 4}}.get(name, {})
    momentum = {"optimizer.options.momentum": 0.5} if name == "adafactor" else {}
    return settings_of(STATIC, GROUPS, {"optimizer.name": name}, options, momentum)


CASES = {
    "an average": settings_of(STATIC, AVERAGE),
    "accumulated gradients": settings_of(STATIC, ACCUMULATED, AVERAGE),
    "accumulated gradients of muon": settings_of(STATIC, ACCUMULATED, {"optimizer.name": "muon"}),
    "rates by layer": settings_of(
        TRANSFORMER, GROUPS, {"optimizer.layer_decay": 0.8, "optimizer.freeze": ("*norm*",)}
    ),
    "adapters": settings_of(TRANSFORMER, ADAPTERS),
}


def batch_of(step, settings):
    """Different texts in each step, of different lengths."""
    rng = np.random.default_rng(step)
    rows = np.arange(settings.global_batch_size, dtype=np.int32)
    sides = {}
    for side, longest in settings.data.max_tokens._asdict().items():
        length = rng.integers(1, longest + 1, len(rows)).astype(np.int32)
        tokens = rng.integers(1, VOCABULARY, (len(rows), longest)).astype(np.int32)
        tokens = np.where(np.arange(longest) < length[:, None], tokens, 0)
        sides[side] = {"tokens": tokens, "length": length}
    return {**sides, "row": rows, "group": rows, "text": rows}


def steps_of(program, state, steps, batch_of=batch_of):
    """The state after some steps, and the bits of their losses."""
    losses = []
    for step in steps:
        batch = put_batch(batch_of(step, program.settings), program.mesh)
        state, metrics = program.train_step(state, batch)
        losses.append(bits(metrics.loss))
    return state, losses


def program_of(settings, buckets=None):
    """The functions of a run on two devices."""
    return build_training(settings, devices=jax.devices()[:2], buckets=buckets)


def whole_and_resumed(
    program,
    folder,
    *,
    resumed_by=None,
    restored=lambda program, state: state,
    batch_of=batch_of,
):
    """The last state and losses of a run, without and with an interruption.

    The second program is built like the first one; a negative control passes another as
    `resumed_by`, or changes the restored state.
    """
    with Checkpoints(folder) as checkpoints:
        state, _ = steps_of(program, program.init(), range(SAVED), batch_of)
        checkpoints.save(SAVED, state)
        whole = steps_of(program, state, range(SAVED, STEPS), batch_of)
    program = resumed_by or program_of(program.settings, program.buckets)
    with Checkpoints(folder, read_only=True) as checkpoints:
        state = checkpoints.restore_latest(program.abstract_state()).state
    assert int(state.step) == SAVED
    return whole, steps_of(program, restored(program, state), range(SAVED, STEPS), batch_of)


def assert_resumes(program, folder, **options):
    (whole, losses), (resumed, again) = whole_and_resumed(program, folder, **options)
    assert jax.tree.map(bits, resumed) == jax.tree.map(bits, whole)
    assert again == losses
    assert len(set(losses)) > 1  # an update changes the loss
    return resumed


@pytest.mark.parametrize("name", some_slow(OPTIMIZERS, ("adafactor", "muon", "sgd")))
def test_every_optimizer_resumes_bitwise(name, tmp_path):
    assert_resumes(program_of(optimizer_case(name)), tmp_path)


@pytest.mark.parametrize("name", some_slow(CASES, ("an average", "accumulated gradients")))
def test_every_part_of_training_resumes_bitwise(name, tmp_path):
    assert_resumes(program_of(CASES[name]), tmp_path)


@pytest.mark.parametrize(
    "part",
    some_slow(["step", "key", "optimizer", "average", "half an update"], ("half an update",)),
)
def test_a_part_of_the_state_that_is_lost_fails_these_tests(part, tmp_path):
    """Negative control: this part is that of a new run."""
    settings = settings_of(STATIC, ACCUMULATED, AVERAGE, {"augmentation.name": "token_dropout"})

    def without(program, state):
        new = program.init()
        if part == "average":
            return state._replace(memory=new.memory)
        if part == "key":
            return state._replace(key=jax.random.key(1))
        if part == "half an update":
            gradients = new.optimizer.acc_grads
            return state._replace(optimizer=state.optimizer._replace(acc_grads=gradients))
        return state._replace(**{part: getattr(new, part)})

    (whole, _), (resumed, _) = whole_and_resumed(program_of(settings), tmp_path, restored=without)
    ours, theirs = ((one.params, one.optimizer, one.memory) for one in (resumed, whole))
    assert jax.tree.map(bits, ours) != jax.tree.map(bits, theirs)
