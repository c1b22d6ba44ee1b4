"""The data sets of segmentation: images with a mask each, in the layouts in which they are distributed.

voc12aug     VOCdevkit with VOC2012: train.txt with the masks of SegmentationClass, the images of SBD with those of
             SegmentationClassAug, and val.txt to test on
cityscapes   leftImg8bit and gtFine, with train and val
folder       a user's own: images and masks, in folders of these names, paired by their own names. The parts, train and
             val, are folders in them, or above them, or lists in VOC's form. Without a part to test on, a share is
             held out
"""
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from PIL import Image

from ...data.readers.decode import DataError, UnreadableError, decode
from ...data.readers.images import FileImages
from ...data.readers.index import Listing, digest
from ...data.threads import Job, run_in_order
from ...runtime.distributed import cores
from ...runtime.messages import announce, name_some, printable
from ..samples import Pair, hold_out_rows
from .cityscapes import list_cityscapes
from .exif import WITHIN, is_turned
from .mask_files import IGNORED, Classes, decode_mask
from .mask_folders import find_pairs, read_classes
from .sizes import deviation, refusal
from .voc_masks import list_voc12aug


class MaskedImages:
    """Images and their masks, in the same order."""

    labels = None  # an image has no class

    def __init__(self, images: FileImages, masks: FileImages, classes: Classes, indices: np.ndarray) -> None:
        self.images, self.masks, self.indices, self.kinds = images, masks, indices, classes
        self.name, self.classes = images.name, classes.names
        self.notes: list[str] = []  # sentences on what may not be what it seems
        self._turned: list[str] = []

    def __len__(self) -> int:
        return len(self.indices)

    @cached_property
    def digest(self) -> str:
        sizes = self.masks.stored_sizes(self.indices)
        return digest(json.dumps([self.images.digest, self.masks.digest, self.kinds.names, self.kinds.ids]),
                      self.indices.astype('<i8'), sizes.astype('<i8'))

    def mask_path(self, index: int) -> Path:
        """Returns the path of a mask, ending in .png, relative to the folder that holds all masks of this part."""
        return self.masks.path(int(self.indices[index])).relative_to(self._above).with_suffix('.png')

    @cached_property
    def _above(self) -> str:
        return os.path.commonpath([self.masks.path(row).parent for row in self.indices.tolist()])

    def read(self, index: int) -> np.ndarray:
        """Returns (H, W, 3) uint8; raises UnreadableError if the image cannot be decoded."""
        return self.images.read(int(self.indices[index]))

    def read_mask(self, index: int) -> np.ndarray:
        """Returns the labels of the pixels, (H, W) uint8: positions in `classes`, and 255 for ignored ones.

        Raises UnreadableError if the mask cannot be decoded, and DataError if it does not hold ids of the classes.
        """
        row = int(self.indices[index])
        ids = decode_mask(self.masks.stored_bytes(row), self.masks.name_of(row))
        labels = self.kinds.table[ids]
        if labels.min(initial=0) < 0:
            y, x = np.argwhere(labels < 0)[0]
            raise DataError(
                f'{self.masks.name_of(row)}: the id {ids[y, x]} at column {x}, row {y} is of no class; the ids of '
                f'classes are {describe_ids(self.kinds.ids)}, and ignored is {describe_ids(list(self.kinds.ignored))}')
        small: np.ndarray = labels.astype(np.uint8)
        return small

    def read_pair(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns `read` and `read_mask`; raises DataError if their sizes differ."""
        row = int(self.indices[index])
        name, data = self.images.name_of(row), self.images.stored_bytes(row)
        image, mask = decode(bytearray(data), name), self.read_mask(index)
        turn = is_turned(data)
        check_size(name, image.shape[:2], self.masks.name_of(row), mask.shape, turn)
        if turn and not self._turned:
            self._turned.append(name)
            announce(f'{name}: its EXIF data turn or mirror it (orientation {turn}), and perhaps others; this is not '
                     'applied, so masks must be those of the stored pixels')
        return image, mask


def describe_ids(ids: list[int]) -> str:
    """Returns '0 to 20' for ids without gaps, else all of them or the first few."""
    if len(ids) > 2 and ids == list(range(ids[0], ids[0] + len(ids))):
        return f'{ids[0]} to {ids[-1]}'
    return ', '.join(map(str, ids[:40])) + (', ...' if len(ids) > 40 else '')


def check_size(image: str, size: tuple[int, int], mask: str, mask_size: tuple[int, int], turn: int) -> None:
    """Raises DataError if an image and its mask, (height, width), are of different sizes."""
    if tuple(size) == tuple(mask_size):
        return
    found = f'{image} has {size[1]} x {size[0]} pixels, but its mask {mask} has {mask_size[1]} x {mask_size[0]}'
    if turn > 4 and size[::-1] == mask_size:
        raise DataError(f'{found}: the mask is that of the image as its EXIF data turn it (orientation {turn}), which '
                        'is not applied; store the image upright, without EXIF data')
    raise DataError(f'{found}; give the image that the mask was drawn for')


@dataclass
class MaskPair(Pair):
    """Training and test images with masks of the same classes."""

    train: MaskedImages
    test: MaskedImages
    notes: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """Returns what there is, in a line for each sentence."""
        lines = [f'{len(self.train):,} training images and {len(self.test):,} test images of {self.classes} classes']
        if self.held_out:
            lines.append(f'the test images are {self.held_out}')
        return '\n'.join(map(printable, [*lines, *self.notes]))


def make_source(root: Path, pairs: Sequence[tuple[str, str]], name: str, classes: Classes) -> MaskedImages:
    """Returns images and masks from pairs of paths below `root`."""
    files = []
    for side, what in ((0, name), (1, f'{name}, masks')):
        listing = Listing()
        for pair in pairs:
            listing.add(pair[side])
        files.append(FileImages(root, listing.make_index(), what))
    return MaskedImages(files[0], files[1], classes, np.arange(len(pairs)))


def hold_out_images(images: MaskedImages, share: float, seed: int) -> tuple[MaskedImages, MaskedImages, str]:
    """Returns the images to train on, a seeded share to test on, and a text that says so."""
    *parts, text = hold_out_rows(images, share, seed)
    train, test = (MaskedImages(images.images, images.masks, images.kinds, images.indices[rows]) for rows in parts)
    return train, test, text


def find_ids(images: MaskedImages) -> np.ndarray:
    """Returns which ids each mask has, (N, 256) bool, after checking the sizes of images and masks.

    Masks that cannot be read have none.

    Raises:
        DataError: a mask is not in ids, or of another size than its image.
    """
    def look(row: int, found: list[np.ndarray]) -> None:
        name, image = images.masks.name_of(row), images.images.name_of(row)
        try:
            ids = decode_mask(images.masks.stored_bytes(row), name)
            data = images.images.stored_bytes(row, 0, WITHIN)
        except UnreadableError:
            return
        found.append(np.bincount(ids.ravel(), minlength=IGNORED + 1) > 0)
        try:
            with Image.open(io.BytesIO(data)) as opened:
                size = opened.size[::-1]
        # PIL raises almost anything for a broken file, which counts as unreadable later, or a header that is too long.
        except Exception:
            return
        check_size(image, size, name, ids.shape, is_turned(data))

    present = np.zeros((len(images), IGNORED + 1), bool)

    def jobs() -> Iterator[Job]:
        for row in images.indices.tolist():
            found: list[np.ndarray] = []
            yield found, [partial(look, row, found)]

    with ThreadPoolExecutor(min(16, cores()), 'simsiam-data') as threads:
        for i, found in enumerate(run_in_order(threads, jobs(), 64)):
            for ids in found:
                present[i] = ids
    return present


def open_masks(
    kind: str, root: str | Path, partial: bool = False, val_share: float = 0.2, seed: int = 0,
    classes: Path | None = None,
) -> MaskPair:
    """Opens the training and test images of a data set with their masks; `kind` is one of KINDS.

    In a 'folder' without test images, a seeded share of the images is held out. `classes` is a file that names the
    classes of a folder, by default classes.txt in it; without one they are the ids found.

    Raises FileNotFoundError if a file or folder is missing, and ValueError or DataError if images and masks do not
    match, masks have ids of no class or, unless `partial`, the number of images is not that of the set.
    """
    if kind not in KINDS:
        raise ValueError(f'--dataset {kind}: no such data set; choose one of {", ".join(KINDS)}')
    if classes is not None and kind != 'folder':
        raise ValueError(f'--classes {classes}: names the classes of --dataset folder; {kind} has its own')
    notes: list[str] = []
    train, test = KINDS[kind](Path(root), partial, classes, notes)
    held_out = ''
    if test is None:
        train, test, held_out = hold_out_images(train, val_share, seed)
    for images in (train, test):
        if not len(images):
            raise ValueError(f'{images.name}: no image with a mask')
    counts = {'train': len(train), 'test': len(test), 'classes': len(train.classes)}
    if not partial and (found := deviation(kind, counts)):
        raise ValueError(refusal(kind, str(root), found))
    return MaskPair(train, test, kind, len(train.classes), counts, held_out, notes=notes)


def report_classes(part: str, names: list[str], seen: np.ndarray) -> list[str]:
    """Returns a sentence on the classes that no mask of a part has; `seen`: (classes,) bool."""
    missing = [names[i] for i in np.flatnonzero(~seen)]
    return [f'classes that no {part}mask has: {len(missing)} of {len(names)} ({name_some(missing)})'] if missing else []


def check_labels(parts: Sequence[MaskedImages], scans: Sequence[np.ndarray], kinds: Classes) -> None:
    """Raises ValueError if the masks to train on have fewer than two classes, or those to test on none."""
    for images, scan, least in zip(parts, scans, (2, 1), strict=False):
        seen = np.asarray(scan.any(axis=0))
        ids = [i for i in kinds.ids if seen[i]]
        if len(ids) < least:
            found = [f'id {i}' for i in ids]
            if seen[IGNORED] and IGNORED not in ids:
                found.append(f'{IGNORED} (ignored)')
            only = f'only {" and ".join(found)}' if found else 'no class id'
            raise ValueError(f'{images.name}: its masks have {only}; ' + (
                'at least two classes are needed, such as 0 and 1' if least == 2 else 'there is nothing to test on'))


def open_folder(
    root: Path, partial: bool, file: Path | None, notes: list[str],
) -> tuple[MaskedImages, MaskedImages | None]:
    """Opens a user's images and masks, after reading all masks."""
    parts = find_pairs(root, partial)
    opened = [make_source(root, pairs, str(root) + (f' ({part})' if part else ''), Classes([], []))
              for part, pairs in parts]
    scans = [find_ids(images) for images in opened]
    found = np.flatnonzero(np.any([scan.any(0) for scan in scans], 0)).tolist()
    file = file or next((p for p in (root / 'classes.txt',) if p.is_file()), None)
    kinds = read_classes(file) if file else Classes([str(i) for i in found if i != IGNORED],
                                                    [i for i in found if i != IGNORED])
    for images, scan in zip(opened, scans, strict=True):
        images.kinds, images.classes = kinds, kinds.names
        if (unknown := (scan & (kinds.table < 0)).any(1)).any():
            images.read_mask(int(unknown.argmax()))  # raises
    check_labels(opened, scans, kinds)
    for (part, _), scan in zip(parts, scans, strict=True):
        notes += report_classes({'train': 'training ', 'val': 'test '}.get(part, ''), kinds.names,
                                np.any(scan, axis=0)[kinds.ids])
    if file is None:
        notes.append(f'no classes.txt: the classes are the ids found, {describe_ids(kinds.ids)}')
    return opened[0], opened[1] if len(opened) > 1 else None


def open_voc12aug(root: Path, partial: bool, *_: object) -> tuple[MaskedImages, MaskedImages]:
    """Opens VOC2012 with SBD's masks."""
    folder, train, val, names = list_voc12aug(root, partial)
    classes = Classes(names, list(range(len(names))))
    return (make_source(folder, train, f'{folder} (train and aug)', classes),
            make_source(folder, val, f'{folder} (val)', classes))


def open_cityscapes(root: Path, partial: bool, *_: object) -> tuple[MaskedImages, MaskedImages]:
    """Opens Cityscapes with fine masks."""
    folder, parts, classes = list_cityscapes(root, partial)
    train, test = (make_source(folder, pairs, f'{folder} ({part})', classes) for part, pairs in parts.items())
    return train, test


KINDS: dict[str, Callable[..., tuple[MaskedImages, MaskedImages | None]]] = {
    'voc12aug': open_voc12aug, 'cityscapes': open_cityscapes, 'folder': open_folder}
