"""FeatureFiles of features on disk: filled in shards that are either whole or not there, by one run at a time."""
import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ..data.readers.decode import UnreadableError
from ..data.readers.images import Images
from ..runtime.files import explain_write_errors, write_atomically

HEAD = 4096  # bytes before the first row: shards begin on pages, so processes never write to the same one


def shard_rows(rows: int) -> int:
    """Rows of a shard, the most that a stopped process loses: of a small table that is to be a small part.

    128 rows are whole pages where a row has a multiple of 8 values, as the features of networks have.
    """
    return 1024 if rows >= 8192 else 128


class FeatureFile:
    """NAME.npy while it is filled: (rows, width) float32, and NAME.shards/NUMBER with what each shard was made of.

    That is the checksum of its rows, a digest of its images' files, and which of them could not be read.
    """

    def __init__(self, folder: Path, name: str, rows: int, width: int) -> None:
        self.path, self.marks = folder / f'{name}.npy', folder / f'{name}.shards'
        self.rows, self.row_bytes, step = rows, 4 * width, shard_rows(rows)
        self.spans = [(i, min(i + step, rows)) for i in range(0, rows, step)]  # of each shard: its first row, its end
        text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {width}), }}"
        length = (HEAD - 10).to_bytes(2, 'little')  # format 1.0 of .npy, the dictionary filled up with spaces
        self.head = np.lib.format.magic(1, 0) + length + text.ljust(HEAD - 11).encode() + b'\n'

    def prepare(
        self, images: Images, files: list[str | None], threads: ThreadPoolExecutor) -> list[dict[int, str] | None]:
        """Make the file what it must be; of each shard, None: to be made, or what was unreadable in it.

        `files`: of each shard, the digest of its images' files as they are now; None where they are no files.
        """
        with explain_write_errors(self.path):
            self.marks.mkdir(parents=True, exist_ok=True)
            with open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644), 'r+b') as f:
                if f.read(HEAD) != self.head:
                    f.seek(0)
                    f.write(self.head)
                f.truncate(HEAD + self.rows * self.row_bytes)  # what is new is zero and fails the check
        return list(threads.map(lambda shard: self._check(shard, images, files[shard]), range(len(self.spans))))

    def _check(self, shard: int, images: Images, files: str | None) -> dict[int, str] | None:
        try:
            mark = json.loads((self.marks / str(shard)).read_text())
            bad = {int(i): str(why) for i, why in mark['unreadable'].items()}
            inside = range(*self.spans[shard])
            if not all(i in inside for i in bad) or mark['files'] != files or mark['crc32'] != self._checksum(shard):
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
        start, stop = self.spans[shard]
        left, crc = (stop - start) * self.row_bytes, 0
        with open(self.path, 'rb', buffering=0) as f:
            f.seek(HEAD + start * self.row_bytes)
            while left and (data := f.read(min(left, 1 << 20))):
                crc, left = zlib.crc32(data, crc), left - len(data)
        return crc

    def write(self, file: int, data: memoryview, row: int) -> None:
        """`file` is the open table, `row` the first of those in `data`."""
        at = HEAD + row * self.row_bytes
        with explain_write_errors(self.path):
            while data:
                n = os.pwrite(file, data, at)
                data, at = data[n:], at + n

    def finish(self, file: int, shard: int, crc: int, files: str | None, bad: dict[int, str]) -> None:
        mark = json.dumps({'crc32': crc, 'files': files, 'unreadable': bad})
        with explain_write_errors(self.path):
            os.fsync(file)
            write_atomically(self.marks / str(shard), lambda f: f.write(mark.encode()))
