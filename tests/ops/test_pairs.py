"""One battery for every way to reduce a pair matrix: reference, tiles, gather, ring."""

import functools
import math
import re
from math import exp, log

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from jax.test_util import check_grads

from jaxcl.ops.mesh import make_mesh
from jaxcl.ops.pairs import (
    EXCHANGES,
    PairLabels,
    pair_count,
    pair_logsumexp,
    pair_softplus,
    pair_sum,
)
from jaxcl.ops.vectors import inner_products
from tests.helpers import relative_error, relative_errors, unit_vectors

pytestmark = pytest.mark.usefixtures("x64")

TILE = 4
SIZES = ((1, 1), (3, 5), (4, 4), (5, 9), (8, 3))
MESHES = ({"data": 8}, {"replica": 2, "data": 4})
BY_TILES = ("tiled", "pallas_tpu")
ANYWHERE = ("reference", *BY_TILES)  # pallas_gpu has no float64; see test_pallas_gpu.py
WAYS = (
    ("gather", "reference"),
    *((exchange, by_tiles) for by_tiles in BY_TILES for exchange in EXCHANGES),
)


def labels_of(option, num_queries, num_keys):
    """Both sides' labels, and keyword arguments, that exercise one option."""
    queries, keys = PairLabels(), PairLabels()
    options = {}
    numbers, others = jnp.arange(num_queries), jnp.arange(num_keys)
    if option in ("different", "all"):
        queries = queries._replace(different=(numbers % 5, numbers // 3))
        keys = keys._replace(different=(others % 5, others // 3))
    if option == "equal":
        queries, keys = PairLabels(equal=(numbers % 2,)), PairLabels(equal=(others % 2,))
    if option == "several labels":
        sets = [jnp.stack([rows % 3, rows % 5 - 2], 1) for rows in (numbers, others)]
        queries = PairLabels(different=(sets[0],), equal=(sets[0],))
        keys = PairLabels(different=(sets[1][:, 0],), equal=(jnp.roll(sets[1], 1, 0),))
    if option in ("valid", "all"):
        queries, keys = queries._replace(valid=numbers != 2), keys._replace(valid=others != 1)
    if option in ("ceiling", "all"):
        queries = queries._replace(ceiling=jnp.linspace(-0.1, 0.5, num_queries))
        keys = keys._replace(ceiling=jnp.linspace(0.5, 0.1, num_keys))
    if option == "guide":
        queries = PairLabels(ceiling=jnp.zeros(num_queries), guide=unit_vectors(8, num_queries, 3))
        keys = PairLabels(guide=unit_vectors(9, num_keys, 3))
    if option in ("bias", "all"):
        options["key_bias"] = jnp.sin(jnp.arange(float(num_keys)))
    if option in ("hardness", "all"):
        options["hardness"] = 2.0
    return queries, keys, options


OPTIONS = (
    *("nothing", "different", "equal", "several labels", "valid", "ceiling", "guide"),
    *("bias", "hardness", "all"),
)


def weighted(pair_fn, labels, options, **how):
    """A scalar with different weights for all rows and columns, which ignores empty ones."""
    query_labels, key_labels = labels

    def total(queries, keys, log_temperature):
        reduced = pair_fn(
            queries,
            keys,
            temperature=jnp.exp(log_temperature),
            query_labels=query_labels,
            key_labels=key_labels,
            **options,
            **how,
        )
        return sum(
            (jnp.where(jnp.isfinite(part), part, 0) * jnp.cos(jnp.arange(1.0, part.size + 1))).sum()
            for part in reduced
        )

    return total


def value_and_gradients(function, *inputs):
    return jax.jit(jax.value_and_grad(function, (0, 1, 2)))(*inputs)


@functools.cache
def of_option(sizes, option, implementation):
    num_queries, num_keys = sizes
    *labels, options = labels_of(option, num_queries, num_keys)
    how = {"implementation": implementation, "tile": TILE}
    inputs = unit_vectors(0, num_queries, 6), unit_vectors(1, num_keys, 6), jnp.log(0.1)
    return value_and_gradients(weighted(pair_logsumexp, labels, options, **how), *inputs)


@pytest.mark.smoke
@pytest.mark.parametrize("implementation", ANYWHERE)
def test_two_by_three_by_hand(implementation):
    queries, keys = jnp.array([[1.0, 0.0], [0.6, 0.8]]), jnp.array([[1.0, 0], [0, 1], [0.8, 0.6]])
    # scores at temperature .5: [[2, 0, 1.6], [1.2, 1.6, 1.92]]
    rows, columns = pair_logsumexp(queries, keys, temperature=0.5, implementation=implementation)
    row_sums = [exp(2) + exp(0) + exp(1.6), exp(1.2) + exp(1.6) + exp(1.92)]
    column_sums = [exp(2) + exp(1.2), exp(0) + exp(1.6), exp(1.6) + exp(1.92)]
    np.testing.assert_allclose(rows, list(map(log, row_sums)), rtol=1e-12)
    np.testing.assert_allclose(columns, list(map(log, column_sums)), rtol=1e-12)


@pytest.mark.parametrize("implementation", ANYWHERE)
def test_each_mask_by_hand(implementation):
    queries = keys = jnp.array([[1.0, 0.0], [0.6, 0.8]])  # similarities: [[1, .6], [.6, 1]]
    first, second = jnp.array([1, 2]), jnp.array([1, 3])
    cases = {
        "different": (
            [exp(0.6), exp(0.6) + exp(1)],
            {"different": (first,)},
            {"different": (second,)},
        ),
        "equal": ([exp(1), 0], {"equal": (first,)}, {"equal": (second,)}),
        "valid": ([exp(1), exp(0.6)], {}, {"valid": jnp.array([True, False])}),
        "ceiling": ([exp(0.6), exp(0.6) + exp(1)], {"ceiling": jnp.array([0.7, 1.1])}, {}),
    }
    for name, (sums, ours, theirs) in cases.items():
        rows, _ = pair_logsumexp(
            queries,
            keys,
            temperature=1.0,
            query_labels=PairLabels(**ours),
            key_labels=PairLabels(**theirs),
            implementation=implementation,
        )
        wanted = [log(total) if total else -math.inf for total in sums]
        np.testing.assert_allclose(rows, wanted, rtol=1e-12, err_msg=name)


@pytest.mark.parametrize(
    ("sizes", "option"),
    [(sizes, "all") for sizes in SIZES] + [((5, 9), option) for option in OPTIONS[:-1]],
    ids=str,
)
@pytest.mark.parametrize("by_tiles", BY_TILES)
def test_tiles_give_the_value_and_gradients_of_the_whole(by_tiles, sizes, option):
    whole = of_option(sizes, option, "reference")
    tiles = of_option(sizes, option, by_tiles)
    errors = {
        path: np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-3)
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(tiles), jax.tree.leaves(whole), strict=True
        )
    }
    assert np.max(list(errors.values())) < 1e-12, errors  # which, unlike max, keeps a NaN
    if option in ("nothing", "bias", "hardness"):
        assert all(np.linalg.norm(leaf) > 0.1 for leaf in jax.tree.leaves(whole))


@pytest.mark.parametrize("implementation", ANYWHERE)
@pytest.mark.parametrize("temperature", [0.01, 0.05, 1.0])
def test_gradients_match_finite_differences(implementation, temperature):
    labels = [PairLabels(different=(jnp.arange(size) % 4,)) for size in (5, 7)]
    bias = jnp.linspace(-1, 1, 7)

    def total(queries, keys, log_temperatures, bias):
        rows, columns = pair_logsumexp(
            *map(jnp.asarray, (queries, keys)),
            temperature=jnp.exp(jnp.asarray(log_temperatures)),
            query_labels=labels[0],
            key_labels=labels[1],
            key_bias=jnp.asarray(bias),
            implementation=implementation,
            tile=TILE,
        )
        return jnp.sin(rows).sum() + jnp.cos(columns).sum()

    per_row = jnp.log(temperature) + jnp.linspace(0, 0.3, 5)
    inputs = (unit_vectors(0, 5, 6), unit_vectors(1, 7, 6), per_row, bias)
    check_grads(total, inputs, order=1, modes=["rev"], eps=1e-6)


@pytest.mark.parametrize("implementation", ANYWHERE)
def test_hardness_weighs_and_is_constant_to_the_gradient(implementation):
    queries, keys = unit_vectors(0, 5, 6), unit_vectors(1, 7, 6)
    similarities = queries @ keys.T

    def row_sum(queries, hardness, how):
        rows, _ = pair_logsumexp(
            queries, keys, temperature=0.5, hardness=hardness, implementation=how, tile=TILE
        )
        return rows.sum()

    def by_hand(queries):
        return jax.nn.logsumexp(queries @ keys.T / 0.5 + 3.0 * similarities, 1).sum()

    found, wanted = (
        jax.value_and_grad(function)(queries)
        for function in (functools.partial(row_sum, hardness=3.0, how=implementation), by_hand)
    )
    assert max(relative_errors(found, wanted).values()) < 1e-12
    ignored = jax.grad(functools.partial(row_sum, hardness=0.0, how=implementation))(queries)
    assert relative_error(found[1], ignored) > 1e-2


@pytest.mark.parametrize("implementation", ANYWHERE)
def test_fully_masked_rows_have_no_sum_and_no_gradient(implementation):
    nothing = PairLabels(valid=jnp.zeros(5, bool))

    def reduced(queries, keys):
        return pair_logsumexp(
            queries,
            keys,
            temperature=0.1,
            query_labels=nothing,
            implementation=implementation,
            tile=TILE,
        )

    values, pull_back = jax.vjp(reduced, unit_vectors(0, 5, 6), unit_vectors(1, 5, 6))
    assert all((part == -jnp.inf).all() for part in values)
    gradients = pull_back((jnp.ones(5), jnp.full(5, jnp.nan)))  # as for a loss of −∞
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("implementation", ANYWHERE)
def test_nan_is_not_treated_as_masked(implementation):
    keys = unit_vectors(1, 7, 6).at[2].set(jnp.nan)
    how = {"implementation": implementation, "tile": TILE}
    for reduce in (pair_logsumexp, pair_sum):
        rows, columns = reduce(unit_vectors(0, 5, 6), keys, temperature=0.1, **how)
        assert np.isnan(rows).all()
        assert np.flatnonzero(np.isnan(columns)).tolist() == [2]


@pytest.mark.parametrize("implementation", ANYWHERE)
@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_huge_scores_stay_exact(implementation, scale):
    queries, keys = scale * unit_vectors(0, 5, 6), unit_vectors(1, 7, 6)
    scores = np.asarray(queries @ keys.T)
    how = {"implementation": implementation, "tile": TILE}
    labels = [PairLabels(), PairLabels()]
    value, gradients = jax.value_and_grad(weighted(pair_logsumexp, labels, {}, **how), (0, 1))(
        queries, keys, 0.0
    )
    wanted = sum(
        (np.logaddexp.reduce(scores, axis) * np.cos(np.arange(1.0, size + 1))).sum()
        for axis, size in ((1, 5), (0, 7))
    )
    assert relative_error(value, wanted) < 1e-12
    assert all(np.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("implementation", ANYWHERE)
def test_duplicates_count_as_often_as_they_occur(implementation):
    query, key = unit_vectors(0, 1, 6), unit_vectors(1, 1, 6)
    rows, columns = pair_logsumexp(
        query, jnp.tile(key, (9, 1)), temperature=0.1, implementation=implementation, tile=TILE
    )
    score = float((query @ key.T)[0, 0]) / 0.1
    np.testing.assert_allclose(rows, [score + log(9)], rtol=1e-12)
    np.testing.assert_allclose(columns, [score] * 9, rtol=1e-12)


@pytest.mark.parametrize("implementation", ANYWHERE)
def test_bfloat16_is_summed_in_float32(implementation):
    queries, keys = unit_vectors(0, 33, 256), unit_vectors(1, 65, 256)
    total = weighted(pair_logsumexp, [PairLabels()] * 2, {}, implementation=implementation, tile=16)
    exact = value_and_gradients(total, queries, keys, jnp.log(0.05))
    short = [side.astype(jnp.bfloat16) for side in (queries, keys)]
    found = value_and_gradients(total, *short, jnp.float32(log(0.05)))
    assert [leaf.dtype for leaf in found[1][:2]] == [jnp.bfloat16] * 2
    # Inputs, weights and gradients keep 8 bits each: 2⁻⁹ = 2e-3 for every one of them.
    assert max(relative_errors(found, exact).values()) < 8e-3
    assert relative_error(found[0], exact[0]) < 5e-4
    # A CPU multiplies bf16 in float32 for any setting, so only the type can be checked.
    assert inner_products(*short).dtype == jnp.float32


@pytest.mark.parametrize("implementation", ANYWHERE)
def test_softplus_count_and_sum_by_hand(implementation):
    queries = keys = jnp.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    others = PairLabels(different=(jnp.arange(3),))
    how = {
        "query_labels": others,
        "key_labels": others,
        "implementation": implementation,
        "tile": 2,
    }
    rows, columns = pair_softplus(queries, keys, scale=10.0, bias=-5.0, **how)
    wanted = [
        log(1 + exp(1)) + log(1 + exp(-5)),  # similarities .6 and 0
        log(1 + exp(1)) + log(1 + exp(3)),  # .6 and .8
        log(1 + exp(-5)) + log(1 + exp(3)),
    ]
    np.testing.assert_allclose(rows, wanted, rtol=1e-12)
    np.testing.assert_allclose(columns, wanted, rtol=1e-12)
    assert [part.tolist() for part in pair_count(queries, keys, **how)] == [[2, 2, 2]] * 2
    rows, columns = pair_sum(queries, keys, temperature=0.5, **how)
    np.testing.assert_allclose(rows, [1.2, 1.2 + 1.6, 1.6], rtol=1e-12)
    np.testing.assert_allclose(columns, rows, rtol=1e-12)


def test_rows_of_several_labels_agree_if_they_have_one_in_common():
    ours = jnp.array([[1, 2], [3, -1], [-1, -1]])
    theirs = jnp.array([[2, 5], [-1, 4], [3, 3]])
    one, other = PairLabels(equal=(ours,)), PairLabels(equal=(theirs,))
    rows, columns = pair_count(jnp.eye(3), jnp.eye(3), query_labels=one, key_labels=other)
    assert (rows.tolist(), columns.tolist()) == ([1, 1, 0], [1, 0, 1])
    one_wide = PairLabels(equal=(jnp.array([[2], [-1], [3]]),))
    rows, _ = pair_count(jnp.eye(3), jnp.eye(3), query_labels=one_wide, key_labels=one_wide)
    assert rows.tolist() == [1, 0, 1]
    single = PairLabels(equal=(jnp.array([2, 3, -1]),))
    rows, _ = pair_count(jnp.eye(3), jnp.eye(3), query_labels=one, key_labels=single)
    assert rows.tolist() == [1, 1, 0]


@pytest.mark.parametrize("by_tiles", BY_TILES)
def test_the_gradients_of_softplus_match_finite_differences(by_tiles):
    def total(queries, keys, scale, bias):
        rows, columns = pair_softplus(
            *map(jnp.asarray, (queries, keys)),
            scale=jnp.asarray(scale),
            bias=jnp.asarray(bias),
            implementation=by_tiles,
            tile=TILE,
        )
        return jnp.sin(rows).sum() + jnp.cos(columns).sum()

    inputs = (unit_vectors(0, 5, 6), unit_vectors(1, 7, 6), 10.0, -3.0)
    check_grads(total, inputs, order=1, modes=["rev"], eps=1e-6)


MESH_LABELS = {
    "different": (np.arange(16) % 13, np.stack([np.arange(16) % 7, np.arange(16) % 5 - 1], 1)),
    "valid": np.arange(16) != 5,
    "ceiling": np.linspace(0.2, 0.9, 16),
}


def over_mesh(shape, exchange, implementation, *, axes=None):
    """A weighted total over a mesh, as a function of the global sides and the log-temperature."""
    mesh = make_mesh(shape)
    rows, whole = PartitionSpec(mesh.axis_names), PartitionSpec()

    def local(queries, keys, labels, log_temperature):
        return pair_logsumexp(
            queries,
            keys,
            temperature=jnp.exp(log_temperature),
            query_labels=labels,
            key_labels=labels,
            hardness=1.0,
            axis_name=axes or mesh.axis_names,
            exchange=exchange,
            implementation=implementation,
            tile=TILE,
        )

    sharded = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(rows, rows, rows, whole),
        out_specs=(rows, rows),
        # JAX's interpreter of kernels does not know the types of varying arrays.
        check_vma="pallas" not in implementation,
    )

    def reduced(queries, keys, *, temperature, query_labels, key_labels):
        return sharded(queries, keys, query_labels, jnp.log(temperature))

    labels = PairLabels(**jax.tree.map(jnp.asarray, MESH_LABELS))
    return weighted(reduced, (labels, labels), {})


@pytest.fixture(scope="module")
def on_one_device():
    with jax.enable_x64(True):
        inputs = unit_vectors(0, 16, 6), unit_vectors(1, 16, 6), jnp.log(0.1)
        labels = PairLabels(**jax.tree.map(jnp.asarray, MESH_LABELS))
        how = {"implementation": "reference", "hardness": 1.0}
        return inputs, value_and_gradients(weighted(pair_logsumexp, (labels, labels), how), *inputs)


@pytest.mark.smoke
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_any_mesh_gives_the_value_and_gradients_of_one_device(shape, way, on_one_device):
    inputs, wanted = on_one_device
    found = value_and_gradients(over_mesh(shape, *way), *inputs)
    assert max(relative_errors(found, wanted).values()) < 1e-12


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_forgotten_mesh_axis_would_be_seen(way, on_one_device):
    inputs, wanted = on_one_device
    found = value_and_gradients(over_mesh(MESHES[1], *way, axes="data"), *inputs)
    assert min(relative_errors(found, wanted).values()) > 1e-3


def moved_numbers(compiled_text: str) -> dict[str, int]:
    """Numbers that enter a device per collective, counting each turn of a loop."""
    moved: dict[str, int] = {}
    computations = dict(re.findall(r"^%?([\w.\-]+) [^\n]*\{\n(.*?)^\}", compiled_text, re.M | re.S))
    trips = {}
    for body in computations.values():
        for called, count in re.findall(
            r" while\([^\n]*body=%?([\w.\-]+)[^\n]*\"known_trip_count\":\{\"n\":\"(\d+)\"", body
        ):
            trips[called] = int(count)
    for name, body in computations.items():
        for shape, kind in re.findall(
            r"= (.*?) (all-gather|all-reduce|reduce-scatter|collective-permute)(?:-start)?\(",
            body,
        ):
            sizes = [
                math.prod(map(int, filter(None, dims.split(","))))
                for dims in re.findall(r"f(?:32|64)\[([\d,]*)\]", shape)
            ]
            moved[kind] = moved.get(kind, 0) + sum(sizes) * trips.get(name, 1)
    return moved


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_the_bytes_between_devices_are_as_documented(exchange):
    num_devices, rows, features = 8, 16, 32
    mesh = make_mesh({"data": num_devices})
    spec = PartitionSpec("data")

    def local(queries, keys):
        how = {"exchange": exchange, "implementation": "tiled", "tile": TILE}
        return pair_logsumexp(queries, keys, temperature=0.1, axis_name="data", **how)

    sharded = jax.shard_map(local, mesh=mesh, in_specs=(spec, spec), out_specs=(spec, spec))
    sides = (
        unit_vectors(0, num_devices * rows, features),
        unit_vectors(1, num_devices * rows, features),
    )
    total = jax.grad(lambda *sides: sum(part.sum() for part in sharded(*sides)), (0, 1))
    moved = moved_numbers(jax.jit(total).lower(*sides).compile().as_text())
    block = rows * features
    if exchange == "gather":
        keys = num_devices * rows  # one part of the received vectors and columns is its own
        assert moved == {
            "all-gather": keys * features + keys,
            "all-reduce": keys,
            "reduce-scatter": rows * features + rows,
        }
    else:
        forward, backward = (
            (num_devices - 1) * block + num_devices * rows,
            (num_devices - 1) * (block + 2 * rows) + num_devices * block,
        )
        assert moved == {"collective-permute": forward + backward}


def test_tiles_need_no_memory_for_the_matrix():
    side = jax.ShapeDtypeStruct((32_768, 768), jnp.float32)

    def loss(queries, keys, how):
        rows, columns = pair_logsumexp(queries, keys, temperature=0.05, implementation=how)
        return rows.sum() + columns.sum()

    def temporary_mebibytes(how):
        gradient = jax.jit(jax.grad(functools.partial(loss, how=how), (0, 1)))
        return gradient.lower(side, side).compile().memory_analysis().temp_size_in_bytes / 2**20

    assert temporary_mebibytes("tiled") < 64
    assert temporary_mebibytes("reference") > 4_096


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"implementation": "cuda"},
            "'cuda' is unknown; use one of reference, tiled, pallas_tpu, pallas_gpu",
        ),
        ({"exchange": "star"}, "'star' is unknown; use one of gather, ring"),
        ({"tile": 0}, "tile=0 must be at least 1"),
        ({"query_labels": PairLabels(valid=np.ones(2, bool))}, "2 labels do not match 3 vectors"),
        (
            {"query_labels": PairLabels(different=(np.arange(3),))},
            "1 labels in 'different'",
        ),
        ({"key_labels": PairLabels(guide=np.eye(3))}, "give both"),
    ],
)
def test_a_mistake_is_named(arguments, message):
    arguments = {
        name: jax.tree.map(jnp.asarray, value) if isinstance(value, PairLabels) else value
        for name, value in arguments.items()
    }
    with pytest.raises(ValueError, match=message):
        pair_logsumexp(jnp.eye(3), jnp.eye(3), temperature=1.0, **arguments)


