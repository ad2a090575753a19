"""Values and gradients of every loss in float64: masks × negatives × exchange, on 1 and 8 devices.

A case is named `losses/LOSS/NEGATIVES/MASKS/WAY`. Its result holds the loss of each row and the
gradient of their mean, for each array that the loss reads: both sides, the log-temperature, a bias,
explicit negatives and tiers.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec

from tests.goldens.adapter import (
    LOSSES,
    ExplicitNegatives,
    Masks,
    OwnNegatives,
    SharedNegatives,
    matryoshka,
    measure_negatives,
)

__all__ = ["CASES", "record"]

NUM_ROWS, DIM, GUIDE_DIM = 16, 8, 6
EXPLICIT, OWN, SHARED = 3, 2, 24  # negatives of a row, and of all rows together
EVERY_SOURCE = ("batch", "explicit", "shared", "own", "all")
ALL_DIRECTIONS = ("query_to_key", "key_to_query", "query_to_query", "key_to_key")

Arrays = dict[str, Any]


class Way(NamedTuple):
    """The way in which a loss is computed."""

    devices: int
    options: Mapping[str, Any]


WAYS = {
    "one": Way(1, {}),
    "one-tiled": Way(1, {"implementation": "tiled"}),
    "gather": Way(8, {"exchange": "gather"}),
    "gather-tiled": Way(8, {"exchange": "gather", "implementation": "tiled"}),
    "ring": Way(8, {"exchange": "ring"}),
}
FEWER_WAYS = ("one", "gather", "ring")
FEWER_MASKS = ("unmasked", "everything")

MASKS: Mapping[str, tuple[tuple[str, ...], Mapping[str, float]]] = {
    "unmasked": ((), {}),
    "valid": (("valid",), {}),
    "labels": (("ids", "groups", "valid"), {}),
    "margin": ((), {"margin": 0.1}),
    "everything": (("ids", "groups", "valid", "guides"), {"relative_margin": 0.2}),
}
"""Name -> the columns that a loss receives, and its options."""


class Variant(NamedTuple):
    """A loss with its options, and the inputs that it has in addition to both sides."""

    loss_fn: Callable
    inputs: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    masks: tuple[str, ...] = ("unmasked", "labels", "margin", "everything")
    ways: tuple[str, ...] = FEWER_WAYS
    negatives: tuple[str, ...] = ("batch",)
    exchanges: bool = True


def _variants() -> dict[str, Variant]:
    infonce, estimate = LOSSES["infonce"], LOSSES["running_estimate"]
    labels_only, valid_only = ("unmasked", "labels"), ("unmasked", "valid")

    def with_options(loss_fn: Callable = infonce, **options: Any) -> Variant:
        return Variant(functools.partial(loss_fn, **options))

    return {
        "infonce": Variant(infonce, ways=tuple(WAYS), negatives=EVERY_SOURCE),
        "infonce-query-to-key": with_options(directions=("query_to_key",))._replace(
            masks=("margin", "everything")
        ),
        "infonce-key-to-query": with_options(directions=("key_to_query",))._replace(
            masks=("margin", "everything")
        ),
        "infonce-own-sides": with_options(directions=("query_to_query", "key_to_key")),
        "infonce-joint": with_options(directions=ALL_DIRECTIONS, partition="joint")._replace(
            masks=FEWER_MASKS, negatives=("batch", "all")
        ),
        "infonce-hardness": with_options(hardness=3.0)._replace(masks=FEWER_MASKS),
        "infonce-negative-hardness": with_options(negative_hardness=2.0)._replace(
            masks=FEWER_MASKS, negatives=("explicit", "own")
        ),
        "infonce-row-temperatures": with_options()._replace(
            columns=("temperatures",), masks=labels_only
        ),
        "decoupled": Variant(LOSSES["decoupled_infonce"]),
        "hard": Variant(LOSSES["hard_infonce"]),
        "debiased": with_options(LOSSES["hard_infonce"], concentration=0.0, positive_share=0.02),
        "sigmoid": Variant(
            LOSSES["sigmoid_pair"], inputs=("bias",), masks=labels_only, ways=tuple(WAYS)
        ),
        "matryoshka": Variant(matryoshka(infonce, dims=(3, DIM), weights=(0.5, 1.0))),
        "running-estimate": Variant(estimate, columns=("estimates",)),
        "running-estimate-robust": with_options(estimate, robustness=6.5)._replace(
            columns=("estimates", "row_temperatures"), masks=FEWER_MASKS
        ),
        "supervised": Variant(LOSSES["supervised_infonce"], columns=("labels",), masks=valid_only),
        "supervised-many": Variant(
            LOSSES["supervised_infonce"],
            columns=("many_labels", "key_labels"),
            masks=valid_only,
        ),
        "distillation": Variant(
            LOSSES["distillation"],
            columns=("teacher_scores",),
            masks=valid_only,
            ways=("one", "gather"),
            negatives=("explicit",),
            exchanges=False,
        ),
        "measure": Variant(measure_negatives, masks=FEWER_MASKS, negatives=("all",)),
    }


class Case(NamedTuple):
    """One computation: a loss, its negatives and masks, and the devices."""

    variant: Variant
    negatives: str
    masks: str
    way: Way


def _cases() -> Iterator[tuple[str, Case]]:
    for name, variant in _variants().items():
        for negatives in variant.negatives:
            for masks, way in itertools.product(variant.masks, variant.ways):
                if negatives in ("batch", "all") or way in FEWER_WAYS:
                    case = Case(variant, negatives, masks, WAYS[way])
                    yield f"losses/{name}/{negatives}/{masks}/{way}", case


CASES: Mapping[str, Case] = dict(_cases())


def record(name: str) -> dict[str, Any]:
    """The result of a case: array name -> a float64 array."""
    with jax.enable_x64(True):
        value, gradients = _value_and_gradients(CASES[name])
    leaves = {"value": value, **{f"gradient of {key}": leaf for key, leaf in gradients.items()}}
    return {name: np.asarray(leaf, np.float64) for name, leaf in sorted(_flat(leaves).items())}


def _value_and_gradients(case: Case) -> tuple[Any, Arrays]:
    rows, scalars, columns = _inputs(case)
    loss_fn = functools.partial(_local_loss, case)
    if case.way.devices > 1:
        mesh = _mesh(case.way.devices)
        sharded, whole = PartitionSpec("data"), PartitionSpec()
        loss_fn = jax.shard_map(
            functools.partial(loss_fn, axis_name="data"),
            mesh=mesh,
            in_specs=(sharded, whole, sharded),
            out_specs=sharded,
        )

    def mean_loss(rows: Arrays, scalars: Arrays) -> tuple[Any, Any]:
        found = loss_fn(rows, scalars, columns)
        # A loss that returns more than its values returns them first.
        return jax.tree.leaves(found)[0].mean(), found

    gradient = jax.jit(jax.grad(mean_loss, (0, 1), has_aux=True))
    (of_rows, of_scalars), value = gradient(rows, scalars)
    return value, of_rows | of_scalars


def _local_loss(
    case: Case, rows: Arrays, scalars: Arrays, columns: Arrays, axis_name: str | None = None
) -> Any:
    """The loss of one device's rows."""
    arguments = {name: leaf for name, leaf in columns.items() if name not in rows}
    if "many_labels" in arguments:
        arguments["labels"] = arguments.pop("many_labels")
    temperature = jnp.exp(scalars["log_temperature"])
    for name in ("temperatures", "row_temperatures"):
        if name in arguments:
            temperature = temperature * arguments.pop(name)
    if "bias" in scalars:
        arguments["bias"] = scalars["bias"]
    masks = {name: arguments.pop(name) for name in MASKS[case.masks][0]}
    negatives = {
        name: kind(rows[column], **columns[column])
        for column, name, kind in (
            ("negatives", "explicit", ExplicitNegatives),
            ("shared", "shared", SharedNegatives),
            ("own", "own", OwnNegatives),
        )
        if column in rows
    }
    if negatives:
        arguments["negatives"] = negatives
    if case.variant.exchanges:
        arguments |= {"axis_name": axis_name, **case.way.options}
    return case.variant.loss_fn(
        rows["queries"],
        rows["keys"],
        temperature=temperature,
        masks=Masks(**masks, **MASKS[case.masks][1]),
        **arguments,
    )


