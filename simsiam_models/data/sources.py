"""Where images come from: a folder of files, or arrays in memory. Labels are optional and never used in training."""
import os
from pathlib import Path
from typing import Protocol

import numpy as np

from .decode import UnreadableError, decode
from .index import open_index

EXTENSIONS = ('.jpg', '.jpeg', '.png', '.bmp', '.gif', '.tif', '.tiff', '.webp', '.ppm', '.pgm')


class Images(Protocol):
    """What the loader asks of a source: `len`, labels or None, and one RGB image by its index, from any thread."""

    name: str
    labels: np.ndarray | None  # (N,) whole numbers
    classes: list[str]

    def __len__(self) -> int: ...

    def read(self, index: int) -> np.ndarray: ...  # (H, W, 3) uint8, or UnreadableError


class FolderImages:
    """Images below `root`: one subfolder per class (ImageFolder layout), or a flat folder without labels.

    The listing is cached as long as no folder below `root` changes, and mapped, not loaded.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
    """

    def __init__(self, root: str | Path) -> None:
        root = Path(root)
        if not root.is_dir():
            raise FileNotFoundError(f'{root}: no such folder; DATA is a folder of images')
        self._index = open_index(root, EXTENSIONS)
        if not len(self._index):
            raise FileNotFoundError(f'{root}: no image in it or below it; looked for {" ".join(EXTENSIONS)}')
        self.root, self.name = root, str(root)
        self.classes, self.labels = self._index.classes, self._index.labels

    def __len__(self) -> int:
        return len(self._index)

    def path(self, index: int) -> Path:
        return self.root / os.fsdecode(self._index.path(index))

    def read(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8. Raises UnreadableError, naming the file, where it cannot be decoded."""
        path = self.path(index)
        try:
            with open(path, 'rb', buffering=0) as f:
                data = bytearray(f.readall())
        except OSError as e:
            raise UnreadableError(f'{path}: cannot be read ({e.strerror})') from None
        return decode(data, str(path))


class MemoryImages:
    """(N, H, W, 3) uint8 images in memory, with labels (N,)."""

    def __init__(self, images: np.ndarray, labels: np.ndarray | None, classes: list[str], name: str) -> None:
        self.images, self.labels, self.classes, self.name = images, labels, classes, name

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> np.ndarray:
        return self.images[index]


def open_folder(root: str | Path) -> tuple[FolderImages, FolderImages | None]:
    """Training images and labelled validation images, if there are any: ROOT/train and ROOT/val, or ROOT itself."""
    root = Path(root)
    if not (root / 'train').is_dir():
        return FolderImages(root), None
    train = FolderImages(root / 'train')
    val = FolderImages(root / 'val') if (root / 'val').is_dir() else None
    if val is not None and (val.labels is None or val.classes != train.classes):
        val = None  # not the same classes: of no use to the monitor
    return train, val
