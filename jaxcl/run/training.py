"""Build the functions of a training run from settings."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from jaxcl.data.modalities import modality_of
from jaxcl.data.modality import Reader
from jaxcl.data.table import Table
from jaxcl.host.paths import AnyPath, local_path
from jaxcl.host.progress import say
from jaxcl.models import Towers, TowerSpec, make_towers
from jaxcl.models.augmentations import AUGMENTATIONS, KEEP_SPECIAL_TOKENS
from jaxcl.models.lora import (
    Lora,
    add_adapters,
    cast_base,
    frozen_base,
    with_base,
    without_adapters,
)
from jaxcl.models.pretrained.weights import place
from jaxcl.models.trainable import merge, parameter_paths, split, with_frozen_momentum
from jaxcl.ops.mesh import make_mesh
from jaxcl.run.build_loss import build_loss, build_measure, build_momentum
from jaxcl.run.encoder import Encoder
from jaxcl.run.memory import init_memory
from jaxcl.run.optimizer import build_optimizer, frozen_parameters
from jaxcl.run.text_widths import choose_text_widths
from jaxcl.settings.derived import cut_sides, tower_sections
from jaxcl.settings.sections import Settings
from jaxcl.step.embedder import Embedder, make_embedder
from jaxcl.step.length_buckets import Buckets, computed_tokens, longest_first, text_lengths
from jaxcl.step.mined_refresh import Refresh, make_mined_refresh
from jaxcl.step.parameter_sharding import FSDP
from jaxcl.step.train_state import TrainState
from jaxcl.step.train_step import (
    StepMetrics,
    TemperatureBounds,
    init_state,
    make_train_step,
    state_sharding,
)
from jaxcl.typing import SIDES, Batch, Integer, Key, PyTree, Scalar

__all__ = [
    "Training",
    "abstract_parameters",
    "build_embedder",
    "build_towers",
    "build_training",
    "embedding_dim",
    "evaluation_towers",
    "run_mesh",
    "with_text_widths",
]

Groups: TypeAlias = Integer[np.ndarray, " n"]


class Training(NamedTuple):
    """The functions of a training run on a mesh.

    Attributes:
      settings: the settings from which the functions were built.
      mesh: the devices.
      towers: the model.
      init: `(number of training rows, their groups) -> the state before the first update`, on the
        mesh. The number is needed only by memory with an entry per row, and the groups only by
        stratified draws.
      train_step: `(state, batch) -> (state, metrics)`; the state is donated.
      measure: `(state, batch) -> metrics` of the negatives in the next update, by name.
      mine: `state -> (state with new mined negatives, metrics)`, or `None`; the state is donated.
      embed: `(parameters of the towers, side, read, num_rows) -> embeddings`, without dropout
        (`jaxcl.step.embedder`).
      evaluation_embed: the same, with the towers of `evaluation_towers`.
      learning_rate: `step -> the learning rate of its update`.
      abstract_state: the shapes, types and shardings of the state, with the arguments of `init`.
      frozen: the paths of the parameters that are not trained (`jaxcl.models.trainable`).
      buckets: side -> the widths to which the train step pads its texts, as in `build_training`.
    """

    settings: Settings
    mesh: Mesh
    towers: Towers
    init: Callable[..., TrainState]
    train_step: Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]
    measure: Callable[[TrainState, Batch], Mapping[str, Scalar]]
    mine: Refresh | None
    embed: Embedder
    evaluation_embed: Embedder
    learning_rate: Callable[[Scalar | int], Scalar]
    abstract_state: Callable[..., TrainState]
    frozen: frozenset[str]
    buckets: Mapping[str, Buckets] = {}

    def encoder(self, state: TrainState, readers: Mapping[str, Reader]) -> Encoder:
        """The encoder with the weights that `evaluation.weights` names, given the readers."""
        params = state.params["towers"]
        if self.settings.evaluation.weights == "average":
            _, held = split(state.params, self.frozen)
            params = merge(state.memory["average"].towers, held.get("towers", {}))
        towers = evaluation_towers(self.settings, self.towers)
        return Encoder(self.mesh, towers, self.evaluation_embed, params, readers)


def build_training(
    settings: Settings,
    *,
    devices: Sequence[jax.Device] | None = None,
    buckets: Mapping[str, Buckets] | None = None,
) -> Training:
    """Build the functions of a run.

    Args:
      settings: the settings of the run.
      devices: the devices of the run; all available devices by default.
      buckets: side -> the widths to which the train step pads its texts; by default, all texts are
        padded to `data.max_tokens`.

    Raises:
      ValueError: if the devices cannot form the mesh, the batch does not divide over it, or a
        pattern matches no parameter or leaves no parameter to train.
    """
    mesh = run_mesh(settings.run.mesh, devices=devices)
    if settings.global_batch_size % mesh.size:
        raise ValueError(
            f"global_batch_size={settings.global_batch_size} does not divide over {mesh.size} "
            f"devices; use a multiple of {mesh.size}"
        )
    towers = build_towers(settings)
    embedding_dim(settings, towers)  # an error before the first evaluation
    params = abstract_parameters(settings, towers)
    optimizer, learning_rate = build_optimizer(settings, params)
    frozen = frozen_parameters(settings, params)
    measure = build_measure(settings, towers, mesh)
    init, abstract_state = _state_makers(settings, mesh, towers, optimizer, frozen)

    @jax.jit
    def measured(state: TrainState, batch: Batch) -> Mapping[str, Scalar]:
        key = jax.random.fold_in(state.key, state.step)
        memory = with_frozen_momentum(state.memory, state.params, frozen)
        return measure(state.params, memory, batch, key)

    embed = build_embedder(settings, towers, mesh)
    mined = settings.negatives.mined
    # Whether rows of the same group are masked as negatives, or are positives of each other.
    by_group = "group" in (*settings.loss.masks, *settings.parts.loss.columns.values())
    return Training(
        settings=settings,
        mesh=mesh,
        towers=towers,
        init=init,
        train_step=make_train_step(
            build_loss(settings, towers, mesh, buckets),
            optimizer,
            mesh,
            temperature=TemperatureBounds(*settings.loss.temperature),
            momentum=build_momentum(settings),
            average_decay=settings.optimizer.average_decay,
            accumulate_steps=settings.optimizer.accumulate_steps,
            rules=settings.run.parameter_rules,
            frozen=frozen,
            count=functools.partial(_lengths, settings, mesh.size, buckets or {}),
        ),
        measure=measured,
        mine=None
        if mined.refresh_every is None
        else make_mined_refresh(mined.rule, mesh, by_group=by_group),
        embed=embed,
        evaluation_embed=embed
        if settings.evaluation.projection_head
        else build_embedder(settings, evaluation_towers(settings, towers), mesh),
        learning_rate=learning_rate,
        abstract_state=abstract_state,
        frozen=frozen,
        buckets=buckets or {},
    )


def _state_makers(
    settings: Settings,
    mesh: Mesh,
    towers: Towers,
    optimizer: optax.GradientTransformation,
    frozen: frozenset[str],
) -> tuple[Callable[..., TrainState], Callable[..., TrainState]]:
    """Build `init` and `abstract_state` of a `Training`."""
    rules = settings.run.parameter_rules

    def unplaced(num_rows: int | None, groups: Groups | None, loaded: PyTree) -> TrainState:
        return init_state(
            jax.random.key(settings.seed),
            lambda key: with_base(towers.init(key), loaded),
            optimizer,
            temperature=TemperatureBounds(*settings.loss.temperature),
            bias=settings.loss.bias,
            memory=init_memory(settings, num_rows, groups),
            frozen=frozen,
        )

    def abstract_state(num_rows: int | None = None, groups: Groups | None = None) -> TrainState:
        state = jax.eval_shape(lambda: unplaced(num_rows, groups, {}))
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            state,
            state_sharding(mesh, state, rules=rules),
        )

    def init(num_rows: int | None = None, groups: Groups | None = None) -> TrainState:
        def placed(loaded: PyTree) -> TrainState:
            state = unplaced(num_rows, groups, loaded)
            return jax.lax.with_sharding_constraint(state, state_sharding(mesh, state, rules=rules))

        sources = pretrained_sources(settings)
        loaded = {}
        if sources:
            parameters = abstract_state(num_rows, groups).params["towers"]
            loaded = {
                name: place(tree, without_adapters(parameters[name]))
                for name, tree in towers.load(sources).items()
            }
        return jax.jit(placed, donate_argnums=0)(loaded)

    return init, abstract_state


def with_text_widths(training: Training, table: Table) -> Training:
    """The same training run, with texts padded to widths chosen from these training rows."""
    settings, mesh = training.settings, training.mesh
    platform = mesh.devices.flat[0].platform
    widths = choose_text_widths(settings, table, num_devices=mesh.size, platform=platform)
    if not widths.buckets:
        return training
    if jax.process_index() == 0:
        say(widths.description)
    devices = mesh.devices.ravel().tolist()
    return build_training(settings, devices=devices, buckets=widths.buckets)


def _lengths(
    settings: Settings, num_devices: int, buckets: Mapping[str, Buckets], batch: Batch
) -> tuple[Integer[jax.Array, ""], Integer[jax.Array, ""] | int]:
    """The total length of a batch's inputs, over both sides, without and with padding."""
    data = settings.data
    length, padded = jnp.int32(0), jnp.int32(0)
    for side in SIDES:
        modality = modality_of(data, side)
        length += modality.count(batch[side])
        if side in buckets:
            longest = longest_first(text_lengths(batch[side]).reshape(num_devices, -1))
            padded += num_devices * computed_tokens(longest, buckets[side])
        else:
            padded += settings.global_batch_size * modality.length(data, side)
    return length, padded


