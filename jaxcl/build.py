"""From a config to the parts of a run: plain dicts from names to functions, and nothing hidden."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxcl.embed import Embedder, make_embedder
from jaxcl.grad_cache import rows_per_chunk
from jaxcl.losses import (
    decoupled_infonce_loss,
    distillation_loss,
    hard_infonce_loss,
    infonce_loss,
    matryoshka,
    sigmoid_pair_loss,
    supervised_infonce_loss,
)
from jaxcl.losses.running_estimate import (
    estimate_memory,
    remembered_estimate_loss,
    running_estimate_loss,
)
from jaxcl.mesh import make_mesh
from jaxcl.models import StaticEncoder, Towers, TransformerEncoder, make_towers
from jaxcl.models.towers import SIDES
from jaxcl.negatives.memory_bank import MemoryBank, init_bank, update_instances, update_queue
from jaxcl.train_state import TrainState
from jaxcl.train_step import (
    LossOfBatch,
    StepMetrics,
    TemperatureBounds,
    init_state,
    make_loss,
    make_train_step,
    state_sharding,
)
from jaxcl.typing import Batch, PyTree, Scalar

__all__ = [
    "BANKS",
    "ENCODERS",
    "LOSSES",
    "MASKS",
    "MEMORIES",
    "OPTIMIZERS",
    "Program",
    "build_loss",
    "build_memory",
    "build_optimizer",
    "build_program",
    "build_towers",
]

ENCODERS: Mapping[str, Callable] = {"static": StaticEncoder, "transformer": TransformerEncoder}
"""Encoders by name; `config.model.options` are their keyword arguments."""

LOSSES: Mapping[str, Callable] = {
    "decoupled": decoupled_infonce_loss,
    "distillation": distillation_loss,
    "hard": hard_infonce_loss,
    "infonce": infonce_loss,
    "running_estimate": remembered_estimate_loss,
    "sigmoid": sigmoid_pair_loss,
    "supervised": supervised_infonce_loss,
}
"""Losses by name; `config.loss.options` are their keyword arguments."""

MEMORIES: Mapping[str, Callable[..., PyTree]] = {"running_estimate": estimate_memory}
"""What a loss of this name remembers of the training rows, from their number and its options."""

BANKS = ("queue", "instance")
"""Memory banks by name, as `config.negatives.bank.kind`."""

MASKS: Mapping[str, str] = {"row": "ids", "group": "groups"}
"""Which argument of a loss goes by which column of the batch: whose equals are no negatives."""

_BATCH_ARGUMENTS = (
    *("queries", "keys", "temperature", "axis_name", "valid", "guides", *MASKS.values()),
    *("negatives", "negative_ids", "negative_groups", "negatives_valid", "negative_guides"),
    *("bank", "key_groups", "teacher_scores", "memory"),
)
_CONFIG_ARGUMENTS = ("exchange", "implementation", "temperature_bounds")

OPTIMIZERS: Mapping[str, Callable] = {
    "adam": optax.scale_by_adam,
    "lion": optax.scale_by_lion,
    "sgd": lambda decay=0.9, nesterov=False: optax.trace(decay, nesterov),
}
"""Gradient scalings by name; `config.optimizer.options` are their keyword arguments."""


class Program(NamedTuple):
    """What trains: the functions of a run, on its mesh, and its initial state's shapes.

    Attributes:
      mesh: where it runs.
      towers: the model.
      init: number of training rows -> the state before the first update, on the mesh. Only a loss
        that remembers rows needs the number.
      train_step: (state, batch) -> (state, metrics); the state is donated.
      embed: (parameters of the towers, side, tokens) -> embeddings, without dropout.
      learning_rate: step -> the rate of that update.
      abstract_state: number of training rows -> the state's shapes, types and shardings.
    """

    mesh: Mesh
    towers: Towers
    init: Callable[..., TrainState]
    train_step: Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]
    embed: Embedder
    learning_rate: Callable[[Scalar | int], Scalar]
    abstract_state: Callable[..., TrainState]


def build_program(config: ConfigDict) -> Program:
    """Builds a run's functions.

    Args:
      config: as the files of `configs/` return it.

    Raises:
      ValueError: for an unknown name, and for a batch that does not divide over the mesh.
    """
    _check_numbers(config)
    if "group" in config.loss.masks and config.data.group_field is None:
        raise ValueError(
            "loss.masks names 'group', but data.group_field is None: all rows would be of one "
            "group, and no negative would count. Set data.group_field, or leave 'group' out"
        )
    mesh = make_mesh(dict(config.run.mesh))
    _check_batch_size(config.global_batch_size, mesh)
    towers = build_towers(config.model, vocabulary_size=config.data.vocabulary_size)
    optimizer, learning_rate = build_optimizer(config.optimizer, steps=config.steps)
    temperature = TemperatureBounds(**config.loss.temperature)
    loss = build_loss(config, towers, mesh)

    def init(num_rows: int | None = None) -> TrainState:
        return init_state(
            jax.random.key(config.seed),
            towers.init,
            optimizer,
            temperature=temperature,
            bias=config.loss.get("bias"),
            memory=build_memory(config, num_rows),
        )

    def abstract_state(num_rows: int | None = None) -> TrainState:
        state = jax.eval_shape(lambda: init(num_rows))
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            state,
            state_sharding(mesh, state),
        )

    def placed_init(num_rows: int | None = None) -> TrainState:
        state = init(num_rows)
        return jax.lax.with_sharding_constraint(state, state_sharding(mesh, state))

    return Program(
        mesh=mesh,
        towers=towers,
        init=jax.jit(placed_init, static_argnums=0),
        train_step=make_train_step(loss, optimizer, mesh, temperature=temperature),
        embed=make_embedder(towers.encode, mesh, batch_size=config.evaluation.batch_size),
        learning_rate=learning_rate,
        abstract_state=abstract_state,
    )


def build_towers(config: ConfigDict, *, vocabulary_size: int) -> Towers:
    """The model of `config.model`."""
    encoder = _bound(
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
    scaling = _bound("optimizer", config.name, OPTIMIZERS, dict(config.options))
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


def build_loss(config: ConfigDict, towers: Towers, mesh: Mesh) -> LossOfBatch:
    """The loss of `config.loss`, encoded as `config.grad_cache` says: see `make_loss`."""
    return make_loss(
        towers.encode,
        _loss_fn(config.loss),
        mesh,
        masks=_masks(config.loss),
        chunk_sizes=_chunk_sizes(config),
        remembers=config.loss.name in MEMORIES,
        update_bank=_bank_update(config),
        needs=[
            name
            for name, argument in _arguments(LOSSES[config.loss.name]).items()
            if name == "teacher_scores" and argument.default is argument.empty
        ],
    )


def _loss_fn(config: ConfigDict) -> Callable:
    bound = {"exchange": config.get("exchange"), "implementation": config.get("implementation")}
    bound = {name: value for name, value in bound.items() if value is not None}
    not_options = (*_BATCH_ARGUMENTS, *_CONFIG_ARGUMENTS)
    loss_fn = _bound("loss", config.name, LOSSES, dict(config.options), not_options=not_options)
    if config.name in MEMORIES:
        bounds = TemperatureBounds(**config.temperature)
        bound["temperature_bounds"] = (bounds.minimum, bounds.maximum)
    if config.get("bias") is not None and "bias" not in _arguments(LOSSES[config.name]):
        raise ValueError(
            f"loss.bias={config.bias} is learned by losses that have one; {config.name!r} has none"
        )
    if config.get("bias") is not None and "bias" in config.options:
        raise ValueError("loss.bias and loss.options.bias are both given; leave one out")
    loss_fn = functools.partial(loss_fn, **bound)
    dims = config.get("matryoshka_dims", ())
    if dims and config.name in MEMORIES:
        raise ValueError(
            f"loss.matryoshka_dims={tuple(dims)} with {config.name!r}, which remembers one number "
            "of each row, not one for each length; leave one of the two out"
        )
    return matryoshka(loss_fn, dims=dims) if dims else loss_fn


def build_memory(config: ConfigDict, num_rows: int | None) -> dict[str, PyTree]:
    """What a run of so many training rows remembers, before the first batch."""
    loss = config.loss
    memory: dict[str, PyTree] = {}
    remembers = {"the loss": loss.name in MEMORIES, "the bank": _bank_kind(config) == "instance"}
    for what, needed in remembers.items():
        if needed and num_rows is None:
            raise ValueError(f"{what} remembers rows; give the number of them")
    if loss.name in MEMORIES:
        bounds = TemperatureBounds(**loss.temperature)
        memory["rows"] = MEMORIES[loss.name](num_rows, temperature=bounds.initial, **loss.options)
    if _bank_kind(config) is not None:
        bank = config.negatives.bank
        slots: Any = num_rows if bank.kind == "instance" else bank.slots
        memory["bank"] = init_bank(slots, config.model.dim, dtype=jnp.dtype(bank.dtype))
    return memory


def _bank_kind(config: ConfigDict) -> str | None:
    kind = config.negatives.bank.kind if "negatives" in config else None
    if kind is not None and kind not in BANKS:
        raise ValueError(
            f"negatives.bank.kind={kind!r} is unknown; use one of {', '.join(BANKS)}, or None"
        )
    return kind


def _bank_update(config: ConfigDict) -> Callable[..., MemoryBank] | None:
    kind = _bank_kind(config)
    if kind is None:
        return None
    bank = config.negatives.bank
    if "bank" not in _arguments(LOSSES[config.loss.name]):
        raise ValueError(
            f"negatives.bank.kind={kind!r}, but the loss {config.loss.name!r} takes no bank; leave "
            "it None"
        )
    if "row" not in config.loss.masks:
        raise ValueError(
            "a bank holds rows of this batch, too: put 'row' among loss.masks, by which none is "
            "its own negative"
        )
    if config.loss.get("matryoshka_dims", ()):
        raise ValueError(
            f"negatives.bank.kind={kind!r} with loss.matryoshka_dims: a bank holds whole "
            "embeddings; leave one of the two out"
        )
    if not 0 <= bank.momentum < 1:
        raise ValueError(f"negatives.bank.momentum={bank.momentum}; set it to at least 0, below 1")
    if kind == "queue":
        if bank.slots < 1:
            raise ValueError(f"negatives.bank.slots={bank.slots}; set it to at least 1")
        return functools.partial(update_queue, num_slots=bank.slots)
    return functools.partial(update_instances, momentum=bank.momentum)


def _chunk_sizes(config: ConfigDict) -> dict[str, int] | None:
    """How many of a device's rows are encoded at a time, by side; `None` for all."""
    options = dict(config.get("grad_cache", {}))
    size, tokens = options.get("chunk_size"), options.get("chunk_tokens")
    if size is not None and tokens is not None:
        raise ValueError(
            f"grad_cache.chunk_size={size} and grad_cache.chunk_tokens={tokens} are both given; "
            "leave one out"
        )
    for name, value in (("chunk_size", size), ("chunk_tokens", tokens)):
        if value is not None and value < 1:
            raise ValueError(f"grad_cache.{name}={value}; set it to at least 1, or leave it out")
    if size is not None:
        return dict.fromkeys(SIDES, int(size))
    if tokens is not None:
        return {
            side: rows_per_chunk(width, max_tokens=tokens)
            for side, width in _max_tokens(config).items()
        }
    return None


