"""Training with every kind of negatives at once, against the same steps in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcl.losses import LOSSES
from jaxcl.negatives.memory_bank import init_bank, update_instances
from jaxcl.negatives.mining import MiningRule
from jaxcl.negatives.tiers import TierBudgets, strata_of
from jaxcl.ops.mesh import make_mesh, put_batch
from jaxcl.run.checkpoint import Checkpoints
from jaxcl.step.batch_loss import BeyondBatch, make_loss
from jaxcl.step.mined_refresh import make_mined_refresh
from jaxcl.step.train_state import TrainState
from jaxcl.step.train_step import TemperatureBounds, make_train_step, state_sharding
from tests.helpers import bits, relative_error, towers_of

pytestmark = pytest.mark.usefixtures("x64")

ROWS, BATCH, DIM, STEPS, REFRESH_AT = 40, 8, 6, 9, 5
BUDGETS = TierBudgets(
    uniform=6,
    stratified=5,
    nearest=3,
    mixed=4,
    mixed_with_query=3,
    perturbed=2,
    hardest=4,
    degrees=25.0,
)
RULE = MiningRule(per_query=2, rank_range=(1, 7), relative_margin=0.02)
LEARNING_RATE, BANK_MOMENTUM, TOWER_MOMENTUM, RELATIVE_MARGIN = 0.3, 0.4, 0.9, 0.05
OPTIMIZER = optax.sgd(LEARNING_RATE)
BOUNDS = TemperatureBounds(initial=0.2, minimum=0.01, maximum=1.0)
TEXT = np.arange(ROWS) // 2 * 2  # pairs of rows share a text
GROUP = np.arange(ROWS, dtype=np.int32) % 3 * 10
OTHERS = ((3, 30), (5, 30), (7, 35))  # devices, and a batch size that they divide


def rows_of(step):
    return (np.arange(BATCH) * 5 + 3 * step) % ROWS


def initial(seed=0):
    rng = np.random.default_rng(seed)
    tables = {side: rng.normal(size=(ROWS, DIM)) for side in ("query", "key")}
    # A key is near its query, so that margins mask some negatives and allow others.
    tables["key"] = tables["query"] + 0.8 * tables["key"]
    return tables


def encode(params, side, inputs, rngs=None):
    found = params[side][inputs["tokens"][:, 0]]
    return found / jnp.linalg.norm(found, axis=1, keepdims=True)


def batch_of(step, mined):
    rows = rows_of(step).astype(np.int32)

    def labels(rows):
        return {"row": rows, "text": TEXT[rows].astype(np.int32), "group": GROUP[rows]}

    tokens = {"tokens": rows[:, None]}
    theirs = mined[rows]
    others = np.maximum(theirs, 0).astype(np.int32)
    explicit = {"inputs": {"tokens": others[:, :, None]}, "valid": theirs >= 0, **labels(others)}
    return {"query": tokens, "key": tokens, "negatives": explicit, **labels(rows)}


def functions(devices, **changes):
    """A mesh with this number of devices, and its training functions."""
    mesh = make_mesh({"data": devices}, devices=jax.devices()[:devices])

    def update(bank, vectors, rows, ids, groups, guides):
        return update_instances(bank, vectors, rows, groups, momentum=BANK_MOMENTUM, ids=ids)

    beyond = BeyondBatch(
        BUDGETS._replace(**changes),
        {"query": update, "key": update},
        guide=None,
        margins={"relative_margin": RELATIVE_MARGIN},
    )

    loss = make_loss(
        towers_of(encode), LOSSES["infonce"], mesh, masks={"ids": "text"}, beyond=beyond
    )
    step_fn = make_train_step(
        loss, OPTIMIZER, mesh, temperature=BOUNDS, momentum=lambda step: jnp.float64(TOWER_MOMENTUM)
    )
    return mesh, step_fn, make_mined_refresh(RULE, mesh, by_group=False)


def initial_state():
    params = {
        "towers": jax.tree.map(jnp.asarray, initial()),
        "log_temperature": jnp.log(jnp.float64(BOUNDS.initial)),
    }
    memory = {
        "bank": {
            side: init_bank(ROWS, DIM, dtype=jnp.dtype("float64")) for side in ("query", "key")
        },
        "momentum": jax.tree.map(jnp.array, params["towers"]),
        "mined": jnp.full((1_024, RULE.per_query), -1, jnp.int32),
        "strata": strata_of(GROUP, count=BUDGETS.stratified, proportions={0: 2, 10: 3}),
    }
    return TrainState(jnp.int32(0), params, OPTIMIZER.init(params), memory, jax.random.key(7))


def train_in_jax(devices, *, move=None, **changes):
    """The state after all steps, and their losses; `move` is (step, devices, folder)."""
    mesh, step_fn, refresh = functions(devices, **changes)
    state = initial_state()
    state = jax.device_put(state, state_sharding(mesh, state))
    losses = []
    for step in range(STEPS):
        if move is not None and step == move[0]:
            mesh, step_fn, refresh = functions(move[1])
            state = moved(state, step, mesh, move[2])
        batch = batch_of(step, np.asarray(state.memory["mined"]))
        state, metrics = step_fn(state, put_batch(batch, mesh))
        losses.append(float(metrics.loss))
        if step + 1 == REFRESH_AT:
            state, found = refresh(state)
            assert float(found["mined/per_row"]) > 1
    return jax.device_get(state._replace(key=jnp.zeros(()))), losses


def moved(state, step, mesh, folder):
    """The state, saved in float32 as in runs, and restored on another mesh."""
    state = cast(state, jnp.float32)
    before = jax.device_get(state.memory)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(step, state)
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        state_sharding(mesh, state),
    )
    with Checkpoints(folder) as checkpoints:
        state = checkpoints.restore_latest(abstract).state
    assert state.memory["bank"]["key"].vectors.sharding.mesh == mesh
    assert jax.tree.map(bits, before) == jax.tree.map(bits, state.memory)
    return cast(state, jnp.float64)


def cast(state, dtype):
    return jax.tree.map(
        lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, state
    )


class Restated:
    """The same in NumPy, with all scores of a query in one list, and gradients by hand."""

    def __init__(self, *, gradient=False, of_batch=False):
        self.towers = initial()
        self.momentum = initial()
        self.log_temperature = np.log(BOUNDS.initial)
        self.bank = {side: np.zeros((ROWS, DIM)) for side in ("query", "key")}
        self.written = np.zeros(ROWS, bool)
        self.mined = np.full((ROWS, RULE.per_query), -1)
        self.key = jax.random.key(7)
        self.gradient, self.of_batch = gradient, of_batch
        self.losses = []
        self.met = dict.fromkeys(("batch", "explicit", "shared", "nearest", "synthetic"), 0)
        self.counted = dict(self.met)

    def run(self):
        for step in range(STEPS):
            self.step(step)
            if step + 1 == REFRESH_AT:
                self.refresh(step + 1)
        return self

    def step(self, step):
        rows = rows_of(step)
        temperature = np.exp(self.log_temperature)
        queries, keys = (unit(self.towers[side][rows]) for side in ("query", "key"))
        grads = {side: np.zeros_like(table) for side, table in self.towers.items()}
        to_log_temperature = 0.0
        total = 0.0
        drawn = self.draws(step, rows, queries, keys)

        def add(side, row, gradient):
            grads[side][row] += gradient

        positives = (queries * keys).sum(1)
        ceilings = positives - RELATIVE_MARGIN * abs(positives)
        for i, row in enumerate(rows):
            query, key, positive, ceiling = queries[i], keys[i], positives[i], ceilings[i]
            # (vector, the receiver of its gradient, the query's part of it)
            towards_keys = {kind: [] for kind in self.met}
            for j, other in enumerate(rows):
                # Either row's margin masks.
                if TEXT[other] != TEXT[row] and query @ keys[j] <= ceilings[j]:
                    towards_keys["batch"].append((keys[j], ("key", other), None))
                for their in self.mined[other]:
                    if their >= 0 and TEXT[their] != TEXT[row]:
                        vector = unit(self.towers["key"][their])
                        towards_keys["explicit"].append((vector, ("key", their), None))
            for slot in drawn["shared"]:
                if TEXT[slot] != TEXT[row]:
                    towards_keys["shared"].append((self.bank["key"][slot], None, None))
            for vector in drawn["nearest"][i]:
                towards_keys["nearest"].append((vector, None, None))
            for vector, jacobian in drawn["synthetic"][i]:
                towards_keys["synthetic"].append((vector, None, jacobian))
            for kind, met in towards_keys.items():
                self.met[kind] += len(met)
                towards_keys[kind] = [one for one in met if query @ one[0] <= ceiling]
                self.counted[kind] += len(towards_keys[kind])
            towards_keys = [one for counted in towards_keys.values() for one in counted]
            scores = np.array([query @ vector for vector, _, _ in towards_keys]) / temperature
            loss, weights, own = cross_entropy(positive / temperature, scores)
            total += loss / 2
            scale = 1 / (2 * len(rows) * temperature)
            for weight, (vector, owner, jacobian) in zip(weights, towards_keys, strict=True):
                add("query", row, scale * weight * vector)
                if owner is not None:
                    add(*owner, scale * weight * query)
                if jacobian is not None:
                    add("query", row, scale * weight * (query @ jacobian))
            add("query", row, -scale * own * key)
            add("key", row, -scale * own * query)
            to_log_temperature += -(weights @ scores - own * positive / temperature) / 2 / len(rows)
            towards_queries = [
                (queries[j], other)
                for j, other in enumerate(rows)
                if TEXT[other] != TEXT[row] and queries[j] @ key <= min(ceiling, ceilings[j])
            ]
            scores = np.array([vector @ key for vector, _ in towards_queries]) / temperature
            loss, weights, own = cross_entropy(positive / temperature, scores)
            total += loss / 2
            for weight, (vector, other) in zip(weights, towards_queries, strict=True):
                add("key", row, scale * weight * vector)
                add("query", other, scale * weight * key)
            add("query", row, -scale * own * key)
            add("key", row, -scale * own * query)
            to_log_temperature += -(weights @ scores - own * positive / temperature) / 2 / len(rows)
        self.losses.append(total / len(rows))
        seen = {side: unit(self.momentum[side][rows]) for side in ("query", "key")}
        for side, table in self.towers.items():
            norms = np.linalg.norm(table, axis=1, keepdims=True)
            along = (grads[side] * table).sum(1, keepdims=True) * table / norms**2
            self.towers[side] = table - LEARNING_RATE * (grads[side] - along) / norms
            self.momentum[side] = (
                TOWER_MOMENTUM * self.momentum[side] + (1 - TOWER_MOMENTUM) * self.towers[side]
            )
        self.log_temperature -= LEARNING_RATE * to_log_temperature
        for i, row in enumerate(rows):
            for side in ("query", "key"):
                new = seen[side][i]
                if self.written[row]:
                    old = self.bank[side][row]
                    new = unit(BANK_MOMENTUM * old + (1 - BANK_MOMENTUM) * new)
                self.bank[side][row] = new
            self.written[row] = True

    def draws(self, step, rows, queries, keys):
        key = jax.random.fold_in(jax.random.fold_in(self.key, step), 1_000)
        bits = [
            np.asarray(jax.random.bits(jax.random.fold_in(key, n), (1_024,), jnp.uint32))
            for n in range(2)
        ]
        free = set(np.flatnonzero(self.written))
        uniform = sorted(free, key=lambda slot: (-int(bits[0][slot]), slot))[: BUDGETS.uniform]
        free -= set(uniform)
        stratified = []
        for group, quota in ((0, 2), (10, 3)):
            members = [slot for slot in free if GROUP[slot] == group]
            stratified += sorted(members, key=lambda slot: (-int(bits[1][slot]), slot))[:quota]
        free -= set(stratified)
        nearest, synthetic = [], []
        for i, row in enumerate(rows):
            positive = queries[i] @ keys[i]
            ceiling = positive - RELATIVE_MARGIN * abs(positive)
            there = [
                (-(queries[i] @ self.bank["key"][slot]), slot)
                for slot in free
                if TEXT[slot] != TEXT[row] and queries[i] @ self.bank["key"][slot] <= ceiling
            ]
            hardest = [self.bank["key"][slot] for _, slot in sorted(there)[: BUDGETS.hardest]]
            nearest.append(hardest[: BUDGETS.nearest])
            if self.of_batch:
                there = [
                    (-(queries[i] @ keys[j]), j)
                    for j, other in enumerate(rows)
                    if TEXT[other] != TEXT[row] and queries[i] @ keys[j] <= ceiling
                ]
                hardest = [keys[j] for _, j in sorted(there)[: BUDGETS.hardest]]
            synthetic.append(self.made(jax.random.fold_in(key, row), queries[i], hardest))
        return {"shared": uniform + stratified, "nearest": nearest, "synthetic": synthetic}

    def made(self, key, query, hardest):
        if not hardest:
            return []
        keys = [jax.random.fold_in(key, n) for n in range(3)]

        def uniform(key, *shape):
            return np.asarray(jax.random.uniform(key, shape, jnp.float32))

        def drawn(numbers):
            return [hardest[int(number * len(hardest))] for number in numbers]

        found = []
        numbers = uniform(keys[0], 3, BUDGETS.mixed)
        for one, other, share in numbers.T:
            place = int(one * len(hardest))
            first = hardest[place]
            second = hardest[(place + 1 + int(other * (len(hardest) - 1))) % len(hardest)]
            found.append((unit(float(share) * first + (1 - float(share)) * second), None))
        numbers = uniform(keys[1], 2, BUDGETS.mixed_with_query)
        for hard, number in zip(drawn(numbers[0]), numbers[1], strict=True):
            share = float(number) / 2
            sum_of_both = share * query + (1 - share) * hard
            vector = unit(sum_of_both)
            jacobian = share * (np.eye(DIM) - np.outer(vector, vector))
            jacobian /= np.linalg.norm(sum_of_both)
            found.append((vector, jacobian if self.gradient else None))
        numbers = uniform(keys[2], 1, BUDGETS.perturbed)
        noise = np.asarray(
            jax.random.normal(jax.random.fold_in(keys[2], 1), (BUDGETS.perturbed, DIM), jnp.float32)
        )
        angle = np.deg2rad(BUDGETS.degrees)
        for hard, direction in zip(drawn(numbers[0]), noise, strict=True):
            across = direction - (direction @ hard) * hard
            found.append((np.cos(angle) * hard + np.sin(angle) * unit(across), None))
        return found

    def refresh(self, step):
        key = jax.random.fold_in(jax.random.fold_in(self.key, 2**31), step)
        first, last = RULE.rank_range
        for row in np.flatnonzero(self.written):
            query, positive = self.bank["query"][row], self.bank["key"][row]
            near = sorted(
                (-(query @ self.bank["key"][other]), other)
                for other in np.flatnonzero(self.written)
                if TEXT[other] != TEXT[row]
            )[first:last]
            row_key = jax.random.fold_in(key, row)
            order = np.asarray(jax.random.uniform(row_key, (last - first,), jnp.float32))
            ceiling = query @ positive - RULE.relative_margin * abs(query @ positive)
            allowed = [place for place, (score, _) in enumerate(near) if -score <= ceiling]
            chosen = sorted(sorted(allowed, key=lambda place: order[place])[: RULE.per_query])
            self.mined[row] = -1
            self.mined[row, : len(chosen)] = [near[place][1] for place in chosen]


def unit(vectors):
    # jaxcl's norm adds 1e-12 under the root, which is below the tolerance here
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def cross_entropy(positive, scores):
    everything = np.logaddexp.reduce([positive, *scores])
    weights = np.exp(scores - everything)
    return everything - positive, weights, weights.sum()


@functools.cache
def restated(**changes):
    return Restated(**changes).run()


def assert_same(state, losses, wanted, *, tolerance=1e-10):
    pairs = {
        "losses": (losses, wanted.losses),
        "log_temperature": (state.params["log_temperature"], wanted.log_temperature),
        **{
            f"{what} {side}": (ours[side], theirs[side])
            for what, ours, theirs in (
                ("towers", state.params["towers"], wanted.towers),
                ("momentum", state.memory["momentum"], wanted.momentum),
            )
            for side in ("query", "key")
        },
        **{
            f"bank {side}": (bank.vectors[:ROWS], wanted.bank[side])
            for side, bank in state.memory["bank"].items()
        },
    }
    errors = {name: relative_error(*pair) for name, pair in pairs.items()}
    assert max(errors.values()) < tolerance, errors
    np.testing.assert_array_equal(state.memory["mined"][:ROWS], wanted.mined)


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), 8])
def test_every_tier_trains_as_written_out_in_numpy(devices):
    assert (restated().mined >= 0).any(1).sum() > ROWS / 2
    assert_same(*train_in_jax(devices), restated())


@pytest.mark.slow
def test_a_run_moves_from_8_devices_to_4_with_all_its_memory(tmp_path):
    moved_run = train_in_jax(8, move=(REFRESH_AT + 1, 4, tmp_path / "run"))
    assert_same(*moved_run, restated(), tolerance=1e-6)  # it was saved in float32


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "batch"), [(6, 30), *OTHERS])
def test_a_bank_is_the_same_on_devices_that_do_not_divide_it(monkeypatch, devices, batch, tmp_path):
    rows = (np.arange(batch)[None] * 7 + 3 * np.arange(STEPS)[:, None]) % ROWS
    monkeypatch.setitem(globals(), "rows_of", lambda step: rows[step])
    state, losses = train_in_jax(devices)
    alone, losses_alone = train_in_jax(1)
    assert relative_error(losses, losses_alone) < 1e-12
    for part in ("params", "memory"):
        ours, theirs = getattr(state, part), getattr(alone, part)
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        for leaf, leaf_alone in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(leaf, leaf_alone, rtol=1e-9, atol=1e-12)
    assert (state.memory["mined"] >= 0).any(1).sum() > ROWS / 2


@pytest.mark.slow
def test_a_run_moves_between_numbers_of_devices_that_do_not_divide_its_bank(monkeypatch, tmp_path):
    rows = (np.arange(30)[None] * 7 + 3 * np.arange(STEPS)[:, None]) % ROWS
    monkeypatch.setitem(globals(), "rows_of", lambda step: rows[step])
    state, losses = train_in_jax(6, move=(REFRESH_AT + 1, 5, tmp_path / "run"))
    wanted, losses_wanted = train_in_jax(6)
    assert relative_error(losses, losses_wanted) < 1e-6  # it was saved in float32
    np.testing.assert_array_equal(state.memory["mined"], wanted.memory["mined"])


@pytest.mark.slow
def test_synthetic_negatives_may_come_from_the_batch_despite_a_bank():
    assert_same(*train_in_jax(8, of_batch=True), restated(of_batch=True))
    wanted, other = (restated(of_batch=flag).towers["query"] for flag in (True, False))
    assert relative_error(wanted, other) > 1e-4


@pytest.mark.slow
def test_synthetic_negatives_may_have_gradients():
    assert_same(*train_in_jax(8, gradient=True), restated(gradient=True))
    wanted, without = (restated(gradient=flag).towers["query"] for flag in (True, False))
    assert relative_error(wanted, without) > 1e-4


def test_each_kind_of_negative_occurred_and_was_masked_somewhere():
    met, counted = restated().met, restated().counted
    assert set(met) == {"batch", "explicit", "shared", "nearest", "synthetic"}
    assert min(counted.values()) > 20, counted
    for kind in ("batch", "explicit", "shared", "synthetic"):  # the nearest are unmasked
        assert counted[kind] < met[kind], kind
