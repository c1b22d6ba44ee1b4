"""Lists of images with their classes, as Places205, iNaturalist 2018 and a flat ImageNet val have them."""
import json
import logging
import os
import re
from array import array
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ...data.readers.images import EXTENSIONS, FileImages
from ...data.readers.index import Index, Listing, cached, file_stamp, open_index
from ...data.readers.lists import MOST
from .sizes import refusal

LINE = re.compile(r'(.+?)(?:\s*,\s*|\s+)([0-9]{1,9})')
_SOLUTION = re.compile(r'(\w+),(n[0-9]{8})(?: .*)?')  # boxes of the one class follow
LONGEST = 4096  # characters of a line

_logger = logging.getLogger('simsiam_models')


def listed(
    file: Path, folder: Path, partial: bool, kind: str, parse: Callable[[Path], Listing] | None = None,
) -> FileImages:
    """The images that `file` names, below `folder`, each once; a name may begin with the folder's own.

    Raises:
        FileNotFoundError: an image that is named is not there; with `partial`, none is.
        ValueError: an image is named twice, unless `partial`.
    """
    parse = parse or parse_list
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


def parse_list(file: Path) -> Listing:
    """`path label` or `path,label` a line; the labels are numbers of classes."""
    listing = _watched(file)
    with open(file, encoding='utf-8-sig', errors='surrogateescape') as f:
        for line, text in enumerate(f, 1):
            text = text.strip()
            if not text:
                continue
            found = LINE.fullmatch(text) if len(text) <= LONGEST else None  # many blanks take it long
            if not found or '\0' in text or int(found[2]) >= MOST:
                raise ValueError(f'{file}, line {line}: {text[:80]!r} is not `path label` with the number of a class')
            listing.add(found[1].removeprefix('./'))
            listing.labels.append(int(found[2]))
    listing.classes = [str(i) for i in range(max(listing.labels, default=-1) + 1)]
    return listing


def parse_solution(file: Path) -> Listing:
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


def parse_inat(file: Path) -> Listing:
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
