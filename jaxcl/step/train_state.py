"""The training state of a run, as one pytree."""

from typing import NamedTuple

from jaxcl.typing import Array, Int, Key, PyTree

__all__ = ["TrainState"]


class TrainState(NamedTuple):
    """The training state that a checkpoint holds; anything else is lost on restart.

    The position in the data is `step`; random draws come from `key` folded with `step`.
    Neither depends on the number of devices or hosts.

    Attributes:
      step: number of batches trained on.
      params: `{"towers": …, "log_temperature": float32}`, and `"bias"` if the loss learns one.
      optimizer: the state of the optax transformation, for the trained parameters only.
      memory: state that outlives a batch, if it is used: `"rows"`, the loss's state by training
        row (`jaxcl.ops.row_tables`); `"bank"`, side -> earlier embeddings
        (`jaxcl.negatives.memory_bank`); `"momentum"`, the trained parameters of the momentum
        encoder (`jaxcl.models.trainable`); `"average"`, the average of the weights
        (`jaxcl.step.average`); `"mined"`, each training row's mined negatives as row
        numbers; `"strata"`, the quotas of a stratified draw (`jaxcl.negatives.tiers`);
        `"assignment"`, the order that is cut into batches (`jaxcl.assignment.Assigned`).
      key: the run's random key, constant.
    """

    step: Int[Array, ""]
    params: PyTree
    optimizer: PyTree
    memory: PyTree
    key: Key[Array, ""]
