"""The listing of an image folder, a list or tar shards: made once, kept in a file, and mapped from there afterwards.

Paths lie end to end in one buffer, never as a list of Python objects: 14 million take a few hundred MB to list, and
next to nothing in a process that maps them. A file holds

    MAGIC, length of the header (int64), SHA-256 of the header; the header, JSON; the arrays, each 8-byte aligned

and is believed while no folder below the root, and no file that was read for it, has changed. The CRC-32 of the arrays
is in the header and verified each time: that is to read them all, 0.02 s for ImageNet.
"""
import hashlib
import json
import os
import stat
import struct
import tempfile
import time
import zlib
from array import array
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ...runtime.files import cache_folder

MAGIC = b'simsidx3'  # the last character is the version of the format
PREFIX = struct.Struct('<8sq32s')
DTYPES = {'offsets': '<i8', 'paths': 'u1', 'labels': '<i4', 'shards': '<i4', 'starts': '<i8', 'sizes': '<i8'}
COLUMNS = ('shards', 'starts', 'sizes')  # where an image lies in tar shards
ABANDONED = 3600  # seconds after which nobody writes to a file under its temporary name any more
RACY_NS = 2 * 10**9  # the coarsest clock of a file system in use (FAT)


class Index:
    """Named images in a fixed order, read only. Without labels, `labels` is None and `classes` empty."""

    def __init__(
        self, offsets: np.ndarray, paths: np.ndarray, labels: np.ndarray | None, classes: list[str], digest: str,
        columns: dict[str, np.ndarray],
    ) -> None:
        self._offsets, self._paths = offsets, paths  # (N + 1,) int64; all paths end to end, uint8
        self.labels, self.classes = labels, classes  # (N,) int32; sorted
        self.digest, self.columns = digest, columns  # of names and labels, see `digest`; (N,) each

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def path(self, i: int) -> bytes:
        """Relative to the root, as os.fsencode gives it."""
        i = range(len(self))[i]  # counts from the end below 0, IndexError outside
        return self._paths[self._offsets[i]:self._offsets[i + 1]].tobytes()


def digest(*parts: bytes | str | np.ndarray) -> str:
    """16 hexadecimal characters that tell one sequence of parts from another."""
    state = hashlib.blake2b(digest_size=8)
    for part in parts:
        part = part.encode(errors='surrogateescape') if isinstance(part, str) else part
        data = memoryview(np.ascontiguousarray(part)).cast('B') if isinstance(part, np.ndarray) and part.size else part
        size = part.nbytes if isinstance(part, np.ndarray) else len(part)
        state.update(size.to_bytes(8, 'little'))
        if size:
            state.update(data)
    return state.hexdigest()


def open_index(root: str | Path, extensions: tuple[str, ...]) -> Index:
    """The files below `root` that end in one of `extensions` (lower case): those os.walk finds, links followed.

    Taken from the cache where that is current. Of length 0, and not cached, where there is no such file.
    """
    key = {'root': os.path.realpath(root), 'extensions': list(extensions)}
    return cached(key, lambda: _scan(key['root'], extensions))


def cached(key: dict, build: Callable[[], 'Listing']) -> Index:
    """What `build` lists, or the cache holds under `key`; its 'root' is where the folders and files stamped lie."""
    cache = cache_folder()
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    file = None if cache is None else cache / 'index' / f'{name}.idx'
    index = None if file is None else _load(file, key)
    if index is not None:
        return index
    listing = build()
    if file is not None and (index := _load(file, key)) is not None:  # another process was sooner
        return index
    if file is not None and listing.lasting and len(listing):
        try:
            _save(file, key, listing)
        except OSError:  # no room or no right to write there: only the next start is slower
            pass
        else:
            index = _load(file, key)  # this process is to map it as well, and forget the listing
    return listing.index() if index is None else index


