"""The listing of an image folder, a list or tar shards: built once, then memory-mapped from a cache file.

Paths lie end to end in one buffer, never as a list of Python objects: listing 14 million takes a few hundred MB, and
mapping them almost none. A cache file holds

    MAGIC, length of the header (int64), SHA-256 of the header; the header, JSON; the arrays, each 8-byte aligned

and is valid as long as no folder below the root, and no file that was read for it, has changed. The header holds the
CRC-32 of the arrays, which is checked at every start; this reads all of them, 0.02 s for ImageNet.
"""
import dataclasses
import functools
import hashlib
import itertools
import json
import operator
import os
import stat
import struct
import time
import unicodedata
import zlib
from array import array
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime.files import cache_folder, replacing
from ...runtime.messages import counted, name_some, short
from .names import is_passed_over

MAGIC = b'simsidx4'  # the last character is the version of the format
PREFIX = struct.Struct('<8sq32s')
DTYPES = {  # shards, starts and sizes: the columns of an index of tar shards
    'offsets': '<i8', 'paths': 'u1', 'labels': '<i4', 'shards': '<i4', 'starts': '<i8', 'sizes': '<i8'}
RACY_NS = 2 * 10**9  # the coarsest clock among file systems in use (FAT)
MAX_KINDS = 100  # of names that are counted one by one


@dataclass(eq=False)
class Index:
    """Named images in a fixed order, read-only. Without labels, `labels` is None and `classes` empty."""

    _offsets: np.ndarray  # (N + 1,) int64
    _paths: np.ndarray  # all paths end to end, uint8
    labels: np.ndarray | None  # (N,) int32
    classes: list[str]  # sorted
    digest: str  # of names and labels
    columns: dict[str, np.ndarray]  # (N,) each
    notes: list[str]  # sentences on what was left out, and on what may not be what it seems

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def path(self, i: int) -> bytes:
        """Returns the path of an image relative to the root, as bytes (os.fsencode)."""
        i = range(len(self))[i]  # negative numbers count from the end; IndexError out of range
        return self._paths[self._offsets[i]:self._offsets[i + 1]].tobytes()

    def relabel(self, labels: np.ndarray, classes: list[str]) -> 'Index':
        """Returns the index of a folder with other labels, (N,) int32."""
        return dataclasses.replace(
            self, labels=labels, classes=classes, digest=_digest('', classes, self._offsets, self._paths, labels))


def digest(*parts: bytes | str | np.ndarray) -> str:
    """Hashes a sequence of parts to 16 hexadecimal characters."""
    state = hashlib.blake2b(digest_size=8)
    for part in parts:
        data: bytes | memoryview
        if isinstance(part, np.ndarray):
            data = np.ascontiguousarray(part).data.cast('B') if part.size else b''
        else:
            data = part.encode(errors='surrogateescape') if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, 'little'))
        state.update(data)
    return state.hexdigest()


def _digest(about: str, classes: list[str], offsets: np.ndarray, paths: np.ndarray, labels: np.ndarray) -> str:
    return digest(json.dumps([about, classes, bool(len(labels))]), offsets, paths, labels)


def describe_alike(classes: list[str]) -> str:
    """Returns the line on classes that are perhaps the same under two spellings; '' if there are none."""
    spellings: dict[str, list[str]] = {}
    for name in classes:
        spellings.setdefault(unicodedata.normalize('NFKC', name).casefold().strip(), []).append(name)
    alike = [name for names in spellings.values() if len(names) > 1 for name in names]
    return f'classes whose names differ in case, blanks or encoding only: {name_some(alike)}' if alike else ''


class Tally:
    """Counts what is left out, by its kind, and keeps the first name."""

    def __init__(self, what: str) -> None:
        self.what, self.first = what, ''
        self.counts: dict[str, int] = {}

    def add(self, kind: str, name: str, n: int = 1) -> None:
        kind = kind if kind in self.counts or len(self.counts) < MAX_KINDS else 'others'
        self.counts[kind] = self.counts.get(kind, 0) + n
        self.first = min(self.first, name) if self.first else name  # folders list their names in any order

    def describe(self) -> str:
        kinds = sorted(self.counts, key=lambda kind: (-self.counts[kind], kind))
        named = name_some([f'{self.counts[kind]:,} {kind}' for kind in kinds if kind])
        total = f'{sum(self.counts.values()):,}{named and f" ({named})"}'
        return f'{self.what}: {total}, the first {short(self.first, 200)}'


