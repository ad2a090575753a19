"""Build the optimizer of a run, with its settings by parameter path."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcl.models.lora import frozen_base
from jaxcl.models.trainable import (
    block_of,
    is_stacked,
    is_table,
    map_paths,
    matching_paths,
    parameter_paths,
)
from jaxcl.settings.derived import learning_rate_of, tower_sections
from jaxcl.settings.pretrained import PRETRAINED
from jaxcl.settings.sections import OptimizerSettings, Settings
from jaxcl.step.accumulation import accumulate
from jaxcl.typing import Array, Float, PyTree

__all__ = ["build_optimizer", "frozen_parameters", "layer_factors"]


def frozen_parameters(settings: Settings, params: PyTree) -> frozenset[str]:
    """The paths of the parameters that adapters leave frozen or `optimizer.freeze` matches.

    Args:
      settings: the settings of the run.
      params: all parameters, or their shapes.

    Raises:
      ValueError: for a pattern that matches no parameter, and if no parameter is left to train.
    """
    paths = parameter_paths(params)
    matches = matching_paths("optimizer.freeze", settings.optimizer.freeze, paths)
    frozen = frozenset(frozen_base(settings.model.lora, paths)).union(*matches)
    if len(frozen) == len(paths):
        raise ValueError(
            f"optimizer.freeze={settings.optimizer.freeze} leaves no parameter to train; leave one "
            "of the patterns out"
        )
    return frozen


def build_optimizer(
    settings: Settings, params: PyTree
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer of `settings.optimizer`, and its learning rate by step.

    It clips the gradients by their norm, all together or by group, applies the optimizer, adds the
    weight decay of matrices, and multiplies by the learning rate and by the factor of each path.
    With `accumulate_steps`, it does all this once per `accumulate_steps` batches, with the mean of
    their gradients; the parameters do not change in between.

    Args:
      settings: the settings of the run.
      params: all parameters, or their shapes, including frozen ones.

    Raises:
      ValueError: for a pattern that matches no trained parameter, and for `layer_decay` of encoders
        without blocks.
    """
    optimizer_settings = settings.optimizer
    rate_of_step = learning_rate_of(optimizer_settings, settings.parts, steps=settings.steps)
    every = optimizer_settings.accumulate_steps
    frozen = frozen_parameters(settings, params)
    trained = [path for path in parameter_paths(params) if path not in frozen]
    clip = optimizer_settings.clip_norm
    transformations = [
        optax.clip_by_global_norm(clip) if clip else optax.identity(),
        settings.parts.optimizer(**optimizer_settings.options),
        optax.add_decayed_weights(
            optimizer_settings.weight_decay, mask=_decay_mask(optimizer_settings, trained)
        ),
        # The optimizer counts updates, and each update consists of `every` steps.
        optax.scale_by_learning_rate(
            rate_of_step if every == 1 else lambda update: rate_of_step(every * update)
        ),
    ]
    if optimizer_settings.clip_groups:
        transformations[0] = _clip_by_group(optimizer_settings, trained)
    factors = _rate_factors(settings, params, trained)
    if factors:
        transformations.append(_scale_by_factors(factors))
    optimizer = optax.chain(*transformations)
    if every == 1:
        return optimizer, rate_of_step
    return accumulate(optimizer, every=every), lambda step: rate_of_step(step - step % every)


def _matched(setting: str, patterns: tuple[str, ...], trained: list[str]) -> list[list[str]]:
    return matching_paths(setting, patterns, trained, kind="trained parameter")


def _first_matches(setting: str, patterns: tuple[str, ...], trained: list[str]) -> dict[str, int]:
    """Path -> the index of the first pattern that matches it.

    Raises:
      ValueError: for a pattern without effect, because an earlier one matches the same parameters
        and more.
    """
    matches = [set(matched) for matched in _matched(setting, patterns, trained)]
    first: dict[str, int] = {}
    for number, matched in enumerate(matches):
        for earlier in range(number):
            if matched < matches[earlier]:
                raise ValueError(
                    f"{setting} has {patterns[number]!r} after {patterns[earlier]!r}, which matches"
                    " the same parameters and more, and the first pattern applies; swap the two"
                )
        for path in matched:
            first.setdefault(path, number)
    return first


def _decay_mask(settings: OptimizerSettings, trained: list[str]) -> Callable[[PyTree], PyTree]:
    """`parameters -> whether each decays`: matrices decay, unless `no_decay` matches them."""
    excluded = {
        path
        for matched in _matched("optimizer.no_decay", settings.no_decay, trained)
        for path in matched
    }

    def decays(path: str, leaf: Array) -> bool:
        return jnp.ndim(leaf) - is_stacked(path) > 1 and path not in excluded

    return lambda params: map_paths(decays, params)


