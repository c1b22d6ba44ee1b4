"""Where images come from: a folder of files, or arrays in memory. Labels are optional and never used in training."""
import os
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

EXTENSIONS = ('.jpg', '.jpeg', '.png', '.bmp', '.gif', '.tif', '.tiff', '.webp', '.ppm', '.pgm')


class UnreadableError(RuntimeError):
    """An image file could not be decoded."""


class Images(Protocol):
    """What the loader asks of a source: `len`, labels or None, and one RGB image by its index."""

    name: str
    labels: np.ndarray | None  # (N,) int64
    classes: list[str]

    def __len__(self) -> int: ...

    def read(self, index: int) -> Image.Image: ...


class FolderImages:
    """Images below `root`: one subfolder per class (ImageFolder layout), or a flat folder without labels.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
    """

    def __init__(self, root: str | Path) -> None:
        root = Path(root)
        if not root.is_dir():
            raise FileNotFoundError(f'{root}: no such folder; DATA is a folder of images')
        found = sorted(
            os.path.relpath(os.path.join(folder, name), root)
            for folder, _, names in os.walk(root, followlinks=True) for name in names
            if name.lower().endswith(EXTENSIONS))
        if not found:
            raise FileNotFoundError(f'{root}: no image in it or below it; looked for {" ".join(EXTENSIONS)}')
        self.root, self.name = root, str(root)
        # One buffer, not a list of strings: worker processes share it without copying.
        self._paths = np.array([os.fsencode(p) for p in found])
        folders = [p.split(os.sep, 1)[0] if os.sep in p else None for p in found]
        flat = None in folders
        self.classes = [] if flat else sorted(set(folders))
        self.labels = None if flat else np.searchsorted(self.classes, folders).astype(np.int64)

    def __len__(self) -> int:
        return len(self._paths)

    def path(self, index: int) -> Path:
        return self.root / os.fsdecode(self._paths[index])

    def read(self, index: int) -> Image.Image:
        """Raises UnreadableError, naming the file, where PIL cannot decode it."""
        path = self.path(index)
        try:
            with Image.open(path) as image:
                if image.mode.startswith('I;16'):  # convert() would cut at 255: all white
                    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
                return image.convert('RGB')
        # PIL raises nearly anything on a broken file (OSError, SyntaxError, ValueError, DecompressionBombError, ...).
        except Exception as e:
            raise UnreadableError(f'{path}: cannot be read as an image ({e})') from None


class MemoryImages:
    """(N, H, W, 3) uint8 images in memory, with labels (N,)."""

    def __init__(self, images: np.ndarray, labels: np.ndarray | None, classes: list[str], name: str) -> None:
        self.images, self.labels, self.classes, self.name = images, labels, classes, name

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index])


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
