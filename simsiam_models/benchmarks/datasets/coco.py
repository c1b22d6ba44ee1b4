"""COCO's form of annotations: one JSON file with images, annotations and categories."""
import itertools
import json
import math
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...data.readers.names import find_part
from ...runtime.messages import one_line, short
from .annotations import Annotated, Annotations, Segmentations
from .lists import find_repeated

FORM = 'images, annotations and categories, as instances_train2017.json of COCO has'
WHOLE, FLAG, NUMBER = (int,), (int, bool), (int, float)  # the types of values
MAX_WHOLE = 2**63 - 1
MAX_COORDINATE = 1e6  # of polygons, in pixels: pycocotools takes memory for every pixel of an outline
FOLDERS = ('annotations', 'annotation', 'labels', 'json')  # names that say: the images are elsewhere
MIN_POLYGON = 6  # coordinates; pycocotools takes a list of four for a box

Rows = list[dict[str, Any]]


def parse_coco(file: Path, known: Annotated | None = None) -> Annotated:
    """Reads a file of annotations; paths are as in it. `known`: the training part, which has the classes of both.

    Raises ValueError, which names the file and the image or annotation, for contents that have no meaning: another
    kind of JSON, ids that occur twice, unknown categories, values of another type, malformed segmentations. What
    training leaves out is no error, see `Annotations.reasons`.
    """
    content = _load(file)
    try:
        category_ids, classes = _parse_categories(content['categories'])
        if known is not None:
            category_ids, classes = _match_categories(category_ids, classes, known)
        images = content['images']
        _check_rows(images, 'image')
        ids = _unique_ids(images, 'image')
        sizes = np.array([_column(images, 'image', key, NUMBER, 'the number of its pixels')
                          for key in ('height', 'width')], np.float64).T.reshape(-1, 2)
        if len(odd := np.flatnonzero(((sizes < 1) | (sizes != np.rint(sizes)) | (sizes > 1e9)).any(1))):
            at = int(odd[0])
            raise ValueError(
                f'image {ids[at]} is {sizes[at, 1]:g} x {sizes[at, 0]:g} pixels; correct its width and height')
        paths = _column(images, 'image', 'file_name', (str,), 'text')
        if not paths:
            raise ValueError('it has no image')
        sizes, notes = sizes.astype(np.int64), list[str]()
        objects = _parse_objects(content['annotations'], ids, sizes, category_ids, notes)
    except ValueError as e:
        raise ValueError(f'{file}: {one_line(e, 500)}') from None
    return Annotated(str(file), file.parent, [path.replace('\\', '/') for path in paths], ids, sizes, classes,
                     category_ids, objects, notes)


def _load(file: Path) -> dict[str, Any]:
    """Parses the JSON; raises ValueError if it has no lists of images, annotations and categories."""
    try:
        with open(file, 'rb') as f:
            content = json.load(f)
    except (ValueError, RecursionError) as e:
        raise ValueError(f'{file} cannot be read as JSON ({one_line(e)}); give a file with {FORM}') from None
    if not isinstance(content, dict):
        what = 'a list, like a results file' if isinstance(content, list) else short(content)
        raise ValueError(f'{file} is not an annotation file, but {what}; give one with {FORM}')
    if missing := [key for key in ('images', 'annotations', 'categories') if not isinstance(content.get(key), list)]:
        found = ', '.join(short(key, 30) for key in [*content][:6]) or 'nothing'
        raise ValueError(f'{file} has {found}, but these are missing or not lists: {", ".join(missing)}; give a file '
                         f'with {FORM}')
    return content


def _check_rows(rows: list[Any], what: str) -> None:
    if not {*map(type, rows)} <= {dict}:
        at = next(i for i, row in enumerate(rows) if type(row) is not dict)
        raise ValueError(f'{what} {at + 1} of the list is {short(rows[at])}, not an object with names and values')


def _name(row: dict[str, Any], what: str, at: int) -> str:
    return f'{what} {row["id"]}' if type(row.get('id')) is int else f'{what} {at + 1} of the list'


