"""Lists that name images with their classes: Places205, iNaturalist 2018, a flat ImageNet val, labelled ImageNet."""
import json
import logging
import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from ...data.readers.images import FileImages, Images
from ...data.readers.index import Listing, load_or_build, open_index
from ...data.readers.labels import MAX_CLASSES
from ...data.readers.names import EXTENSIONS
from ...runtime.messages import short
from ..samples import Subset, subset
from .sizes import LABELLED, refusal

# A path and the number of a class. Longer lines are not matched: many blanks make matching slow.
_LINE = re.compile(r'(?!.{4097})(.+?)(?:\s*,\s*|\s+)([0-9]{1,9})')
_SOLUTION = re.compile(r'(\w+),(n[0-9]{8})(?: .*)?')  # boxes of the same class follow

T = TypeVar('T')
_logger = logging.getLogger('simsiam_models')


def read_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yields the number and the text of each line that is not blank."""
    with open(file, encoding='utf-8-sig', errors='surrogateescape') as f:
        for line, text in enumerate(f, 1):
            if text := text.strip():
                yield line, text


def find_repeated(ids: Iterable[T]) -> T | None:
    """Returns the first one that occurred before, or None."""
    seen: set[T] = set()
    for i in ids:
        if i in seen:
            return i
        seen.add(i)
    return None


def find_present(
    kind: str, folder: Path, names: Sequence[str], part: str, partial: bool, what: str = 'images',
) -> np.ndarray:
    """Returns which of the files that a list names are below `folder`, (N,) bool; with `partial`, warns of the others.

    Raises FileNotFoundError if one is missing (with `partial`: all are). `part`: whose list it is.
    """
    listed: dict[str, set[str]] = {}
    for above in {name.rpartition('/')[0] for name in names}:
        with suppress(OSError):  # no such folder
            listed[above] = {*os.listdir(folder / above)}
    there = ((listed.get(above, ()), name) for above, _, name in (name.rpartition('/') for name in names))
    present = np.array([name in folder_names for folder_names, name in there], bool)
    if not present.all():
        message = (f'{present.sum():,} {what} found in {folder}, {len(names):,} named for {part} '
                   f'(missing: {short(names[int(present.argmin())], 200)})')
        if not partial or not present.any():
            raise FileNotFoundError(refusal(kind, str(folder.parent), message))
        _logger.warning(f'{message}: the others are left out')
    return present


def parse_list(file: Path) -> Listing:
    """Parses `path label` or `path,label` lines; a label is the number of a class."""
    listing = Listing()
    listing.watch_file(file.name, file)
    for line, text in read_lines(file):
        found = _LINE.fullmatch(text)
        if not found or '\0' in text or int(found[2]) >= MAX_CLASSES:
            raise ValueError(f'{file}, line {line}: {text[:80]!r} is not `path label` with the number of a class')
        listing.add(found[1].removeprefix('./'))
        listing.labels.append(int(found[2]))
    listing.classes = [str(i) for i in range(max(listing.labels, default=-1) + 1)]
    return listing


def parse_solution(file: Path) -> Listing:
    """Parses Kaggle's form: a header, then `image,class` lines with boxes after a blank."""
    listing, names = Listing(), []
    listing.watch_file(file.name, file)
    for line, text in read_lines(file):
        if found := _SOLUTION.fullmatch(text):
            listing.add(f'{found[1]}.JPEG')
            names.append(found[2])
        elif line > 1 or not text.startswith('ImageId'):
            raise ValueError(f'{file}, line {line}: {text[:80]!r} is not `image,class` with a class such as n01440764')
    classes, labels = np.unique(names, return_inverse=True)
    listing.classes, listing.labels = classes.tolist(), array('i', labels.tolist())
    return listing


def parse_inat(file: Path) -> Listing:
    """Parses COCO's form: annotations give the category of an image. Labels are the ranks of the categories' ids."""
    listing = Listing()
    listing.watch_file(file.name, file)
    try:
        content = json.loads(file.read_bytes())
        names = {c['id']: str(c.get('name', c['id'])) for c in content['categories']}
        listing.classes = [names[i] for i in sorted(names)]
        label = {id_: n for n, id_ in enumerate(sorted(names))}
        category_of: dict[Any, Any] = {}
        for annotation in content['annotations']:
            image, category = annotation['image_id'], annotation['category_id']
            if category_of.setdefault(image, category) != category:
                raise ValueError(f'image {image} has two categories, {category_of[image]} and {category}')
        for image in content['images']:
            if category_of.get(image['id']) not in label:
                raise ValueError(f'image {image["id"]} has no annotation with one of the {len(label)} categories')
            listing.add(image['file_name'])
            listing.labels.append(label[category_of[image['id']]])
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as e:  # ValueError: of json, too
        why = f'no {e}' if isinstance(e, KeyError) else str(e)[:200]
        raise ValueError(
            f'{file} is not the JSON of iNaturalist 2018 with images, annotations and categories ({why})') from None
    return listing


