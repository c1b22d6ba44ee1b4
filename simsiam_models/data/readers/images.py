"""Where images come from. Here: a folder of files, or arrays in memory; opening.py knows the rest.

Labels are optional and never used in training.
"""
import functools
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from .decode import UnreadableError, decode
from .index import Index, digest, open_index

MOST_BYTES = 1 << 30  # of an image file
EXTENSIONS = ('.jpg', '.jpeg', '.png', '.bmp', '.gif', '.tif', '.tiff', '.webp', '.ppm', '.pgm')


class Images(Protocol):
    """What the loader asks of a source: `len`, labels or None, and one RGB image by its index, from any thread."""

    name: str
    labels: np.ndarray | None  # (N,) whole numbers from 0
    classes: list[str]
    digest: str  # 16 hexadecimal characters: which images these are, wherever they lie

    def __len__(self) -> int: ...

    def read(self, index: int) -> np.ndarray: ...  # (H, W, 3) uint8, or UnreadableError


def pixels_digest(images: Images) -> str:
    """16 hexadecimal characters of 16 images, evenly spaced: `digest` does not tell a resized copy from the original.

    What cannot be read does not count.
    """
    parts = []
    for i in sorted({(len(images) - 1) * j // 15 for j in range(16)}) if len(images) else ():
        try:
            image = images.read(i)
        except UnreadableError:
            continue
        parts += [str(image.shape), image]
    return digest(*parts)


def contents_digest(images: Images) -> str:
    """16 hexadecimal characters of names, pixels of 16 images and sizes of all: images that were exchanged, too."""
    sizes = stored_sizes(images, np.arange(len(images)))
    return digest(images.digest, pixels_digest(images), '' if sizes is None else sizes.astype('<i8'))


def stored_sizes(images: Images, rows: np.ndarray) -> np.ndarray | None:
    """Bytes of the files (in a tar: members) that hold these images, -1 where there is none, int64.

    They tell most images that were exchanged under their names, and a copy of the data has the same, unlike the times
    of files. None for other sources: their `digest` covers sizes or pixels, except of files that torchvision reads.
    """
    while hasattr(images, 'indices'):  # a subset
        images, rows = images.images, images.indices[rows]
    if isinstance(images, FileImages):
        return np.array([images.size(i) for i in rows.tolist()], np.int64)
    index = getattr(images, '_index', None)
    return None if index is None else index.columns['sizes'][rows]


@runtime_checkable
class Stream(Protocol):
    """A source without random access: images come in its own order, undecoded, and it never has labels."""

    name: str
    labels: None
    classes: list[str]
    digest: str
    promise: str  # one sentence: what can be reproduced and what cannot

    def __len__(self) -> int: ...  # images per epoch

    def samples(self, seed: int, epoch: int, start: int) -> Iterator[bytes | np.ndarray]: ...  # from position start on


def _at_once(path: str, flags: int) -> int:
    """A pipe would wait for somebody who writes to it."""
    return os.open(path, flags | getattr(os, 'O_NONBLOCK', 0))


class FileImages:
    """Image files that an index names, relative to `root` or from the top of the file system."""

    def __init__(self, root: Path, index: Index, name: str) -> None:
        self.root, self.name, self._index = root, name, index
        self.classes, self.labels, self.digest = index.classes, index.labels, index.digest

    def __len__(self) -> int:
        return len(self._index)

    def path(self, index: int) -> Path:
        return self.root / os.fsdecode(self._index.path(index))

    def size(self, index: int) -> int:
        """Bytes of the file, -1 where there is none."""
        try:  # not by `path`, which takes as long again
            return os.stat(os.path.join(os.fsencode(self.root), self._index.path(index))).st_size
        except (OSError, ValueError):  # ValueError: a name that no file can have
            return -1

    def read(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8. Raises UnreadableError, naming the file, where it cannot be decoded."""
        path = self.path(index)
        try:
            with open(path, 'rb', buffering=0, opener=_at_once) as f:
                status = os.fstat(f.fileno())
                if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_BYTES:
                    raise ValueError('no file, or one of more than a gigabyte')
                data = bytearray(f.readall())
        except (OSError, ValueError) as e:  # ValueError: also a name that no file can have
            raise UnreadableError(f'{path}: cannot be read ({getattr(e, "strerror", None) or e})') from None
        return decode(data, str(path))


class FolderImages(FileImages):
    """Images below `root`: one subfolder per class (ImageFolder layout), or a flat folder without labels.

    The listing is cached as long as no folder below `root` changes, and mapped, not loaded.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
    """

    def __init__(self, root: str | Path) -> None:
        root = Path(root)
        if not root.is_dir():
            raise FileNotFoundError(f'{root}: no such folder; DATA is a folder of images')
        index = open_index(root, EXTENSIONS)
        if not len(index):
            raise FileNotFoundError(f'{root}: no image in it or below it; looked for {" ".join(EXTENSIONS)}')
        super().__init__(root, index, str(root))


class MemoryImages:
    """(N, H, W, 3) uint8 images in memory, with labels (N,)."""

    def __init__(self, images: np.ndarray, labels: np.ndarray | None, classes: list[str], name: str) -> None:
        self.images, self.labels, self.classes, self.name = images, labels, classes, name

    @functools.cached_property
    def digest(self) -> str:
        labels = np.zeros(0) if self.labels is None else self.labels.astype('<i8')
        return digest(json.dumps([self.images.shape, self.classes]), self.images, labels)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> np.ndarray:
        return self.images[index]