def build_embedder(settings: Settings, towers: Towers, mesh: Mesh) -> Embedder:
    """The function that embeds many rows with these towers."""
    size = settings.evaluation.batch_size
    return make_embedder(towers.encode, mesh, batch_size=size, cut_sides=cut_sides(settings))


def evaluation_towers(settings: Settings, towers: Towers) -> Towers:
    """The towers that evaluation and all commands use: with or without projection heads."""
    if settings.evaluation.projection_head:
        return towers
    return towers._replace(encode=towers.features)


def embedding_dim(settings: Settings, towers: Towers) -> int:
    """The dimension of the embeddings of `evaluation_towers`.

    Raises:
      ValueError: if the two sides have different dimensions.
    """
    if settings.evaluation.projection_head:
        return settings.model.dim
    dims = {}
    for side in SIDES:
        spec = modality_of(settings.data, side).spec(settings.data, side)
        inputs = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), spec)
        params = jax.eval_shape(towers.init, jax.random.key(0))
        encode = functools.partial(towers.features, side=side)
        dims[side] = jax.eval_shape(
            lambda params, inputs, encode=encode: encode(params, inputs=inputs), params, inputs
        ).shape[1]
    if len(set(dims.values())) > 1:
        raise ValueError(
            f"the features of queries and keys have different dimensions, {dims}; set "
            "evaluation.projection_head to True"
        )
    return dims["query"]


