"""The data sets of detection: images with annotated objects, in the layouts in which they are distributed.

voc0712   VOCdevkit with VOC2007 and VOC2012: trainval of both to train on, test of VOC2007 to test on
coco      annotations/instances_train2017.json and instances_val2017.json, with images in train2017 and val2017
folder    a user's own: a folder in VOC's form (JPEGImages, Annotations, and perhaps ImageSets/Main), or a JSON file in
          COCO's form, or a folder with one for each part. Without one to test on, a share of the images is held out
"""
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ...data.opening import find_validation_list
from ...data.readers.decode import DataError, decode
from ...data.readers.images import FileImages
from ...data.readers.index import Listing, digest
from ...data.readers.names import VALIDATION, is_passed_over, part_of
from ...runtime.messages import announce, guess_path, name_some, short
from ..samples import Pair, hold_out_rows
from .annotations import MIN_SIDE, VARIANTS, Annotated, Objects
from .coco import find_images, parse_coco
from .exif import WITHIN, find_orientation
from .lists import find_present
from .sizes import SIZES, deviation, refusal
from .voc_objects import find_voc, open_voc0712, open_voc_folder


class ObjectImages:
    """Images and their objects: those of `annotated` at `indices`, which are also the rows of `images`."""

    labels = None  # an image has no class

    def __init__(self, images: FileImages, annotated: Annotated, indices: np.ndarray) -> None:
        self.images, self.indices, self.annotated = images, indices, annotated
        self.name, self.classes, self.category_ids = images.name, annotated.classes, annotated.category_ids
        self.image_ids = [annotated.image_ids[i] for i in indices.tolist()]
        self.sizes = annotated.sizes[indices]  # (N, 2) int64: height and width, as the annotations say
        self.has_masks = annotated.objects.has_masks
        self.crowds = annotated.objects.crowds  # ignored objects are COCO's crowds, not VOC's difficult ones
        self.notes = list(annotated.notes)  # sentences on what was left out
        self.broken: dict[str, int] = {}  # objects and images that do not train: kind -> number
        self._trains: dict[str, np.ndarray] = {}
        self._turned: list[str] = []

    def __len__(self) -> int:
        return len(self.indices)

    @cached_property
    def digest(self) -> str:
        a = self.annotated
        return digest(json.dumps([self.images.digest, a.classes, a.category_ids, self.image_ids]),
                      self.indices.astype('<i8'), self.sizes, a.objects.digest())

    def objects(self, index: int) -> Objects:
        """Returns all objects of an image, also those that do not train."""
        return self.annotated.objects.objects(int(self.indices[index]))

    def training_objects(self, index: int, variant: str) -> Objects:
        """Returns the objects of an image that train, see `Annotations.reasons`."""
        return self.annotated.objects.objects(int(self.indices[index]), self._training(variant))

    def training_indices(self, variant: str) -> np.ndarray:
        """Returns the images that train, (n,) int64: those with objects, perhaps none of which trains.

        Difficult objects and, for mmdet, also crowds and boxes that it drops count as objects of an image. mmdet leaves
        out images whose shorter side is below 32 px.
        """
        kept = np.ones(len(self), bool)
        for without in self._useless_images(variant).values():
            kept &= ~without
        return np.flatnonzero(kept)

    def annotation_table(self, rows: np.ndarray) -> tuple[np.ndarray, ...]:
        """Returns the objects of the images `rows`: image (its place in `rows`), rectangles, labels, ignored, areas.

        Rectangles are (M, 4) float64: x, y, width and height, as in a file of COCO's form.
        """
        a = self.annotated.objects
        owners, chosen = self._gather(self.indices[rows])
        return owners, a.rectangles[chosen], a.labels[chosen], a.ignored[chosen], a.areas[chosen]

    def note_training(self, variant: str) -> None:
        """Counts in `broken` which objects and images do not train, and appends a sentence for each reason to `notes`.

        Raises ValueError if none does.
        """
        a = self.annotated.objects
        owners, chosen = self._gather(self.indices)
        for what, rows in a.reasons(self.annotated.sizes, variant).items():
            if n := int(np.count_nonzero(rows[chosen])):
                at = int(np.flatnonzero(rows[chosen])[0])
                image = int(self.indices[owners[at]])
                first = f'annotation {a.ids[chosen[at]]} of ' if a.crowds else ''
                self._count(what, n, f'{first}{short(self.annotated.paths[image], 200)}')
        for what, rows in self._useless_images(variant).items():
            if n := int(np.count_nonzero(rows)):
                self._count(what, n, short(self.annotated.paths[int(self.indices[rows.argmax()])], 200))
        if not (counts := self.count_training(variant)).any():
            raise ValueError(f'{self.name}: none of its {len(self):,} images has an object to train on'
                             f'{"".join(f"; {note}" for note in self.notes)}')
        if len(unseen := np.flatnonzero(counts == 0)):
            self.notes.append(f'classes without an object to train on: {len(unseen)} of {len(counts)}, '
                              f'{name_some([self.classes[i] for i in unseen.tolist()])}')

    def count_training(self, variant: str) -> np.ndarray:
        """Returns how many objects of each class train, (classes,) int64."""
        chosen = self._gather(self.indices[self.training_indices(variant)])[1]
        chosen = chosen[self._training(variant)[chosen]]
        return np.bincount(self.annotated.objects.labels[chosen], minlength=len(self.classes))

    def read(self, index: int) -> np.ndarray:
        """Returns (H, W, 3) uint8, as stored: an orientation in the EXIF data is not applied.

        Raises UnreadableError if the image cannot be decoded, and DataError if its size is not that of its annotation.
        """
        row = int(self.indices[index])
        name, data = self.images.name_of(row), self.images.stored_bytes(row)
        image, (height, width) = decode(bytearray(data), name), self.sizes[index].tolist()
        if image.shape[:2] == (height, width):
            if b'Exif' in data[:WITHIN] and not self._turned and (turn := find_orientation(data)) != 1:
                self._turned.append(name)
                announce(f'{name}: its EXIF data turn or mirror it (orientation {turn}), and perhaps others; this is '
                         'not applied, so boxes must be those of the stored pixels')
            return image
        found = f'{name} has {image.shape[1]} x {image.shape[0]} pixels, but its annotation says {width} x {height}'
        turn = find_orientation(data)
        if turn > 4 and image.shape[:2] == (width, height):
            raise DataError(f'{found}: boxes are those of the image as its EXIF data turn it (orientation {turn}), '
                            'which is not applied; store it upright, without EXIF data')
        raise DataError(f'{found}; give the image that was annotated, or annotate this one')

    def _gather(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the objects of these images as rows of the arrays, and before it the place of each one's image."""
        starts = self.annotated.objects.starts
        counts = starts[images + 1] - starts[images]
        owners = np.repeat(np.arange(len(images)), counts)
        first = np.repeat(np.cumsum(counts) - counts, counts)
        return owners, np.arange(len(owners)) - first + starts[images][owners]

    def _training(self, variant: str) -> np.ndarray:
        """Returns which of all objects train."""
        if variant not in self._trains:
            a = self.annotated.objects
            useless = [*a.reasons(self.annotated.sizes, variant).values()]
            self._trains[variant] = ~np.logical_or.reduce([np.zeros(len(a.labels), bool), *useless])
        return self._trains[variant]

    def _useless_images(self, variant: str) -> dict[str, np.ndarray]:
        """Returns which images do not train: text -> (N,) bool."""
        counted = np.ones(len(self.annotated.objects.labels), np.int64)
        if variant == 'detectron2' and self.crowds:
            counted -= self.annotated.objects.ignored
        owners, chosen = self._gather(self.indices)
        without = np.bincount(owners, counted[chosen], minlength=len(self)) == 0
        small = (self.sizes.min(1) < MIN_SIDE) if variant == 'mmdet' else np.zeros(len(self), bool)
        return {'images without an object': without,
                f'images with a shorter side below {MIN_SIDE} px': small & ~without}

    def _count(self, what: str, n: int, first: str) -> None:
        self.broken[what] = n
        self.notes.append(f'{what} do not train: {n:,}, the first is {first}')


@dataclass
class ObjectPair(Pair):
    """Training and test images with objects of the same classes."""

    train: ObjectImages
    test: ObjectImages


def open_objects(
    kind: str, root: str | Path, variant: str, partial: bool = False, val_share: float = 0.2, seed: int = 0,
) -> ObjectPair:
    """Opens the training and test images of a data set with their objects; `kind` is one of KINDS.

    In a 'folder' without test images, a seeded share of the images is held out. `variant` says how corners of VOC's
    boxes are read, and what trains.

    Raises FileNotFoundError if a file or folder is missing, and ValueError if an annotation has no meaning, no object
    is left to train on or to measure, or, unless `partial`, the number of images or classes is not that of the set.
    """
    if kind not in KINDS:
        raise ValueError(f'--dataset {kind}: no such data set; choose one of {", ".join(KINDS)}')
    if variant not in VARIANTS:
        raise ValueError(f'--variant {variant}: must be one of {", ".join(VARIANTS)}')
    train, test = KINDS[kind](Path(root), variant, partial)
    held_out = ''
    if test is None:
        train, test, held_out = _hold_out(train, val_share, seed)
    for images, what in ((train, 'to train on'), (test, 'held out to test on')):
        ignored = images.annotation_table(np.arange(len(images)))[3]
        if ignored.all():
            which = f'the {len(images):,} images {what}' if held_out else f'its {len(images):,} images'
            raise ValueError(f'{images.name}: none of {which} has an object'
                             f'{" that is not ignored" if len(ignored) else ""}; a detector needs at least one')
    train.note_training(variant)
    counts = {'train': len(train), 'test': len(test), 'classes': len(train.classes)}
    if not partial and (found := deviation(kind, counts)):
        raise ValueError(refusal(kind, str(root), found))
    return ObjectPair(train, test, kind, len(train.classes), counts, held_out)


def _hold_out(images: ObjectImages, share: float, seed: int) -> tuple[ObjectImages, ObjectImages, str]:
    *parts, text = hold_out_rows(images, share, seed)
    train, test = (ObjectImages(images.images, images.annotated, images.indices[rows]) for rows in parts)
    return train, test, text


def _open_images(annotated: Annotated, root: Path, rows: np.ndarray | None = None) -> ObjectImages:
    listing = Listing()
    for path in annotated.paths:
        listing.add(path)
    files = FileImages(root, listing.make_index(), annotated.name)
    return ObjectImages(files, annotated, np.arange(len(files)) if rows is None else rows)


def _open_coco_file(
    kind: str, file: Path, images: Path | None, partial: bool, known: ObjectImages | None = None,
) -> ObjectImages:
    """Opens a file in COCO's form with images in a folder, by default where a user's are found."""
    annotated = parse_coco(file, None if known is None else known.annotated)
    images = images or find_images(file, annotated.paths)
    present = find_present(kind, images, annotated.paths, file.name, partial)
    return _open_images(annotated, images, np.flatnonzero(present))


def _open_voc0712(root: Path, variant: str, partial: bool) -> tuple[ObjectImages, ObjectImages]:
    train, test = open_voc0712(root, variant, partial)
    return _open_images(train, train.root), _open_images(test, test.root)


def _open_coco(root: Path, variant: str, partial: bool) -> tuple[ObjectImages, ObjectImages]:
    above = next((root / p for p in ('.', 'coco', 'COCO') if (root / p / 'annotations').is_dir()), root)
    found: list[ObjectImages] = []
    for part in ('train2017', 'val2017'):
        file = above / 'annotations' / f'instances_{part}.json'
        if not file.is_file() or not (above / part).is_dir():
            missing = (above / part) if file.is_file() else file
            raise FileNotFoundError(f'{root} is not COCO: it has no {missing.relative_to(root)}; unpack '
                                    f'{SIZES["coco"].source} there')
        found.append(_open_coco_file('coco', file, above / part, partial, found[0] if found else None))
    return found[0], found[1]


def _open_folder(root: Path, variant: str, partial: bool) -> tuple[ObjectImages, ObjectImages | None]:
    if root.is_file():
        return _open_json(root, partial)
    if not root.is_dir():
        raise FileNotFoundError(f'{root}: no such file or folder; {guess_path(root) or FORMS}')
    voc, files = find_voc(root), _list_json(root)
    if voc and files:
        raise ValueError(f"{root} has annotations in COCO's form, {files[0]}, and in VOC's, {voc[0] / voc[2]}; give "
                         'the JSON file itself, or a folder with one of the two')
    if voc:
        annotated, train, test = open_voc_folder(*voc, variant, partial)
        opened = _open_images(annotated, annotated.root, train)
        return opened, None if test is None else ObjectImages(opened.images, annotated, test)
    training = [file for file in files if part_of(file.name) == 'train' or part_of(file.parent.name) == 'train']
    training = [file for file in training if file.name.startswith('instances')] or training
    training = training or (files if len(files) == 1 else [])
    if len(training) != 1:
        named = name_some([os.path.relpath(file, root) for file in training or files])
        raise ValueError(f'{root} has {len(training or files)} JSON files that may be the one to train on ({named}); '
                         'give that file itself, or call one train and the other val' if files else
                         f'{root}: no annotations; {FORMS}')
    return _open_json(training[0], partial)


def _open_json(file: Path, partial: bool) -> tuple[ObjectImages, ObjectImages | None]:
    """Opens a user's file in COCO's form, and the one to test on if there is one of the same name but for the part."""
    train = _open_coco_file('folder', file, None, partial)
    val = find_validation_list(file)
    if val is None and part_of(file.parent.name) == 'train':  # train/annotations.json and val/annotations.json
        beside = (file.parent.with_name(name) / file.name for name in VALIDATION)
        val = next((path for path in beside if path.is_file()), None)
    return train, None if val is None else _open_coco_file('folder', val, None, partial, train)


def _list_json(root: Path) -> list[Path]:
    """Returns the JSON files in `root`, in annotations/, and in folders of parts, sorted."""
    folders = [root, *(path for path in sorted(root.iterdir()) if path.is_dir() and (
        path.name.lower() == 'annotations' or part_of(path.name)))]
    return [file for folder in folders for file in sorted(folder.glob('*.json')) if not is_passed_over(file.name)]


FORMS = ("DATA must be a JSON file in COCO's form, a folder with one or with one for each part, or a folder in VOC's "
         'form with JPEGImages and Annotations')
KINDS: dict[str, Callable[[Path, str, bool], tuple[ObjectImages, ObjectImages | None]]] = {
    'voc0712': _open_voc0712, 'coco': _open_coco, 'folder': _open_folder}
