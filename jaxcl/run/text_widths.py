"""Choose the widths to which a run pads its texts, from the lengths of its training rows."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.data.table import Table, row_lengths
from jaxcl.grad_cache import rows_per_chunk
from jaxcl.settings.derived import cut_sides
from jaxcl.settings.sections import Settings
from jaxcl.step.length_buckets import Buckets, choose_widths, computed_tokens, longest_first
from jaxcl.typing import SIDES, Int

__all__ = ["RowsOfStep", "TextWidths", "choose_text_widths", "deal", "dealt_rows"]

RowsOfStep = Callable[[int], Int[np.ndarray, " b"]]

_WIDTHS = 12  # each further width saves less, and makes the program larger
_WIDTHS_ON_CPU = 3  # where compiling each width takes as long as ten steps
_LEAST_SAVING = 0.2
_RECOMPUTED = 4 / 3  # three passes without gradient caching, four with it
_CHUNKS = 64  # per batch padded to the longest text: larger chunks have more padding
_LEAST_CHUNK_TOKENS = 1_024  # smaller chunks leave devices idle
_LEAST_CHUNK_TOKENS_ON_CPU = 512
_MOST_ROWS = 4  # of a narrow chunk, relative to the rows of a chunk of the largest width
_SAMPLED_BATCHES = 16


class TextWidths(NamedTuple):
    """The widths of a run, and the tokens in a sample of random batches.

    Attributes:
      buckets: side -> the widths; all other sides are padded to the maximum length.
      tokens: side of texts -> the number of tokens without padding.
      computed: the same, with the padding of these widths.
      longest: the same, with every row padded to the maximum length.
    """

    buckets: Mapping[str, Buckets]
    tokens: Mapping[str, int]
    computed: Mapping[str, int]
    longest: Mapping[str, int]

    def padding(self, *sides: str) -> float:
        """The share of the computed tokens that are padding."""
        return _share(self.tokens, self.computed, sides)

    def padding_before(self, *sides: str) -> float:
        """The share of padding if every row is padded to the maximum length."""
        return _share(self.tokens, self.longest, sides)

    @property
    def description(self) -> str:
        """A sentence about the widths and the padding."""
        widths = [
            f"each {side} to {', '.join(map(str, one.widths))} tokens"
            for side, one in self.buckets.items()
        ]
        sides = tuple(self.tokens)
        return (
            f"pads {' and '.join(widths)}: {100 * self.padding(*sides):.0f}% of the computed "
            f"tokens are padding, instead of {100 * self.padding_before(*sides):.0f}% with one "
            "width; the train step is one program for all widths"
        )


def choose_text_widths(
    settings: Settings,
    table: Table,
    *,
    num_devices: int,
    platform: str,
    num_batches: int = _SAMPLED_BATCHES,
) -> TextWidths:
    """Choose the widths of both sides.

    The choice depends on the settings, the devices and the lengths of the training rows,
    so that it is the same on every host and after a restart.

    Args:
      settings: the settings of the run.
      table: the training rows.
      num_devices: the number of devices over which a batch is sharded.
      platform: the kind of the devices, such as `"cpu"`.
      num_batches: the number of random batches in which padding is counted.
    """
    rng = np.random.default_rng(0)
    size = settings.global_batch_size
    sample = rng.integers(0, table.num_rows, (num_batches, size))
    sample = np.stack([deal(rows, table, num_devices=num_devices) for rows in sample])
    buckets, tokens, computed, longest = {}, {}, {}, {}
    for side in SIDES:
        lengths = row_lengths(table, side, sample)
        if lengths is None:
            continue
        tokens[side] = int(lengths.sum())
        longest[side] = lengths.size * getattr(settings.data.max_tokens, side)
        computed[side] = longest[side]
        chosen = _buckets(settings, table, side, num_rows=size // num_devices, platform=platform)
        if chosen is None:
            continue
        with_widths = num_devices * sum(
            _computed(one.reshape(num_devices, -1), chosen) for one in lengths
        )
        chunk_size, chunk_tokens, wanted = settings.grad_cache
        cached = chunk_size is not None or chunk_tokens is not None
        cost = with_widths * (1 if cached else _RECOMPUTED)
        if wanted is not None or cost <= (1 - _LEAST_SAVING) * longest[side]:
            buckets[side], computed[side] = chosen, with_widths
    return TextWidths(buckets, tokens, computed, longest)


def deal(rows: Int[np.ndarray, " b"], table: Table, *, num_devices: int) -> Int[np.ndarray, " b"]:
    """Order the rows of a batch so that all devices get texts of similar lengths.

    The rows are dealt to the devices like cards, longest first. Each device computes as many tokens
    as the longest rows of any device require, so dealing keeps the padding close to that on one
    device.

    Args:
      rows: the rows of a batch, sharded over the devices in this order.
      table: the training rows; without texts, the order stays as it is.
      num_devices: a divisor of the number of rows.
    """
    lengths = [row_lengths(table, side, rows) for side in SIDES]
    total = sum(one for one in lengths if one is not None)
    if num_devices == 1 or isinstance(total, int):
        return rows
    order = np.argsort(-total, kind="stable")
    return rows[order.reshape(-1, num_devices).T.ravel()]


def dealt_rows(rows_fn: RowsOfStep, table: Table, *, num_devices: int) -> RowsOfStep:
    """The same rows of each step, in the order of `deal`."""
    return lambda step: deal(np.asarray(rows_fn(step)), table, num_devices=num_devices)


def _buckets(
    settings: Settings, table: Table, side: str, *, num_rows: int, platform: str
) -> Buckets | None:
    """The widths of a side with the least padding; `None` if the side has only one width."""
    most = settings.grad_cache.length_buckets
    if most is None:
        most = _WIDTHS_ON_CPU if platform == "cpu" else _WIDTHS
    if most == 1 or side not in cut_sides(settings):
        return None
    lengths = row_lengths(table, side, np.arange(table.num_rows))
    if lengths is None:
        return None
    longest = getattr(settings.data.max_tokens, side)
    widths = choose_widths(lengths, max_tokens=longest, num_widths=most)
    size, tokens, _ = settings.grad_cache
    least = _LEAST_CHUNK_TOKENS_ON_CPU if platform == "cpu" else _LEAST_CHUNK_TOKENS
    rows = max(num_rows // _CHUNKS, least // longest, 1)
    if size is not None:
        rows = min(rows, size)
    if tokens is not None:
        rows = min(rows, rows_per_chunk(longest, max_tokens=tokens))
    # Chunks of powers of two, so that few rows are left for the last one.
    doublings = (min(longest // width, _MOST_ROWS).bit_length() - 1 for width in widths)
    return Buckets(widths, tuple(rows << doubling for doubling in doublings))


def _computed(lengths: Int[np.ndarray, "s n"], buckets: Buckets) -> int:
    longest = longest_first(jnp.asarray(lengths, jnp.int32))
    return int(_computed_tokens(longest, buckets))


_computed_tokens = jax.jit(computed_tokens, static_argnums=1)


def _share(tokens: Mapping[str, int], computed: Mapping[str, int], sides: tuple[str, ...]) -> float:
    return 1 - sum(tokens[side] for side in sides) / sum(computed[side] for side in sides)
