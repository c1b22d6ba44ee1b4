"""The data sets of the benchmarks as pairs of labelled images, in the layouts in which they are distributed.

imagenet    train/ and val/ with a folder per class. Or val/ is flat, and its images are named by meta/train.txt and
            meta/val.txt (`path label` lines), or by Kaggle's LOC_val_solution.csv, which may lie up to three folders
            above. Either may lie below ILSVRC/Data/CLS-LOC
places205   trainvalsplit_places205/{train,val}_places205.csv, with images below
            data/vision/torralba/deeplearning/images256 or images256
inat18      train2018.json and val2018.json, or meta/train.txt and meta/val.txt, with images in train_val2018
cifar10, cifar100   the binary version
folder      train/ and one of val/, valid/, validation/, test/ with a folder per class; or a folder per class alone, of
            which a share is held out

Parts are known by their names as in every other command (see `data.parts`).

All but places205 and inat18 also take any form that data.open_data opens, such as hf:ILSVRC/imagenet-1k. A data set
whose counts are not those of the complete set (see `sizes`) is an error, unless `partial` is set.
"""
import os
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np

from ...data.opening import announce_unusable, open_parts
from ...data.parts import list_entries
from ...data.readers.images import FolderImages, Images
from ...data.readers.names import VALIDATION
from ..samples import Pair, Subset, check_every_class_trains, check_several_classes, hold_out
from .lists import open_list, parse_inat, parse_list, parse_solution
from .sizes import SIZES, deviation, refusal

KAGGLE = ('.', 'ILSVRC/Data/CLS-LOC', 'Data/CLS-LOC')  # below the given folder, which may be above ILSVRC or ILSVRC
SOLUTION = 'LOC_val_solution.csv'
PLACES = 'data/vision/torralba/deeplearning/images256'


def open_pair(kind: str, root: str | Path, partial: bool = False, share: float = 0.2, seed: int = 0) -> Pair:
    """Opens the training and test images of a data set; `kind` is one of KINDS.

    In a 'folder' without test images, a seeded `share` of each class is held out to test on.

    Raises FileNotFoundError if a file or folder is missing, and ValueError if images have no labels or all the same
    one, or, unless `partial`, if a class has no training image, or the number of images or classes is not that of the
    complete set.
    """
    if kind not in KINDS:
        raise ValueError(f'--dataset {kind}: no such data set; choose one of {", ".join(KINDS)}')
    train, test = KINDS[kind](str(root), partial)
    if test is None and kind != 'folder':
        raise FileNotFoundError(
            f'{root} has no validation part (none of {", ".join(VALIDATION)}); a benchmark needs images to measure on')
    held_out = ''
    if test is None and train.labels is not None:
        check_several_classes(train)
        train, test, held_out = hold_out(train, share, seed)
    parts = [(train, 'training'), *([] if test is None else [(test, 'test')])]
    for images, part in parts:
        if images.labels is None:
            notes = ''.join(f'; {note}' for note in getattr(images, 'notes', []))
            raise ValueError(
                f'{images.name}: the {part} images have no labels; give one subfolder per class, or a list with '
                f'labels{notes}')
    check_several_classes(train)
    test = cast(Images, test)  # only images without labels have none
    train_labels, test_labels = cast(np.ndarray, train.labels), cast(np.ndarray, test.labels)
    if test.classes != train.classes:  # some may have no test image
        number = {name: i for i, name in enumerate(train.classes)}
        if unknown := [name for name in test.classes if name not in number]:
            raise ValueError(
                f'{root}: {len(unknown)} of {len(test.classes)} test classes have no training image, the first is '
                f'{unknown[0]!r}; both parts need the same classes under the same names')
        labels = np.array([number[name] for name in test.classes], np.int32)[test_labels]
        test, test_labels = Subset(test, np.arange(len(test)), labels, train.classes), labels
    counts = {
        'train': len(train), 'test': len(test), 'classes': int(np.unique(train_labels).size),
        'test_classes': int(np.unique(test_labels).size)}
    if not partial and (found := deviation(kind, counts)):
        raise ValueError(refusal(kind, str(root), found))
    if not partial:
        check_every_class_trains(train)
    return Pair(train, test, kind, len(train.classes), counts, held_out)


