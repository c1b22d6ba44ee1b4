"""Tar shards, as WebDataset writes them: indexed once, then read at random, without being unpacked.

A sample is the files of a shard whose names agree up to the first dot of the last part; its image is the one with an
image's extension, its label the whole number in its .cls. A shard counts only if it is whole: up to the blocks of zeros
that end every tar, and with nothing behind them.
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

import numpy as np

from .decode import UnreadableError, decode
from .images import EXTENSIONS
from .index import Listing, cached, file_stamp
from .lists import MOST

OPEN = 64  # shards that are kept open
COMPRESSED = ('.tar.gz', '.tgz', '.tar.bz2', '.tar.xz', '.tar.zst', '.tar.lz4')
_NAME = re.compile(r'((?:.*/)?[^./]+)\.([^/]*)', re.DOTALL)  # up to the first dot, and what follows

_logger = logging.getLogger('simsiam_models')


class TarImages:
    """The images in `shards`, in the order of the shards and of the files in them.

    Raises:
        FileNotFoundError: no such shard, or no image in them.
        ValueError: a shard that is compressed, cut off or no tar.
    """

    def __init__(self, shards: list[Path], name: str) -> None:
        for shard in shards:
            if shard.name.lower().endswith(COMPRESSED):
                raise ValueError(
                    f'{shard}: a compressed tar cannot be read at random; unpack it to a plain one first (gunzip, or '
                    'the like, leaves a .tar)')
            if not shard.is_file():
                raise FileNotFoundError(f'{shard}: no such shard, of {len(shards)} in {name}')
        root = os.path.commonpath([os.path.realpath(shard.parent) for shard in shards])
        names = [os.path.relpath(os.path.join(os.path.realpath(s.parent), s.name), root) for s in shards]
        self.name, self._index = name, cached({'root': root, 'shards': names}, lambda: _scan(root, names))
        if not len(self._index):
            raise FileNotFoundError(
                f'{name}: no image in {len(shards)} tar shards; looked for {" ".join(EXTENSIONS)}')
        self.classes, self.labels, self.digest = self._index.classes, self._index.labels, self._index.digest
        self._shards = [os.path.join(root, name) for name in names]
        self._open: OrderedDict[int, _Handle] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._index)

    def read(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8. Raises UnreadableError, naming shard and file, where it cannot be decoded."""
        where = self._index.columns
        shard, start, size = (int(where[column][index]) for column in ('shards', 'starts', 'sizes'))
        name = f'{self._shards[shard]}: {os.fsdecode(self._index.path(index))}'
        try:
            handle = self._handle(shard)  # held while it is read: it closes with the last who holds it
            data = _read(handle.number, start, size)
        except OSError as e:
            raise UnreadableError(f'{name}: cannot be read ({e.strerror})') from None
        return decode(data, name)

    def _handle(self, shard: int) -> '_Handle':
        with self._lock:
            handle = self._open.pop(shard, None) or _Handle(self._shards[shard])
            self._open[shard] = handle
            if len(self._open) > OPEN:
                self._open.popitem(last=False)
            return handle


class _Handle:
    """An open file, which is closed once nobody reads from it."""

    def __init__(self, path: str) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY | getattr(os, 'O_CLOEXEC', 0))

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


def _read(number: int, start: int, size: int) -> bytearray:
    data = bytearray()
    while len(data) < size:
        piece = os.pread(number, size - len(data), start + len(data))
        if not piece:
            raise OSError(0, 'the shard ends before it')
        data += piece
    return data


def _scan(root: str, names: list[str]) -> Listing:
    listing, labels = Listing(), []
    listing.columns = {'shards': array('i'), 'starts': array('q'), 'sizes': array('q')}
    listing.about = '\n'.join(names)
    _logger.info(f'listing {len(names)} tar shards in {root}')
    for number, name in enumerate(names):
        path = os.path.join(root, name)
        listing.files[name] = stamp = file_stamp(path)
        listing.watch(stamp[1] if stamp else 0)
        rows: dict[str, int] = {}  # sample -> row of its image
        found: dict[str, int] = {}  # sample -> label
        first = len(listing)
        for member, extension, sample, label in _members(path):
            if extension == 'cls':
                found[sample] = label
                continue
            if sample in rows:
                raise ValueError(
                    f'{path}: the sample {sample} has more than one image ({_known(listing, rows[sample])} and '
                    f'{member.name}); names are to differ before their first dot')
            rows[sample] = len(listing)
            listing.add(member.name)
            for column, value in zip(listing.columns.values(), (number, member.offset_data, member.size), strict=True):
                column.append(value)
        row_labels = array('i', [-1]) * (len(listing) - first)
        for sample, row in rows.items():
            row_labels[row - first] = found.get(sample, -1)
        labels.append(row_labels)
    every = array('i')
    for part in labels:
        every.extend(part)
    missing = every.count(-1)
    if every and not missing:
        listing.labels, listing.classes = every, [str(i) for i in range(max(every) + 1)]
    elif missing < len(every):
        _logger.warning(f'{root}: {missing} of {len(every)} images have no .cls, so none has a label')
    return listing


def _known(listing: Listing, row: int) -> str:
    return os.fsdecode(bytes(listing.paths[listing.offsets[row]:listing.offsets[row + 1]]))


def _members(path: str) -> Iterator[tuple[tarfile.TarInfo, str, str, int]]:
    """Images and .cls files of one tar: what and where it is, its extension, its sample, and the label in it or -1."""
    try:
        with open(path, 'rb') as f, tarfile.open(fileobj=f, mode='r:') as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # tarfile keeps all of them otherwise
                matched = _NAME.fullmatch(member.name)
                extension = matched[2].lower() if matched else ''
                if member.isdir() or extension != 'cls' and not f'.{extension}'.endswith(EXTENSIONS):
                    continue
                if not member.isreg() or member.issparse():
                    raise ValueError(
                        f'{path}: {member.name} is a link or a sparse file; write the tar with --dereference '
                        '--hard-dereference')
                yield member, extension, matched[1], _label(path, f, member) if extension == 'cls' else -1
            _check_end(path, f, tar.offset)
    except tarfile.TarError as e:
        raise ValueError(f'{path}: cut off, damaged or no tar ({e}); download or make it anew') from None
    except OSError as e:
        raise OSError(f'{path}: cannot be read ({e.strerror or e})') from None


def _label(path: str, f, member: tarfile.TarInfo) -> int:
    text = _read(f.fileno(), member.offset_data, min(member.size, 32)).strip()
    if not text.isdigit() or int(text) >= MOST:
        raise ValueError(
            f'{path}: {member.name} holds {bytes(text)!r}, which is no class number; these are whole numbers from 0 to '
            f'{MOST - 1}')
    return int(text)


def _check_end(path: str, f, end: int) -> None:
    """tarfile ends in silence where a header is cut off or damaged, and at a first end of several."""
    f.seek(end)
    if f.read(512) != bytes(512):
        raise ValueError(f'{path}: cut off or damaged after {end} bytes; download or make it anew')
    while piece := f.read(1 << 20):
        if piece.count(0) != len(piece):
            raise ValueError(f'{path}: goes on after its end at {end} bytes; join tars by tar --concatenate, not cat')
