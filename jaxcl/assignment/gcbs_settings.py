"""Settings for assigning rows to batches: the method, the neighbour graph, the search effort."""

from typing import Annotated, Any, NamedTuple

from jaxcl.assignment.bisection import DEFAULT_EFFORT, Effort
from jaxcl.typing import Range, check_ranges

__all__ = ["GRAPHS", "METHODS", "PRESETS", "Gcbs"]

METHODS = ("bisection", "rcm_device", "rcm")
"""How to order rows: bisection, Cuthill–McKee on the devices, or the paper's method."""

GRAPHS = ("exact", "clustered")
"""Where to search for neighbours: among all rows, or in the clusters nearest to a row's cluster."""


class _Choices(NamedTuple):
    method: str = "bisection"
    graph: str | None = None
    neighbours: Annotated[int, Range(least=1)] = 32
    cluster_size: Annotated[int, Range(least=1)] = 256
    probes: Annotated[int, Range(least=1)] = 32
    similarity_cap: Annotated[float, Range(least=-1, most=1)] | None = None
    quantile: Annotated[float, Range(above=0, below=1)] = 0.999
    effort: Effort = DEFAULT_EFFORT


class Gcbs(_Choices):
    """Settings of a search: `Gcbs(neighbours=16)`, `Gcbs(preset="light", neighbours=8)`.

    Attributes:
      method: one of `METHODS`.
      graph: one of `GRAPHS`; `None` for an exact graph up to 10,000 rows, else a clustered one.
      neighbours: number of neighbours per row in the graph.
      cluster_size: rows per cluster.
      probes: number of clusters to search for the neighbours of a cluster's rows.
      similarity_cap: rows more similar than this, by the mean cosine of both directions, are never
        neighbours; `None` for no cap.
      quantile: the share of similarities that `"rcm"` ignores.
      effort: the search effort of the bisection.
    """

    __slots__ = ()

    def __new__(cls, *values: Any, preset: str | None = None, **named: Any) -> "Gcbs":
        if preset is None:
            return super().__new__(cls, *values, **named)
        if preset not in PRESETS:
            raise ValueError(f"preset={preset!r} is unknown; use one of {', '.join(PRESETS)}")
        if values:
            raise TypeError(f"preset={preset!r} takes changes by name, such as neighbours=8")
        return PRESETS[preset]._replace(**named)

    def check(self) -> None:
        """Raise a `ValueError` for invalid settings."""
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r} is unknown; use one of {', '.join(METHODS)}")
        if self.graph not in (None, *GRAPHS):
            raise ValueError(
                f"graph={self.graph!r} is unknown; use one of {', '.join(GRAPHS)}, or None"
            )
        check_ranges(self)
        if self.method == "rcm" and (self.graph, self.similarity_cap) != (None, None):
            raise ValueError(
                f"method='rcm' compares all rows and ignores graph={self.graph!r} and "
                f"similarity_cap={self.similarity_cap}; set them to None"
            )
        self.effort.check()


PRESETS = {
    "full": Gcbs(),
    "light": Gcbs(
        neighbours=16,
        cluster_size=128,
        probes=8,
        effort=Effort(starts=1, walks=6, swaps=4, refinements=8),
    ),
}
"""Settings by name. `"light"` takes a third of the time of `"full"`, closes nine tenths as much of
the gap, and trains as well."""