def _open_any(root: str, partial: bool) -> tuple[Images, Images | None]:
    if root.partition(':')[0] in ('hf-stream', 'pipe', 'http', 'https'):
        raise ValueError(f'{root}: a stream has no labels; give data with random access, such as hf:REPO')
    train, test, unusable = open_parts(root)
    if unusable and unusable.is_test and train.labels is not None:
        announce_unusable(unusable)
        return train, None
    # Perhaps only some classes have no test image.
    return cast(Images, train), test if unusable is None else unusable.images


def _open_imagenet(root: str, partial: bool) -> tuple[Images, Images | None]:
    path = next((Path(root, tree) for tree in KAGGLE if Path(root, tree, 'train').is_dir()), None)
    if path is None or not (path / 'val').is_dir() or (path / 'dataset_dict.json').is_file():
        return _open_any(str(path or root), partial)
    train, val = path / 'train', path / 'val'
    lists = [path / 'meta' / f'{part}.txt' for part in ('train', 'val')]
    missing = [str(file) for file in lists if not file.is_file()]
    above = Path(os.path.abspath(path))
    solution = next((p / SOLUTION for p in (above, *above.parents[:3]) if (p / SOLUTION).is_file()), None)
    folders, loose = list_entries(val)
    if folders and (len(loose) <= len(folders) or missing and not solution):
        return _open_class_folders(train), _open_class_folders(val)
    if not missing:
        return open_list(lists[0], train, partial, 'imagenet'), open_list(lists[1], val, partial, 'imagenet')
    if not solution:
        raise FileNotFoundError(
            f'{val} has no folder per class and no list: sort the images into folders like those of train; or put '
            f'{" and ".join(missing)} there, with `path label` lines; or put {SOLUTION} of Kaggle into {path} or up '
            'to three folders above it')
    return _open_class_folders(train), open_list(solution, val, partial, 'imagenet', parse_solution)


def _open_class_folders(root: Path) -> FolderImages:
    """Opens the images of a folder per class."""
    folders, loose = list_entries(root)
    if folders and loose:
        raise ValueError(
            f'{root}: the image {loose[0]} lies beside the folder {folders[0]}, but with a folder per class each image '
            'belongs in one of them; move away whatever does not belong there')
    return FolderImages(root)


def _open_places205(root: str, partial: bool) -> tuple[Images, Images]:
    given, spellings = Path(root), ('Places205', 'places205')
    tried = [given, *((given.parent if given.name in spellings else given) / name for name in spellings)]
    path = next((p for p in tried if (p / 'trainvalsplit_places205').is_dir()), None)
    images = next((p for p in (path / PLACES, path / 'images256') if p.is_dir()), None) if path else None
    if path is None or images is None:
        raise FileNotFoundError(
            f'{root} is not Places205: {"trainvalsplit_places205" if path is None else PLACES} is not below it; unpack '
            f'{SIZES["places205"].source} there')
    lists = path / 'trainvalsplit_places205'
    return (open_list(lists / 'train_places205.csv', images, partial, 'places205'),
            open_list(lists / 'val_places205.csv', images, partial, 'places205'))


def _open_inat18(root: str, partial: bool) -> tuple[Images, Images]:
    images, parts = Path(root, 'train_val2018'), list[Images]()
    if not images.is_dir():
        raise FileNotFoundError(f'{root} has no folder {images.name}; unpack {SIZES["inat18"].source} there')
    for part in ('train', 'val'):
        names = f'{part}2018.json', f'annotations/{part}2018.json', f'meta/{part}.txt'
        file = next((Path(root, name) for name in names if Path(root, name).is_file()), None)
        if file is None:
            raise FileNotFoundError(f'{root} has none of {", ".join(names)}; one of them must name the images')
        parse = parse_inat if file.suffix == '.json' else parse_list
        parts.append(open_list(file, images, partial, 'inat18', parse))
    return parts[0], parts[1]


KINDS: dict[str, Callable[[str, bool], tuple[Images, Images | None]]] = {
    'imagenet': _open_imagenet, 'places205': _open_places205, 'inat18': _open_inat18, 'cifar10': _open_any,
    'cifar100': _open_any, 'folder': _open_any}
