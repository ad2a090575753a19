"""Random draws of sharded slots that do not depend on the number of devices."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.ops.varying import as_varying
from jaxcl.typing import Array, AxisName, Bool, Int, Integer, Key

__all__ = ["draw_slots", "priorities"]

_DIGITS = 256  # priorities are compared in this base, as four digits of one byte


def priorities(key: Key[Array, ""], num_slots: int) -> Integer[Array, " m"]:
    """Random priorities of a draw; slots with higher priorities are drawn first.

    Call it outside `jax.shard_map`. The priorities then do not depend on the number of devices, and
    each device computes only its slots' priorities.
    """
    return jax.random.bits(key, (num_slots,), jnp.uint32)


def draw_slots(
    priority: Integer[Array, " m"],
    stratum: Int[Array, " m"],
    quotas: Int[Array, " g"],
    *,
    count: int,
    axis_name: AxisName | None = None,
) -> Int[Array, " _"]:
    """Draw the slots with the highest priorities of each stratum, up to its quota.

    The lowest priority to draw is found digit by digit. Four times, each device counts its slots by
    stratum and digit, and the counts of all devices are summed. In addition to these `4 · 256 · g`
    numbers, devices exchange `count` slot numbers. Equal priorities favour the lowest slot.

    Args:
      priority: random numbers of this device's slots.
      stratum: the stratum of each slot; strata without a quota are never drawn.
      quotas: the number of slots to draw from each stratum.
      count: the length of the result, at least the sum of the quotas.
      axis_name: the mesh axes over which slots are sharded.

    Returns:
      Global slot numbers, ascending, `[count]`, equal on all devices; padded with −1 if there are
      too few slots.
    """
    stratum = jnp.where(stratum >= 0, stratum, quotas.shape[0])  # −1 would index the last stratum
    num_slots = priority.shape[0]
    device = 0 if axis_name is None else lax.axis_index(axis_name)
    slots = device * num_slots + jnp.arange(num_slots, dtype=jnp.int32)
    is_drawn = _highest_of_strata(priority, slots, stratum, quotas, axis_name)
    here = is_drawn.sum(dtype=jnp.int32)
    # Each device writes after the slots of all previous devices, which keeps slots ascending.
    before = jnp.int32(0)
    if axis_name is not None:
        counts = lax.all_gather(here, axis_name)
        before = jnp.where(jnp.arange(counts.shape[0]) < device, counts, 0).sum(dtype=jnp.int32)
    positions = jnp.where(is_drawn, before + jnp.cumsum(is_drawn, dtype=jnp.int32) - 1, count)
    # Slots that are not drawn point past the end. Each position is written by one device and −1 on
    # all others, so the maximum combines them.
    drawn = jnp.full(count, -1, jnp.int32).at[positions].set(slots, mode="drop")
    return drawn if axis_name is None else lax.pmax(drawn, axis_name)


def _highest_of_strata(
    priority: Integer[Array, " m"],
    slots: Int[Array, " m"],
    stratum: Int[Array, " m"],
    quotas: Int[Array, " g"],
    axis_name: AxisName | None,
) -> Bool[Array, " m"]:
    """Whether each slot's priority is among the highest of its stratum, by radix selection."""

    def pass_over(
        numbers: Array, shift: int, state: tuple[Array, Array, Array]
    ) -> tuple[Array, Array, Array]:
        """Decide all open slots except those with the lowest digit taken, which stay open."""
        is_drawn, open_, remaining = state
        # Strata without a quota point past the end, where the scatter drops them.
        digit = ((numbers >> shift) & (_DIGITS - 1)).astype(jnp.int32)
        counts = jnp.zeros(quotas.shape[0] * _DIGITS, jnp.int32)
        counts = counts.at[stratum * _DIGITS + digit].add(open_.astype(jnp.int32), mode="drop")
        if axis_name is not None:
            counts = lax.psum(counts, axis_name)
        counts = counts.reshape(-1, _DIGITS)
        above = counts[:, ::-1].cumsum(1)[:, ::-1] - counts  # slots with a higher digit
        remaining = jnp.minimum(remaining, counts.sum(1))
        last = (above < remaining[:, None]) & (above + counts >= remaining[:, None])
        # If nothing remains to draw, `last` is all false and its argmax 0, which would take all
        # higher digits; a limit above all digits takes none.
        limit = jnp.where(remaining > 0, last.argmax(1), _DIGITS).astype(jnp.int32)
        own_limit = limit.at[stratum].get(mode="fill", fill_value=_DIGITS)
        used = jnp.where(last, above, 0).sum(1)
        is_drawn |= open_ & (digit > own_limit)
        return is_drawn, open_ & (digit == own_limit), remaining - used

    def passes(numbers: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        for shift in (24, 16, 8, 0):
            state = pass_over(numbers.astype(jnp.uint32), shift, state)
        return state

    known = stratum < quotas.shape[0]
    start = as_varying((jnp.zeros(priority.shape, bool), known), (priority, stratum))
    is_drawn, open_, remaining = passes(priority, (*start, quotas.astype(jnp.int32)))
    # Slots with equal priorities stay open, which is rare. Then slot numbers decide, inverted so
    # that the lowest comes first. The condition is a sum over devices, so that they all take the
    # same branch; its collectives would otherwise hang.
    num_open = jnp.zeros(quotas.shape, jnp.int32)
    num_open = num_open.at[stratum].add(open_.astype(jnp.int32), mode="drop")
    if axis_name is not None:
        num_open = lax.psum(num_open, axis_name)
    is_drawn, open_, _ = lax.cond(
        (num_open > remaining).any(),
        lambda state: passes(~slots, state),
        lambda state: state,
        (is_drawn, open_, remaining),
    )
    return is_drawn | open_
