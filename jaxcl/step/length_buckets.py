r"""Encode texts of similar length together, each chunk only as wide as its longest text.

Texts differ in length by a factor of ten, so a batch padded to its longest text is mostly padding.
Here each device sorts its rows by length, longest first, and encodes them chunk by chunk. A chunk
has one of a few widths: the smallest that holds its longest row. With gradient caching's two
passes (`jaxcl.grad_cache`), the loss still sees the whole batch.

Embeddings and gradients are the same as for the padded batch, up to rounding, provided that an
embedding does not depend on the padding of its row. Dropout may stay on: JAX's random bits at a
position do not depend on the width of the array (with `jax_threefry_partitionable`, the default).

All widths are branches of one compiled program, and the lengths choose among them at run time. All
devices run the same branches, since branches may communicate: the longest row over all devices
decides. Fewer rows per device therefore mean more padding.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from jaxcl.ops.varying import as_varying, full_like_varying
from jaxcl.typing import PADDING_ID, Array, Embeddings, Float, Int, PyTree, RowKeys

__all__ = [
    "Buckets",
    "bucketed",
    "choose_widths",
    "computed_tokens",
    "cut_texts",
    "longest_first",
    "text_lengths",
]

_CANDIDATES = (4, 32, 8)  # multiples of 4 up to 32, then of 8
_LEAST_GAIN = 0.005  # the share of tokens that more widths must save, as they enlarge programs

EncodeTexts = Callable[[PyTree, PyTree, RowKeys | None], Embeddings]


class Buckets(NamedTuple):
    """The widths of chunks.

    Attributes:
      widths: tokens of a row with padding, in increasing order; the last one is the width of the
        batch's arrays.
      rows: for each width, the number of rows that a device encodes at a time.
    """

    widths: tuple[int, ...]
    rows: tuple[int, ...]


def choose_widths(
    lengths: Int[np.ndarray, " n"], *, max_tokens: int, num_widths: int
) -> tuple[int, ...]:
    r"""Choose the widths with the least padding.

    Minimises $\sum_i w(l_i)$ over all sets of at most `num_widths` widths, where $w(l)$ is the
    least width that holds a row of length $l$. Widths are multiples of 8, or of 4 up to 32, except
    `max_tokens`, which is always one of them. Widths that save less than 0.5% are left out.

    Args:
      lengths: number of tokens of each row.
      max_tokens: the largest width.
      num_widths: the maximum number of widths.

    Example:
      >>> choose_widths(np.array([3, 7, 8, 30]), max_tokens=30, num_widths=3)
      (4, 8, 30)
    """
    fine, turn, coarse = _CANDIDATES
    candidates = [*range(fine, turn, fine), *range(turn, max_tokens, coarse)]
    widths = np.array([*(width for width in candidates if width < max_tokens), max_tokens])
    # up_to[i]: the number of rows that the first i widths hold.
    up_to = np.searchsorted(np.sort(lengths), [0, *widths], side="right")
    up_to[0] = 0
    # tokens[i, j]: tokens, at widths[j], of the rows that widths[j] holds but the first i do not.
    tokens = ((up_to[1:] - up_to[:-1, None]) * widths).astype(float)
    tokens[np.tril_indices(len(widths), -1)] = np.inf
    least = [tokens[0]]
    below = []
    for _ in range(1, min(num_widths, len(widths))):
        totals = np.concatenate([[np.inf], least[-1][:-1]])[:, None] + tokens
        below.append(totals.argmin(0))
        least.append(totals.min(0))
    finals = [float(one[-1]) for one in least]
    count = next(i for i, one in enumerate(finals) if one <= min(finals) * (1 + _LEAST_GAIN))
    chosen = [len(widths) - 1]
    for of_width in reversed(below[:count]):
        chosen.append(int(of_width[chosen[-1]]) - 1)
    return tuple(int(widths[i]) for i in reversed(chosen))


def text_lengths(inputs: PyTree) -> Int[Array, "*b"]:
    """The number of tokens of each text, up to and including its last token."""
    if "length" in inputs:
        return inputs["length"]
    tokens = inputs["tokens"]
    return jnp.where(tokens != PADDING_ID, jnp.arange(1, tokens.shape[-1] + 1), 0).max(-1)


def cut_texts(inputs: PyTree, width: int) -> PyTree:
    """The inputs of texts without the padding after the first `width` tokens."""
    return inputs | {"tokens": inputs["tokens"][..., :width]}


def longest_first(lengths: Int[Array, "s n"]) -> Int[Array, " n"]:
    """The greatest length at each rank, after sorting the rows of each part, longest first.

    Example:
      >>> longest_first(jnp.array([[9, 2], [4, 5]])).tolist()
      [9, 4]
    """
    return (-jnp.sort(-lengths, axis=1)).max(0)


def computed_tokens(longest: Int[Array, " n"], buckets: Buckets) -> Int[Array, ""]:
    """The number of tokens that a device processes, including padding.

    Args:
      longest: from `longest_first`.
      buckets: the widths; `rows` greater than the number of rows are clipped to it.

    Example:
      >>> int(computed_tokens(jnp.array([20, 9, 3, 2, 1]), Buckets((8, 20), (4, 2))))
      72
    """
    buckets = _limited(buckets, len(longest))
    sizes = jnp.array(np.multiply(buckets.rows, buckets.widths), jnp.int32)

    def chunk(state: tuple[Array, Array]) -> tuple[Array, Array]:
        first, total = state
        number = _bucket(longest, first, buckets)
        return first + jnp.array(buckets.rows, jnp.int32)[number], total + sizes[number]

    start = (jnp.int32(0), jnp.zeros((), sizes.dtype))
    return lax.while_loop(lambda state: state[0] < len(longest), chunk, start)[1]


def bucketed(
    encode: EncodeTexts, buckets: Buckets, *, shards: int = 1, axis_names: Sequence[str] = ()
) -> EncodeTexts:
    """Make an encoder run in chunks of texts of similar length, with gradient caching.

    Args:
      encode: `(params, inputs, a random key per row or None) -> embeddings`, pure. An embedding
        depends on the tokens of its row alone, not on its padding.
      buckets: the widths of chunks.
      shards: as for `jaxcl.grad_cache.chunked`.
      axis_names: the axes of an enclosing `jax.shard_map` over which rows are sharded.

    Returns:
      A function with the same arguments and results. It has a gradient with respect to the
      parameters only.
    """

    def encode_rows(params: PyTree, inputs: PyTree, rngs: RowKeys | None) -> Embeddings:
        lengths = text_lengths(inputs).reshape(shards, -1)
        num_rows = lengths.shape[1]
        order = jnp.argsort(-lengths, axis=1, stable=True)
        longest = longest_first(lengths)
        if axis_names:
            longest = lax.pmax(longest, tuple(axis_names))
        rows = jax.tree.map(
            lambda leaf: _taken(leaf.reshape(shards, num_rows, *leaf.shape[1:]), order),
            (inputs, rngs),
        )
        loop = _Loop(encode, _limited(buckets, num_rows))
        # Before the loop, since the gradient would otherwise be summed over devices in each step.
        vectors = _encoded(loop, as_varying(params, rows), rows, longest)
        restored = _taken(vectors, jnp.argsort(order, axis=1))
        return restored.reshape(shards * num_rows, *vectors.shape[2:])

    return encode_rows


class _Loop:
    """The loop of `bucketed` over chunks of sorted rows `[shards, rows, …]`."""

    def __init__(self, encode: EncodeTexts, buckets: Buckets):
        self._encode, self._buckets = encode, buckets
        self._most = max(buckets.rows)

    def padded(self, rows: PyTree) -> PyTree:
        """The rows, and copies of the last one that fill the last chunk."""
        return jax.tree.map(
            lambda leaf: jnp.concatenate([leaf, *[leaf[:, -1:]] * self._most], axis=1), rows
        )

    def chunk(self, rows: PyTree, number: int, first: Array) -> tuple[PyTree, RowKeys | None]:
        """The inputs of a chunk of one width."""
        size = self._buckets.rows[number]

        def sliced(leaf: Array) -> Array:
            part = lax.dynamic_slice_in_dim(leaf, first, size, 1)
            return part.reshape(-1, *leaf.shape[2:])

        inputs, rngs = jax.tree.map(sliced, rows)
        return cut_texts(inputs, self._buckets.widths[number]), rngs

    def over_chunks(
        self, branch: Callable[[int, Array, PyTree], PyTree], longest: Array, start: PyTree
    ) -> PyTree:
        """Apply `(index of the width, first row, carry) -> carry` to each chunk in turn."""
        branches = [
            lambda first, carry, number=number: branch(number, first, carry)
            for number in range(len(self._buckets.widths))
        ]

        def step(state: tuple[Array, PyTree]) -> tuple[Array, PyTree]:
            first, carry = state
            number = _bucket(longest, first, self._buckets)
            return first + jnp.array(self._buckets.rows, jnp.int32)[number], lax.switch(
                number, branches, first, carry
            )

        state = (jnp.int32(0), start)
        return lax.while_loop(lambda state: state[0] < len(longest), step, state)[1]

    def forward(self, params: PyTree, rows: PyTree, longest: Array) -> Float[Array, "s n d"]:
        """The embeddings of all rows."""
        padded = self.padded(rows)
        shards = jax.tree.leaves(rows)[0].shape[0]
        one = jax.eval_shape(self._encode, params, *self.chunk(padded, 0, jnp.int32(0)))
        shape = (shards, len(longest) + self._most, *one.shape[1:])

        def branch(number: int, first: Array, vectors: Array) -> Array:
            chunk_vectors = self._encode(params, *self.chunk(padded, number, first))
            chunk_vectors = chunk_vectors.reshape(shards, -1, *chunk_vectors.shape[1:])
            return lax.dynamic_update_slice_in_dim(vectors, chunk_vectors, first, 1)

        start = full_like_varying(shape, 0.0, one.dtype, (params, rows))
        return self.over_chunks(branch, longest, start)[:, : len(longest)]

    def backward(
        self, trained: PyTree, held: PyTree, rows: PyTree, longest: Array, cotangent: Array
    ) -> PyTree:
        """The gradient with respect to `trained`; encodes each chunk again."""
        padded = self.padded(rows)
        missing = [(0, self._most if axis == 1 else 0) for axis in range(cotangent.ndim)]
        cotangent = jnp.pad(cotangent, missing)  # copies of rows have no gradient

        def branch(number: int, first: Array, total: PyTree) -> PyTree:
            inputs = self.chunk(padded, number, first)
            vectors, pull_back = jax.vjp(
                lambda trained: self._encode(_merged(trained, held), *inputs), trained
            )
            of_chunk = lax.dynamic_slice_in_dim(cotangent, first, self._buckets.rows[number], 1)
            (gradient,) = pull_back(of_chunk.reshape(vectors.shape))
            return jax.tree.map(jnp.add, total, gradient)

        start = jax.tree.map(lambda leaf: as_varying(jnp.zeros_like(leaf), leaf), trained)
        return self.over_chunks(branch, longest, start)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _encoded(loop: _Loop, params: PyTree, rows: PyTree, longest: Array) -> Float[Array, "s n d"]:
    return loop.forward(params, rows, longest)


def _encoded_forward(
    loop: _Loop, params: PyTree, rows: PyTree, longest: CustomVJPPrimal
) -> tuple[Float[Array, "s n d"], tuple]:
    def where(perturbed: bool) -> PyTree:
        return jax.tree.map(
            lambda leaf: leaf.value if leaf.perturbed == perturbed else None, params
        )

    # Frozen parameters are kept apart: the loop would otherwise sum a gradient for each of them.
    trained, held = where(True), where(False)
    rows = jax.tree.map(lambda leaf: leaf.value, rows)
    vectors = loop.forward(_merged(trained, held), rows, longest.value)
    return vectors, (trained, held, rows, longest.value)


def _encoded_backward(loop: _Loop, residuals: tuple, cotangent: Array | SymbolicZero) -> tuple:
    if isinstance(cotangent, SymbolicZero):
        return None, None, None
    trained, held, rows, longest = residuals
    return loop.backward(trained, held, rows, longest, cotangent), None, None


_encoded.defvjp(_encoded_forward, _encoded_backward, symbolic_zeros=True)


def _merged(trained: PyTree, held: PyTree) -> PyTree:
    """Combine two trees of parameters; each parameter is `None` in one of them."""
    return jax.tree.map(
        lambda leaf, other: other if leaf is None else leaf,
        trained,
        held,
        is_leaf=lambda leaf: leaf is None,
    )


def _limited(buckets: Buckets, num_rows: int) -> Buckets:
    return buckets._replace(rows=tuple(min(rows, num_rows) for rows in buckets.rows))


def _bucket(longest: Array, first: Array, buckets: Buckets) -> Array:
    """The index of the width of the chunk that begins with this row."""
    return (longest[first] > jnp.array(buckets.widths[:-1], longest.dtype)).sum(dtype=jnp.int32)


def _taken(leaf: Array, order: Int[Array, "s n"]) -> Array:
    return jax.vmap(lambda part, places: part[places])(leaf, order)
