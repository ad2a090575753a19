"""Decode many images at a time in worker threads; Pillow releases the GIL while decoding."""

import collections
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["in_threads", "num_threads"]

T = TypeVar("T")
U = TypeVar("U")

_MOST_THREADS = 32
_WAITING = 2
"""The maximum number of queued tasks per thread, which limits memory use."""


def num_threads() -> int:
    """The default number of threads: one per core that this process may use, at most 32."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, _MOST_THREADS)


def in_threads(
    function: Callable[[T], U],
    values: Iterable[T],
    *,
    threads: int | None = None,
    purpose: str = "decoding",
) -> Iterator[U]:
    """Apply a function to each value in worker threads, and yield the results in order.

    Values are taken from the iterable in the calling thread, only a few ahead of the results.

    Args:
      function: applied to each value; must not call `in_threads` for the same purpose.
      values: one value per task; a task should take a millisecond or more.
      threads: the number of threads; `None` for `num_threads()`.
      purpose: the name of the thread pool; work in one pool does not wait for work in another.
    """
    pool = _pool(threads or num_threads(), purpose)
    waiting: collections.deque[Future[U]] = collections.deque()
    try:
        for value in values:
            waiting.append(pool.submit(function, value))
            if len(waiting) > _WAITING * pool._max_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:  # after an error, or if the caller stops early
        for future in waiting:
            future.cancel()


@functools.cache
def _pool(threads: int, purpose: str) -> ThreadPoolExecutor:
    """A cached pool, because starting a thread takes as long as decoding a small image."""
    return ThreadPoolExecutor(threads, thread_name_prefix=f"jaxcl-{purpose}")
