"""The listing of an image folder: scanned once, kept in a file, and mapped from there afterwards.

Paths lie end to end in one buffer, never as a list of Python objects: 14 million take a few hundred MB to list, and
next to nothing in a process that maps them. A file holds

    MAGIC, length of the header (int64), SHA-256 of the header; the header, JSON; the arrays, each 8-byte aligned

and is believed while no folder below the root has changed. The arrays themselves carry no checksum: to verify one would
be to read them all.
"""
import hashlib
import json
import os
import stat
import struct
import tempfile
import time
from array import array
from pathlib import Path

import numpy as np

from .cache import cache_folder

MAGIC = b'simsidx1'  # the last character is the version of the format
PREFIX = struct.Struct('<8sq32s')
DTYPES = {'offsets': '<i8', 'paths': 'u1', 'labels': '<i4'}
RACY_NS = 2 * 10**9  # the coarsest clock of a file system in use (FAT)


class Index:
    """Files in sorted order, read only. Where one lies directly in the root, `labels` is None and `classes` empty."""

    def __init__(self, offsets: np.ndarray, paths: np.ndarray, labels: np.ndarray | None, classes: list[str]) -> None:
        self._offsets, self._paths = offsets, paths  # (N + 1,) int64; all paths end to end, uint8
        self.labels, self.classes = labels, classes  # (N,) int32; sorted

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def path(self, i: int) -> bytes:
        """Relative to the root, as os.fsencode gives it."""
        i = range(len(self))[i]  # counts from the end below 0, IndexError outside
        return self._paths[self._offsets[i]:self._offsets[i + 1]].tobytes()


def open_index(root: str | Path, extensions: tuple[str, ...]) -> Index:
    """The files below `root` that end in one of `extensions` (lower case): those os.walk finds, links followed.

    Taken from the cache where that is current. Of length 0, and not cached, where there is no such file.
    """
    key = {'root': os.path.realpath(root), 'extensions': list(extensions)}
    cache = cache_folder()
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    file = None if cache is None else cache / 'index' / f'{name}.idx'
    index = None if file is None else _load(file, key)
    if index is not None:
        return index
    listing = _scan(key['root'], extensions)
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


class _Listing:
    """What a scan has found so far."""

    def __init__(self) -> None:
        self.paths, self.offsets = bytearray(), array('q', [0])
        self.runs: list[tuple[str, int]] = []  # folders of the root and their numbers of files, in the order of paths
        self.stamps: dict[str, list[int] | None] = {}  # see _stamp; of every folder, and of links that lead to none
        self.lasting = True  # whether the stamps tell every later change

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def add(self, path: str) -> None:
        self.paths += os.fsencode(path)
        self.offsets.append(len(self.paths))

    def index(self) -> Index:
        runs = [(folder, n) for folder, n in self.runs if n]
        classes, labels = sorted(folder for folder, _ in runs), None
        if not runs or sum(n for _, n in runs) < len(self):
            classes = []
        else:
            number = {name: i for i, name in enumerate(classes)}  # runs are in another order: 'a b/' is before 'a/'
            labels = np.repeat(np.array([number[folder] for folder, _ in runs], np.int32), [n for _, n in runs])
        return Index(np.frombuffer(self.offsets, np.int64), np.frombuffer(self.paths, np.uint8), labels, classes)


def _scan(root: str, extensions: tuple[str, ...]) -> _Listing:
    listing = _Listing()
    settled = time.time_ns() - RACY_NS

    def walk(folder: str, above: tuple[tuple[int, int], ...]) -> None:
        """folder: '' or a relative path with a final separator; above: which folders it lies in."""
        path, names = os.path.join(root, folder), []
        try:
            status = os.stat(path)
            listing.stamps[folder] = _stamp(status)
            # A folder changed a moment ago may change again within one tick of the file system's clock, and keep its
            # time. Time 0 is what file systems tell that keep none.
            listing.lasting &= 0 < status.st_mtime_ns < settled
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
                        listing.stamps[folder + entry.name] = None
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


def _save(file: Path, key: dict, listing: _Listing) -> None:
    """Under a name of its own, then renamed: other processes see a whole file or none."""
    index = listing.index()
    arrays = {'offsets': index._offsets, 'paths': index._paths}
    if index.labels is not None:
        arrays['labels'] = index.labels
    places, size = {}, 0
    for name, values in arrays.items():
        places[name] = [size, len(values)]
        size = _aligned(size + values.nbytes)
    header = json.dumps({
        **key, 'images': len(index), 'classes': index.classes, 'folders': listing.stamps, 'arrays': places,
        'size': size}).encode()
    file.parent.mkdir(mode=0o700, exist_ok=True)
    handle, part = tempfile.mkstemp('.part', file.stem, file.parent)
    try:
        with open(handle, 'wb') as f:
            f.write(PREFIX.pack(MAGIC, len(header), hashlib.sha256(header).digest()))
            for block in (header, *(values.astype(DTYPES[name], copy=False) for name, values in arrays.items())):
                f.write(block)
                f.write(bytes(_aligned(f.tell()) - f.tell()))
            f.flush()
            os.fsync(f.fileno())  # or a power cut could leave the new name with zeros behind it
        os.replace(part, file)
    finally:
        Path(part).unlink(missing_ok=True)


def _load(file: Path, key: dict) -> Index | None:
    """None where the file is missing, damaged or another folder's, or where the folder has changed since."""
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
            if any(_stamp(os.path.join(key['root'], at)) != stamp for at, stamp in header['folders'].items()):
                return None
            mapped = np.asarray(np.memmap(f, np.uint8, 'r'))[start:]
        arrays = {}
        for name, (first, count) in header['arrays'].items():
            dtype = np.dtype(DTYPES[name])
            arrays[name] = mapped[first:first + count * dtype.itemsize].view(dtype)
        index = Index(arrays['offsets'], arrays['paths'], arrays.get('labels'), header['classes'])
        labels = 0 if index.labels is None else len(index.labels)
        fits = (len(index) == header['images'] and labels == (len(index) if index.classes else 0)
                and index._offsets[0] == 0 and index._offsets[-1] == len(index._paths))
        return index if fits else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, struct.error):  # not a file of ours
        return None


def _aligned(n: int) -> int:
    return (n + 7) // 8 * 8
