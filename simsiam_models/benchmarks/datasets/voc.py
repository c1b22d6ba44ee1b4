"""VOC07 classification: for each of 20 classes, an image shows it, lacks it, or shows it only as a difficult object."""
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ...data.readers.images import FileImages, contents_digest
from ...data.readers.index import Listing, digest
from .lists import find_present, read_lines
from .sizes import SIZES, deviation, refusal

NAMES = [  # alphabetical, as the columns of the labels
    'aeroplane', 'bicycle', 'bird', 'boat', 'bottle', 'bus', 'car', 'cat', 'chair', 'cow', 'diningtable', 'dog',
    'horse', 'motorbike', 'person', 'pottedplant', 'sheep', 'sofa', 'train', 'tvmonitor']
PARTS = ('trainval', 'test')
# Value in a file -> label: present, absent, difficult, as in MMSelfSup v0.9.1, tools/data_converters (its SVMLabels).
LABEL = {'1': 1, '-1': 0, '0': -1}
_LINE = re.compile(r'([^/\s\0]+)\s+(1|0|-1)')


@dataclass
class Voc07:
    """The images of both parts, sorted by id, and their labels: 1 present, 0 absent, -1 difficult."""

    trainval: FileImages
    test: FileImages
    names: list[str]  # of the classes
    labels_trainval: np.ndarray  # (N, classes) int8
    labels_test: np.ndarray  # (N, classes) int8
    counts: dict[str, int]  # train, test: images; classes

    def data(self) -> dict[str, Any]:
        """Returns the data set's entry in a record."""
        return {'name': 'voc07', 'counts': self.counts, 'digest': self.digest}

    @cached_property
    def digest(self) -> str:
        return digest(*map(contents_digest, (self.trainval, self.test)), self.labels_trainval, self.labels_test)


def open_voc07(root: str | Path, partial: bool = False) -> Voc07:
    """Opens VOCdevkit/VOC2007, which is `root` or below it, from its JPEGImages and ImageSets/Main.

    Raises FileNotFoundError if a folder, the file of a class, or an image is missing, and ValueError if the file of a
    class is malformed or names other images, or the number of images is not that of VOC07. `partial` accepts fewer
    images than the lists name, and fewer classes.
    """
    folder = find_folder(root, ('.', 'VOC2007', 'VOCdevkit/VOC2007'), ('JPEGImages', 'ImageSets/Main'), 'voc07')
    main = folder / 'ImageSets' / 'Main'
    names, images, labels = _list_classes(main, partial), {}, {}
    for part in PARTS:
        ids, labels[part] = _read_labels(main, names, part)
        present = find_present('voc07', folder / 'JPEGImages', [f'{i}.jpg' for i in ids], part, partial)
        labels[part] = labels[part][present]
        listing = Listing()
        for i in np.flatnonzero(present):
            listing.add(f'JPEGImages/{ids[i]}.jpg')
        images[part] = FileImages(folder, listing.make_index(), f'{folder} ({part})')
    counts = {'train': len(images['trainval']), 'test': len(images['test']), 'classes': len(names)}
    if not partial and (found := deviation('voc07', counts)):
        raise ValueError(refusal('voc07', str(folder), found))
    return Voc07(images['trainval'], images['test'], names, labels['trainval'], labels['test'], counts)


def find_folder(root: str | Path, places: tuple[str, ...], needed: tuple[str, ...], kind: str) -> Path:
    """Returns the first of `places` below `root` that has the needed folders; raises FileNotFoundError if none has."""
    for place in places:
        if all((Path(root, place) / name).is_dir() for name in needed):
            return Path(root, place)
    first = 'it' if places[0] == '.' else places[0]
    raise FileNotFoundError(
        f'{root}: neither {first} nor {places[-1]} below it has {", ".join(needed[:-1])} and {needed[-1]}; unpack '
        f'{SIZES[kind].source} there')


def _list_classes(main: Path, partial: bool) -> list[str]:
    """Returns the classes, after checking that both parts have a file for each."""
    found = {part: {p.name.removesuffix(f'_{part}.txt') for p in main.glob(f'*_{part}.txt')} for part in PARTS}
    present = sorted(found['trainval'] | found['test'])
    names = present if partial else NAMES
    missing = [f'{name}_{part}.txt' for name in names for part in PARTS if name not in found[part]]
    if missing or not names:
        raise FileNotFoundError(
            f'{main}: {2 * len(names) - len(missing)} files of classes found (expected {2 * len(names) or 40}, two for '
            f'each class; missing: {", ".join(missing[:3]) or "all"}); complete it ({SIZES["voc07"].source})')
    if unknown := [name for name in present if name not in names]:
        raise ValueError(f'{main}: {unknown[0]} is not a class of VOC07; its 20 classes are {", ".join(NAMES)}')
    return names


def _read_labels(main: Path, names: list[str], part: str) -> tuple[list[str], np.ndarray]:
    """Returns the sorted ids and the labels (N, classes) int8."""
    ids, columns = list[str](), list[list[int]]()
    for name in names:
        file, label = main / f'{name}_{part}.txt', {}
        for line, text in read_lines(file):
            found = _LINE.fullmatch(text)
            if not found:
                raise ValueError(f'{file}, line {line}: {text[:80]!r} is not an id and one of 1, 0, -1')
            if found[1] in label:
                raise ValueError(f'{file}, line {line}: {found[1]} is named twice')
            label[found[1]] = LABEL[found[2]]
        if not label:
            raise ValueError(f'{file} names no image')
        ids = ids or sorted(label)
        if other := {*label} ^ {*ids}:
            raise ValueError(
                f'{file}: its {len(label):,} images are not the {len(ids):,} of {names[0]}_{part}.txt: only one of the '
                f'two has {min(other)}; unpack the lists again')
        columns.append([label[i] for i in ids])
    return ids, np.array(columns, np.int8).T.copy()