def _inputs(case: Case) -> tuple[Arrays, Arrays, Arrays]:
    """Arrays by row and scalars with gradients, and columns without."""
    queries = _unit_vectors(0, NUM_ROWS, DIM)
    rows = {
        "queries": queries,
        "keys": _normalised(queries + 0.9 * _unit_vectors(1, NUM_ROWS, DIM)),
    }
    scalars = {"log_temperature": jnp.log(0.3)}
    if "bias" in case.variant.inputs:
        scalars["bias"] = jnp.float64(-2.0)
    known = _columns()
    masked = MASKS[case.masks][0]
    columns = {name: known[name] for name in (*case.variant.columns, *masked)}
    labels = [name for name in ("ids", "groups", "guides") if name in masked]
    if case.negatives in ("explicit", "all"):
        rows["negatives"] = _unit_vectors(2, NUM_ROWS, EXPLICIT, DIM)
        columns["negatives"] = _described(3, (NUM_ROWS, EXPLICIT), labels)
    if case.negatives in ("shared", "all"):
        rows["shared"] = _unit_vectors(4, SHARED, DIM)
        columns["shared"] = _described(5, (SHARED,), labels)
    if case.negatives in ("own", "all"):
        rows["own"] = _unit_vectors(6, NUM_ROWS, OWN, DIM)
        columns["own"] = _described(7, (NUM_ROWS, OWN), labels)
    return rows, scalars, columns


