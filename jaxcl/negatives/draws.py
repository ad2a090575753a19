"""Random draws of slots that lie on many devices, equal on any number of them."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.ops.varying import as_varying
from jaxcl.typing import Array, AxisName, Bool, Int, Integer, Key

__all__ = ["draw_slots", "priorities"]

_DIGITS = 256  # of the base in which priorities are compared


def priorities(key: Key[Array, ""], num_slots: int) -> Integer[Array, " m"]:
    """The random numbers of a draw, by which slots come first.

    Made outside of `jax.shard_map`, they are the same on any number of devices, and each device
    makes those of its own slots.
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
    """The slots with the greatest priorities of each stratum, as many as its quota.

    The least priority that is drawn is found digit by digit: four times, each device counts its
    slots by stratum and digit, and the counts of all are summed. Besides these `4 · 256 · g`
    numbers, `count` slot numbers go to all devices. Of equal priorities the lowest slot is first.

    Args:
      priority: random numbers of this device's slots.
      stratum: their stratum; one that has no quota is never drawn.
      quotas: how many of each stratum.
      count: their sum, at least.
      axis_name: the mesh axes over which slots are sharded.

    Returns:
      Slot numbers over all devices, ascending, `[count]`, the same on each; −1 behind them where
      there are too few.
    """
    num_slots = priority.shape[0]
    device = 0 if axis_name is None else lax.axis_index(axis_name)
    slots = device * num_slots + jnp.arange(num_slots, dtype=jnp.int32)
    taken = _greatest_of_strata(priority, slots, stratum, quotas, axis_name)
    here = taken.sum(dtype=jnp.int32)
    before = jnp.int32(0)
    if axis_name is not None:
        counts = lax.all_gather(here, axis_name)
        before = jnp.where(jnp.arange(counts.shape[0]) < device, counts, 0).sum(dtype=jnp.int32)
    places = jnp.where(taken, before + jnp.cumsum(taken, dtype=jnp.int32) - 1, count)
    drawn = jnp.full(count, -1, jnp.int32).at[places].set(slots, mode="drop")  # count is out
    return drawn if axis_name is None else lax.pmax(drawn, axis_name)


def _greatest_of_strata(
    priority: Integer[Array, " m"],
    slots: Int[Array, " m"],
    stratum: Int[Array, " m"],
    quotas: Int[Array, " g"],
    axis_name: AxisName | None,
) -> Bool[Array, " m"]:
    """Which slots are among the first of their stratum, by a radix selection over all devices."""

    def pass_over(
        numbers: Array, shift: int, state: tuple[Array, Array, Array]
    ) -> tuple[Array, Array, Array]:
        """Decides those that differ from the last one taken in this digit; the rest stays open."""
        taken, open_, wanted = state
        digit = ((numbers >> shift) & (_DIGITS - 1)).astype(jnp.int32)
        counts = jnp.zeros(quotas.shape[0] * _DIGITS, jnp.int32)
        counts = counts.at[stratum * _DIGITS + digit].add(open_.astype(jnp.int32), mode="drop")
        if axis_name is not None:
            counts = lax.psum(counts, axis_name)
        counts = counts.reshape(-1, _DIGITS)
        above = counts[:, ::-1].cumsum(1)[:, ::-1] - counts  # how many have a greater digit
        wanted = jnp.minimum(wanted, counts.sum(1))
        last = (above < wanted[:, None]) & (above + counts >= wanted[:, None])
        # Where nothing is wanted no digit is the last, and none is above it.
        limit = jnp.where(wanted > 0, last.argmax(1), _DIGITS).astype(jnp.int32)
        theirs = limit.at[stratum].get(mode="fill", fill_value=_DIGITS)
        used = jnp.where(last, above, 0).sum(1)
        return taken | (open_ & (digit > theirs)), open_ & (digit == theirs), wanted - used

    def passes(numbers: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        for shift in (24, 16, 8, 0):
            state = pass_over(numbers.astype(jnp.uint32), shift, state)
        return state

    known = stratum < quotas.shape[0]
    start = as_varying((jnp.zeros(priority.shape, bool), known), (priority, stratum))
    taken, open_, wanted = passes(priority, (*start, quotas.astype(jnp.int32)))
    # Of equal priorities, which are rare, the slots decide.
    still = jnp.zeros(quotas.shape, jnp.int32).at[stratum].add(open_.astype(jnp.int32), mode="drop")
    if axis_name is not None:
        still = lax.psum(still, axis_name)
    taken, open_, _ = lax.cond(
        (still > wanted).any(),
        lambda state: passes(~slots, state),
        lambda state: state,
        (taken, open_, wanted),
    )
    return taken | open_