def _column(rows: Rows, what: str, key: str, types: tuple[type, ...], rule: str, default: Any = ...) -> list[Any]:
    """Returns a value of each row, after checking its type; without a default each row needs one."""
    values = [row.get(key, default) for row in rows]
    allowed = {*types} if default is ... else {*types, type(default)}
    if not {*map(type, values)} <= allowed:
        at, value = next((i, v) for i, v in enumerate(values) if type(v) not in allowed)
        if value is ...:
            keys = ', '.join(short(name, 30) for name in [*rows[at]][:8])
            raise ValueError(f'{_name(rows[at], what, at)} has no {key}, only {keys or "nothing"}; give a file '
                             f'with {FORM}')
        raise ValueError(f'{_name(rows[at], what, at)}: {key} is {short(json.dumps(value))}, not {rule}; correct it')
    whole = [value for value in values if type(value) is int]
    if whole and not -MAX_WHOLE <= min(whole) <= max(whole) <= MAX_WHOLE:
        at = next(i for i, v in enumerate(values) if type(v) is int and abs(v) > MAX_WHOLE)
        raise ValueError(f'{what} {at + 1} of the list: {key} is {short(values[at])}, outside '
                         f'±{MAX_WHOLE}; correct it')
    return values


def _unique_ids(rows: Rows, what: str) -> list[int]:
    ids = _column(rows, what, 'id', WHOLE, 'a whole number')
    if len({*ids}) < len(ids):
        twice = find_repeated(ids)
        raise ValueError(f'{what} {twice} occurs {ids.count(twice)} times; number each {what} once')
    return ids


def _parse_categories(rows: list[Any]) -> tuple[list[int], list[str]]:
    _check_rows(rows, 'category')
    ids = _unique_ids(rows, 'category')
    if not ids:
        raise ValueError('it has no category; every annotation needs one')
    names = _column(rows, 'category', 'name', (str,), 'text', None)
    names = [name if name and name.strip() else str(i) for i, name in zip(ids, names, strict=True)]
    first: dict[str, int] = {}
    for i, name in zip(ids, names, strict=True):
        if (other := first.setdefault(name, i)) != i:
            raise ValueError(f'categories {other} and {i} are both called {short(name)}; give each a name of its own')
    return ids, names


def _match_categories(ids: list[int], names: list[str], known: Annotated) -> tuple[list[int], list[str]]:
    """Returns the classes of the training part, after checking that they include these."""
    own = dict(zip(known.category_ids, known.classes, strict=True))
    if other := [(i, name) for i, name in zip(ids, names, strict=True) if own.get(i) != name]:
        i, name = other[0]
        there = f'{short(own[i])} has this id' if i in own else 'no category has this id'
        raise ValueError(f'category {i} is {short(name)}, but in {known.name} {there}; both parts need the same '
                         'categories with the same ids')
    return known.category_ids, known.classes


def _parse_objects(
    rows: list[Any], image_ids: list[int], sizes: np.ndarray, category_ids: list[int], notes: list[str],
) -> Annotations:
    """Returns the objects by image; appends to `notes` what was left out or filled in."""
    _check_rows(rows, 'annotation')
    _unique_ids(rows, 'annotation')
    row_of = {id_: i for i, id_ in enumerate(image_ids)}
    owners = [row_of.get(i, -1) for i in _column(rows, 'annotation', 'image_id', WHOLE, 'the id of an image')]
    if lost := [row for row, owner in zip(rows, owners, strict=True) if owner < 0]:
        text = (f'{len(lost):,} of {len(rows):,}, the first is annotation {lost[0]["id"]} of image '
                f'{lost[0]["image_id"]}')
        if len(lost) == len(rows):
            raise ValueError(f'all annotations are of images that it does not list: {text}; give the file that '
                             'belongs to these images')
        notes.append(f'annotations of images that the file does not list, which are left out: {text}')
        rows = [row for row, owner in zip(rows, owners, strict=True) if owner >= 0]
    owner = np.array([i for i in owners if i >= 0], np.int64)
    order = np.argsort(owner, kind='stable')
    label_of = {id_: i for i, id_ in enumerate(category_ids)}
    categories = _column(rows, 'annotation', 'category_id', WHOLE, 'the id of a category')
    if unknown := {*categories} - {*category_ids}:
        at = next(i for i, c in enumerate(categories) if c in unknown)
        raise ValueError(f'annotation {rows[at]["id"]} has the category {categories[at]}, which the file does not '
                         'list; add it to the categories, or correct the annotation')
    rectangles = _parse_rectangles(rows)
    flags = [np.array(_column(rows, 'annotation', key, FLAG, '0 or 1', 0), bool) for key in ('iscrowd', 'ignore')]
    areas = np.array(_column(rows, 'annotation', 'area', NUMBER, 'a number', None), np.float64)  # None: NaN
    if len(absent := np.flatnonzero(np.isnan(areas))):
        notes.append(f'annotations without an area, for which that of the box is used: {len(absent):,}, the first is '
                     f'annotation {rows[absent[0]]["id"]}')
        areas[absent] = rectangles[absent, 2] * rectangles[absent, 3]
    outlines = _parse_segmentations(rows, sizes[owner], notes)
    return Annotations(
        np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=len(image_ids)))]).astype(np.int64),
        rectangles[order], np.array([label_of[c] for c in categories], np.int64)[order], flags[0][order], True,
        areas[order], flags[1][order], np.array([row['id'] for row in rows], np.int64)[order], outlines, order)


