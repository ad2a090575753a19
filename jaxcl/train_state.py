"""Everything about a run that evolves, as one pytree."""

from typing import NamedTuple

from jaxcl.typing import Array, Int, Key, PyTree

__all__ = ["TrainState"]


class TrainState(NamedTuple):
    """The one tuple that a checkpoint holds: what is not here does not survive a restart.

    The position in the data is `step`; random draws come from `key` folded with `step`. Both hold
    for any number of devices and hosts.

    Attributes:
      step: updates done.
      params: `{"towers": …, "log_temperature": float32}`, and `"bias"` where a loss learns one.
      optimizer: the state of the optax transformation.
      memory: `"rows"`, what the loss remembers of the training rows (`jaxcl.ops.row_tables`), and
        `"bank"`, embeddings of earlier keys (`jaxcl.negatives.memory_bank`); each where it is used.
      key: the run's random key, constant.
    """

    step: Int[Array, ""]
    params: PyTree
    optimizer: PyTree
    memory: PyTree
    key: Key[Array, ""]
