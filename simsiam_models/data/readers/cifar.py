"""CIFAR-10 and CIFAR-100 in their binary version (Krizhevsky, 2009), memory-mapped in place.

A record is one byte of label (in CIFAR-100 two: coarse and fine) and an image of 3 x 32 x 32 bytes: red, green, blue.
"""
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .index import digest

PIXELS = 3 * 32 * 32
FOLDERS = ('.', 'cifar-10-batches-bin', 'cifar-100-binary')

_logger = logging.getLogger('simsiam_models')


@dataclass(frozen=True)
class _Layout:
    name: str
    label_bytes: int
    classes: int
    names_file: str  # class names
    train: list[str]  # 50000 images
    test: str  # 10000 images


LAYOUTS = [
    _Layout('CIFAR-10', 1, 10, 'batches.meta.txt', [f'data_batch_{i}.bin' for i in range(1, 6)], 'test_batch.bin'),
    _Layout('CIFAR-100', 2, 100, 'fine_label_names.txt', ['train.bin'], 'test.bin')]
PYTHON_FILES = {  # of the Python version, which torchvision reads
    'data_batch_1': 'CIFAR10', 'train': 'CIFAR100', 'cifar-10-batches-py/data_batch_1': 'CIFAR10',
    'cifar-100-python/train': 'CIFAR100'}


class CifarImages:
    """The images of those `files` that exist in `folder`; the complete set has `expected`.

    Raises ValueError if a file is not a whole number of records, or its records are not of this data set.
    """

    def __init__(self, folder: Path, layout: _Layout, files: list[str], expected: int) -> None:
        existing = [file for file in files if (folder / file).is_file()]
        self.name, self._parts, size = f'{folder} ({", ".join(existing)})', [], layout.label_bytes + PIXELS
        for path in (folder / file for file in existing):
            found = path.stat().st_size
            if not found or found % size:
                raise ValueError(
                    f'{path}: {found} bytes are not a whole number of {layout.name} records of {size} bytes: '
                    f'{found // size} are complete, {expected // len(files)} are expected; download it again')
            self._parts.append(np.memmap(path, np.uint8, 'r').reshape(-1, size))
        self._ends = np.cumsum([len(part) for part in self._parts])
        self.labels = np.concatenate([part[:, layout.label_bytes - 1] for part in self._parts]).astype(np.int32)
        if self.labels.max() >= layout.classes:
            raise ValueError(
                f'{self.name}: a label of {self.labels.max()}, but {layout.name} has {layout.classes} classes; '
                'download it again')
        if len(self) != expected:
            _logger.warning(f'{self.name}: {len(self)} images found, {expected} expected in the whole {layout.name}')
        file = folder / layout.names_file
        lines = file.read_text(errors='replace').split('\n') if file.is_file() else []
        names = [name for line in lines if (name := line.strip())]
        self.classes = names if len(names) == layout.classes else [str(i) for i in range(layout.classes)]
        self.digest = digest(json.dumps([layout.name, self.classes]), *(np.asarray(part) for part in self._parts))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, index: int) -> np.ndarray:
        """Returns (32, 32, 3) uint8."""
        part = int(np.searchsorted(self._ends, index, 'right'))
        record = self._parts[part][index - self._ends[part]]
        return np.array(record[-PIXELS:].reshape(3, 32, 32).transpose(1, 2, 0))

    def stored_bytes(self, index: int, start: int = 0, length: int | None = None) -> bytes:
        """See `images.stored_bytes`."""
        return self.read(index).tobytes()[start:None if length is None else start + length]


def open_cifar(root: Path) -> tuple[CifarImages, CifarImages | None] | None:
    """Opens `root`, or the folder of the unpacked archive in it; returns None if neither has a training file."""
    for folder in (root / name for name in FOLDERS):
        for layout in LAYOUTS:
            if any(os.path.isfile(os.path.join(folder, file)) for file in layout.train):  # every folder comes by here
                train, has_val = CifarImages(folder, layout, layout.train, 50000), (folder / layout.test).is_file()
                return train, CifarImages(folder, layout, [layout.test], 10000) if has_val else None
    for file, name in PYTHON_FILES.items():
        if (root / file).is_file():
            folder = (root / file).parent
            raise ValueError(
                f'{folder}: this is the Python version of {name}; read it with torchvision:{name}:{folder.parent}')
    return None
