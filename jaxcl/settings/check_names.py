"""The check of a setting that lists names."""

from collections.abc import Collection

__all__ = ["check_names"]


def check_names(setting: str, names: Collection[str], known: Collection[str]) -> None:
    """Raise a `ValueError` that lists the known names if a name is unknown."""
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"{setting} names {', '.join(map(repr, unknown))}; use some of {', '.join(known)}"
        )