class Listing:
    """The images found so far, from which an index is made."""

    def __init__(self) -> None:
        self.paths, self.offsets = bytearray(), array('q', [0])
        self.labels = array('i')  # one for each path, or none at all
        self.classes: list[str] = []
        self.columns: dict[str, array[int]] = {}
        self.about = ''  # text that the digest also covers
        self.folders: dict[str, list[int] | None] = {}  # stamps of all folders, and of links that lead to none
        self.files: dict[str, list[int] | None] = {}  # stamps of all files that were read
        self.lasting = True  # whether the stamps will show every later change
        self.passed_over = Tally('hidden and system files, skipped')
        self.left_out = Tally('files without an image extension, skipped')
        self.loops = Tally('links to a folder above them, not followed')
        self.unreadable = Tally('unreadable folders, skipped')
        self.nested = Tally('images in subfolders of class folders, labelled by the topmost folder')
        self.remarks: list[str] = []  # other sentences for `Index.notes`
        self._settled = time.time_ns() - RACY_NS

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def add(self, path: str) -> None:
        self.paths += os.fsencode(path)
        self.offsets.append(len(self.paths))

    def add_all(self, folder: str, names: list[str]) -> None:
        """Adds the files of one folder, a path with a final separator, several times as fast as one by one."""
        paths = os.fsencode('\0'.join([folder + name for name in names])).split(b'\0') if names else []  # in no name
        self.offsets.extend(list(itertools.accumulate(map(len, paths), initial=len(self.paths)))[1:])
        self.paths += b''.join(paths)

    def leave_out(self, path: str, kind: str = '') -> None:
        """Counts a file that is no image by its extension, or as another kind."""
        self.left_out.add(kind or os.path.splitext(path)[1].lower() or 'without an extension', path)

    def path(self, i: int) -> str:
        return os.fsdecode(bytes(self.paths[self.offsets[i]:self.offsets[i + 1]]))

    def pass_over(self, name: str, path: str) -> None:
        """Counts a path because of a name in it for which `is_passed_over` is true."""
        self.passed_over.add('._*' if name.startswith('._') else name, path)

    def remark_repeated(self, hashes: 'array[int]') -> None:
        """Remarks on images that are listed more than once; `hashes` of their names, one for each."""
        _, first, which = np.unique(hashes, return_index=True, return_inverse=True)
        if len(first) == len(hashes):
            return
        repeated, text = np.setdiff1d(np.arange(len(hashes)), first), ''
        if self.labels:
            labels = np.array(self.labels)
            text = f', {np.count_nonzero(labels != labels[first[which]]):,} of them with another label'
        self.remarks.append(f'images that are listed again{text}: {len(repeated):,}, the first '
                            f'{short(self.path(int(repeated[0])), 200)}')

    def label_runs(self, runs: list[tuple[str, int]]) -> None:
        """Labels all images by runs of consecutive ones: names of classes and numbers of images."""
        self.classes = sorted(name for name, n in runs if n)
        number = {name: i for i, name in enumerate(self.classes)}
        for name, n in runs:
            self.labels.extend(array('i', [number.get(name, 0)]) * n)

    def watch_file(self, name: str, path: str | Path) -> None:
        """Makes the listing valid only until the file at `path` changes; `name` is its path relative to the root."""
        self.files[name] = stamp = stamp_file(path)
        self._watch(stamp[1] if stamp else 0)

    def _watch(self, mtime_ns: int) -> None:
        """Rejects 0 (a file system without times), and times so recent that the clock may not show another change."""
        self.lasting &= 0 < mtime_ns < self._settled

    def make_index(self) -> Index:
        offsets, paths = np.frombuffer(self.offsets, np.int64), np.frombuffer(self.paths, np.uint8)
        labels, classes = np.frombuffer(self.labels, np.int32), self.classes if self.labels else []
        columns = {name: np.frombuffer(values, DTYPES[name]) for name, values in self.columns.items()}
        text = _digest(self.about, classes, offsets, paths, labels)
        return Index(offsets, paths, labels if self.labels else None, classes, text, columns, self.notes())

    def notes(self) -> list[str]:
        """Returns the sentences on what the images are not, each for one line."""
        tallies = self.passed_over, self.left_out, self.loops, self.unreadable, self.nested
        notes = [tally.describe() for tally in tallies if tally.counts]
        return [*notes, *self.remarks, *filter(None, [describe_alike(self.classes)])]