def _parse_rectangles(rows: Rows) -> np.ndarray:
    """Returns the boxes (M, 4) float64, as in the file: x, y, width, height."""
    boxes = _column(rows, 'annotation', 'bbox', (list,), 'a list of x, y, width and height')
    flat = array('d')
    for row, box in zip(rows, boxes, strict=True):
        try:
            flat.extend(box)
        except (TypeError, OverflowError):
            box = [*box, None]  # of another length, in any case
        if len(box) != 4:
            raise ValueError(f'annotation {row["id"]}: bbox is {short(row["bbox"])}, not four numbers: x, y, width and '
                             'height; correct it')
    rectangles = np.array(flat, np.float64).reshape(-1, 4)
    if len(odd := np.flatnonzero(~np.isfinite(rectangles).all(1))):
        raise ValueError(f'annotation {rows[odd[0]]["id"]}: bbox is {short(boxes[odd[0]])}, which is not finite; '
                         'correct it')
    return rectangles


def _parse_segmentations(rows: Rows, sizes: np.ndarray, notes: list[str]) -> Segmentations | None:
    """Returns the outlines in the order of `rows`, None if no object has one; `sizes` (M, 2): of the images."""
    coordinates, polygons, starts = array('d'), array('q', [0]), array('q', [0])
    encodings: dict[int, dict[str, Any]] = {}
    short_of: list[int] = []
    values = _column(rows, 'annotation', 'segmentation', (list, dict), 'a list of polygons or an encoding', None)
    for i, value in enumerate(values):
        try:
            if type(value) is dict:
                _check_encoding(value, *sizes[i].tolist())
                encodings[i] = value
            elif value:
                kept = [polygon for polygon in value if _check_polygon(polygon)]
                short_of += [rows[i]['id']] * (len(value) - len(kept))
                if not kept:
                    raise ValueError('has no polygon of three points or more')
                for polygon in kept:
                    coordinates.extend(polygon)
                    polygons.append(len(coordinates))
        except (ValueError, TypeError, OverflowError) as e:
            why = e if isinstance(e, ValueError) else 'has a coordinate that is not a number'
            raise ValueError(f'annotation {rows[i]["id"]}: segmentation {why}; correct or remove it') from None
        starts.append(len(polygons) - 1)
    points, ends = np.frombuffer(coordinates, np.float64), np.frombuffer(polygons, np.int64)
    if len(odd := np.flatnonzero(~(np.abs(points) <= MAX_COORDINATE))):
        at = np.searchsorted(starts, np.searchsorted(ends, odd[0], 'right') - 1, 'right') - 1
        raise ValueError(f'annotation {rows[at]["id"]}: segmentation has the coordinate {points[odd[0]]:g}, which lies '
                         'nowhere near an image; correct or remove it')
    if short_of:
        notes.append(f'polygons of fewer than three points, which are left out: {len(short_of):,}, the first is of '
                     f'annotation {short_of[0]}')
    outlines = Segmentations(points, ends, np.frombuffer(starts, np.int64), encodings)
    if (n := np.count_nonzero(outlines.present)) and n < len(rows):
        notes.append(f'annotations without a segmentation, so that no masks are used: {len(rows) - n:,} of '
                     f'{len(rows):,}, the first is annotation {rows[outlines.present.argmin()]["id"]}')
    return outlines if n else None


