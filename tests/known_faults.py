"""How a test says that the outcome it asserts is not yet there."""

from collections.abc import Callable
from typing import Any

import pytest

__all__ = ["known_fault"]


def known_fault(reason: str, *, raises: type[BaseException] = AssertionError) -> Callable[..., Any]:
    """Marks a test of the right outcome that fails today; it must fail until the fault is mended.

    Args:
      reason: today's outcome.
      raises: the exception that ends the test today. A test that fails otherwise fails the suite.
    """
    return pytest.mark.xfail(strict=True, reason=reason, raises=raises)
