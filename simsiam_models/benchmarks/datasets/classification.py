"""The data sets of the benchmarks as pairs of labelled images, in the layouts in which they are distributed.

imagenet    train/ and val/ with a folder per class. Or val/ is flat, and its images are named by meta/train.txt and
            meta/val.txt (`path label` lines), or by Kaggle's LOC_val_solution.csv, which may lie up to three folders
            above. Either may lie below ILSVRC/Data/CLS-LOC
places205   trainvalsplit_places205/{train,val}_places205.csv, with images below
            data/vision/torralba/deeplearning/images256 or images256
inat18      train2018.json and val2018.json, or meta/train.txt and meta/val.txt, with images in train_val2018
cifar10, cifar100   the binary version
folder      train/ and one of val/, valid/, validation/, test/ with a folder per class

All but places205 and inat18 also take any form that data.open_data opens, such as hf:ILSVRC/imagenet-1k. A data set
whose counts are not those of the complete set (see `sizes`) is an error, unless `partial` is set.
"""
import logging
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ...data.opening import open_data
from ...data.readers.images import EXTENSIONS, FileImages, FolderImages, Images
from ...data.readers.index import Listing, open_index
from ..samples import Pair, Subset
from .lists import open_list, parse_inat, parse_list, parse_solution
from .sizes import SIZES, deviation, refusal

VALIDATION = ('val', 'valid', 'validation', 'test')  # the first of these that exists is used
KAGGLE = ('.', 'ILSVRC/Data/CLS-LOC', 'Data/CLS-LOC')  # below the given folder, which may be above ILSVRC or ILSVRC
SOLUTION = 'LOC_val_solution.csv'
PLACES = 'data/vision/torralba/deeplearning/images256'

_logger = logging.getLogger('simsiam_models')


def open_pair(kind: str, root: str | Path, partial: bool = False) -> Pair:
    """Opens the training and test images of a data set; `kind` is one of KINDS.

    Raises FileNotFoundError if a file or folder is missing, and ValueError if images have no labels, or, unless
    `partial`, if the number of images or classes is not that of the complete set.
    """
    if kind not in KINDS:
        raise ValueError(f'--dataset {kind}: no such data set; choose one of {", ".join(KINDS)}')
    train, test = KINDS[kind](str(root), partial)
    for images, part in ((train, 'training'), (test, 'test')):
        if images.labels is None:
            raise ValueError(f'{images.name}: the {part} images have no labels; a benchmark needs a class for each')
    if test.classes != train.classes:  # some may have no test image
        number = {name: i for i, name in enumerate(train.classes)}
        if unknown := [name for name in test.classes if name not in number]:
            raise ValueError(
                f'{root}: {len(unknown)} of {len(test.classes)} test classes have no training image, the first is '
                f'{unknown[0]!r}; both parts need the same classes under the same names')
        labels = np.array([number[name] for name in test.classes], np.int32)[test.labels]
        test = Subset(test, np.arange(len(test)), labels, train.classes)
    counts = {
        'train': len(train), 'test': len(test), 'classes': int(np.unique(train.labels).size),
        'test_classes': int(np.unique(test.labels).size)}
    if not partial and (found := deviation(kind, counts)):
        raise ValueError(refusal(kind, str(root), found))
    return Pair(train, test, kind, len(train.classes), counts)


def _open_any(root: str, partial: bool) -> tuple[Images, Images]:
    if root.partition(':')[0] in ('hf-stream', 'pipe', 'http', 'https'):
        raise ValueError(f'{root}: a stream has no labels; give data that can be read in any order, such as hf:REPO')
    train, test = open_data(root)
    if test is None:
        raise ValueError(f'{root} has no labelled validation images of the same classes as the training images; a '
                         'benchmark needs both')
    return train, test


def _open_folder(root: str, partial: bool) -> tuple[Images, Images]:
    path = Path(root)
    if not (path / 'train').is_dir() or (path / 'dataset_dict.json').is_file():
        return _open_any(root, partial)
    test = next((path / name for name in VALIDATION if (path / name).is_dir()), None)
    if test is None:
        raise FileNotFoundError(
            f'{root} has train, but none of {", ".join(VALIDATION)}; a benchmark needs images to measure on')
    return FolderImages(path / 'train'), FolderImages(test)