class Listing:
    """What has been found so far."""

    def __init__(self) -> None:
        self.paths, self.offsets = bytearray(), array('q', [0])
        self.labels, self.classes = array('i'), []  # labels: as many as there are paths, or none
        self.columns: dict[str, array] = {}
        self.about = ''  # what else the digest is to cover
        self.folders: dict[str, list[int] | None] = {}  # see _stamp; of every folder, and of links that lead to none
        self.files: dict[str, list[int] | None] = {}  # see file_stamp; of every file that was read
        self.lasting = True  # whether the stamps tell every later change
        self._settled = time.time_ns() - RACY_NS

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def add(self, path: str) -> None:
        self.paths += os.fsencode(path)
        self.offsets.append(len(self.paths))

    def watch(self, mtime_ns: int) -> None:
        """What changed a moment ago may change again within one tick of the file system's clock, and keep its time.

        Time 0 is what file systems tell that keep none.
        """
        self.lasting &= 0 < mtime_ns < self._settled

    def numbered(self) -> tuple[np.ndarray | None, list[str]]:
        """Labels and classes."""
        return (np.frombuffer(self.labels, np.int32), self.classes) if len(self.labels) else (None, [])

    def index(self) -> Index:
        offsets, paths = np.frombuffer(self.offsets, np.int64), np.frombuffer(self.paths, np.uint8)
        labels, classes = self.numbered()
        columns = {name: np.frombuffer(values, DTYPES[name]) for name, values in self.columns.items()}
        about = json.dumps([self.about, classes, labels is not None])
        marked = digest(about, offsets, paths, np.zeros(0, np.int32) if labels is None else labels)
        return Index(offsets, paths, labels, classes, marked, columns)


