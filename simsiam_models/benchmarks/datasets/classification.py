"""The data sets of the benchmarks as pairs of labelled images, in the layouts in which they are distributed.

imagenet    train/ and val/ with a folder per class; or val/ flat, then meta/train.txt and meta/val.txt, `path label` a
            line, name the images, or Kaggle's LOC_val_solution.csv, there or up to three folders above, names those of
            val; also below ILSVRC/Data/CLS-LOC; or any form of data.open_data, as hf:ILSVRC/imagenet-1k
places205   trainvalsplit_places205/{train,val}_places205.csv, images below data/vision/torralba/deeplearning/images256
            or images256
inat18      train2018.json and val2018.json, images in train_val2018; or meta/train.txt and meta/val.txt
cifar10, cifar100   the binary version, or any form of data.open_data, as torchvision:CIFAR10:data
folder      train/ and one of val/, valid/, validation/, test/ with a folder per class; or any form of data.open_data

Nothing is read in part: where the counts are not those of the whole set (protocol 0), opening it is an error. With
`partial` what is there is opened, and its counts tell.
"""
import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ...data.opening import open_data
from ...data.readers.images import EXTENSIONS, FileImages, FolderImages, Images
from ...data.readers.index import Listing, open_index
from ..samples import Pair, Subset, subset
from .lists import LINE, LONGEST, listed, parse_inat, parse_list, parse_solution
from .sizes import LABELLED, SIZES, deviation, refusal
from .voc import Voc07, open_voc07  # noqa: F401 - open_voc07 is looked for here

VALIDATION = ('val', 'valid', 'validation', 'test')  # of these the first that is there
KAGGLE = ('ILSVRC/Data/CLS-LOC', 'Data/CLS-LOC')  # from the folder above ILSVRC, and from ILSVRC
SOLUTION = 'LOC_val_solution.csv'
PLACES = 'data/vision/torralba/deeplearning/images256'
INAT = 'train_val2018'
STREAMS = ('hf-stream', 'pipe', 'http', 'https')

_logger = logging.getLogger('simsiam_models')


def open_pair(kind: str, root: str | Path, partial: bool = False) -> Pair:
    """The labelled images of a data set; `kind` is one of KINDS.

    Raises:
        ValueError: no such kind; images without labels; another number of images or classes than the whole set has,
            unless `partial`.
        FileNotFoundError: what is missing.
    """
    if kind not in KINDS:
        raise ValueError(f'--dataset {kind}: no such data set; choose one of {", ".join(KINDS)}')
    train, test = KINDS[kind](str(root), partial)
    for images, part in ((train, 'training'), (test, 'test')):
        if images.labels is None:
            raise ValueError(f'{images.name}: the {part} images have no labels; a benchmark needs a class for each')
    test = _same_classes(train, test, str(root))
    counts = {
        'train': len(train), 'test': len(test), 'classes': int(np.unique(train.labels).size),
        'test_classes': int(np.unique(test.labels).size)}
    if not partial and (found := deviation(kind, counts)):
        raise ValueError(refusal(kind, str(root), found))
    return Pair(train, test, kind, len(train.classes), counts)


def _same_classes(train: Images, test: Images, root: str) -> Images:
    """Test labels as numbers of the training classes: some of these may have no test image."""
    if test.classes == train.classes:
        return test
    number = {name: i for i, name in enumerate(train.classes)}
    strange = [name for name in test.classes if name not in number]
    if strange:
        raise ValueError(
            f'{root}: {len(strange)} of {len(test.classes)} test classes have no training image, the first is '
            f'{strange[0]!r}; both parts are to have the same classes under the same names')
    labels = np.array([number[name] for name in test.classes], np.int32)[test.labels]
    return Subset(test, np.arange(len(test)), labels, train.classes)


def _opened(root: str, partial: bool = False) -> tuple[Images, Images]:
    """Any form of data that has a labelled training and validation part."""
    if root.partition(':')[0] in STREAMS:
        raise ValueError(f'{root}: a stream has no labels; give data that can be read in any order, as hf:REPO')
    train, test = open_data(root)
    if test is None:
        raise ValueError(
            f'{root}: no labelled validation images of the same classes beside the training images; a benchmark needs '
            'both')
    return train, test