def _open_imagenet(root: str, partial: bool) -> tuple[Images, Images]:
    path = next((Path(root, tree) for tree in KAGGLE if Path(root, tree, 'train').is_dir()), None)
    if path is None or not (path / 'val').is_dir() or (path / 'dataset_dict.json').is_file():
        return _open_folder(str(path or root), partial)
    train, val = path / 'train', path / 'val'
    lists = [path / 'meta' / f'{part}.txt' for part in ('train', 'val')]
    missing = [str(file) for file in lists if not file.is_file()]
    above = Path(os.path.abspath(path))
    solution = next((p / SOLUTION for p in (above, *above.parents[:3]) if (p / SOLUTION).is_file()), None)
    folders, loose = _list_entries(val)
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


def _list_entries(folder: Path) -> tuple[list[str], list[str]]:
    """Returns the names of the folders and of the images directly in `folder`, without those that start with a dot."""
    entries = sorted((e for e in os.scandir(folder) if not e.name.startswith('.')), key=lambda e: e.name)
    return (
        [e.name for e in entries if e.is_dir()],
        [e.name for e in entries if e.name.lower().endswith(EXTENSIONS) and not e.is_dir()])


def _open_class_folders(root: Path) -> FileImages:
    """Opens the images of a folder per class, except those in folders whose names start with a dot."""
    folders, loose = _list_entries(root)
    if folders and loose:
        raise ValueError(
            f'{root}: the image {loose[0]} lies beside the folder {folders[0]}, but with a folder per class each image '
            'belongs in one of them; move away whatever does not belong there')
    index = open_index(root, EXTENSIONS)
    if loose or index.labels is not None and not any(name.startswith('.') for name in index.classes):
        return FolderImages(root)
    paths = [path for i in range(len(index)) if not (path := os.fsdecode(index.path(i))).startswith('.')]
    if not paths:
        raise FileNotFoundError(f'{root}: its folders hold no image; looked for {" ".join(EXTENSIONS)}')
    _logger.warning(f'{root}: {len(index) - len(paths):,} images whose paths begin with a dot are left out')
    listing = Listing()
    for path in paths:
        listing.add(path)
    listing.label_runs(list(Counter(path.partition(os.sep)[0] for path in paths).items()))
    return FileImages(root, listing.make_index(), str(root))


def _open_places205(root: str, partial: bool) -> tuple[Images, Images]:
    given, spellings = Path(root), ('Places205', 'places205')
    tried = [given, *((given.parent if given.name in spellings else given) / name for name in spellings)]
    path = next((p for p in tried if (p / 'trainvalsplit_places205').is_dir()), None)
    images = next((p for p in (path / PLACES, path / 'images256') if p.is_dir()), None) if path else None
    if images is None:
        raise FileNotFoundError(
            f'{root} is not Places205: {"trainvalsplit_places205" if path is None else PLACES} is not below it; unpack '
            f'{SIZES["places205"].source} there')
    return tuple(
        open_list(path / 'trainvalsplit_places205' / f'{part}_places205.csv', images, partial, 'places205')
        for part in ('train', 'val'))


def _open_inat18(root: str, partial: bool) -> tuple[Images, Images]:
    images, parts = Path(root, 'train_val2018'), []
    if not images.is_dir():
        raise FileNotFoundError(f'{root} has no folder {images.name}; unpack {SIZES["inat18"].source} there')
    for part in ('train', 'val'):
        names = f'{part}2018.json', f'annotations/{part}2018.json', f'meta/{part}.txt'
        file = next((Path(root, name) for name in names if Path(root, name).is_file()), None)
        if file is None:
            raise FileNotFoundError(f'{root} has none of {", ".join(names)}; one of them must name the images')
        parse = parse_inat if file.suffix == '.json' else parse_list
        parts.append(open_list(file, images, partial, 'inat18', parse))
    return tuple(parts)


KINDS: dict[str, Callable[[str, bool], tuple[Images, Images]]] = {
    'imagenet': _open_imagenet, 'places205': _open_places205, 'inat18': _open_inat18, 'cifar10': _open_any,
    'cifar100': _open_any, 'folder': _open_folder}
