"""Labelled images that a benchmark trains on and is measured on."""
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ..data.philox import permutation
from ..data.readers.images import Images, contents_digest
from ..data.readers.index import digest
from ..runtime.messages import counted


@dataclass
class Pair:
    """Training and test images of a data set. The labels of both number the same classes."""

    train: Images
    test: Images
    name: str  # the kind of data set
    classes: int
    counts: dict[str, int]  # train, test: images; classes, test_classes: classes that have images
    held_out: str = ''  # how the test images were chosen, if they are a share of the training images
    shared: dict[str, Any] = field(default_factory=dict)  # images of both parts, from `shared_images.report_shared`

    @property
    def tested_on(self) -> str:
        return self.held_out or f'{counted(len(self.test), "image")} of {self.test.name}'

    def data(self) -> dict[str, Any]:
        """Returns the data set's entry in a record."""
        held_out = {'held_out': self.held_out} if self.held_out else {}
        return {'name': self.name, 'counts': self.counts, 'digest': self.digest, **held_out}

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
    if len(missing := np.flatnonzero(np.bincount(np.asarray(images.labels), minlength=len(images.classes)) == 0)):
        raise ValueError(
            f'{images.name}: {len(missing)} of {len(images.classes)} classes have no training image, the first is '
            f'{images.classes[missing[0]]!r}; add images, number the classes from 0 without gaps, or accept this with '
            '--allow-partial')


def check_several_classes(images: Images) -> None:
    """Raises ValueError if all images are of one class: every classifier is right then."""
    if len(names := np.unique(np.asarray(images.labels))) < 2:
        raise ValueError(
            f'{images.name}: only one class{f" ({images.classes[names[0]]})" if len(names) else ""}; a classifier '
            'needs at least two, each in its own folder')


def hold_out_rows(images: Images, share: float, seed: int) -> tuple[np.ndarray, np.ndarray, str]:
    """Returns the rows of images without classes to train on, a seeded `share` to test on, and a text that says so."""
    if len(images) < 2:
        raise ValueError(f'{images.name}: {len(images)} image, so none can be held out to test on; add images')
    n = min(max(1, round(share * len(images))), len(images) - 1)
    held = np.zeros(len(images), bool)
    held[permutation(seed, 0, len(images))[:n]] = True
    return ~held, held, f'{n} of {len(images)} images, {share:g} of all, held out by seed {seed}'


def hold_out(images: Images, share: float, seed: int) -> tuple[Subset, Subset, str]:
    """Returns the images to train on, a seeded `share` of each class to hold out, and a text that says so."""
    train, held = split(np.asarray(images.labels), share, seed)
    if not len(held):
        raise ValueError(
            f'{images.name}: no class has two images, so none can be held out; add images, or a val folder')
    text = f'{len(held)} of {len(images)} images, {share:g} of each class, held out by seed {seed}'
    if single := sum(np.bincount(np.asarray(images.labels)) == 1):
        text += f'; {counted(single, "class has", "classes have")} one image and no test image'
    return subset(images, train), subset(images, held), text


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
