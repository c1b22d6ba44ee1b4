"""Tar shards, as WebDataset writes them: indexed once, then read at random without being unpacked.

A sample is the files of a shard whose names agree up to the first dot of the last path component; its image is the one
with an image extension, its label the integer in its .cls. A shard must be complete: it ends with the blocks of zeros
that end every tar, and nothing follows them.
"""
import logging
import os
import re
import tarfile
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ...runtime.messages import announce
from .decode import decode, explain_read_errors
from .images import EXTENSIONS
from .index import Listing, load_or_build
from .lists import MAX_CLASSES
from .names import find_passed_over

MAX_OPEN = 64  # shards
COMPRESSED = ('.tar.gz', '.tgz', '.tar.bz2', '.tar.xz', '.tar.zst', '.tar.lz4')
_NAME = re.compile(r'((?:.*/)?[^./]+)\.([^/]*)', re.DOTALL)  # up to the first dot, and the rest

_logger = logging.getLogger('simsiam_models')


class _OpenFile:
    """A file that closes with the last reference to it."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


class TarImages:
    """The images in `shards`, in the order of the shards and of the files in them.

    Raises FileNotFoundError if a shard does not exist or none holds an image, ValueError if one is not a complete tar.
    """

    def __init__(self, shards: list[Path], name: str) -> None:
        for shard in shards:
            if shard.name.lower().endswith(COMPRESSED):
                raise ValueError(
                    f'{shard}: a compressed tar cannot be read at random; decompress it to a .tar first (for example '
                    'with gunzip)')
            if not shard.is_file():
                raise FileNotFoundError(f'{shard}: no such shard, of {len(shards)} in {name}')
        self._shards = [os.path.join(os.path.realpath(shard.parent), shard.name) for shard in shards]
        root = os.path.commonpath([os.path.dirname(shard) for shard in self._shards])
        names = [os.path.relpath(shard, root) for shard in self._shards]
        self.name, self._index = name, load_or_build({'root': root, 'shards': names}, lambda: _scan(root, names))
        if not len(self._index):
            found = ''.join(f'; {note}' for note in self._index.notes)
            raise FileNotFoundError(
                f'{name}: no image in {len(shards)} tar shards; looked for {" ".join(EXTENSIONS)}{found}')
        for note in self._index.notes:
            announce(f'{name}: {note}')
        self.classes, self.labels, self.digest = self._index.classes, self._index.labels, self._index.digest
        self.notes = self._index.notes
        self._open: OrderedDict[int, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._index)

    def stored_sizes(self, rows: np.ndarray) -> np.ndarray:
        """See `images.stored_sizes`."""
        return self._index.columns['sizes'][rows]

    def read(self, index: int) -> np.ndarray:
        """Returns (H, W, 3) uint8; raises UnreadableError, which names shard and file, if that fails."""
        return decode(self.stored_bytes(index), self.name_of(index))

    def name_of(self, index: int) -> str:
        return f'{self._shards[self._index.columns["shards"][index]]}: {os.fsdecode(self._index.path(index))}'

    def stored_bytes(self, index: int, start: int = 0, length: int | None = None) -> bytearray:
        """See `images.stored_bytes`."""
        shard, first, size = (int(self._index.columns[name][index]) for name in ('shards', 'starts', 'sizes'))
        with explain_read_errors(self.name_of(index), OSError):
            file = self._open_shard(shard)  # this reference keeps it open while it is read
            return _read(file.descriptor, first + start, size - start if length is None else min(length, size - start))

    def _open_shard(self, shard: int) -> _OpenFile:
        with self._lock:
            file = self._open.pop(shard, None) or _OpenFile(os.open(self._shards[shard], os.O_RDONLY))
            self._open[shard] = file
            if len(self._open) > MAX_OPEN:
                self._open.popitem(last=False)
            return file


def _read(descriptor: int, start: int, size: int) -> bytearray:
    data = bytearray()
    while len(data) < size:
        if not (piece := os.pread(descriptor, size - len(data), start + len(data))):
            raise OSError(0, 'the shard ends before it')
        data += piece
    return data


def _scan(root: str, names: list[str]) -> Listing:
    listing, labels = Listing(), array('i')
    listing.columns = {'shards': array('i'), 'starts': array('q'), 'sizes': array('q')}
    listing.about = '\n'.join(names)
    _logger.info(f'listing {len(names)} tar shards in {root}')
    for number, name in enumerate(names):
        path = os.path.join(root, name)
        listing.watch_file(name, path)
        rows: dict[str, int] = {}  # sample -> row of its image
        found: dict[str, int] = {}  # sample -> label
        for member, sample, label in _read_members(path, listing):
            if label is not None:
                found[sample] = label
                continue
            if sample in rows:
                raise ValueError(
                    f'{path}: the sample {sample} has more than one image ({listing.path(rows[sample])} and '
                    f'{member.name}); names must differ before their first dot')
            rows[sample] = len(listing)
            listing.add(member.name)
            for column, value in zip(listing.columns.values(), (number, member.offset_data, member.size), strict=True):
                column.append(value)
        labels.extend(found.get(sample, -1) for sample in rows)  # in the order of the rows
    missing = labels.count(-1)
    if labels and not missing:
        listing.labels, listing.classes = labels, [str(i) for i in range(max(labels) + 1)]
    elif missing < len(labels):
        _logger.warning(f'{root}: {missing} of {len(labels)} images have no .cls, so all labels are ignored')
    return listing


def _read_members(path: str, listing: Listing) -> Iterator[tuple[tarfile.TarInfo, str, int | None]]:
    """Yields the images and .cls files of a tar: the member, its sample, and the label if it is a .cls.

    Counts other files in the listing.
    """
    try:
        with open(path, 'rb') as f, tarfile.open(fileobj=f, mode='r:') as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # otherwise tarfile keeps all of them
                matched = _NAME.fullmatch(member.name)
                extension = matched[2].lower() if matched else ''
                if member.isdir():
                    continue
                if passed_over := find_passed_over(member.name):
                    listing.pass_over(passed_over, member.name)
                    continue
                if extension != 'cls' and not f'.{extension}'.endswith(EXTENSIONS):
                    listing.leave_out(member.name)
                    continue
                if not member.isreg() or member.issparse():
                    raise ValueError(
                        f'{path}: {member.name} is a link or a sparse file; write the tar with --dereference '
                        '--hard-dereference')
                yield member, matched[1], _read_label(path, f, member) if extension == 'cls' else None
            _check_end(path, f, tar.offset)
    except tarfile.TarError as e:
        raise ValueError(f'{path}: cut off, damaged or not a tar ({e}); download or create it again') from None
    except OSError as e:
        raise OSError(f'{path}: cannot be read ({e.strerror or e})') from None


def _read_label(path: str, f: BinaryIO, member: tarfile.TarInfo) -> int:
    text = _read(f.fileno(), member.offset_data, min(member.size, 32)).strip()
    if not text.isdigit() or int(text) >= MAX_CLASSES:
        raise ValueError(
            f'{path}: {member.name} holds {bytes(text)!r}, which is not a class number; use integers from 0 to '
            f'{MAX_CLASSES - 1}')
    return int(text)


def _check_end(path: str, f: BinaryIO, end: int) -> None:
    """Raises ValueError unless the tar ends at `end`.

    tarfile stops silently at a header that is cut off or damaged, and at the first of several ends.
    """
    f.seek(end)
    if f.read(512) != bytes(512):
        raise ValueError(f'{path}: cut off or damaged after {end} bytes; download or create it again')
    while piece := f.read(1 << 20):
        if piece.count(0) != len(piece):
            raise ValueError(
                f'{path}: continues after its end at {end} bytes; join tars with tar --concatenate, not cat')
