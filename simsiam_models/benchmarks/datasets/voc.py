"""VOC07 classification: 20 classes, each of which an image has, has not, or has only as a difficult object."""
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ...data.readers.images import FileImages, contents_digest
from ...data.readers.index import Listing, digest
from .sizes import SIZES, deviation, refusal

NAMES = [  # alphabetical, which is the order of the files
    'aeroplane', 'bicycle', 'bird', 'boat', 'bottle', 'bus', 'car', 'cat', 'chair', 'cow', 'diningtable', 'dog',
    'horse', 'motorbike', 'person', 'pottedplant', 'sheep', 'sofa', 'train', 'tvmonitor']
PARTS = ('trainval', 'test')
PRESENT, ABSENT, DIFFICULT = 1, 0, -1
LABEL = {'1': PRESENT, '-1': ABSENT, '0': DIFFICULT}  # value in a file -> label (protocol 4.2)

_logger = logging.getLogger('simsiam_models')


@dataclass
class Voc07:
    """Images of either part are sorted by id (protocol 4.1); labels are 1 present, 0 absent, -1 difficult: ignored."""

    trainval: FileImages
    test: FileImages
    names: list[str]  # of the classes
    labels_trainval: np.ndarray  # (N, classes) int8
    labels_test: np.ndarray  # (N, classes) int8
    counts: dict[str, int]  # train, test: images; classes

    def data(self) -> dict[str, Any]:
        """For the record."""
        return {'name': 'voc07', 'counts': self.counts, 'digest': self.digest}

    @cached_property
    def digest(self) -> str:
        images = map(contents_digest, (self.trainval, self.test))
        return digest(*images, self.labels_trainval, self.labels_test)


def open_voc07(root: str | Path, partial: bool = False) -> Voc07:
    """What VOCdevkit/VOC2007, which is `root` or lies below it, has in JPEGImages and ImageSets/Main.

    Args:
        partial: fewer images, also than are named, and fewer classes will do.

    Raises:
        FileNotFoundError: a folder, the file of a class, or an image is missing.
        ValueError: a file names other images than that of another class, or has a line of another form; another number
            of images than VOC07 has.
    """
    tried = [Path(root, below) for below in ('.', 'VOC2007', 'VOCdevkit/VOC2007')]
    folder = next((p for p in tried if (p / 'ImageSets' / 'Main').is_dir() and (p / 'JPEGImages').is_dir()), None)
    if folder is None:
        raise FileNotFoundError(
            f'{root}: neither it nor VOCdevkit/VOC2007 below it has JPEGImages and ImageSets/Main; unpack '
            f'{SIZES["voc07"].source} there')
    names = _names(folder, partial)
    files = {path.name for path in (folder / 'JPEGImages').iterdir()}
    images, labels = {}, {}
    for part in PARTS:
        ids, labels[part] = _labels(folder, names, part)
        there = np.array([f'{i}.jpg' in files for i in ids])
        if not there.all():
            first = f'{ids[int(np.flatnonzero(~there)[0])]}.jpg'
            said = (f'{there.sum():,} images found in {folder / "JPEGImages"} where {len(ids):,} are named for {part} '
                    f'(missing: {first})')
            if not partial or not there.any():
                raise FileNotFoundError(refusal('voc07', str(folder), said))
            _logger.warning(f'{said}: the others are left out')
            labels[part] = labels[part][there]
        listing = Listing()
        for i, is_there in zip(ids, there, strict=True):
            if is_there:
                listing.add(f'JPEGImages/{i}.jpg')
        images[part] = FileImages(folder, listing.index(), f'{folder} ({part})')
    counts = {'train': len(images['trainval']), 'test': len(images['test']), 'classes': len(names)}
    if not partial and (found := deviation('voc07', counts)):
        raise ValueError(refusal('voc07', str(folder), found))
    return Voc07(images['trainval'], images['test'], names, labels['trainval'], labels['test'], counts)


def _names(folder: Path, partial: bool) -> list[str]:
    """Of the classes that both parts have a file for."""
    main = folder / 'ImageSets' / 'Main'
    found = {part: {p.name.removesuffix(f'_{part}.txt') for p in main.glob(f'*_{part}.txt')} for part in PARTS}
    names = sorted(found['trainval'] | found['test']) if partial else NAMES
    missing = [f'{name}_{part}.txt' for name in names for part in PARTS if name not in found[part]]
    strange = [] if partial else sorted((found['trainval'] | found['test']) - set(NAMES))
    if missing or not names:
        raise FileNotFoundError(
            f'{main}: {2 * len(names) - len(missing)} files of classes found where {2 * len(names) or 40} are '
            f'expected, two for each class (missing: {", ".join(missing[:3]) or "all"}); complete it '
            f'({SIZES["voc07"].source})')
    if strange:
        raise ValueError(f'{main}: {strange[0]} is no class of VOC07; its 20 classes are {", ".join(NAMES)}')
    return names


def _labels(folder: Path, names: list[str], part: str) -> tuple[list[str], np.ndarray]:
    """Ids, sorted, and (N, classes) int8."""
    main, ids, columns = folder / 'ImageSets' / 'Main', [], []
    for name in names:
        file = main / f'{name}_{part}.txt'
        label = dict(_lines(file))
        if not label:
            raise ValueError(f'{file}: names no image')
        ids = ids or sorted(label)
        if sorted(label) != ids:
            other = min({*label} ^ {*ids})
            raise ValueError(
                f'{file}: its {len(label):,} images are not the {len(ids):,} of {names[0]}_{part}.txt, of which '
                f'{other} is in one only; unpack the lists anew')
        columns.append([label[i] for i in ids])
    return ids, np.array(columns, np.int8).T.copy()


def _lines(file: Path) -> Iterator[tuple[str, int]]:
    seen = set()
    with open(file, encoding='utf-8-sig', errors='replace') as f:
        for line, text in enumerate(f, 1):
            fields = text.split()
            if not fields:
                continue
            if len(fields) != 2 or fields[1] not in LABEL or '/' in fields[0] or '\0' in fields[0]:
                raise ValueError(f'{file}, line {line}: {text.strip()[:80]!r} is not an id and one of 1, 0, -1')
            if fields[0] in seen:
                raise ValueError(f'{file}, line {line}: {fields[0]} is named twice')
            seen.add(fields[0])
            yield fields[0], LABEL[fields[1]]
