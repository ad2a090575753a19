"""Parts that encoders share: layers, dropout by row, pooling, and a loop over equal blocks."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from jaxcl.ops.vectors import normalise
from jaxcl.typing import (
    PADDING_ID,
    Array,
    Bool,
    Embeddings,
    Float,
    Int,
    Key,
    Num,
    PyTree,
    RowKeys,
    Tokens,
)

__all__ = [
    "DEFAULT_MAX_TOKENS",
    "POOLINGS",
    "Hidden",
    "Layer",
    "TokenMask",
    "activation_dtype",
    "check_length",
    "check_name",
    "default_compute_dtype",
    "images_of",
    "joined",
    "linear_layer",
    "pool",
    "row_dropout",
    "run_layers",
    "saving_slope",
    "stacked",
    "token_mask",
    "tokens_of",
    "unit_vectors",
]

Hidden: TypeAlias = Float[Array, "b t h"]
TokenMask: TypeAlias = Bool[Array, "b t"]
Layer: TypeAlias = int | Int[Array, ""]
"""The number of a block, traced in a loop over stacked blocks."""

DEFAULT_MAX_TOKENS = 128
"""The longest text that an encoder reads by default, in tokens."""

POOLINGS = ("mean", "cls", "last")


def default_compute_dtype(platform: str) -> str:
    """The default type of activations, by the platform of the devices."""
    return "float32" if platform == "cpu" else "bfloat16"


def activation_dtype(compute_dtype: str | None) -> jnp.dtype:
    """The type of activations by name; `None` means the default type of the devices.

    Raises:
      ValueError: if no floating-point type has this name.
    """
    try:
        dtype = jnp.dtype(compute_dtype or default_compute_dtype(jax.default_backend()))
    except TypeError:
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"compute_dtype={compute_dtype!r} is not a floating-point type; use float32 or bfloat16"
        )
    return dtype


def tokens_of(inputs: PyTree, reader: str) -> Int[Array, "*b t"]:
    """The tokens of texts; for other inputs, raises a `ValueError` that names the reader."""
    return _input_of(inputs, "tokens", f"{reader} reads texts")


def images_of(inputs: PyTree, reader: str) -> Num[Array, "*b y x c"]:
    """The pixels of images; for other inputs, raises a `ValueError` that names the reader."""
    return _input_of(inputs, "image", f"{reader} reads images")


def _input_of(inputs: PyTree, name: str, wanted: str) -> Array:
    if name not in inputs:
        raise ValueError(f"{wanted}, but this side has {', '.join(inputs)}; see data.modality")
    return inputs[name]


def token_mask(inputs: PyTree) -> Bool[Array, "*b t"]:
    """Compute the mask of the tokens in texts.

    Args:
      inputs: inputs of one or more texts: `"tokens"`, and `"length"` if any id may be a token.
        Augmentations that leave tokens out add a `"mask"`.

    Returns:
      `True` for tokens; `False` for padding and for tokens that an augmentation left out.
    """
    if "mask" in inputs:
        return inputs["mask"]
    tokens = inputs["tokens"]
    if "length" in inputs:
        return jnp.arange(tokens.shape[-1]) < inputs["length"][..., None]
    return tokens != PADDING_ID


def check_length(tokens: Tokens, longest: int) -> None:
    """Raise a `ValueError` for texts of more tokens than an encoder reads."""
    if tokens.shape[1] > longest:
        raise ValueError(f"texts of {tokens.shape[1]} tokens; this encoder reads {longest}")


def check_name(setting: str, name: str, known: Sequence[str]) -> None:
    """Raise a `ValueError` for an unknown name; the message lists the known ones."""
    if name not in known:
        raise ValueError(f"{setting}={name!r} is unknown; use one of {', '.join(known)}")


def unit_vectors(vectors: Embeddings) -> Embeddings:
    """Normalise vectors, in float32 or wider, since a norm in bfloat16 would be inaccurate."""
    return normalise(vectors.astype(jnp.promote_types(vectors.dtype, jnp.float32)))


def linear_layer(in_features: int, out_features: int, **options: Any) -> nnx.Linear:
    """A linear layer that multiplies all tokens of a batch as the rows of one matrix.

    On a CPU, XLA copies the gradient of a `[b, t, h]` output to transpose it, which took as long as
    the product itself. The transpose of a matrix needs no copy.
    """
    return nnx.Linear(in_features, out_features, dot_general=_product_of_rows, **options)


def _product_of_rows(
    inputs: Float[Array, "*b i"], kernel: Float[Array, "i o"], dimensions: Any, **options: Any
) -> Float[Array, "*b o"]:
    del dimensions  # a linear layer always contracts the last axis
    rows = inputs.reshape(-1, inputs.shape[-1])
    product = lax.dot_general(rows, kernel, (((1,), (0,)), ((), ())), **options)
    return product.reshape(*inputs.shape[:-1], kernel.shape[1])


def saving_slope(
    function: Callable[[Float[Array, "*b"]], Float[Array, "*b"]],
) -> Callable[[Float[Array, "*b"]], Float[Array, "*b"]]:
    """Make an elementwise function keep only its slope for the backward pass.

    Otherwise, GELU keeps three arrays of the size of its input for the backward pass.
    """

    @jax.custom_jvp
    def saving(values: Float[Array, "*b"]) -> Float[Array, "*b"]:
        return function(values)

    @saving.defjvp
    def derivative(
        values: tuple[Float[Array, "*b"]], tangents: tuple[Float[Array, "*b"]]
    ) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
        out, slope = jax.jvp(function, values, (jnp.ones_like(values[0]),))
        return out, slope * tangents[0]

    return saving


def pool(
    hidden: Float[Array, "b t h"], mask: Bool[Array, "b t"], *, pooling: str
) -> Float[Array, "b h"]:
    """One vector per row: the mean over its tokens, its first token, or its last one.

    Raises:
      ValueError: for an unknown pooling.
    """
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "last":
        # Augmentation may leave padding between tokens, or no token at all.
        last = jnp.where(mask, jnp.arange(mask.shape[1])[None], 0).max(1)
        return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    if pooling == "mean":
        # Summed in float32 at least: float16 would overflow, and bfloat16 counts exactly to 256.
        wide = jnp.promote_types(hidden.dtype, jnp.float32)
        weights = mask.astype(hidden.dtype)
        count = jnp.maximum(mask.sum(1, keepdims=True), 1)  # a row may have no token
        total = jnp.einsum("bt,bth->bh", weights, hidden, preferred_element_type=wide)
        return (total / count).astype(hidden.dtype)
    raise ValueError(f"pooling={pooling!r} is unknown; use one of {', '.join(POOLINGS)}")


def row_dropout(
    values: Float[Array, "b ..."],
    rngs: RowKeys | None,
    *,
    rate: float,
    layer: Layer,
) -> Float[Array, "b ..."]:
    """Dropout whose mask depends on the row, not on the position of the row in a batch.

    Args:
      values: activations. The mask of a token does not depend on the number of tokens.
      rngs: a random key per row, or `None` for evaluation.
      rate: the fraction of values set to 0, rounded to a multiple of $2^{-16}$; the others are
        scaled to keep the expectation.
      layer: a number that makes the masks of different calls independent.
    """
    if rngs is None or rate == 0.0:
        return values

    dropped = min(round(rate * 2**16), 2**16 - 1)

    def drop(key: Key[Array, ""], row: Float[Array, "..."]) -> Float[Array, "..."]:
        *others, width = row.shape
        # Two numbers of 16 bits from each word, since the hash is most of the cost on a CPU.
        words = jax.random.bits(jax.random.fold_in(key, layer), (*others, -(-width // 2)))
        numbers = lax.concatenate([words & 0xFFFF, words >> 16], dimension=len(others))
        kept = numbers[..., :width] >= dropped
        return jnp.where(kept, row / (1 - dropped / 2**16), 0).astype(row.dtype)

    return jax.vmap(drop)(rngs, values)


def stacked(
    make_block: Callable[[nnx.Rngs], nnx.Module], rngs: nnx.Rngs, *, num_layers: int
) -> nnx.Module:
    """Make identical blocks as one module, whose parameters have a leading layer axis."""

    @nnx.split_rngs(splits=num_layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make_blocks(rngs: nnx.Rngs) -> nnx.Module:
        return make_block(rngs)

    return make_blocks(rngs)


def joined(blocks: Sequence[nnx.Module], *, dtype: jnp.dtype) -> nnx.Module:
    """Join blocks of equal structure into one module for `run_layers`, as `stacked` would build it.

    The blocks keep their own parameters, one array per layer; only the forward pass sees the joined
    copy, whose matrices have the activations' type.
    """
    graph, _ = nnx.split(blocks[0])
    states = [nnx.split(block)[1] for block in blocks]
    if len({jax.tree.structure(state) for state in states}) > 1:
        raise ValueError(
            "the blocks of this encoder run as one loop, but have different parameters; give all "
            "blocks the same adapters, as model.lora.targets='*blocks/*/attention/query' does"
        )

    def join(*leaves: Array | np.ndarray) -> Array:
        return jnp.stack([leaf.astype(dtype) if leaf.ndim > 1 else leaf for leaf in leaves])

    return nnx.merge(graph, jax.tree.map(join, *states))


def run_layers(
    blocks: nnx.Module,
    hidden: Float[Array, "b t h"],
    mask: Bool[Array, "b t"] | None,
    rngs: RowKeys | None,
    *,
    num_layers: int,
    remat: bool,
) -> Float[Array, "b t h"]:
    """Run blocks of equal structure in sequence, as one compiled loop.

    If parameters are sharded over a mesh, each block's parameters are gathered just before use,
    with matrices cast to the activations' type. Rows keep their sharding.

    Args:
      blocks: the result of `stacked` or `joined`; a block maps `(hidden, mask, rngs, layer)` to the
        next hidden states.
      hidden: the input of the first block.
      mask: `True` for tokens; blocks without padding may accept `None`.
      rngs: a random key per row, or `None` for evaluation.
      num_layers: number of blocks.
      remat: keep one activation per block for the backward pass, and recompute the others.
    """
    graph, params = nnx.split(blocks)
    rows = PartitionSpec(_spread_axes())

    def gathered(leaf: Array) -> Array:
        return _placed(leaf.astype(hidden.dtype) if leaf.ndim > 1 else leaf, PartitionSpec())

    def run(hidden: Array, params_and_layer: tuple[PyTree, Array]) -> tuple[Array, None]:
        params, layer = params_and_layer
        block = nnx.merge(graph, jax.tree.map(gathered, params))
        return _placed(block(hidden, mask, rngs, layer), rows), None

    numbered = (params, jnp.arange(num_layers))
    return lax.scan(jax.checkpoint(run) if remat else run, hidden, numbered)[0]


def _spread_axes() -> tuple[str, ...]:
    """The axes of the current mesh over which the compiler shards arrays."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind == AxisType.Auto)


def _placed(array: Array, spec: PartitionSpec) -> Array:
    return lax.with_sharding_constraint(array, spec) if _spread_axes() else array