def _clip_by_group(settings: OptimizerSettings, trained: list[str]) -> optax.GradientTransformation:
    """Clip the gradients of each group by the group's norm, and all other gradients together."""
    patterns = tuple(pattern for pattern, _ in settings.clip_groups)
    group_of = _first_matches("optimizer.clip_groups", patterns, trained)
    rest = len(patterns)
    norms = [*(norm for _, norm in settings.clip_groups), settings.clip_norm]

    def clipped(gradients: PyTree, params: PyTree | None) -> PyTree:
        leaves, structure = jax.tree_util.tree_flatten_with_path(gradients)
        by_path = {jax.tree_util.keystr(path, simple=True, separator="/"): g for path, g in leaves}
        for number, norm in enumerate(norms):
            group = {p: g for p, g in by_path.items() if group_of.get(p, rest) == number}
            if norm and group:
                by_path |= optax.clip_by_global_norm(norm).update(group, optax.EmptyState())[0]
        return jax.tree.unflatten(structure, list(by_path.values()))

    return optax.stateless(clipped)


def _scale_by_factors(factors: Mapping[str, Any]) -> optax.GradientTransformation:
    def scaled(updates: PyTree, params: PyTree | None) -> PyTree:
        return map_paths(
            lambda path, one: one * jnp.asarray(factors.get(path, 1.0), one.dtype), updates
        )

    return optax.stateless(scaled)


def _rate_factors(
    settings: Settings, params: PyTree, trained: list[str]
) -> dict[str, float | Float[np.ndarray, "..."]]:
    """Path -> the factor of its learning rate; by layer where layers are stacked."""
    optimizer_settings = settings.optimizer
    patterns = tuple(pattern for pattern, _ in optimizer_settings.rates)
    numbers = _first_matches("optimizer.rates", patterns, trained)
    factors: dict[str, Any] = {
        path: optimizer_settings.rates[number][1] for path, number in numbers.items()
    }
    if optimizer_settings.layer_decay is not None:
        embedding_norms = _embedding_norms(settings)
        by_layer = layer_factors(
            params, optimizer_settings.layer_decay, embedding_norms=embedding_norms
        )
        if not by_layer:
            raise ValueError(
                f"optimizer.layer_decay={optimizer_settings.layer_decay}, but the encoder has "
                "no layers; leave it None"
            )
        for path, factor in by_layer.items():
            factors[path] = factor * factors.get(path, 1.0)
    return factors


def layer_factors(
    params: PyTree, decay: float, *, embedding_norms: tuple[str, ...] = ()
) -> dict[str, float | Float[np.ndarray, "..."]]:
    r"""The factors of layer-wise decay.

    Of $L$ blocks, block $l = 0, …, L - 1$ has the factor $decay^{L - 1 - l}$, and the embeddings
    below the blocks have $decay^L$. Parameters above the blocks are
    left out, so their factor is 1.

    Args:
      params: all parameters, or their shapes. The blocks of an encoder are in its `blocks`; the
        embeddings are the tables outside `blocks` (`jaxcl.models.trainable.is_table`).
      decay: the factor of a block, relative to that of the block above.
      embedding_norms: other modules below the blocks, such as norms of the embeddings and
        projections of patches, by their paths.

    Returns:
      Path -> its factor; an array with one factor per layer where layers are stacked.

    Reference:
      Clark et al., "ELECTRA", ICLR 2020, appendix A.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    map_paths(lambda path, leaf: shapes.update({path: jnp.shape(leaf)}), params)
    blocks = {path: block for path in shapes if (block := block_of(path)) is not None}
    depths: dict[str, int] = {}
    for path, (encoder, layer) in blocks.items():
        layers = shapes[path][0] if layer is None else layer + 1
        depths[encoder] = max(depths.get(encoder, 0), layers)
    factors: dict[str, Any] = {}
    for path, (encoder, layer) in blocks.items():
        if layer is None:
            by_layer = decay ** np.arange(depths[encoder] - 1, -1, -1.0)
            factors[path] = by_layer.reshape(-1, *[1] * (len(shapes[path]) - 1))
        else:
            factors[path] = decay ** (depths[encoder] - 1 - layer)
    for path in shapes.keys() - blocks.keys():
        parent = path.rpartition("/")[0]
        owners = [encoder for encoder in depths if path.startswith(f"{encoder}/")]
        if owners and (is_table(path) or parent in embedding_norms):
            factors[path] = decay ** depths[owners[0]]
    return factors


def _embedding_norms(settings: Settings) -> tuple[str, ...]:
    """The modules between the inputs and the blocks, as the encoders of this package name them."""
    norms = []
    for tower, section in tower_sections(settings.model).items():
        model = settings.model if section == "model" else settings.model.key
        if model.name == PRETRAINED:
            norms += [f"towers/{tower}/encoder/{name}" for name in ("norm", "embeddings")]
        elif model.name == "transformer" and model.options.get("norm_position") == "post":
            norms.append(f"towers/{tower}/norm")
    return tuple(norms)
