"""Files of features on disk. Each is filled in shards that are complete or absent, by one run at a time."""
import json
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ..data.readers.decode import UnreadableError
from ..data.readers.images import Images
from ..runtime.files import explain_write_errors, write_atomically

HEAD = 4096  # bytes before the first row: shards begin on pages, so two processes never write to the same page


def shard_rows(rows: int) -> int:
    """Returns the rows of a shard, the most that a stopped process loses; small files have smaller shards.

    128 rows fill whole pages if a row has a multiple of 8 values, as the features of networks have.
    """
    return 1024 if rows >= 8192 else 128


@contextmanager
def explain_read_errors(path: Path) -> Iterator[None]:
    """Turns a failed read of a file that exists into one sentence."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as e:
        raise OSError(
            f'--cache: {path} cannot be read ({e.strerror or e}); nothing is changed, so try again later, or name '
            'another folder') from None


class FeatureFile:
    """NAME.npy while it is filled: (rows, width) float32, with one file NAME.shards/NUMBER per finished shard.

    That file holds the checksum of the shard's rows, a digest of its images' files, and its unreadable images.
    """

    def __init__(self, folder: Path, name: str, rows: int, width: int) -> None:
        self.path, self.marks = folder / f'{name}.npy', folder / f'{name}.shards'
        self.rows, self.row_bytes, step = rows, 4 * width, shard_rows(rows)
        self.spans = [(i, min(i + step, rows)) for i in range(0, rows, step)]  # first row and end of each shard
        text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {width}), }}"
        length = (HEAD - 10).to_bytes(2, 'little')  # format 1.0 of .npy; spaces pad the dictionary
        self.head = np.lib.format.magic(1, 0) + length + text.ljust(HEAD - 11).encode() + b'\n'

    def prepare(
        self, images: Images, digests: list[str | None], threads: ThreadPoolExecutor,
    ) -> list[dict[int, str] | None]:
        """Gives the file its size and header; returns None for each shard to compute, else its unreadable images.

        Args:
            digests: for each shard, the digest of its images' files as they are now; None if they are not files.
        """
        with explain_write_errors(self.path):
            self.marks.mkdir(parents=True, exist_ok=True)
            with open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644), 'r+b') as f:
                if f.read(HEAD) != self.head:
                    f.seek(0)
                    f.write(self.head)
                f.truncate(HEAD + self.rows * self.row_bytes)  # new rows are zeros, which fail the checksum
        return list(threads.map(lambda shard: self._check(shard, images, digests[shard]), range(len(self.spans))))

    def _check(self, shard: int, images: Images, digest: str | None) -> dict[int, str] | None:
        mark_file = self.marks / str(shard)
        try:
            with explain_read_errors(mark_file):
                mark = json.loads(mark_file.read_text())
            bad, crc = {int(i): str(why) for i, why in mark['unreadable'].items()}, mark['crc32']
            inside = range(*self.spans[shard])
            if mark['files'] != digest or not all(i in inside for i in bad) or crc != self._compute_checksum(shard):
                return None
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None  # no mark, or a damaged one
        for index in bad:  # repaired meanwhile?
            try:
                images.read(index)
            except UnreadableError:
                continue
            return None
        return bad

    def _compute_checksum(self, shard: int) -> int:
        start, stop = self.spans[shard]
        left, crc = (stop - start) * self.row_bytes, 0
        with explain_read_errors(self.path), open(self.path, 'rb', buffering=0) as f:
            f.seek(HEAD + start * self.row_bytes)
            while left and (data := f.read(min(left, 1 << 20))):
                crc, left = zlib.crc32(data, crc), left - len(data)
        return crc

    def write(self, handle: int, data: memoryview, row: int) -> None:
        """Writes rows from `row` on to the file, which is open as `handle`."""
        at = HEAD + row * self.row_bytes
        with explain_write_errors(self.path):
            while data:
                n = os.pwrite(handle, data, at)
                data, at = data[n:], at + n

    def finish(self, handle: int, shard: int, crc: int, digest: str | None, bad: dict[int, str]) -> None:
        """Marks the shard as complete once its rows are on the disk."""
        mark = json.dumps({'crc32': crc, 'files': digest, 'unreadable': bad})
        with explain_write_errors(self.path):
            os.fsync(handle)
            write_atomically(self.marks / str(shard), lambda f: f.write(mark.encode()))
