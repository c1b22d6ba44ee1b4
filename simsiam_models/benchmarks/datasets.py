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
import json
import logging
import os
import re
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..data.index import Index, Listing, cached, digest, file_stamp, open_index
from ..data.lists import MOST
from ..data.opening import open_data
from ..data.sources import EXTENSIONS, FileImages, FolderImages, Images, pixels_digest
from .counts import LABELLED, SIZES, deviation, refusal
from .voc07 import Voc07, open_voc07  # noqa: F401 - open_voc07 is looked for here

VALIDATION = ('val', 'valid', 'validation', 'test')  # of these the first that is there
KAGGLE = ('ILSVRC/Data/CLS-LOC', 'Data/CLS-LOC')  # from the folder above ILSVRC, and from ILSVRC
SOLUTION = 'LOC_val_solution.csv'
PLACES = 'data/vision/torralba/deeplearning/images256'
INAT = 'train_val2018'
STREAMS = ('hf-stream', 'pipe', 'http', 'https')
_LINE = re.compile(r'(.+?)(?:\s*,\s*|\s+)([0-9]{1,9})')
_SOLUTION = re.compile(r'(\w+),(n[0-9]{8})(?: .*)?')  # boxes of the one class follow

_logger = logging.getLogger('simsiam_models')


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
        return digest(*(part for x in (self.train, self.test) for part in (x.digest, pixels_digest(x))))


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
            _listed(file, part, partial, 'imagenet') for file, part in zip(lists, (train, val), strict=True))
    if not solution:
        raise FileNotFoundError(
            f'{val}: no folder per class in it, and no list: sort the images into folders like those of train; or put '
            f'{" and ".join(missing)} there, with `path label` a line; or put {SOLUTION} of Kaggle into {path} or up '
            'to three folders above it')
    return _by_class(train), _listed(solution, val, partial, 'imagenet', _parse_solution)


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
        _listed(path / 'trainvalsplit_places205' / f'{part}_places205.csv', images, partial, 'places205')
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
        parse = _parse_inat if file.suffix == '.json' else _parse_list
        found.append(_listed(file, path / INAT, partial, 'inat18', parse))
    return tuple(found)


KINDS: dict[str, Callable[[str, bool], tuple[Images, Images]]] = {
    'imagenet': _imagenet, 'places205': _places205, 'inat18': _inat18, 'cifar10': _opened, 'cifar100': _opened,
    'folder': _folder}


def _listed(
    file: Path, folder: Path, partial: bool, kind: str, parse: Callable[[Path], Listing] | None = None,
) -> FileImages:
    """The images that `file` names, below `folder`, each once; a name may begin with the folder's own.

    Raises:
        FileNotFoundError: an image that is named is not there; with `partial`, none is.
        ValueError: an image is named twice, unless `partial`.
    """
    parse = parse or _parse_list
    if not file.is_file():
        raise FileNotFoundError(f'{file}: no such list; it names the images of {folder}')
    index = cached({'root': os.path.realpath(file.parent), 'labelled': file.name}, lambda: parse(file))
    if not len(index):
        raise ValueError(f'{file}: names no image')
    if index.path(0).startswith(os.fsencode(folder.name) + b'/'):
        root, inside = folder.parent, len(folder.name) + 1
    else:
        root, inside = folder, 0
    files = open_index(folder, EXTENSIONS)
    have = np.fromiter((hash(files.path(i)) for i in range(len(files))), np.int64, len(files))
    want = np.fromiter((hash(index.path(i)[inside:]) for i in range(len(index))), np.int64, len(index))
    once = np.sort(np.unique(want, return_index=True)[1])
    there = np.isin(want[once], have)
    kept, missing, again = once[there], once[~there], np.setdiff1d(np.arange(len(want)), once)
    if len(kept) < len(index):
        why = '; '.join(
            f'{what}: {os.fsdecode(index.path(int(rows[0])))}'
            for what, rows in (('missing', missing), ('named twice', again)) if len(rows))
        said = f'{len(kept):,} images found below {folder} where {len(index):,} are named in {file} ({why})'
        if not partial or not len(kept):
            raise (FileNotFoundError if len(missing) else ValueError)(refusal(kind, str(root), said))
        _logger.warning(f'{said}: the others are left out')
        index = _kept(index, kept)
    return FileImages(root, index, str(file))


def _kept(index: Index, rows: np.ndarray) -> Index:
    listing = Listing()
    for i in rows:
        listing.add(os.fsdecode(index.path(int(i))))
    listing.labels, listing.classes = array('i', np.asarray(index.labels)[rows].tobytes()), index.classes
    return listing.index()


def _parse_list(file: Path) -> Listing:
    """`path label` or `path,label` a line; the labels are numbers of classes."""
    listing = _watched(file)
    with open(file, encoding='utf-8-sig', errors='surrogateescape') as f:
        for line, text in enumerate(f, 1):
            text = text.strip()
            if not text:
                continue
            found = _LINE.fullmatch(text)
            if not found or '\0' in text or int(found[2]) >= MOST:
                raise ValueError(f'{file}, line {line}: {text[:80]!r} is not `path label` with the number of a class')
            listing.add(found[1].removeprefix('./'))
            listing.labels.append(int(found[2]))
    listing.classes = [str(i) for i in range(max(listing.labels, default=-1) + 1)]
    return listing


def _parse_solution(file: Path) -> Listing:
    """Kaggle's form: a row of names, then `image,class` a line, and after blanks the boxes."""
    listing, names = _watched(file), []
    with open(file, encoding='utf-8-sig', errors='surrogateescape') as f:
        for line, text in enumerate(f, 1):
            text = text.strip()
            if not text or line == 1 and text.startswith('ImageId'):
                continue
            found = _SOLUTION.fullmatch(text)
            if not found:
                raise ValueError(f'{file}, line {line}: {text[:80]!r} is not `image,class` with a class as n01440764')
            listing.add(f'{found[1]}.JPEG')
            names.append(found[2])
    listing.classes = sorted(set(names))
    number = {name: i for i, name in enumerate(listing.classes)}
    listing.labels.extend(number[name] for name in names)
    return listing


def _parse_inat(file: Path) -> Listing:
    """COCO's form: annotations give the category of an image; labels are ranks of the categories' ids."""
    listing = _watched(file)
    try:
        text = json.loads(file.read_bytes())
        names = {c['id']: str(c.get('name', c['id'])) for c in text['categories']}
        listing.classes = [names[i] for i in sorted(names)]
        label, of = {id_: n for n, id_ in enumerate(sorted(names))}, {}
        for annotation in text['annotations']:
            image, category = annotation['image_id'], annotation['category_id']
            if of.setdefault(image, category) != category:
                raise ValueError(f'image {image} has two categories, {of[image]} and {category}')
        for image in text['images']:
            if of.get(image['id']) not in label:
                raise ValueError(f'image {image["id"]} has no annotation with one of the {len(label)} categories')
            listing.add(image['file_name'])
            listing.labels.append(label[of[image['id']]])
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as e:  # also JSON's own errors
        why = f'no {e}' if isinstance(e, KeyError) else str(e)[:200]
        raise ValueError(
            f'{file}: is not the JSON of iNaturalist 2018, with images, annotations and categories ({why})') from None
    return listing


def _watched(file: Path) -> Listing:
    """A listing that holds while `file` is as it is now."""
    listing = Listing()
    listing.files[file.name] = stamp = file_stamp(file)
    listing.watch(stamp[1] if stamp else 0)
    return listing


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
        labelled = _LINE.fullmatch(text)
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