def _columns() -> Arrays:
    """All columns that a loss may read."""
    place = jnp.arange(NUM_ROWS)
    rng = np.random.default_rng(10)
    estimates = rng.normal(1.0, 1.0, (NUM_ROWS, 2))
    estimates[::4] = -np.inf  # rows of no earlier batch
    return {
        "ids": place % 13,
        "groups": place // 3,
        "labels": place // 3,
        "many_labels": jnp.stack([place // 2, jnp.where(place % 2, place % 5, -1)], 1),
        "key_labels": place // 2,
        "valid": place != 5,
        "guides": (
            _unit_vectors(8, NUM_ROWS, GUIDE_DIM),
            _normalised(_unit_vectors(8, NUM_ROWS, GUIDE_DIM) + _unit_vectors(9, GUIDE_DIM)),
        ),
        "temperatures": jnp.asarray(rng.uniform(0.05, 1.0, NUM_ROWS)),
        "row_temperatures": jnp.asarray(rng.uniform(0.5, 2.0, (NUM_ROWS, 2))),
        "estimates": jnp.asarray(estimates),
        "teacher_scores": jnp.asarray(rng.normal(0.0, 2.0, (NUM_ROWS, 1 + EXPLICIT))),
    }


def _described(seed: int, shape: tuple[int, ...], labels: list[str]) -> Arrays:
    """Labels of negatives; some equal the label of a row, which masks them there."""
    rng = np.random.default_rng(seed)
    known = {
        "ids": jnp.asarray(rng.integers(0, 20, shape)),
        "groups": jnp.asarray(rng.integers(0, 8, shape)),
        "guides": _unit_vectors(seed + 20, *shape, GUIDE_DIM),
    }
    return {name: known[name] for name in labels} | {"valid": jnp.asarray(rng.random(shape) < 0.8)}


def _unit_vectors(seed: int, *shape: int) -> jax.Array:
    return _normalised(jnp.asarray(np.random.default_rng(seed).normal(size=shape)))


def _normalised(vectors: jax.Array) -> jax.Array:
    return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)


def _mesh(devices: int) -> Mesh:
    return jax.make_mesh(
        (devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )


def _flat(tree: Any) -> dict[str, Any]:
    """Leaf path -> leaf."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
