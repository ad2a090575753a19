"""The differences between two recorded files."""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

__all__ = ["differences"]

_MOST_NAMED = 3  # the most metrics or arrays that a line names


def differences(
    found: Mapping[str, Any], wanted: Mapping[str, Any], *, tolerance: float = 0.0
) -> dict[str, str]:
    """The cases that differ.

    Args:
      found: case -> its recorded result, from one file.
      wanted: the same from the other file.
      tolerance: the largest allowed relative error; 0 compares bits.

    Returns:
      Case -> a line that says how it differs. A case that one file lacks differs.
    """
    lines = {}
    for name in sorted(found.keys() | wanted.keys()):
        if name not in wanted:
            lines[name] = "only in the first file"
        elif name not in found:
            lines[name] = "only in the second file"
        else:
            details = list(_differing(found[name], wanted[name], tolerance))
            if details:
                more = len(details) - _MOST_NAMED
                rest = f"; {more} more" if more > 0 else ""
                lines[name] = "; ".join(details[:_MOST_NAMED]) + rest
    return lines


def _differing(
    found: Mapping[str, Any], wanted: Mapping[str, Any], tolerance: float
) -> Iterator[str]:
    """A phrase for each part of a case that differs."""
    for case, place in ((found, "first"), (wanted, "second")):
        if "error" in case:
            yield f"failed in the {place} file: {case['error'].strip().splitlines()[-1]}"
    if "error" in found or "error" in wanted:
        return
    for kind in ("arrays", "metrics"):
        ours, theirs = found.get(kind, {}), wanted.get(kind, {})
        for name in [*ours, *(name for name in theirs if name not in ours)]:
            if name not in ours or name not in theirs:
                yield f"{name} only in the {'first' if name in ours else 'second'} file"
            elif (error := _relative_error(ours[name], theirs[name])) > tolerance:
                yield f"{name} by {error:.1e}"
    yield from _differing_states(found.get("state", []), wanted.get("state", []), tolerance)


def _differing_states(
    found: list[Mapping[str, Any]], wanted: list[Mapping[str, Any]], tolerance: float
) -> Iterator[str]:
    """Compare two unordered collections of digests."""
    found, wanted = list(found), list(wanted)
    for digest in list(found):  # equal arrays cancel, in any order
        if digest in wanted:
            found.remove(digest)
            wanted.remove(digest)
    for digest in found:
        candidates = [other for other in wanted if _form(other) == _form(digest)]
        if not candidates:
            yield f"state {_form(digest)} only in the first file"
            continue
        nearest = min(candidates, key=lambda other: _digest_error(digest, other))
        wanted.remove(nearest)
        error = _digest_error(digest, nearest)
        if tolerance == 0 or error > tolerance:
            yield f"state {_form(digest)} by {error:.1e} of its norm"
    for digest in wanted:
        yield f"state {_form(digest)} only in the second file"


def _form(digest: Mapping[str, Any]) -> str:
    return f"{digest['dtype']}{digest['shape']}"


def _digest_error(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """The difference of norms and sums, relative to the norm."""
    scale = max(one["norm"], other["norm"])
    apart = max(abs(one[name] - other[name]) for name in ("norm", "sum"))
    return apart / scale if scale else 0.0


def _relative_error(found: Any, wanted: Any) -> float:
    """‖found − wanted‖ / ‖wanted‖; 0 only for equal bits, infinity for another shape or type."""
    if json.dumps(found) == json.dumps(wanted):
        return 0.0
    try:
        ours, theirs = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    except (TypeError, ValueError):
        return math.inf
    finite = np.isfinite(theirs) if ours.shape == theirs.shape else None
    if (
        finite is None
        or not np.array_equal(ours[~finite], theirs[~finite], equal_nan=True)
        or not np.isfinite(ours[finite]).all()
    ):
        return math.inf
    scale = np.linalg.norm(theirs[finite])
    apart = np.linalg.norm(ours[finite] - theirs[finite])
    # A difference that is too small for a float is still one: −0 is not 0.
    return max(float(apart / scale) if scale else math.inf, np.finfo(float).tiny)