def test_a_ring_of_the_reference_is_refused():
    with pytest.raises(ValueError, match="use 'tiled'"):
        over_mesh({"data": 8}, "ring", "reference")(
            unit_vectors(0, 16, 6), unit_vectors(1, 16, 6), 0.0
        )


REDUCTIONS = {
    "logsumexp": functools.partial(pair_logsumexp, temperature=0.1, hardness=2.0),
    "softplus": functools.partial(pair_softplus, scale=10.0, bias=-1.0),
    "sum": functools.partial(pair_sum, temperature=0.1),
}


def second_derivatives(reduce, sides, directions):
    """The second derivative along a direction: forward over reverse, and reverse over reverse."""

    def value(queries, keys):
        return sum((jnp.tanh(one) ** 2).sum() for one in reduce(queries, keys))

    gradient = jax.grad(value, argnums=(0, 1))

    def along(*sides):
        return sum(
            (one * other).sum() for one, other in zip(gradient(*sides), directions, strict=True)
        )

    forward = jax.jvp(gradient, sides, directions)[1]
    return jax.jit(lambda: (forward, jax.grad(along, argnums=(0, 1))(*sides)))()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name == "softplus" else [])
        for name in REDUCTIONS
    ],
)
def test_tiles_have_the_second_derivatives_of_the_whole_block(name):
    sides = unit_vectors(0, 5, 6), unit_vectors(1, 9, 6)
    directions = unit_vectors(2, 5, 6), unit_vectors(3, 9, 6)
    queries, keys, _ = labels_of("all", 5, 9)
    reduce = functools.partial(REDUCTIONS[name], query_labels=queries, key_labels=keys, tile=TILE)
    found, expected = (
        second_derivatives(functools.partial(reduce, implementation=way), sides, directions)
        for way in ("tiled", "reference")
    )
    for errors in (relative_errors(found, expected), relative_errors(found[0], expected[1])):
        assert max(errors.values()) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("exchange", ["ring", "gather"])
def test_devices_have_the_second_derivatives_of_one(exchange):
    sides, directions = ([unit_vectors(seed, 16, 6) for seed in pair] for pair in ((0, 1), (2, 3)))
    mesh, rows = make_mesh({"data": 8}), PartitionSpec("data")
    reduce = functools.partial(pair_logsumexp, temperature=0.1, tile=2)
    across = jax.shard_map(
        functools.partial(reduce, implementation="tiled", axis_name="data", exchange=exchange),
        mesh=mesh,
        in_specs=(rows, rows),
        out_specs=rows,
    )
    found = second_derivatives(across, tuple(sides), tuple(directions))
    whole = functools.partial(reduce, implementation="reference")
    expected = second_derivatives(whole, tuple(sides), tuple(directions))
    assert max(relative_errors(found, expected).values()) < 1e-10