def run_mesh(axes: Mapping[str, int], *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Make the mesh of `settings.run.mesh`. An `fsdp` axis of size 1 is omitted."""
    return make_mesh(
        {name: size for name, size in axes.items() if name != FSDP or size != 1},
        devices=None if devices is None else list(devices),
    )


def build_towers(settings: Settings) -> Towers:
    """Build the model of `settings.model`, with the augmentations of `settings.augmentation`.

    Files have no adapters, so `Towers.load` returns the parameters without them.
    """
    parts, augmentation = settings.parts, settings.augmentation
    augment = {}
    if parts.augmentation is not None:
        options = augmentation.options
        if settings.data.special_tokens and augmentation.name in AUGMENTATIONS:
            known = getattr(AUGMENTATIONS[str(augmentation.name)].options, "_fields", ())
            defaults = {name: one for name, one in KEEP_SPECIAL_TOKENS.items() if name in known}
            options = {**defaults, **options}
        function = parts.augmentation(**options)
        augment = dict.fromkeys(augmentation.sides, function)
    lora = settings.model.lora
    towers = base = make_towers(_tower_specs(settings, Lora()), augment=augment)
    frozen: set[str] = set()
    if lora.rank is not None:
        towers = make_towers(_tower_specs(settings, lora), augment=augment)
        abstract = jax.eval_shape(towers.init, jax.random.key(0))
        frozen = frozen_base(lora, parameter_paths({"towers": abstract}))

    def init(key: Key[jax.Array, ""]) -> PyTree:
        # If 64-bit types are enabled, an encoder without an explicit type has float64 parameters.
        params = jax.tree.map(
            lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == jnp.float64 else leaf,
            towers.init(key),
        )
        return cast_base({"towers": params}, frozen, lora.base_dtype)["towers"]

    return towers._replace(init=init, load=base.load)


def _tower_specs(settings: Settings, lora: Lora) -> dict[str, TowerSpec]:
    return {
        name: _tower_spec(settings, "query" if name == "both" else name, section, lora)
        for name, section in tower_sections(settings.model).items()
    }


def _tower_spec(settings: Settings, side: str, section: str, lora: Lora) -> TowerSpec:
    model, part = settings.model, settings.parts.encoders[section]
    options = model.options if section == "model" else model.key.options
    first = modality_of(settings.data, side).encoder_argument(settings.data, side)

    def make(rngs: nnx.Rngs) -> nnx.Module:
        try:
            module = part.function(first, dim=model.dim, rngs=rngs, **options)
        except ValueError as error:
            if section in settings.parts.pretrained:
                raise
            raise ValueError(f"{section}.options: {error}") from error
        return module if lora.rank is None else add_adapters(module, lora, rngs=rngs)

    return TowerSpec(make, part.load)


def abstract_parameters(settings: Settings, towers: Towers) -> PyTree:
    """The shapes and types of all parameters of a run."""
    state = jax.eval_shape(
        lambda: init_state(
            jax.random.key(0),
            towers.init,
            optax.identity(),
            temperature=TemperatureBounds(*settings.loss.temperature),
            bias=settings.loss.bias,
        )
    )
    return state.params


def pretrained_sources(settings: Settings) -> dict[str, AnyPath]:
    """The file or folder from which each tower is loaded, by the name of the tower."""
    model, pretrained = settings.model, settings.parts.pretrained
    paths = {"model": model.pretrained, "model.key": model.key.pretrained}
    return {
        tower: pretrained[section].path if section in pretrained else local_path(path)
        for tower, section in tower_sections(model).items()
        if (path := paths[section]) is not None
    }