def _folder(root: str, partial: bool) -> tuple[Images, Images]:
    path = Path(root)
    parts = [path / name for name in VALIDATION if (path / name).is_dir()]
    if not (path / 'train').is_dir() or (path / 'dataset_dict.json').is_file():
        return _opened(root)
    if not parts:
        raise FileNotFoundError(
            f'{root}: train is there, but none of {", ".join(VALIDATION)}; a benchmark needs images to measure on')
    return FolderImages(path / 'train'), FolderImages(parts[0])


def _imagenet(root: str, partial: bool) -> tuple[Images, Images]:
    path = next((p for p in (Path(root), *(Path(root, tree) for tree in KAGGLE)) if (p / 'train').is_dir()), None)
    if path is None or not (path / 'val').is_dir() or (path / 'dataset_dict.json').is_file():
        return _folder(str(path), partial) if path is not None else _opened(root)
    train, val = path / 'train', path / 'val'
    lists = [path / 'meta' / f'{part}.txt' for part in ('train', 'val')]
    missing = [str(file) for file in lists if not file.is_file()]
    above = Path(os.path.abspath(path))
    solution = next((p / SOLUTION for p in (above, *above.parents[:3]) if (p / SOLUTION).is_file()), None)
    folders, loose = _entries(val)
    if folders and (len(loose) <= len(folders) or missing and not solution):
        return _by_class(train), _by_class(val)
    if not missing:
        return tuple(
            listed(file, part, partial, 'imagenet') for file, part in zip(lists, (train, val), strict=True))
    if not solution:
        raise FileNotFoundError(
            f'{val}: no folder per class in it, and no list: sort the images into folders like those of train; or put '
            f'{" and ".join(missing)} there, with `path label` a line; or put {SOLUTION} of Kaggle into {path} or up '
            'to three folders above it')
    return _by_class(train), listed(solution, val, partial, 'imagenet', parse_solution)


