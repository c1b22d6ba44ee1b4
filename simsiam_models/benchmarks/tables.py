"""Tables of features on disk: filled in shards that are either whole or not there, by one run at a time."""
import json
import os
import sys
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from ..data.decode import UnreadableError
from ..data.sources import Images
from ..training.checkpoint import write_atomically
from ..training.distributed import World

ROWS = 1024  # of a shard
HEAD = 4096  # bytes before the first row: shards begin on pages, so processes never write to the same one


class Table:
    """NAME.npy while it is filled: (rows, width) float32, and NAME.shards/NUMBER with the checksum of each shard."""

    def __init__(self, folder: Path, name: str, rows: int, width: int) -> None:
        self.path, self.marks = folder / f'{name}.npy', folder / f'{name}.shards'
        self.rows, self.row_bytes = rows, 4 * width
        text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {width}), }}"
        length = (HEAD - 10).to_bytes(2, 'little')  # format 1.0 of .npy, the dictionary filled up with spaces
        self.head = np.lib.format.magic(1, 0) + length + text.ljust(HEAD - 11).encode() + b'\n'

    def span(self, shard: int) -> tuple[int, int]:
        return shard * ROWS, min((shard + 1) * ROWS, self.rows)

    def prepare(self, images: Images, threads: ThreadPoolExecutor) -> dict[int, dict[int, str] | None]:
        """Make the file what it must be; of each shard, None: to be made, or what was unreadable in it."""
        self.marks.mkdir(parents=True, exist_ok=True)
        with open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644), 'r+b') as f:
            if f.read(HEAD) != self.head:
                f.seek(0)
                f.write(self.head)
            f.truncate(HEAD + self.rows * self.row_bytes)  # longer or shorter; what is new is zero and fails the check
        shards = range(-(-self.rows // ROWS))
        return dict(zip(shards, threads.map(lambda shard: self._check(shard, images), shards), strict=True))

    def _check(self, shard: int, images: Images) -> dict[int, str] | None:
        try:
            mark = json.loads((self.marks / str(shard)).read_text())
            bad = {int(i): str(why) for i, why in mark['unreadable'].items()}
            inside = range(*self.span(shard))
            if not all(i in inside for i in bad) or mark['crc32'] != self._checksum(shard):
                return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        for index in bad:  # repaired meanwhile?
            try:
                images.read(index)
            except UnreadableError:
                continue
            return None
        return bad

    def _checksum(self, shard: int) -> int:
        start, stop = self.span(shard)
        left, crc = (stop - start) * self.row_bytes, 0
        with open(self.path, 'rb', buffering=0) as f:
            f.seek(HEAD + start * self.row_bytes)
            while left and (data := f.read(min(left, 1 << 20))):
                crc, left = zlib.crc32(data, crc), left - len(data)
        return crc

    def finish(self, file: int, shard: int, crc: int, bad: dict[int, str]) -> None:
        os.fsync(file)
        mark = json.dumps({'crc32': crc, 'unreadable': bad})
        write_atomically(self.marks / str(shard), lambda f: f.write(mark.encode()))


def write(file: int, data: memoryview, at: int) -> None:
    while data:
        n = os.pwrite(file, data, at)
        data, at = data[n:], at + n


@contextmanager
def alone(path: Path, world: World, what: str) -> Iterator[None]:
    """Of the runs that want the same one makes it, and the others wait and find it. `path` is the lock."""
    def hold() -> FileLock | None:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            return lock.acquire(timeout=0).lock
        except Timeout:
            print(f'{what}: waiting for the process that makes the same in {path.parent}', file=sys.stderr)
            return lock.acquire().lock
        except NotImplementedError:  # a file system without locks
            return None

    lock = None

    def take() -> None:
        nonlocal lock
        lock = hold()

    world.share(take)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()
