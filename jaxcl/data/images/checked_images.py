"""Decode all images of a source once, to find bad images and images with equal pixels.

The result is cached in the shared folder under a hash of the rows, the rule and the decoder. The
same rows are therefore left out on all hosts and after each restart.
"""

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxcl.data.column_folder import cached_columns
from jaxcl.data.images.decoder_probe import decoder_fingerprint, reading_limits
from jaxcl.data.images.decoding import BadImage, ImageRule, decode_image, verify_image
from jaxcl.data.images.image_threads import in_threads
from jaxcl.data.row_checks import checked_int32
from jaxcl.data.source_fields import SelectedPairs, read_fields, row_place, rows_that_fit
from jaxcl.data.sources import PairSource
from jaxcl.data.splits import ConcatenatedPairs
from jaxcl.host.progress import progress_bar, say
from jaxcl.typing import Int, Integer

__all__ = ["CheckedImages", "check_images", "usable_images"]

_FORMAT = 1
_FIRST_ROWS, _MOST_ROWS = 8, 64
_BYTES_AT_ONCE = 8 * 2**20
"""The approximate size of the files in one task; each thread has a few tasks queued."""
_NAMED_ROWS = 5
"""The number of bad images that a message names; the others are only counted."""
_KEPT_REASONS = 100


class CheckedImages(NamedTuple):
    """The result of decoding all images of a source once.

    Attributes:
      digests: side -> the 128-bit digest of the pixels of each row's image; 0 for bad images.
      group: each row's group; 0 if the rows have no groups.
      bad: the rows with an image that cannot be decoded.
      reasons: for each of the first bad images, its place and why it cannot be decoded.
    """

    digests: dict[str, Integer[np.ndarray, "n 2"]]
    group: Int[np.ndarray, " n"]
    bad: Int[np.ndarray, " _"]
    reasons: tuple[str, ...]


def check_images(
    source: PairSource, sides: Sequence[str], rule: ImageRule, *, role: str, directory: Path
) -> CheckedImages:
    """Decode all images of a source, or read the result of an earlier call.

    Args:
      source: the rows.
      sides: the sides that are images.
      rule: the rule for decoding an image to an array.
      role: the role of the split, for the progress bar.
      directory: the folder that caches the results of all calls.

    Raises:
      ValueError: if a value of a side is a text.
      OSError: if the result cannot be written.
    """
    if isinstance(source, ConcatenatedPairs):
        parts = [
            check_images(part, sides, rule, role=role, directory=directory)
            for part in source.data_sets
        ]
        return _concatenated(parts, source.first_rows)
    if isinstance(source, SelectedPairs):
        checked = check_images(source.source, sides, rule, role=role, directory=directory)
        return _selected(checked, source.chosen)
    made_from = {
        "format": _FORMAT,
        "source": source.fingerprint,
        "sides": list(sides),
        "rule": json.loads(json.dumps(rule)),
        "decoder": decoder_fingerprint(),
        "limits": reading_limits(),
    }
    name = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:12]
    columns = cached_columns(
        directory / name,
        made_from,
        functools.partial(_compute, source, sides, rule, role),
        what=f"the checks of the images of {role}",
    )
    return CheckedImages(
        {side: columns[f"{side}_digest"].reshape(-1, 2) for side in sides},
        columns["group"],
        np.flatnonzero(columns["is_bad"]),
        tuple(json.loads(columns["reasons"].tobytes())),
    )


def usable_images(source: PairSource, checked: CheckedImages, *, role: str, bad: str) -> PairSource:
    """The rows of a source whose images can be decoded.

    Args:
      source: the rows.
      checked: the result of `check_images`.
      role: the role of the split, for messages.
      bad: `"skip"` leaves out rows with bad images, and logs how many; `"error"` raises an error.

    Raises:
      ValueError: if a row has a bad image and `bad` is `"error"`, or all rows have one.
    """
    if not len(checked.bad):
        return source
    count = f"{len(checked.bad):,} of {len(source):,} rows of {role} have images that"
    more = len(checked.bad) - _NAMED_ROWS
    named = "; ".join(checked.reasons[:_NAMED_ROWS]) + (f"; and {more:,} more" if more > 0 else "")
    if bad == "error":
        raise ValueError(
            f"{count} cannot be read: {named}. Repair or remove them, or set data.images.bad=skip "
            "to leave these rows out"
        )
    if len(checked.bad) == len(source):
        raise ValueError(f"no image of {role} can be read: {named}")
    say(f"{count} cannot be read and are left out: {named}")
    return SelectedPairs(source, np.setdiff1d(np.arange(len(source)), checked.bad))


class _Part(NamedTuple):
    """Some rows of a source.

    Attributes:
      first: the number of the first row.
      records: the fields of each row; a row that cannot be read lacks one or more sides.
      errors: row number -> the error of a row that cannot be read.
    """

    first: int
    records: list[dict[str, Any]]
    errors: dict[int, "_Bad"]


