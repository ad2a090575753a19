"""Invalid numbers are refused by every public function, if their values are known."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxcl import assignment, negatives
from jaxcl.grad_cache import rows_per_chunk
from jaxcl.losses import (
    LOSSES,
    Masks,
    distillation_loss,
    hard_infonce_loss,
    infonce_loss,
    matryoshka,
    measure_negatives,
    running_estimate_loss,
    sigmoid_pair_loss,
)
from jaxcl.losses.running_estimate import estimate_memory, remembered_estimate_loss
from jaxcl.models import DecoderEncoder, StaticEncoder, TransformerEncoder
from jaxcl.models.augmentations import span_masking, token_dropout
from jaxcl.ops.pairs import PairLabels, pair_logsumexp, pair_softplus, pair_sum
from tests.helpers import unit_vectors

ROWS = 4


def sides():
    return tuple(unit_vectors(seed, ROWS, 8, dtype=jnp.float32) for seed in (0, 1))


def on_sides(function, **known):
    return lambda **numbers: function(*sides(), **known, **numbers)


def columns_of(name):
    columns = {"labels": jnp.arange(ROWS), "teacher_scores": jnp.zeros((ROWS, 1))}
    columns |= {"scores": jnp.arange(float(ROWS)), "teacher_vectors": {}}
    found = {argument: columns[argument] for argument in LOSSES[name].columns}
    if LOSSES[name].init_memory is not None:
        found["memory"] = {"estimates": jnp.zeros((ROWS, 2))}
    return found


def masked(**margins):
    return infonce_loss(*sides(), masks=Masks(**margins))


def row_keys():
    return jax.random.split(jax.random.key(0), ROWS)


def drawn(margin=None, relative_margin=None, **budgets):
    return negatives.draw_tiers(
        negatives.TierBudgets(**({"perturbed": 1, "hardest": 2} | budgets)),
        *sides(),
        row_keys=row_keys(),
        ids=jnp.arange(ROWS),
        margin=margin,
        relative_margin=relative_margin,
    )


def mined(**rule):
    labels = PairLabels((jnp.arange(ROWS),))
    return negatives.mine_negatives(
        *sides(),
        sides()[1],
        rule=negatives.MiningRule(**({"per_query": 1, "rank_range": (0, 2)} | rule)),
        row_keys=row_keys(),
        query_labels=labels,
        table_labels=labels,
    )


def assigned(temperature=0.1, **settings):
    sides_on_host = map(np.asarray, sides())
    return assignment.assign(
        *sides_on_host,
        block_size=2,
        temperature=temperature,
        settings=assignment.Gcbs(method="rcm", **settings),
    )


def gap(temperature=0.1, near_duplicate=0.95):
    return assignment.measure_gap(
        *sides(),
        jnp.arange(ROWS).reshape(2, 2),
        temperature=temperature,
        key=jax.random.key(0),
        num_rows=ROWS,
        near_duplicate=near_duplicate,
    )


def remembered(**numbers):
    shape = (ROWS, 2)
    memory = {"estimates": jnp.zeros(shape), "log_temperatures": jnp.zeros(shape)}
    return remembered_estimate_loss(*sides(), memory=memory, **numbers)


def encoder(kind, **options):
    return lambda **numbers: kind(16, dim=8, rngs=nnx.Rngs(0), **(options | numbers))


estimated = on_sides(running_estimate_loss, estimates=jnp.zeros((ROWS, 2)))
taught = on_sides(distillation_loss, teacher_scores=jnp.zeros((ROWS, 1)))
small = {"hidden_dim": 8, "num_layers": 1, "num_heads": 1, "mlp_dim": 8}
decoder = encoder(DecoderEncoder, num_key_heads=1, **small)
transformer = encoder(TransformerEncoder, **small)

NOT_ABOVE_0 = (-0.1, 0.0, math.nan, math.inf)
NOT_FINITE = (math.nan, math.inf)
BELOW_0 = (-1.0, *NOT_FINITE)

# (call, the name of the number, invalid values)
DOORS = [
    *((on_sides(LOSSES[name].function, **columns_of(name)), "temperature", NOT_ABOVE_0)
      for name in LOSSES if LOSSES[name].has_temperature),
    (on_sides(matryoshka(infonce_loss, dims=(4, 8))), "temperature", NOT_ABOVE_0),
    (on_sides(measure_negatives), "temperature", NOT_ABOVE_0),
    (on_sides(measure_negatives), "hardness", BELOW_0),
    (on_sides(pair_logsumexp), "temperature", NOT_ABOVE_0),
    (on_sides(pair_logsumexp, temperature=0.1), "hardness", BELOW_0),
    (on_sides(pair_sum), "temperature", NOT_ABOVE_0),
    (on_sides(pair_softplus, bias=0.0), "scale", NOT_FINITE),
    (on_sides(pair_softplus, scale=1.0), "bias", NOT_FINITE),
    (on_sides(infonce_loss), "hardness", BELOW_0),
    (on_sides(infonce_loss), "negative_hardness", BELOW_0),
    (on_sides(hard_infonce_loss), "concentration", BELOW_0),
    (on_sides(hard_infonce_loss), "positive_share", (-0.1, 1.0, math.nan)),
    (on_sides(sigmoid_pair_loss), "bias", NOT_FINITE),
    (taught, "teacher_temperature", NOT_ABOVE_0),
    (estimated, "update_rate", (0.0, 1.5, math.nan, jnp.array(0.0))),
    (estimated, "epsilon", NOT_ABOVE_0),
    (estimated, "robustness", NOT_FINITE),
    (remembered, "temperature_rate", NOT_ABOVE_0),
    (functools.partial(remembered, temperature_rate=0.1), "temperature_bounds",
     ((0.0, 1.0), (-1.0, 1.0), (1.0, 0.5), (math.nan, 1.0), (0.1, math.nan), (0.1, math.inf))),
    (functools.partial(estimate_memory, 4), "temperature", NOT_ABOVE_0),
    (lambda weights: matryoshka(infonce_loss, dims=(4, 8), weights=weights), "weights",
     ((1.0, math.nan), (1.0, -1.0))),
    (masked, "margin", NOT_FINITE),
    (masked, "relative_margin", (5.0, -5.0, math.nan)),
    (drawn, "margin", NOT_FINITE),
    (drawn, "relative_margin", (5.0, math.nan)),
    (drawn, "degrees", (0.0, -20.0, 181.0, math.nan)),
    *((drawn, name, (-1,))
      for name in ("uniform", "stratified", "nearest", "mixed", "mixed_with_query", "perturbed")),
    (drawn, "hardest", (0,)),
    (mined, "margin", NOT_FINITE),
    (mined, "relative_margin", (5.0, math.nan)),
    (mined, "per_query", (0,)),
    (assigned, "temperature", NOT_ABOVE_0),
    (assigned, "quantile", (0.0, 1.0, math.nan)),
    (gap, "temperature", NOT_ABOVE_0),
    (gap, "near_duplicate", NOT_FINITE),
    (functools.partial(negatives.init_bank, dim=8), "num_slots", (0, -1)),
    (functools.partial(negatives.init_bank, 8), "dim", (0,)),
    (functools.partial(negatives.init_bank, 8, 8), "guide_dim", (0,)),
    (token_dropout, "rate", (1.0, 1.5, -0.5, math.nan)),
    (span_masking, "rate", (1.0, 1.5, -0.5, math.nan)),
    (span_masking, "span_length", (0,)),
    (span_masking, "keep_first", (-1,)),
    (span_masking, "keep_last", (-1,)),
    (functools.partial(rows_per_chunk, max_tokens=8), "width", (0,)),
    *((kind, "dropout", (1.0, 1.5, -0.5, math.nan)) for kind in (decoder, transformer)),
    *((kind, name, (0, -1)) for kind in (decoder, transformer) for name in small),
    (decoder, "rotary_base", NOT_ABOVE_0),
    *((encoder(StaticEncoder), name, (0, -1)) for name in ("hidden_dim", "max_tokens")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "name", "number"),
    [
        pytest.param(call, name, number, id=f"{place}-{name}={number}")
        for place, (call, name, numbers) in enumerate(DOORS)
        for number in numbers
    ],
)
def test_an_invalid_number_is_refused(call, name, number):
    with pytest.raises(ValueError, match=rf"{name}(\[0\])?=.*(; set it| must be)"):
        call(**{name: number})


@pytest.mark.parametrize("temperature", [np.array([0.1, 0.2, -0.1, 0.1]), jnp.zeros(ROWS)])
def test_a_temperature_of_one_row_is_refused_like_that_of_all(temperature):
    with pytest.raises(ValueError, match="temperature="):
        infonce_loss(*sides(), temperature=jnp.asarray(temperature, jnp.float32))


def test_a_traced_temperature_passes():
    loss = jax.jit(infonce_loss)(*sides(), temperature=0.0)
    assert not np.isfinite(loss).all()