def open_index(root: str | Path, extensions: tuple[str, ...]) -> Index:
    """Lists the files below `root` that end in one of `extensions` (lower case), as os.walk with links followed."""
    real = os.path.realpath(root)
    return load_or_build({'root': real, 'extensions': list(extensions)}, lambda: _scan(real, extensions))


def load_or_build(key: dict[str, Any], build: Callable[[], Listing]) -> Index:
    """Loads the listing that is cached under `key`, or builds and caches it.

    key['root'] is the folder that the paths of `Listing.folders` and `Listing.files` are relative to.
    """
    if (cache := cache_folder()) is None:
        return build().make_index()
    file = cache / 'index' / f'{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.idx'
    if (index := _load(file, key)) is not None:
        return index
    listing = build()
    index = _load(file, key)  # another process may have been faster
    if index is None and listing.lasting and len(listing):
        with suppress(OSError):  # no space or no permission: only the next start is slower
            _save(file, key, listing)
            index = _load(file, key)  # map it here, too, to free the memory of the listing
    return listing.make_index() if index is None else index


def _scan(root: str, extensions: tuple[str, ...]) -> Listing:
    """Lists `root`; its subfolders are the classes, unless an image is in `root` itself."""
    listing, runs = Listing(), []  # runs: subfolders of root and their numbers of images, in the order of the paths
    loose = ''  # the first image in root itself

    def walk(folder: str, above: tuple[tuple[int, int], ...]) -> None:
        """Lists `folder`, '' or a relative path with a final separator; `above` identifies its parent folders."""
        nonlocal loose
        path, before = os.path.join(root, folder), len(listing)
        try:
            status = os.stat(path)
            listing.folders[folder] = stamp_file(status, is_folder=True)
            listing._watch(status.st_mtime_ns)
            identity = status.st_dev, status.st_ino
            if identity in above:  # a link to a folder above it
                return listing.loops.add('', folder)
            names = _list_folder(listing, path, folder, extensions)
        except OSError as e:  # os.walk skips it too; it may be readable next time
            listing.lasting = False
            return listing.unreadable.add(e.strerror or type(e).__name__, folder or os.curdir)
        names.sort()  # with the separators, this is the order of whole paths: 'a b/1' < 'a.png' < 'a/1'
        loose = loose if folder else next((name for name in names if not name.endswith(os.sep)), '')
        for is_folder, group in itertools.groupby(names, operator.methodcaller('endswith', os.sep)):
            if not is_folder:
                listing.add_all(folder, list(group))
                continue
            for name in group:
                first = len(listing)
                walk(folder + name, (*above, identity))
                if not folder:
                    runs.append((name[:-1], len(listing) - first))
        if len(above) == 2 and len(listing) > before:
            listing.nested.add('', folder, len(listing) - before)

    walk('', ())
    if not loose:
        listing.label_runs(runs)
        if empty := sorted(name for name, n in runs if not n):
            listing.remarks.append(f'folders without images, not used as classes: {name_some(empty)}')
        return listing
    listing.nested.counts.clear()
    if classes := [name for name, n in runs if n]:
        n = len(listing) - sum(n for _, n in runs)
        listing.remarks.append(
            f'no labels, as {counted(n, "image")} {"lies" if n == 1 else "lie"} beside '
            f'{counted(len(classes), "folder")} of images: {short(loose)} beside {name_some(classes)}')
    return listing


def _list_folder(listing: Listing, path: str, folder: str, extensions: tuple[str, ...]) -> list[str]:
    """Returns the names of images and, with a final separator, of subfolders; notes all others in the listing."""
    names = []
    with os.scandir(path) as entries:
        for entry in entries:
            name = entry.name
            is_image = name.lower().endswith(extensions)
            if (not is_image or name[0] == '.') and is_passed_over(name):  # no other image has such a name
                listing.pass_over(name, folder + name)
                continue
            try:
                is_folder = entry.is_dir()
            except OSError:
                is_folder = listing.lasting = False
            if is_folder:
                names.append(name + os.sep)
            elif is_image:
                names.append(name)
            elif entry.is_symlink():  # may lead to a folder later (a disk that is not mounted yet)
                listing.folders[folder + name] = None
                listing.leave_out(folder + name, '' if os.path.exists(entry.path) else 'broken links')
            else:
                listing.leave_out(folder + name)
    return names