def _compute(
    source: PairSource, sides: Sequence[str], rule: ImageRule, role: str
) -> dict[str, np.ndarray]:
    group = np.zeros(len(source), np.int32)
    digests = {side: np.zeros((len(source), 2), np.uint64) for side in sides}
    is_bad = np.zeros(len(source), np.uint8)
    reasons: list[str] = []
    with progress_bar(f"checking the images of {role}", len(source)) as advance:
        digests_of = functools.partial(_digests, sides=sides, rule=rule)
        for part, results in in_threads(digests_of, _parts(source, sides)):
            rows = slice(part.first, part.first + len(part.records))
            groups = [record.get("group", 0) for record in part.records]
            group[rows] = checked_int32(groups, what="group", first_row=part.first)
            for row, result in enumerate(results, part.first):
                if isinstance(result, _Bad):
                    is_bad[row] = True
                    reasons.append(f"{row_place(source, result.side, row)}: {result.reason}")
                else:
                    for side, digest in zip(sides, result, strict=True):
                        digests[side][row] = np.frombuffer(digest, np.uint64)
            advance(len(results))
    content = json.dumps(reasons[:_KEPT_REASONS]).encode()
    columns: dict[str, np.ndarray] = {f"{side}_digest": digests[side].ravel() for side in sides}
    columns |= {"group": group, "is_bad": is_bad}
    return columns | {"reasons": np.frombuffer(content, np.uint8)}


def _parts(source: PairSource, sides: Sequence[str]) -> Iterator[_Part]:
    first, count = 0, _FIRST_ROWS
    while first < len(source):
        rows = range(first, min(first + count, len(source)))
        try:
            part = _Part(first, read_fields(source, rows, (*sides, "group")), {})
        except BadImage:
            part = _Part(first, [], {})
            for row in rows:
                record, bad = _read_row(source, row, sides)
                part.records.append(record)
                if bad is not None:
                    part.errors[row] = bad
        _check_types(source, part, sides)
        yield part
        first += len(rows)
        count = min(rows_that_fit(part.records, _BYTES_AT_ONCE), 2 * count, _MOST_ROWS)


def _read_row(
    source: PairSource, row: int, sides: Sequence[str]
) -> tuple[dict[str, Any], "_Bad | None"]:
    """The readable fields of a row, and the error of its first side that cannot be read."""
    (record,) = read_fields(source, [row], ("group",))
    for side in sides:
        try:
            record |= read_fields(source, [row], (side,))[0]
        except BadImage as error:
            return record, _Bad(side, str(error))
    return record, None


def _check_types(source: PairSource, part: _Part, sides: Sequence[str]) -> None:
    for row, record in enumerate(part.records, part.first):
        for side in sides:
            if isinstance(record.get(side), str):
                raise ValueError(
                    f"the {side} in {row_place(source, side, row)} is a text, but data.modality."
                    f"{side}='image' needs image files; set data.{side}_field to their column"
                )


class _Bad(NamedTuple):
    side: str
    reason: str


def _digests(
    part: _Part, *, sides: Sequence[str], rule: ImageRule
) -> tuple[_Part, list[_Bad | tuple[bytes, ...]]]:
    """The digests of each row's images, or the error of the first image that cannot be decoded."""
    results: list[_Bad | tuple[bytes, ...]] = []
    known: dict[bytes, bytes] = {}  # both sides may share a column, and several captions an image
    for row, record in enumerate(part.records, part.first):
        if row in part.errors:
            results.append(part.errors[row])
            continue
        digests: list[bytes] = []
        for side in sides:
            try:
                digests.append(_digest(record[side], rule, known))
            except BadImage as error:
                results.append(_Bad(side, str(error)))
                break
        else:
            results.append(tuple(digests))
    return part, results


def _digest(value: Any, rule: ImageRule, known: dict[bytes, bytes]) -> bytes:
    """The digest of the pixels of an image; equal files are decoded only once."""
    if isinstance(value, bytes) and value in known:
        return known[value]
    verify_image(value)
    digest = hashlib.blake2b(decode_image(value, rule).tobytes(), digest_size=16).digest()
    if isinstance(value, bytes):
        known[value] = digest
    return digest


def _selected(checked: CheckedImages, chosen: Int[np.ndarray, " n"]) -> CheckedImages:
    """The results for the chosen rows, which have no bad images."""
    digests = {side: digests[chosen] for side, digests in checked.digests.items()}
    return CheckedImages(digests, checked.group[chosen], np.zeros(0, np.int64), ())


def _concatenated(
    parts: Sequence[CheckedImages], first_rows: Int[np.ndarray, " _"]
) -> CheckedImages:
    return CheckedImages(
        {side: np.concatenate([part.digests[side] for part in parts]) for side in parts[0].digests},
        np.concatenate([part.group for part in parts]),
        np.concatenate([part.bad + first for part, first in zip(parts, first_rows, strict=True)]),
        tuple(reason for part in parts for reason in part.reasons),
    )
