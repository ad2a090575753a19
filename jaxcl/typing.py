"""The axis letters and array aliases that every annotation of jaxcl uses.

The letters, one meaning each, everywhere:

| letter | axis |
|---|---|
| `q` | queries |
| `k` | keys |
| `d` | features of an embedding |
| `b` | rows of a global batch |
| `n` | rows of a data set, or keys of a search pool |
| `t` | tokens of a text |
| `h` | hidden features inside a model |
| `m` | slots of a memory bank |
| `c` | chunks of a gradient cache |

The two sides of a pair are its *query* and its *key*: documents, passages, code, captions and
second views are keys.
"""

from collections.abc import Hashable
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, Key

__all__ = [
    "PADDING_ID",
    "SIDES",
    "Array",
    "AxisName",
    "Batch",
    "Bool",
    "Embeddings",
    "Float",
    "Int",
    "Integer",
    "Key",
    "NumpyInt",
    "PyTree",
    "RowKeys",
    "Scalar",
    "Tokens",
]

SIDES = ("query", "key")
"""The two sides of a pair, in the order in which arrays and random keys take them."""

PADDING_ID = 0
"""The token id that fills a text up to the width of its batch; encoders mask it."""

PyTree: TypeAlias = Any
AxisName: TypeAlias = Hashable | tuple[Hashable, ...]
"""One mesh axis, or several, under which a function runs inside `jax.shard_map`."""

Batch: TypeAlias = dict[str, PyTree]
"""`{"query": tree, "key": tree, "row": int32[b], "group": int32[b]}`; an encoder turns a side's
tree into `[b, d]`, so that text pairs, two views of an image, or an image and its caption are the
same program."""

Embeddings: TypeAlias = Float[Array, "b d"]
Tokens: TypeAlias = Int[Array, "b t"]
Scalar: TypeAlias = Float[Array, ""]
RowKeys: TypeAlias = Key[Array, " b"]
"""One random key per row, so that neither chunking nor the device count changes what is drawn."""

NumpyInt: TypeAlias = Int[np.ndarray, "..."]
