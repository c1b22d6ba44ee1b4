"""Labelled images: what a benchmark learns from and what it is measured on."""
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..data.philox import permutation
from ..data.readers.images import Images, contents_digest
from ..data.readers.index import digest


@dataclass
class Pair:
    """What a benchmark learns from and is measured on; labels of both count the same classes."""

    train: Images
    test: Images
    name: str  # the kind
    classes: int
    counts: dict[str, int]  # train, test: images; classes, test_classes: those that occur

    def data(self) -> dict[str, Any]:
        """For the record."""
        return {'name': self.name, 'counts': self.counts, 'digest': self.digest}

    @cached_property
    def digest(self) -> str:
        return digest(contents_digest(self.train), contents_digest(self.test))


class Subset:
    """The images of `images` at `indices`, in their order; perhaps with other labels."""

    def __init__(
        self, images: Images, indices: np.ndarray, labels: np.ndarray | None = None, classes: list[str] | None = None,
    ) -> None:
        self.images, self.indices, self.name = images, indices, images.name
        kept = None if images.labels is None else np.asarray(images.labels)[indices]
        self.labels = kept if labels is None else labels
        self.classes = images.classes if classes is None else classes
        self.digest = digest(
            json.dumps([images.digest, self.classes]), indices.astype('<i8'),
            np.zeros(0) if self.labels is None else self.labels.astype('<i8'))

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8, or UnreadableError."""
        return self.images.read(int(self.indices[index]))


def subset(images: Images, indices: Sequence[int] | np.ndarray) -> Subset:
    """The images at `indices`, in that order.

    Raises:
        ValueError: an index is no index of an image.
    """
    indices = np.asarray(indices)
    if indices.ndim != 1 or indices.size and indices.dtype.kind not in 'iu':
        raise ValueError(f'{images.name}: a subset is a list of whole numbers, not {indices.dtype} {indices.shape}')
    if indices.size and not 0 <= indices.min() <= indices.max() < len(images):
        raise ValueError(
            f'{images.name}: its images are numbered from 0 to {len(images) - 1}; the subset has numbers from '
            f'{indices.min()} to {indices.max()}')
    return Subset(images, indices.astype(np.int64))


def every_class_trains(images: Images) -> None:
    """Raises ValueError: a class has no training image."""
    missing = np.flatnonzero(np.bincount(images.labels, minlength=len(images.classes)) == 0)
    if len(missing):
        raise ValueError(
            f'{images.name}: {len(missing)} of {len(images.classes)} classes have no training image, the first is '
            f'{images.classes[missing[0]]!r}; add images, or number the classes from 0 without a gap')


def split(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """-> rows that train and rows that are held out: of n >= 2 images of a class `share`, rounded, in 1 .. n - 1."""
    held = np.zeros(len(labels), bool)
    for number in np.unique(labels):
        rows = np.flatnonzero(labels == number)
        n = min(max(1, round(share * len(rows))), len(rows) - 1)
        held[rows[permutation(seed, int(number), len(rows))[:n]]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)