def _entries(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the folders and of the images right in it, but for those that begin with a dot."""
    entries = sorted((e for e in os.scandir(folder) if not e.name.startswith('.')), key=lambda e: e.name)
    return (
        [e.name for e in entries if e.is_dir()],
        [e.name for e in entries if e.name.lower().endswith(EXTENSIONS) and not e.is_dir()])


def _by_class(root: Path) -> FileImages:
    """The images of a folder per class, without those in folders whose names begin with a dot.

    Raises:
        FileNotFoundError: no image in a folder.
        ValueError: an image beside the folders.
    """
    folders, loose = _entries(root)
    if folders and loose:
        raise ValueError(
            f'{root}: the image {loose[0]} lies beside the folder {folders[0]}, and with a folder per class each image '
            'lies in one of them; move away what does not belong there')
    index = open_index(root, EXTENSIONS)
    if loose or index.labels is not None and not any(name.startswith('.') for name in index.classes):
        return FolderImages(root)
    paths = [path for i in range(len(index)) if not (path := os.fsdecode(index.path(i))).startswith('.')]
    if not paths:
        raise FileNotFoundError(f'{root}: no image in a folder of it; looked for {" ".join(EXTENSIONS)}')
    _logger.warning(f'{root}: {len(index) - len(paths):,} images whose paths begin with a dot are left out')
    names = [path.partition(os.sep)[0] for path in paths]
    listing = Listing()
    listing.classes = sorted(set(names))
    number = {name: i for i, name in enumerate(listing.classes)}
    for path, name in zip(paths, names, strict=True):
        listing.add(path)
        listing.labels.append(number[name])
    return FileImages(root, listing.index(), str(root))


def _places205(root: str, partial: bool) -> tuple[Images, Images]:
    given = Path(root)
    spellings = ('Places205', 'places205')
    tried = [given, *((given.parent if given.name in spellings else given) / name for name in spellings)]
    path = next((p for p in tried if (p / 'trainvalsplit_places205').is_dir()), None)
    images = next((p for p in (path / PLACES, path / 'images256') if p.is_dir()), None) if path else None
    if images is None:
        raise FileNotFoundError(
            f'{root}: no Places205: {"trainvalsplit_places205" if path is None else PLACES} is not below it; unpack '
            f'{SIZES["places205"].source} there')
    return tuple(
        listed(path / 'trainvalsplit_places205' / f'{part}_places205.csv', images, partial, 'places205')
        for part in ('train', 'val'))


def _inat18(root: str, partial: bool) -> tuple[Images, Images]:
    path = Path(root)
    if not (path / INAT).is_dir():
        raise FileNotFoundError(f'{root}: no folder {INAT} in it; unpack {SIZES["inat18"].source} there')
    found = []
    for part in ('train', 'val'):
        names = [f'{part}2018.json', f'annotations/{part}2018.json', f'meta/{part}.txt']
        file = next((path / name for name in names if (path / name).is_file()), None)
        if file is None:
            raise FileNotFoundError(f'{root}: none of {", ".join(names)} is in it; one of them names the images')
        parse = parse_inat if file.suffix == '.json' else parse_list
        found.append(listed(file, path / INAT, partial, 'inat18', parse))
    return tuple(found)


KINDS: dict[str, Callable[[str, bool], tuple[Images, Images]]] = {
    'imagenet': _imagenet, 'places205': _places205, 'inat18': _inat18, 'cifar10': _opened, 'cifar100': _opened,
    'folder': _folder}


def labelled_subset(images: Images, share: str, list_file: str | Path, partial: bool = False) -> Subset:
    """The labelled images of the semi-supervised benchmark (protocol 2.5), in the order of their list.

    Args:
        images: those of the ImageNet training folder.
        share: '1pct' or '10pct'.
        list_file: names of files, one a line; the class of a file is what its name has before the first underscore.
            Or, as MMSelfSup has it, the file in the folder of its class, and the number of the class.
        partial: the list may have another number of lines.

    Raises:
        FileNotFoundError: no such list, or an image that it names is not among `images`.
        ValueError: no such share; a list of another length, with an image twice or a label that is not the image's;
            images that are no files.
    """
    file = Path(list_file)
    if share not in LABELLED:
        raise ValueError(f'{share}: no such share of labelled images; choose one of {", ".join(LABELLED)}')
    if not isinstance(images, FileImages):
        raise ValueError(f'{images.name}: {file.name} names files, and these images are none; give the ImageNet folder')
    if not file.is_file():
        raise FileNotFoundError(
            f'{file}: no such list; imagenet_subsets of https://github.com/google-research/simclr has those of '
            '1 % and 10 %')
    lines = file.read_text(encoding='utf-8-sig', errors='surrogateescape').split('\n')
    names = [name.strip() for name in lines if name.strip()]
    if not names or len(names) != LABELLED[share] and not partial:
        raise ValueError(
            f'{file}: {len(names):,} images found where the list of {share} has {LABELLED[share]:,}; give the right '
            'list, or --allow-partial')
    at: dict[tuple[str, str], int] = {}
    given: dict[tuple[str, str], int] = {}
    for text in names:
        labelled = LINE.fullmatch(text) if len(text) <= LONGEST else None
        *folders, name = (labelled[1] if labelled else text).split('/')
        key = folders[-1] if folders else name.partition('_')[0], name
        at[key] = -1
        if labelled:
            given[key] = int(labelled[2])
    if len(at) < len(names):
        raise ValueError(f'{file}: {len(names) - len(at)} of its {len(names)} images are named twice')
    for i in range(len(images)):
        path = images.path(i)
        if (key := (path.parent.name, path.name)) in at:
            at[key] = i
    missing = ['/'.join(key) for key, i in at.items() if i < 0]
    if missing:
        raise FileNotFoundError(
            f'{images.name}: {len(missing):,} of the {len(names):,} images that {file} names are not there, the first '
            f'is {missing[0]}; complete the training images')
    for key, label in given.items():
        if label != (own := int(images.labels[at[key]])):
            raise ValueError(
                f'{file}: {"/".join(key)} has the label {label} there, and {own} (class {images.classes[own]}) in '
                f'{images.name}; give the list that belongs to these images, or one of names without labels')
    return subset(images, list(at.values()))
