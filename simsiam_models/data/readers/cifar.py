"""CIFAR-10 and CIFAR-100 in their binary version (Krizhevsky, 2009), mapped where they lie.

A record is 1 (CIFAR-100: 2, coarse and fine) bytes of labels and 3 x 32 x 32 bytes of an image, red, green, blue.
"""
import json
import logging
from pathlib import Path

import numpy as np

from .index import digest

PIXELS = 3 * 32 * 32
FOLDERS = ('.', 'cifar-10-batches-bin', 'cifar-100-binary')
# name -> bytes of labels, classes, file of their names; training and validation: files and images in all
KINDS = {
    'CIFAR-10': (1, 10, 'batches.meta.txt', ([f'data_batch_{i}.bin' for i in range(1, 6)], 50000), (
        ['test_batch.bin'], 10000)),
    'CIFAR-100': (2, 100, 'fine_label_names.txt', (['train.bin'], 50000), (['test.bin'], 10000)),
}

_logger = logging.getLogger('simsiam_models')


class CifarImages:
    """The images of those `files` that lie in `folder`; all of them hold `expected`.

    Raises:
        ValueError: a file is no whole number of records, or no record of this set.
    """

    def __init__(self, folder: Path, kind: str, files: list[str], expected: int) -> None:
        head, classes, names, *_ = KINDS[kind]
        there = [file for file in files if (folder / file).is_file()]
        self.name, size, self._parts = f'{folder} ({", ".join(there)})', head + PIXELS, []
        for file in there:
            path = folder / file
            found = path.stat().st_size
            if not found or found % size:
                raise ValueError(
                    f'{path}: {found} bytes are no whole number of {kind} records of {size}; '
                    f'{found // size} are whole where {expected // len(files)} are expected: download it anew')
            self._parts.append(np.memmap(path, np.uint8, 'r').reshape(-1, size))
        self._ends = np.cumsum([len(part) for part in self._parts])
        self.labels = np.concatenate([part[:, head - 1] for part in self._parts]).astype(np.int32)
        if self.labels.max() >= classes:
            raise ValueError(f'{self.name}: a label of {self.labels.max()}, where {kind} has {classes} classes')
        if len(self) != expected:
            _logger.warning(f'{self.name}: {len(self)} images found, {expected} expected in the whole {kind}')
        known = (folder / names).read_text(errors='replace').split('\n') if (folder / names).is_file() else []
        known = [name.strip() for name in known if name.strip()]
        self.classes = known if len(known) == classes else [str(i) for i in range(classes)]
        self.digest = digest(json.dumps([kind, self.classes]), *(np.asarray(part) for part in self._parts))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, index: int) -> np.ndarray:
        """(32, 32, 3) uint8."""
        part = int(np.searchsorted(self._ends, index, 'right'))
        record = self._parts[part][index - self._ends[part]]
        return np.array(record[-PIXELS:].reshape(3, 32, 32).transpose(1, 2, 0))


def open_cifar(root: Path) -> tuple[CifarImages, CifarImages | None] | None:
    """None where there is no such file in `root` or the folder that the archive unpacks to.

    Raises:
        ValueError: a damaged file, or the version for Python.
    """
    for folder in (root / name for name in FOLDERS):
        for kind, (_, _, _, (train, trained), (val, tested)) in KINDS.items():
            if any((folder / file).is_file() for file in train):
                has_val = (folder / val[0]).is_file()
                return (CifarImages(folder, kind, train, trained),
                        CifarImages(folder, kind, val, tested) if has_val else None)
    for folder, name in (('.', 'CIFAR10'), ('cifar-10-batches-py', 'CIFAR10'), ('cifar-100-python', 'CIFAR100')):
        if (root / folder / {'CIFAR10': 'data_batch_1', 'CIFAR100': 'train'}[name]).is_file():
            place = root / folder if folder != '.' else root
            raise ValueError(
                f'{place}: this is the Python version of {name}; read it as torchvision:{name}:{place.parent}')
    return None
