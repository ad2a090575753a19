"""From a config to the parts of a run: plain dicts from names to functions, and nothing hidden."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxcl.models import DecoderEncoder, StaticEncoder, Towers, TransformerEncoder, make_towers
from jaxcl.ops.mesh import make_mesh
from jaxcl.settings.build_assignment import gcbs_rule
from jaxcl.settings.build_loss import build_loss, build_measure, build_memory
from jaxcl.settings.build_negatives import build_momentum, mining_rule
from jaxcl.settings.options import bind_options
from jaxcl.step.embedder import Embedder, make_embedder
from jaxcl.step.mined_refresh import Refresh, make_mined_refresh
from jaxcl.step.parameter_sharding import FSDP, Rule
from jaxcl.step.train_state import TrainState
from jaxcl.step.train_step import (
    StepMetrics,
    TemperatureBounds,
    init_state,
    make_train_step,
    state_sharding,
)
from jaxcl.typing import Batch, Integer, PyTree, Scalar

__all__ = [
    "ENCODERS",
    "OPTIMIZERS",
    "Program",
    "build_optimizer",
    "build_program",
    "build_towers",
    "run_mesh",
]

ENCODERS: Mapping[str, Callable] = {
    "decoder": DecoderEncoder,
    "static": StaticEncoder,
    "transformer": TransformerEncoder,
}
"""Encoders by name; `config.model.options` are their keyword arguments."""

OPTIMIZERS: Mapping[str, Callable] = {
    "adam": optax.scale_by_adam,
    "lion": optax.scale_by_lion,
    "sgd": lambda decay=0.9, nesterov=False: optax.trace(decay, nesterov),
}
"""Gradient scalings by name; `config.optimizer.options` are their keyword arguments."""


Groups: TypeAlias = Integer[np.ndarray, " n"]


class Program(NamedTuple):
    """What trains: the functions of a run, on its mesh, and its initial state's shapes.

    Attributes:
      mesh: where it runs.
      towers: the model.
      init: (number of training rows, their groups) -> the state before the first update, on the
        mesh. Only what remembers rows needs the number, only a stratified draw the groups.
      train_step: (state, batch) -> (state, metrics); the state is donated.
      measure: (state, batch) -> what the negatives are in the update to come, by name.
      mine: state -> (state with new mined negatives, metrics), or `None`; the state is donated.
      embed: (parameters of the towers, side, tokens) -> embeddings, without dropout.
      learning_rate: step -> the rate of that update.
      abstract_state: the same as `init` -> the state's shapes, types and shardings.
    """

    mesh: Mesh
    towers: Towers
    init: Callable[..., TrainState]
    train_step: Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]
    measure: Callable[[TrainState, Batch], Mapping[str, Scalar]]
    mine: Refresh | None
    embed: Embedder
    learning_rate: Callable[[Scalar | int], Scalar]
    abstract_state: Callable[..., TrainState]


def build_program(config: ConfigDict, *, devices: Sequence[jax.Device] | None = None) -> Program:
    """Builds a run's functions.

    Args:
      config: as the files of `configs/` return it.
      devices: where it runs; all that there are by default.

    Raises:
      ValueError: for an unknown name, and for a batch that does not divide over the mesh.
    """
    _check_numbers(config)
    gcbs_rule(config)  # before anything is made, what is wrong with it
    if "group" in config.loss.masks and config.data.group_field is None:
        raise ValueError(
            "loss.masks names 'group', but data.group_field is None: all rows would be of one "
            "group, and no negative would count. Set data.group_field, or leave 'group' out"
        )
    mesh = run_mesh(config, devices=devices)
    rules = tuple((path, cut) for path, cut in config.run.get("parameter_rules", ()))
    _check_batch_size(config.global_batch_size, mesh)
    towers = build_towers(config.model, vocabulary_size=config.data.vocabulary_size)
    optimizer, learning_rate = build_optimizer(config.optimizer, steps=config.steps)
    temperature = TemperatureBounds(**config.loss.temperature)
    loss = build_loss(config, towers, mesh)
    measure = build_measure(config, towers, mesh)
    rule, by_group = mining_rule(config), "group" in config.loss.masks

    init, abstract_state = _state_makers(config, mesh, towers, optimizer, rules=rules)

    @jax.jit
    def measured(state: TrainState, batch: Batch) -> Mapping[str, Scalar]:
        key = jax.random.fold_in(state.key, state.step)
        return measure(state.params, state.memory, batch, key)

    return Program(
        mesh=mesh,
        towers=towers,
        init=init,
        train_step=make_train_step(
            loss,
            optimizer,
            mesh,
            temperature=temperature,
            momentum=build_momentum(config),
            rules=rules,
        ),
        measure=measured,
        mine=None if rule is None else make_mined_refresh(rule, mesh, by_group=by_group),
        embed=make_embedder(towers.encode, mesh, batch_size=config.evaluation.batch_size),
        learning_rate=learning_rate,
        abstract_state=abstract_state,
    )


def _state_makers(
    config: ConfigDict,
    mesh: Mesh,
    towers: Towers,
    optimizer: optax.GradientTransformation,
    *,
    rules: Sequence[Rule],
) -> tuple[Callable[..., TrainState], Callable[..., TrainState]]:
    """`init` and `abstract_state` of a `Program`."""

    def unplaced(num_rows: int | None, groups: Groups | None) -> TrainState:
        return init_state(
            jax.random.key(config.seed),
            towers.init,
            optimizer,
            temperature=TemperatureBounds(**config.loss.temperature),
            bias=config.loss.get("bias"),
            memory=build_memory(config, num_rows, groups),
        )

    def abstract_state(num_rows: int | None = None, groups: Groups | None = None) -> TrainState:
        state = jax.eval_shape(lambda: unplaced(num_rows, groups))
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            state,
            state_sharding(mesh, state, rules=rules),
        )

    def init(num_rows: int | None = None, groups: Groups | None = None) -> TrainState:
        def placed() -> TrainState:
            state = unplaced(num_rows, groups)
            return jax.lax.with_sharding_constraint(state, state_sharding(mesh, state, rules=rules))

        return jax.jit(placed)()

    return init, abstract_state


def run_mesh(config: ConfigDict, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `config.run.mesh`; an axis for parameters that has one device is left out."""
    axes = dict(config.run.mesh)
    return make_mesh(
        {name: size for name, size in axes.items() if name != FSDP or size != 1},
        devices=None if devices is None else list(devices),
    )