def stamp_file(at: str | Path | os.stat_result, is_folder: bool = False) -> list[int] | None:
    """Identifies a file, its last change and its size, or a folder and its last change; None if there is none.

    st_mtime of a folder changes with the names in it. So does st_ctime, which tar, rsync and the like cannot set back.
    """
    try:
        status = at if isinstance(at, os.stat_result) else os.stat(at)
    except OSError:
        return None
    stamp = [status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
    if is_folder:
        return stamp if stat.S_ISDIR(status.st_mode) else None
    return [*stamp, status.st_size] if stat.S_ISREG(status.st_mode) else None


def _save(file: Path, key: dict[str, Any], listing: Listing) -> None:
    index = listing.make_index()
    arrays = {'offsets': index._offsets, 'paths': index._paths, **index.columns}
    if index.labels is not None:
        arrays['labels'] = index.labels
    places: dict[str, list[int]] = {}
    blocks: list[bytes | memoryview] = []
    size = 0
    for name, values in arrays.items():
        places[name] = [size, len(values)]
        blocks += [np.ascontiguousarray(values, DTYPES[name]).data, bytes(-values.nbytes % 8)]
        size = _align(size + values.nbytes)
    crc = functools.reduce(lambda crc, block: zlib.crc32(block, crc), blocks, 0)
    header = json.dumps({
        **key, 'images': len(index), 'classes': index.classes, 'digest': index.digest, 'notes': index.notes,
        'folders': listing.folders, 'files': listing.files, 'arrays': places, 'size': size, 'crc32': crc}).encode()

    start = PREFIX.pack(MAGIC, len(header), hashlib.sha256(header).digest()) + header
    file.parent.mkdir(mode=0o700, exist_ok=True)
    # Not synced, which took longer than listing 1,000 files: a torn file fails its checksums, and is made again.
    with replacing(file, shared=True, durable=False) as part:
        part.touch(mode=0o600)  # names of files may be private
        part.write_bytes(b''.join([start, bytes(-len(start) % 8), *blocks]))


def _load(file: Path, key: dict[str, Any]) -> Index | None:
    """Returns None if the file is missing, damaged or of another key, or if what it lists has changed since."""
    try:
        with open(file, 'rb') as f:
            size = os.fstat(f.fileno()).st_size
            magic, length, digest = PREFIX.unpack(f.read(PREFIX.size))
            if magic != MAGIC or not 0 < length < size or hashlib.sha256(text := f.read(length)).digest() != digest:
                return None
            header, start = json.loads(text), _align(PREFIX.size + length)
            if start + header['size'] != size or any(header[name] != value for name, value in key.items()):
                return None
            for stamps, is_folder in ((header['folders'], True), (header['files'], False)):
                if any(stamp_file(os.path.join(key['root'], at), is_folder) != stamp for at, stamp in stamps.items()):
                    return None
            f.seek(start)
            crc = 0
            while data := f.read(1 << 20):  # not through the mapping: its pages would count as this process's memory
                crc = zlib.crc32(data, crc)
            if crc != header['crc32']:
                return None
            mapped = np.asarray(np.memmap(f, np.uint8, 'r'))[start:]
        arrays = {
            name: mapped[first:first + count * np.dtype(DTYPES[name]).itemsize].view(DTYPES[name])
            for name, (first, count) in header['arrays'].items()}
        index = Index(arrays.pop('offsets'), arrays.pop('paths'), arrays.pop('labels', None), header['classes'],
                      header['digest'], columns=arrays, notes=header['notes'])
        labels = 0 if index.labels is None else len(index.labels)
        fits = (len(index) == header['images'] and labels == (len(index) if index.classes else 0)
                and all(len(values) == len(index) for values in index.columns.values())
                and index._offsets[0] == 0 and index._offsets[-1] == len(index._paths))
        return index if fits else None
    # All but OSError mean that the contents are not a listing. Whatever the error, it costs only a new listing.
    except (OSError, ValueError, LookupError, TypeError, AttributeError, struct.error):
        return None


def _align(n: int) -> int:
    return (n + 7) // 8 * 8