class _FolderListing(Listing):
    """Labels are those of the folders that lie in the root."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: list[tuple[str, int]] = []  # folders of the root and their numbers of files, in the order of paths

    def numbered(self) -> tuple[np.ndarray | None, list[str]]:
        runs = [(folder, n) for folder, n in self.runs if n]
        if not runs or sum(n for _, n in runs) < len(self):
            return None, []
        classes = sorted(folder for folder, _ in runs)
        number = {name: i for i, name in enumerate(classes)}  # runs are in another order: 'a b/' is before 'a/'
        return np.repeat(np.array([number[folder] for folder, _ in runs], np.int32), [n for _, n in runs]), classes


def _scan(root: str, extensions: tuple[str, ...]) -> _FolderListing:
    listing = _FolderListing()

    def walk(folder: str, above: tuple[tuple[int, int], ...]) -> None:
        """folder: '' or a relative path with a final separator; above: which folders it lies in."""
        path, names = os.path.join(root, folder), []
        try:
            status = os.stat(path)
            listing.folders[folder] = _stamp(status)
            listing.watch(status.st_mtime_ns)
            identity = status.st_dev, status.st_ino
            if identity in above:  # a link to a folder that it lies in
                return
            with os.scandir(path) as entries:
                for entry in entries:
                    try:
                        is_folder = entry.is_dir()
                    except OSError:
                        is_folder = listing.lasting = False
                    if is_folder:
                        names.append(entry.name + os.sep)
                    elif entry.name.lower().endswith(extensions):
                        names.append(entry.name)
                    elif entry.is_symlink():  # may lead to a folder later (a disk not mounted yet)
                        listing.folders[folder + entry.name] = None
        except OSError:  # os.walk passes over it too; it may be readable the next time
            listing.lasting = False
            return
        names.sort()  # with the separators, this makes the order of whole paths: 'a b/1' < 'a.png' < 'a/1'
        for name in names:
            if not name.endswith(os.sep):
                listing.add(folder + name)
                continue
            before = len(listing)
            walk(folder + name, (*above, identity))
            if not folder:
                listing.runs.append((name[:-1], len(listing) - before))

    walk('', ())
    return listing


def _stamp(at: str | os.stat_result) -> list[int] | None:
    """Which folder it is and when it last changed; None where there is no folder.

    st_mtime changes with the names in it. So does st_ctime, which tar, rsync and the like cannot set back.
    """
    try:
        status = os.stat(at) if isinstance(at, str) else at
    except OSError:
        return None
    return [status.st_ino, status.st_mtime_ns, status.st_ctime_ns] if stat.S_ISDIR(status.st_mode) else None


def file_stamp(at: str | Path) -> list[int] | None:
    """Which file it is, when it last changed, and its size; None where there is no file."""
    try:
        status = os.stat(at)
    except OSError:
        return None
    kept = [status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size]
    return kept if stat.S_ISREG(status.st_mode) else None


def _save(file: Path, key: dict, listing: Listing) -> None:
    """Under a name of its own, then renamed: other processes see a whole file or none."""
    index = listing.index()
    arrays = {'offsets': index._offsets, 'paths': index._paths, **index.columns}
    if index.labels is not None:
        arrays['labels'] = index.labels
    places, blocks, size, crc = {}, [], 0, 0
    for name, values in arrays.items():
        places[name] = [size, len(values)]
        blocks += [values.astype(DTYPES[name], copy=False), bytes(-values.nbytes % 8)]
        size = _aligned(size + values.nbytes)
    for block in blocks:
        crc = zlib.crc32(block, crc)
    header = json.dumps({
        **key, 'images': len(index), 'classes': index.classes, 'digest': index.digest, 'folders': listing.folders,
        'files': listing.files, 'arrays': places, 'size': size, 'crc32': crc}).encode()
    file.parent.mkdir(mode=0o700, exist_ok=True)
    for left in file.parent.glob(f'{file.stem}*.part'):  # by a process that was killed
        if time.time() - left.stat().st_mtime > ABANDONED:
            left.unlink(missing_ok=True)
    handle, part = tempfile.mkstemp('.part', file.stem, file.parent)
    try:
        with open(handle, 'wb') as f:
            f.write(PREFIX.pack(MAGIC, len(header), hashlib.sha256(header).digest()))
            for block in (header, bytes(-(PREFIX.size + len(header)) % 8), *blocks):
                f.write(block)
            f.flush()
            os.fsync(f.fileno())  # or a power cut could leave the new name with zeros behind it
        os.replace(part, file)
    finally:
        Path(part).unlink(missing_ok=True)


def _load(file: Path, key: dict) -> Index | None:
    """None where the file is missing, damaged or another folder's, or where what was listed has changed since."""
    try:
        with open(file, 'rb') as f:
            size = os.fstat(f.fileno()).st_size
            magic, length, digest = PREFIX.unpack(f.read(PREFIX.size))
            if magic != MAGIC or not 0 < length < size:
                return None
            header = f.read(length)
            if hashlib.sha256(header).digest() != digest:
                return None
            header = json.loads(header)
            start = _aligned(PREFIX.size + length)
            if start + header['size'] != size or any(header[name] != value for name, value in key.items()):
                return None
            for at_hand, kept in ((_stamp, header['folders']), (file_stamp, header['files'])):
                if any(at_hand(os.path.join(key['root'], at)) != stamp for at, stamp in kept.items()):
                    return None
            f.seek(start)
            crc = 0
            while data := f.read(1 << 20):  # not through the mapping, whose pages would count as this process's memory
                crc = zlib.crc32(data, crc)
            if crc != header['crc32']:
                return None
            mapped = np.asarray(np.memmap(f, np.uint8, 'r'))[start:]
        arrays = {}
        for name, (first, count) in header['arrays'].items():
            dtype = np.dtype(DTYPES[name])
            arrays[name] = mapped[first:first + count * dtype.itemsize].view(dtype)
        index = Index(
            arrays['offsets'], arrays['paths'], arrays.get('labels'), header['classes'], header['digest'],
            {name: arrays[name] for name in COLUMNS if name in arrays})
        labels = 0 if index.labels is None else len(index.labels)
        fits = (len(index) == header['images'] and labels == (len(index) if index.classes else 0)
                and all(len(values) == len(index) for values in index.columns.values())
                and index._offsets[0] == 0 and index._offsets[-1] == len(index._paths))
        return index if fits else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, struct.error):  # not a file of ours
        return None


def _aligned(n: int) -> int:
    return (n + 7) // 8 * 8
