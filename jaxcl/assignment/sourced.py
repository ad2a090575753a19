"""Batches from several sources or topics in fixed shares, as a function of the step alone."""

import operator
from collections.abc import Mapping, Sequence
from typing import SupportsIndex

import numpy as np

from jaxcl.assignment.uniform import fold_in, permutation, permuted
from jaxcl.ops.arguments import as_integers
from jaxcl.typing import Float, Int

__all__ = ["SourcedRows"]

_MIXES = ("mixed", "single")
_BITS = 32


class SourcedRows:
    r"""The rows of each batch, with a share for each source: `SourcedRows(sources, ...)(step)`.

    The share of a source with $n_s$ rows is $n_s^{1/T} / \sum_r n_r^{1/T}$ at temperature $T$. A
    draw is a row, or a whole batch with `mix="single"`. Sources are consecutive intervals on a
    line, each as long as its share of a batch's draws. Step $t$ draws the sources at points one
    unit apart, shifted by the $t$-th van der Corput number. So

    - a mixed batch has each source's share of rows, rounded up or down;
    - over all steps before $t$, a source deviates from its share by fewer draws than $t$ has ones
      in binary: by less than 1 before steps 1, 2, 4, 8, ..., and by less than 5 in all our
      measurements;
    - each row occurs once per epoch of its source. Such an epoch continues from batch to batch
      whatever else is drawn, and the next epoch follows without a gap. At temperature 1, an epoch
      of all rows is one epoch of each source, up to these few draws.

    A batch holds a row twice if it draws more rows from a source than the source has, or if it
    spans two of the source's epochs; the losses' `ids` mask the duplicate.

    Args:
      sources: each row's source or topic; any integers.
      batch_size: rows of a batch, over all devices and hosts.
      seed: determines the rows and the order of sources.
      mix: `"mixed"` for all sources in each batch, in random order; `"single"` for batches from a
        single source.
      weights: source -> share, in any unit; a source with weight 0 is never drawn. `None` for
        shares by size.
      temperature: 1 draws all rows equally often; infinity draws all sources equally often.

    Raises:
      ValueError: if the mix is unknown, weights or temperature are invalid, a source has no weight
        or no rows, or the step is below 0.
      TypeError: if the sources are not integers.

    Example:
      >>> rows = SourcedRows(np.array([0, 0, 0, 0, 0, 0, 7, 7]), batch_size=4, seed=0)
      >>> [(rows(step) >= 6).sum().item() for step in range(4)]  # source 7 has a share of ¼
      [1, 1, 1, 1]

    Relations:
      With a single source, each row is visited once per epoch, as with `uniform_rows`.

    Reference:
      Temperature: Arivazhagan et al., "Massively multilingual neural machine translation in the
      wild", 2019.
    """

    def __init__(
        self,
        sources: Int[np.ndarray, " n"] | Sequence[int],
        *,
        batch_size: int,
        seed: int,
        mix: str = "mixed",
        weights: Mapping[int, float] | None = None,
        temperature: float = 1.0,
    ):
        batch_size, seed = operator.index(batch_size), operator.index(seed)
        if mix not in _MIXES:
            raise ValueError(f"mix={mix!r} is unknown; use one of {', '.join(_MIXES)}")
        sources = as_integers("sources", sources)
        if batch_size < 1 or not sources.size:
            raise ValueError(f"batch_size={batch_size} and rows={sources.size} must be at least 1")
        names, sizes = np.unique(sources, return_counts=True)
        self._batch_size, self._seed = batch_size, seed
        self._rows_per_draw = batch_size if mix == "single" else 1
        self._draws_per_step = batch_size // self._rows_per_draw
        # Flipping binary digits of the van der Corput numbers gives another sequence, equally even.
        self._flipped = fold_in(seed, 1) % 2**_BITS
        self._sizes = sizes
        self._first = np.cumsum(sizes) - sizes
        self._by_source = np.argsort(sources, kind="stable").astype(np.int32)
        edges = np.cumsum(_shares(names, sizes, weights, temperature))
        # Fixed-point integers from here on, since draws must add up exactly at any step. The last
        # edge divided by itself is 1, so rounding never loses a draw.
        edges = np.append(0, edges / edges[-1]) * self._draws_per_step
        self._edges = np.rint(edges * 2**_BITS).astype(np.int64)

    def __call__(self, step: SupportsIndex) -> Int[np.ndarray, " b"]:
        step = operator.index(step)  # NumPy integers would overflow, and have no bit length
        if not 0 <= step < 2**_BITS:
            raise ValueError(f"step={step} must be from 0 to 2^{_BITS} - 1")
        begin = self._drawn(step) * self._rows_per_draw
        count = self._drawn_in(step, 0) * self._rows_per_draw
        source = np.repeat(np.arange(len(count)), count)
        # The rank of each row among the rows of its source in this batch.
        nth = np.arange(self._batch_size) - (np.cumsum(count) - count)[source]
        epoch, index = np.divmod(begin[source] + nth, self._sizes[source])
        # A different epoch number for each (source, epoch), since sources of equal size would
        # otherwise be permuted alike.
        index = permuted(
            index,
            epoch * len(self._sizes) + source,
            num_rows=self._sizes[source],
            seed=self._seed,
        ).astype(np.int64)
        rows = self._by_source[self._first[source] + index]
        return rows[permutation(len(rows), epoch=step, seed=fold_in(self._seed, 0))]

    def _drawn(self, step: int) -> Int[np.ndarray, " s"]:
        """The number of draws from each source before a step."""
        # Aligned runs of 2^i steps, one for each 1 in the step's binary form, so resuming takes a
        # logarithmic number of additions.
        total = np.zeros_like(self._sizes)
        for i in range(step.bit_length()):
            if step >> i & 1:
                total += self._drawn_in(step >> i + 1 << i + 1, i)
        return total

    def _drawn_in(self, step: int, i: int) -> Int[np.ndarray, " s"]:
        """The number of draws from each source in $2^i$ steps from `step` on, a multiple of $2^i$.

        The van der Corput number of a step has the step's binary digits in reverse after the point.
        In these steps the first $i$ digits take all values, so the draws are evenly spaced.
        """
        spacing = 2 ** (_BITS - i)
        reverse = int(f"{step:0{_BITS}b}"[::-1], 2)
        first = (reverse ^ self._flipped) % spacing
        below = -((first - self._edges) // spacing)  # the draws before each edge
        return np.diff(below)


def _shares(
    names: Int[np.ndarray, " s"],
    sizes: Int[np.ndarray, " s"],
    weights: Mapping[int, float] | None,
    temperature: float,
) -> Float[np.ndarray, " s"]:
    """The share of each source, not normalised."""
    if not temperature > 0:
        raise ValueError(
            f"temperature={temperature} must be above 0; use math.inf for equal shares"
        )
    if weights is None:
        return (sizes / sizes.max()) ** (1 / temperature)
    if temperature != 1:
        raise ValueError(f"weights override temperature={temperature}; give only one of them")
    known = set(names.tolist())
    if unknown := sorted(set(weights) - known):
        raise ValueError(
            f"weights name sources {unknown}, which have no rows; there are {sorted(known)}"
        )
    if missing := sorted(known - set(weights)):
        raise ValueError(f"sources {missing} have no weight; give 0 to leave their rows out")
    shares = np.array([weights[name] for name in names.tolist()], float)
    if not (np.isfinite(shares) & (shares >= 0)).all() or not shares.any():
        raise ValueError(f"weights={dict(weights)} must be finite, at least 0, and not all 0")
    return shares
