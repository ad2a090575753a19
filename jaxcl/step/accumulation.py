r"""Average the gradients of several batches before each update of an optimizer.

After batch $i = 0, …, k - 1$, the mean of the gradients is
$\bar g_i = \bar g_{i-1} + (g_i - \bar g_{i-1}) / (i + 1)$. After the last of the $k$ batches,
the optimizer updates the parameters with $\bar g_{k-1}$; until then, they do not change.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxcl.typing import PyTree

__all__ = ["accumulate"]


def accumulate(
    optimizer: optax.GradientTransformation, *, every: int
) -> optax.GradientTransformation:
    """Run an optimizer on the mean of the gradients of several batches.

    Updates and state are the same as with `optax.MultiSteps`, which computes the optimizer's update
    in every batch and keeps only the last one. With Muon, these updates take a large part of a
    step; here the optimizer runs only after the last batch.

    Args:
      optimizer: the optimizer that receives the mean gradient.
      every: the number of batches per update.

    Returns:
      An optimizer whose update is zero except in every `every`-th batch.
    """

    def init(params: Any) -> Any:
        return optax.MultiSteps(optimizer, every_k_schedule=every).init(params)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        gradients, count = updates, state.mini_step
        mean = jax.tree.map(
            lambda old, new: (old + (new - old) / (count + 1)).astype(old.dtype),
            state.acc_grads,
            gradients,
        )
        is_last = count == every - 1

        def updated(mean: PyTree, inner: PyTree) -> tuple[PyTree, PyTree, PyTree]:
            of_mean, inner = optimizer.update(optax.tree.cast_like(mean, gradients), inner, params)
            return of_mean, inner, jax.tree.map(jnp.zeros_like, mean)

        def kept(mean: PyTree, inner: PyTree) -> tuple[PyTree, PyTree, PyTree]:
            return jax.tree.map(jnp.zeros_like, gradients), inner, mean

        updates, inner, mean = jax.lax.cond(is_last, updated, kept, mean, state.inner_opt_state)
        return updates, state._replace(
            mini_step=(count + 1) % every,
            gradient_step=state.gradient_step + is_last.astype(jnp.int32),
            inner_opt_state=inner,
            acc_grads=mean,
        )

    return optax.GradientTransformation(init, update)