def _check_polygon(polygon: Any) -> bool:
    """Returns whether the polygon has three points or more; raises ValueError if it is not a list of x, y, x, y, ..."""
    if type(polygon) is not list:
        raise ValueError(f'has {short(polygon, 40)} where a polygon belongs, a list of x, y, x, y and so on')
    if len(polygon) % 2:
        raise ValueError(f'has a polygon of {len(polygon)} coordinates, an odd number')
    return len(polygon) >= MIN_POLYGON


def _check_encoding(encoding: dict[str, Any], height: int, width: int) -> None:
    """Raises ValueError if the run-length encoding is not one of an image of this size."""
    counts, size = encoding.get('counts'), encoding.get('size')
    if size != [height, width]:
        raise ValueError(f'is encoded at the size {short(size)}, not that of the image, {[height, width]}')
    if type(counts) is str:
        runs: Sequence[int] = decode_counts(counts)
    elif type(counts) is list and {*map(type, counts)} <= {int}:
        runs = counts
    else:
        raise ValueError(f'has the counts {short(counts, 40)}, which are neither text nor whole numbers')
    if not len(runs) or min(runs) < 0 or sum(runs) != height * width:
        raise ValueError(f'has counts that do not sum up to the {height * width:,} pixels of the image')


def decode_counts(text: str) -> list[int]:
    """Returns the run lengths in pycocotools' compressed text; [] for text that is none (rleFrString in maskApi.c)."""
    try:
        code = np.frombuffer(text.encode('ascii'), np.uint8).astype(np.int64) - 48
    except UnicodeEncodeError:
        return []
    last = np.flatnonzero((code & 32) == 0)
    if not len(code) or code.min() < 0 or code.max() > 63 or last[-1:].tolist() != [len(code) - 1]:
        return []
    first = np.concatenate([[0], last[:-1] + 1])
    place = np.arange(len(code)) - np.repeat(first, last - first + 1)
    if place.max() > 6:  # 35 bits: no image has so many pixels
        return []
    runs = np.add.reduceat((code & 31) << 5 * place, first)
    runs -= np.where(code[last] & 16, 1 << 5 * (place[last] + 1), 0)
    for start in (1, 2):  # from the fourth on, the difference to the last but one
        runs[start::2] = np.cumsum(runs[start::2])
    lengths: list[int] = runs.tolist()
    return lengths


def find_images(file: Path, paths: list[str]) -> Path:
    """Returns the folder of a user's images, by where most of 50 of them are.

    They may lie beside the file, or beside its folder if that is called annotations: in a folder that is named like the
    file's part, in images/, or loose.
    Raises FileNotFoundError if none is found.
    """
    stem, found = file.stem, find_part(file.stem)
    part, word = (stem[found.start():], found[1]) if found else (stem, stem)
    names = dict.fromkeys([
        '.', part, word, stem, *(f'{a}/{b}' for a in (part, word) for b in ('images', 'data')), 'images',
        f'images/{part}', f'images/{word}', 'data', 'JPEGImages'])
    beside = file.absolute().parent
    above = [beside, beside.parent] if beside.name.lower() in FOLDERS else [beside]
    sample = paths[::math.ceil(len(paths) / 50)]
    tried = [Path(*place) for place in itertools.product(above, names)]
    hits = {folder: sum((folder / path).is_file() for path in sample) for folder in tried if folder.is_dir()}
    best = max(hits, key=lambda folder: hits[folder], default=None)
    if not best or not hits[best]:
        raise FileNotFoundError(
            f'{file}: its images were not found, such as {short(paths[0])}; put them beside it, or into {part}/ or '
            f'images/ beside it')
    return best
