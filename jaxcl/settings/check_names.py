"""The check of a setting that lists names."""

from collections.abc import Collection

__all__ = ["check_names"]


def check_names(setting: str, names: Collection[str], known: Collection[str]) -> None:
    """Raise a `ValueError` for names that are not known, with those that are."""
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"{setting} names {', '.join(map(repr, unknown))}; use some of {', '.join(known)}"
        )
