"""The interfaces of image sources, and two of them: files in a folder and arrays in memory. opening.py has the others.

Labels are optional and never used in training.
"""
import functools
import json
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from ...runtime.messages import announce
from .decode import UnreadableError, decode, explain_read_errors
from .index import Index, Listing, digest, open_index
from .labels import Choice
from .metadata import read_metadata
from .names import EXTENSIONS

MAX_FILE_BYTES = 1 << 30


class Images(Protocol):
    """A source with random access: `read` returns an RGB image by its index and may be called from any thread."""

    @property
    def name(self) -> str: ...

    @property
    def labels(self) -> np.ndarray | None: ...  # (N,) integers from 0

    @property
    def classes(self) -> list[str]: ...

    @property
    def digest(self) -> str: ...  # 16 hexadecimal characters that identify these images, wherever they are stored

    def __len__(self) -> int: ...

    def read(self, index: int) -> np.ndarray: ...  # (H, W, 3) uint8, or UnreadableError


@runtime_checkable
class Stream(Protocol):
    """A source without random access: undecoded images in its own order, and never labels."""

    name: str
    labels: None
    classes: list[str]
    digest: str
    promise: str  # one sentence: what is reproducible and what is not

    def __len__(self) -> int: ...  # images per epoch

    def samples(self, seed: int, epoch: int, start: int) -> Iterator[bytes | np.ndarray]: ...  # from position start on


def spread(n: int, most: int) -> np.ndarray:
    """Returns at most `most` evenly spaced rows of n, the first and the last among them, as int64."""
    return np.unique((n - 1) * np.arange(most) // (most - 1)) if n else np.zeros(0, np.int64)


def pixels_digest(images: Images) -> str:
    """Hashes 16 evenly spaced images to 16 hexadecimal characters; unreadable ones do not count.

    Unlike `images.digest`, it tells a resized copy from the original.
    """
    parts: list[str | np.ndarray] = []
    for i in spread(len(images), 16).tolist():
        with suppress(UnreadableError):
            image = images.read(i)
            parts += [str(image.shape), image]
    return digest(*parts)


def contents_digest(images: Images) -> str:
    """Hashes names, 16 images' pixels and all file sizes to 16 hexadecimal characters, which replaced images change."""
    sizes = stored_sizes(images, np.arange(len(images)))
    return digest(images.digest, pixels_digest(images), '' if sizes is None else sizes.astype('<i8'))


def stored_sizes(images: Images, rows: np.ndarray) -> np.ndarray | None:
    """Returns the int64 sizes in bytes of the files (in a tar: members) that hold these images, -1 for no file.

    They reveal most images that were replaced under the same name, and unlike file times they survive copying.
    Returns None for other sources: their `digest` covers sizes or pixels, except for files that torchvision reads.
    """
    source: Any = images
    while hasattr(source, 'indices'):  # a subset
        source, rows = source.images, source.indices[rows]
    return source.stored_sizes(rows) if hasattr(source, 'stored_sizes') else None


def stored_bytes(images: Images, row: int, start: int = 0, length: int | None = None) -> bytes | None:
    """Returns the bytes of one image as it is stored: of its file, or of its pixels where only these are in memory.

    Returns None if the source provides neither. Raises UnreadableError if reading fails.
    """
    source: Any = images
    while hasattr(source, 'indices'):  # a subset
        source, row = source.images, int(source.indices[row])
    return source.stored_bytes(row, start, length) if hasattr(source, 'stored_bytes') else None


def load_picture(images: Images | None, row: int) -> Image.Image | None:
    """Returns an image; None if it cannot be read, or if there are no images."""
    try:
        return None if images is None else Image.fromarray(images.read(row))
    except UnreadableError:
        return None


def name_of(images: Images, row: int) -> str:
    """Returns the name of one image: its file if it has one."""
    source: Any = images
    while hasattr(source, 'indices'):
        source, row = source.images, int(source.indices[row])
    return source.name_of(row) if hasattr(source, 'name_of') else f'{source.name}: image {row}'


class FileImages:
    """Image files that an index names by their paths, absolute or relative to `root`. Logs the notes of the index."""

    def __init__(self, root: Path, index: Index, name: str) -> None:
        self.root, self.name, self._index = root, name, index
        self.classes, self.labels, self.digest, self.notes = index.classes, index.labels, index.digest, index.notes
        for note in index.notes:
            announce(f'{name}: {note}')

    def __len__(self) -> int:
        return len(self._index)

    def path(self, index: int) -> Path:
        return self.root / os.fsdecode(self._index.path(index))

    def stored_sizes(self, rows: np.ndarray) -> np.ndarray:
        """See the function `stored_sizes`."""
        sizes, root = np.full(len(rows), -1, np.int64), os.fsencode(self.root)
        for i, row in enumerate(rows.tolist()):
            with suppress(OSError, ValueError):  # ValueError: no file can have this name
                sizes[i] = os.stat(os.path.join(root, self._index.path(row))).st_size  # `path` would take as long again
        return sizes

    def read(self, index: int) -> np.ndarray:
        """Returns (H, W, 3) uint8; raises UnreadableError, which names the file, if it cannot be read or decoded."""
        path = self.name_of(index)
        return decode(_read_file(path, 0, None), path)  # bytes, which PIL reads without a copy

    def name_of(self, index: int) -> str:
        return str(self.path(index))

    def stored_bytes(self, index: int, start: int = 0, length: int | None = None) -> bytes:
        """See the function `stored_bytes`."""
        return _read_file(self.name_of(index), start, length)


def open_files(paths: Iterable[str], name: str) -> FileImages:
    """Returns the images in these files."""
    listing = Listing()
    for path in paths:
        listing.add(path)
    return FileImages(Path(), listing.make_index(), name)


def _read_file(path: str, start: int, length: int | None) -> bytes:
    nonblocking = getattr(os, 'O_NONBLOCK', 0)  # do not wait for the writer of a pipe
    with explain_read_errors(path, OSError, ValueError):  # ValueError: no file can have this name
        with open(path, 'rb', buffering=0, opener=lambda name, flags: os.open(name, flags | nonblocking)) as f:
            status = os.fstat(f.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_FILE_BYTES:
                raise ValueError('not a regular file, or larger than a gigabyte')
            if start:
                f.seek(start)
            return f.readall() if length is None else f.read(length)


class FolderImages(FileImages):
    """Images below `root`: one subfolder per class (ImageFolder layout), or a flat folder without labels.

    A `metadata` file may have labels; `choice` is the column.

    The listing is memory-mapped from a cache, which is valid until a folder below `root` changes. Raises
    FileNotFoundError if there is no such folder, or no image in it.
    """

    def __init__(self, root: str | Path, choice: Choice | None = None) -> None:
        root = Path(root)
        if not root.is_dir():
            raise FileNotFoundError(f'{root}: no such folder; DATA must be a folder of images')
        index = read_metadata(root, open_index(root, EXTENSIONS), EXTENSIONS, choice or Choice())
        if not len(index):
            found = ''.join(f'; {note}' for note in index.notes)
            raise FileNotFoundError(f'{root}: no image in it or below it; looked for {" ".join(EXTENSIONS)}{found}')
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
        image: np.ndarray = self.images[index]
        return image

    def stored_bytes(self, index: int, start: int = 0, length: int | None = None) -> bytes:
        """See the function `stored_bytes`."""
        return self.read(index).tobytes()[start:None if length is None else start + length]