def open_list(
    file: Path, folder: Path, partial: bool, kind: str, parse: Callable[[Path], Listing] = parse_list,
) -> FileImages:
    """Opens the images below `folder` that `file` names, each once. Names may start with that of the folder.

    Raises FileNotFoundError if an image is missing (with `partial`: all are), and ValueError if one is named twice.
    """
    if not file.is_file():
        raise FileNotFoundError(f'{file}: no such list; it names the images of {folder}')
    index = load_or_build({'root': os.path.realpath(file.parent), 'labelled': file.name}, lambda: parse(file))
    if not len(index):
        raise ValueError(f'{file} names no image')
    prefix = os.fsencode(folder.name) + b'/'
    root, start = (folder.parent, len(prefix)) if index.path(0).startswith(prefix) else (folder, 0)
    files = open_index(folder, EXTENSIONS)
    present = np.fromiter((hash(files.path(i)) for i in range(len(files))), np.int64, len(files))
    named = np.fromiter((hash(index.path(i)[start:]) for i in range(len(index))), np.int64, len(index))
    first = np.sort(np.unique(named, return_index=True)[1])
    found = np.isin(named[first], present)
    kept, missing, repeated = first[found], first[~found], np.setdiff1d(np.arange(len(named)), first)
    if len(kept) < len(index):
        why = '; '.join(
            f'{what}: {os.fsdecode(index.path(int(rows[0])))}'
            for what, rows in (('missing', missing), ('named twice', repeated)) if len(rows))
        message = f'{len(kept):,} images found below {folder}, {len(index):,} named in {file} ({why})'
        if not partial or not len(kept):
            raise (FileNotFoundError if len(missing) else ValueError)(refusal(kind, str(root), message))
        _logger.warning(f'{message}: the others are left out')
        listing = Listing()
        for i in kept.tolist():
            listing.add(os.fsdecode(index.path(i)))
        listing.labels, listing.classes = array('i', np.asarray(index.labels)[kept].tobytes()), index.classes
        index = listing.make_index()
    return FileImages(root, index, str(file))


def labelled_subset(images: Images, share: str, file: Path, partial: bool = False) -> Subset:
    """Returns the labelled images of semi-supervised ImageNet, 1pct or 10pct, in the order of their list.

    A line is the name of a file, whose class is the part before the first underscore, as in google-research/simclr; or
    the class's folder, the file and the number of the class, as in MMSelfSup.

    Raises FileNotFoundError if there is no such list, or an image that it names is missing, and ValueError if the list
    has another length (unless `partial`), repeats an image or gives it another label.
    """
    if share not in LABELLED:
        raise ValueError(f'{share}: no such share of labelled images; choose one of {", ".join(LABELLED)}')
    if not isinstance(images, FileImages):
        raise ValueError(
            f'{images.name}: {file.name} names files, but these images are not files; give the ImageNet folder')
    rows = _parse_labelled(file)
    if not rows or len(rows) != LABELLED[share] and not partial:
        raise ValueError(
            f'{file}: {len(rows):,} images found, but the list of {share} has {LABELLED[share]:,}; give the right '
            'list, or pass --allow-partial')
    at = dict.fromkeys((key for key, _ in rows), -1)
    if len(at) < len(rows):
        raise ValueError(f'{file}: {len(rows) - len(at)} of its {len(rows)} images are named twice')
    for i in range(len(images)):
        path = images.path(i)
        if (key := (path.parent.name, path.name)) in at:
            at[key] = i
    if missing := ['/'.join(key) for key, i in at.items() if i < 0]:
        raise FileNotFoundError(
            f'{images.name}: {len(missing):,} of the {len(rows):,} images that {file} names are missing, the first is '
            f'{missing[0]}; complete the training images')
    for key, label in rows:
        if label not in (None, own := int(cast(np.ndarray, images.labels)[at[key]])):
            raise ValueError(
                f'{file}: {"/".join(key)} has the label {label} there, but {own} (class {images.classes[own]}) in '
                f'{images.name}; give the list that belongs to these images, or one of names without labels')
    return subset(images, list(at.values()))


def _parse_labelled(file: Path) -> list[tuple[tuple[str, str], int | None]]:
    """Returns the folder and name of each image in a list of labelled ImageNet images, and its label if it has one."""
    if not file.is_file():
        raise FileNotFoundError(
            f'{file}: no such list; imagenet_subsets of https://github.com/google-research/simclr has the lists of '
            '1 % and 10 %')
    rows = []
    for _, text in read_lines(file):
        found = _LINE.fullmatch(text)
        *folders, name = (found[1] if found else text).split('/')
        rows.append(((folders[-1] if folders else name.partition('_')[0], name), int(found[2]) if found else None))
    return rows