def build_towers(config: ConfigDict, *, vocabulary_size: int) -> Towers:
    """The model of `config.model`."""
    encoder = bind_options(
        "model",
        config.name,
        ENCODERS,
        dict(config.options),
        not_options=("self", "vocabulary_size", "dim", "rngs"),
    )
    return make_towers(
        lambda rngs: encoder(vocabulary_size, dim=config.dim, rngs=rngs), shared=config.shared
    )


def build_optimizer(
    config: ConfigDict, *, steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimiser of `config.optimizer`, and its learning rate by step.

    Gradients are clipped by their norm together, scaled, joined by the decay of matrices (not of
    vectors and scalars), and multiplied by a rate that rises linearly and falls along a cosine.
    """
    scaling = bind_options("optimizer", config.name, OPTIMIZERS, dict(config.options))
    learning_rate = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=min(config.warmup_steps, steps - 1),
        decay_steps=steps,
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        scaling(),
        optax.add_decayed_weights(config.weight_decay, mask=_is_matrix),
        optax.scale_by_learning_rate(learning_rate),
    )
    return optimizer, learning_rate


def _check_numbers(config: ConfigDict) -> None:
    """Raises a `ValueError` for sizes and rates with which nothing could run."""
    for name, value in _sizes(config).items():
        if value < 1:
            raise ValueError(f"{name}={value}; set it to at least 1")
    if config.run.get("keep_checkpoints", 2) < 2:
        raise ValueError(
            f"run.keep_checkpoints={config.run.keep_checkpoints}; set it to at least 2, so that "
            "there is one to go back to if the newest is damaged"
        )
    if not config.optimizer.learning_rate > 0:
        raise ValueError(
            f"optimizer.learning_rate={config.optimizer.learning_rate}; set it above 0"
        )
    bounds = TemperatureBounds(**config.loss.temperature)
    if not 0 < bounds.minimum <= bounds.initial <= bounds.maximum:
        raise ValueError(
            f"loss.temperature={dict(config.loss.temperature)}; wanted is "
            "0 < minimum <= initial <= maximum"
        )
    longest = max(_max_tokens(config).values(), default=0)
    if longest > config.model.options.get("max_tokens", longest):
        raise ValueError(
            f"data.max_tokens={_max_tokens(config)}, but "
            f"model.options.max_tokens={config.model.options.max_tokens} is the longest text that "
            f"the model reads; set it to at least {longest}"
        )


def _sizes(config: ConfigDict) -> dict[str, int]:
    cadences = ("log_every", "evaluate_every", "checkpoint_every")
    return {
        "steps": config.steps,
        "global_batch_size": config.global_batch_size,
        "model.dim": config.model.dim,
        "evaluation.batch_size": config.evaluation.batch_size,
        **{f"data.max_tokens.{side}": width for side, width in _max_tokens(config).items()},
        **{f"run.{name}": config.run[name] for name in cadences if name in config.run},
    }


def _max_tokens(config: ConfigDict) -> dict[str, int]:
    return dict(config.data.get("max_tokens", {}))


def _check_batch_size(global_batch_size: int, mesh: Mesh) -> None:
    if global_batch_size % mesh.size:
        raise ValueError(
            f"global_batch_size={global_batch_size} does not divide over {mesh.size} devices; "
            f"use a multiple of {mesh.size}"
        )


def _is_matrix(params: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.ndim(leaf) > 1, params)
