"""The symmetric InfoNCE loss and its gradients, written out as a reference for fast losses."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.typing import Array

__all__ = ["exact_infonce"]

_ENTRIES = 2**25  # scores that exist at one time


def exact_infonce(
    queries: Array, keys: Array, temperature: float, *, dtype: str
) -> dict[str, np.ndarray]:
    r"""The mean loss and its gradients, independent of jaxcl's losses.

    With $s_{ij} = \langle q_i, k_j\rangle / \tau$ and the log-sum-exps $r_i$ of rows and $c_j$ of
    columns, the loss is $\frac1{2B} \sum_i (r_i + c_i - 2 s_{ii})$, and its gradient by the scores
    is $w_{ij} = \frac1{2B} (e^{s_{ij} - r_i} + e^{s_{ij} - c_j} - 2 \delta_{ij})$. A chunk of
    queries is scored at a time, so that every batch fits.

    Args:
      queries: vectors of any type.
      keys: the key of each query.
      temperature: $\tau$.
      dtype: type of the computation, "float32" or "float64", with the highest matmul precision.

    Returns:
      `loss`, the value, and `queries`, `keys` and `temperature`, the gradients.
    """
    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        wide = (jnp.asarray(np.asarray(side), dtype) for side in (queries, keys))
        results = _exact(*wide, jnp.asarray(temperature, dtype))
        return {name: np.asarray(value) for name, value in results.items()}


@jax.jit
def _exact(queries: Any, keys: Any, temperature: Any) -> dict[str, Any]:
    size = queries.shape[0]
    most = max(1, min(size, _ENTRIES // size))
    chunk = next(n for n in range(most, 0, -1) if size % n == 0)
    starts = jnp.arange(0, size, chunk)
    rows_of = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=chunk)
    logsumexp = jax.scipy.special.logsumexp

    def reduce(columns: Any, start: Any) -> tuple[Any, Any]:
        scores = rows_of(queries, start) @ keys.T / temperature
        own = jnp.take_along_axis(scores, (start + jnp.arange(chunk))[:, None], axis=1)[:, 0]
        return jnp.logaddexp(columns, logsumexp(scores, axis=0)), (logsumexp(scores, axis=1), own)

    columns, (rows, own) = jax.lax.scan(reduce, jnp.full(size, -jnp.inf, queries.dtype), starts)
    rows, own = rows.reshape(-1), own.reshape(-1)

    def differentiate(sums: Any, start: Any) -> tuple[Any, Any]:
        to_keys, to_temperature = sums
        chunk_queries = rows_of(queries, start)
        scores = chunk_queries @ keys.T / temperature
        weights = jnp.exp(scores - rows_of(rows, start)[:, None]) + jnp.exp(scores - columns)
        diagonal = jnp.arange(size) == (start + jnp.arange(chunk))[:, None]
        weights = (weights - 2 * diagonal) / (2 * size)
        to_temperature -= (weights * scores).sum() / temperature
        return (to_keys + weights.T @ chunk_queries / temperature, to_temperature), (
            weights @ keys / temperature
        )

    zero = jnp.zeros_like(keys), jnp.zeros_like(temperature)
    (to_keys, to_temperature), to_queries = jax.lax.scan(differentiate, zero, starts)
    return {
        "loss": (rows + columns - 2 * own).mean() / 2,
        "queries": to_queries.reshape(queries.shape),
        "keys": to_keys,
        "temperature": to_temperature,
    }
