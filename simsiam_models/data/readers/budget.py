"""Bounds the memory of large images: the threads of a process decode and hold at most BUDGET bytes of them at a time.

A thread of a pool holds the image that it decoded last until it decodes another or its call ends; elsewhere, an image
counts while it is decoded. A thread that waits holds nothing, so threads cannot wait for each other forever.
"""
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

LARGE = 1 << 24  # bytes; smaller images do not count
BUDGET = 1 << 31  # bytes

_changed = threading.Condition()
_used = 0  # bytes, by all threads
_own = threading.local()  # size: of this thread's image; abandoned: of the call that it makes, if it belongs to a pool


class Abandoned(BaseException):
    """The call that reads this image was abandoned: its result is no longer needed."""


@contextmanager
def decode_in_turn(size: int) -> Iterator[None]:
    """Waits until an image that takes `size` bytes while it is decoded fits into the budget, or is the only one."""
    global _used
    abandoned = getattr(_own, 'abandoned', None)
    _release()
    if size < LARGE:
        yield
        return
    with _changed:
        _changed.wait_for(lambda: not _used or _used + size <= BUDGET or abandoned is not None and abandoned.is_set())
        if abandoned is not None and abandoned.is_set():
            raise Abandoned
        _used += size
        _own.size = size
    try:
        yield
    finally:
        if abandoned is None:
            _release()


def call_in_pool(call: Callable[[], Any], abandoned: threading.Event) -> Any:
    """Makes a call of a pool's thread; once `abandoned` is set, it decodes no further large image."""
    _own.abandoned = abandoned
    try:
        return call()
    finally:
        _own.abandoned = None
        _release()


def abandon(abandoned: threading.Event) -> None:
    """Sets the event and wakes the threads that wait for their turn."""
    with _changed:
        abandoned.set()
        _changed.notify_all()


def _release() -> None:
    global _used
    if size := getattr(_own, 'size', 0):
        with _changed:
            _used, _own.size = _used - size, 0
            _changed.notify_all()
