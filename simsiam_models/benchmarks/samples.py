"""Labelled images that a benchmark trains on and is measured on."""
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
    """Training and test images of a data set. The labels of both number the same classes."""

    train: Images
    test: Images
    name: str  # the kind of data set
    classes: int
    counts: dict[str, int]  # train, test: images; classes, test_classes: classes that have images

    def data(self) -> dict[str, Any]:
        """Returns the data set's entry in a record."""
        return {'name': self.name, 'counts': self.counts, 'digest': self.digest}

    @cached_property
    def digest(self) -> str:
        return digest(contents_digest(self.train), contents_digest(self.test))


class Subset:
    """The images of `images` at `indices`, in that order, with labels and classes of their own."""

    def __init__(self, images: Images, indices: np.ndarray, labels: np.ndarray | None, classes: list[str]) -> None:
        self.images, self.indices, self.labels, self.classes, self.name = images, indices, labels, classes, images.name
        self.digest = digest(
            json.dumps([images.digest, classes]), indices.astype('<i8'),
            np.zeros(0) if labels is None else labels.astype('<i8'))

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> np.ndarray:
        """Returns (H, W, 3) uint8; raises UnreadableError if the image cannot be decoded."""
        return self.images.read(int(self.indices[index]))


def subset(images: Images, indices: Sequence[int] | np.ndarray) -> Subset:
    """Returns the images at `indices`, in that order; raises ValueError if an index is out of range."""
    indices = np.asarray(indices)
    if indices.ndim != 1 or indices.size and indices.dtype.kind not in 'iu':
        raise ValueError(f'{images.name}: a subset is a list of integers, not {indices.dtype} {indices.shape}')
    if indices.size and not 0 <= indices.min() <= indices.max() < len(images):
        raise ValueError(
            f'{images.name}: the images are numbered from 0 to {len(images) - 1}, but the subset has numbers from '
            f'{indices.min()} to {indices.max()}')
    indices, labels = indices.astype(np.int64), images.labels
    return Subset(images, indices, None if labels is None else np.asarray(labels)[indices], images.classes)


def check_every_class_trains(images: Images) -> None:
    """Raises ValueError if a class has no training image."""
    if len(missing := np.flatnonzero(np.bincount(images.labels, minlength=len(images.classes)) == 0)):
        raise ValueError(
            f'{images.name}: {len(missing)} of {len(images.classes)} classes have no training image, the first is '
            f'{images.classes[missing[0]]!r}; add images, or number the classes from 0 without gaps')


def split(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows to train on and the rows to hold out.

    Of the n >= 2 images of each class, round(share * n) are held out, at least 1 and at most n - 1.
    """
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        n = min(max(1, round(share * len(rows))), len(rows) - 1)
        held[rows[permutation(seed, int(label), len(rows))[:n]]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)
