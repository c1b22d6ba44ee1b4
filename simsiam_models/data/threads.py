"""Runs jobs in a pool of threads and yields their results in order, a few jobs ahead of the consumer."""
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from .readers.budget import abandon, call_in_pool

AHEAD = 3  # batches that are filled while the consumer works on one

Job = tuple[Any, Sequence[Callable[[], Any]]]  # a result, and the calls that complete it


def make_threads(workers: int) -> ThreadPoolExecutor | None:
    """Returns a pool of `workers` threads; None for 0 workers."""
    return ThreadPoolExecutor(workers, 'simsiam-data') if workers else None


def split_range(n: int, share: int = 16) -> list[slice]:
    """Splits range(n) into slices of `share` samples, each the work of one call."""
    return [slice(i, min(i + share, n)) for i in range(0, n, share)]


def run_in_order(
    threads: ThreadPoolExecutor | None, jobs: Iterable[Job], ahead: int = AHEAD,
) -> Generator[Any, None, None]:
    """Yields the result of each job once its calls have returned; raises what a call raises.

    The threads work up to `ahead` jobs in advance. Without threads, the caller's own thread makes the calls.
    """
    if threads is None:
        for result, calls in jobs:
            for call in calls:
                call()
            yield result
        return
    waiting: deque[tuple[Any, list[Future[None]]]] = deque()
    abandoned = threading.Event()
    try:
        for result, calls in jobs:
            waiting.append((result, [threads.submit(call_in_pool, call, abandoned) for call in calls]))
            if len(waiting) > ahead:
                yield _wait(*waiting.popleft())
        while waiting:
            yield _wait(*waiting.popleft())
    finally:  # runs also if the consumer stops early
        abandon(abandoned)
        if isinstance(jobs, Generator):
            jobs.close()
        for future in (future for _, futures in waiting for future in futures):
            future.cancel()


def _wait(result: Any, futures: list[Future[None]]) -> Any:
    for future in futures:
        future.result()
    return result