def _masks(config: ConfigDict) -> dict[str, str]:
    unknown = set(config.masks) - set(MASKS)
    if unknown:
        raise ValueError(f"loss.masks={config.masks} are unknown; use some of {', '.join(MASKS)}")
    masks = {MASKS[column]: column for column in config.masks}
    arguments = _arguments(LOSSES[config.name])
    for argument, column in masks.items():
        if argument not in arguments:
            raise ValueError(f"loss.masks: {config.name!r} takes no {column!r}; leave it out")
    for argument, column in ((MASKS[column], column) for column in MASKS):
        needed = argument in arguments and arguments[argument].default is inspect.Parameter.empty
        if needed and argument not in masks:
            raise ValueError(
                f"loss.masks={tuple(config.masks)}: {config.name!r} needs {column!r} among them"
            )
    return masks


def _bound(
    what: str,
    name: str,
    known: Mapping[str, Callable],
    options: Mapping[str, Any],
    *,
    not_options: tuple[str, ...] = (),
) -> Callable:
    """The function of a name with its options bound; an unknown name or option is an error."""
    if name not in known:
        raise ValueError(f"{what}.name={name!r} is unknown; use one of {', '.join(known)}")
    function = known[name]
    accepted = [argument for argument in _arguments(function) if argument not in not_options]
    for option in options:
        if option not in accepted:
            raise ValueError(
                f"{what}.options.{option} is unknown to {name!r}; it knows {', '.join(accepted)}"
            )
    return functools.partial(function, **options)


def _arguments(function: Callable) -> dict[str, inspect.Parameter]:
    """What can be given by name."""
    # Flax's metaclass hides the signature of a module's constructor.
    signature = inspect.signature(function.__init__ if inspect.isclass(function) else function)
    arguments = dict(signature.parameters)
    if function is remembered_estimate_loss:  # which hands on the rest
        arguments |= inspect.signature(running_estimate_loss).parameters
        del arguments["estimates"]
    return {
        name: parameter
        for name, parameter in arguments.items()
        if parameter.kind not in (parameter.POSITIONAL_ONLY, parameter.VAR_KEYWORD)
    }


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
