"""VOC's form of annotations: one XML file for each image, with the corners of boxes in pixels counted from 1."""
import math
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from ...data.readers.names import is_image
from ...runtime.messages import name_some, one_line, short
from .annotations import Annotated, Annotations
from .lists import find_present, find_repeated, read_lines
from .voc import NAMES, find_folder

YEARS = {'VOC2007': ('trainval', 'test'), 'VOC2012': ('trainval',)}
NEEDED = ('JPEGImages', 'Annotations', 'ImageSets/Main')
FOLDERS = (('JPEGImages', 'Annotations'), ('images', 'annotations'), ('.', '.'))  # of a user's images and XML files
# Pairs of lists, the best first; without one, the first that is there is for training, and a share is held out.
LISTS = (('train', 'val'), ('trainval', 'test'), ('train', 'test'), ('trainval', ''), ('train', ''))


class VocObject(NamedTuple):
    name: str
    difficult: bool
    corners: tuple[float, ...]  # xmin, ymin, xmax, ymax, as in the file


def open_voc0712(root: str | Path, variant: str, partial: bool) -> tuple[Annotated, Annotated]:
    """Opens VOCdevkit with VOC2007 and VOC2012: trainval of both, and test of VOC2007."""
    above = Path(root)
    above = above.parent if above.name in YEARS else above
    folders = {year: find_folder(above, (year, f'VOCdevkit/{year}'), NEEDED, 'voc0712') for year in YEARS}
    devkit, parts = folders['VOC2007'].parent, list[Annotated]()
    for part in ('trainval', 'test'):
        files: list[tuple[str, str]] = []
        years = [year for year in YEARS if part in YEARS[year]]
        for year in years:
            ids = _read_ids(folders[year] / 'ImageSets' / 'Main' / f'{part}.txt')
            for below, end, what in (('JPEGImages', 'jpg', 'images'), ('Annotations', 'xml', 'annotations')):
                whole = find_present('voc0712', folders[year] / below, [f'{i}.{end}' for i in ids],
                                     f'{part} of {year}', partial, what)
                ids = [i for i, there in zip(ids, whole, strict=True) if there]
            files += [(f'{year}/JPEGImages/{i}.jpg', f'{year}/Annotations/{i}.xml') for i in ids]
        parts.append(parse_voc(devkit, files, f'{devkit} ({part} of {" and ".join(years)})', variant, NAMES))
    return parts[0], parts[1]


def find_voc(root: Path) -> tuple[Path, str, str] | None:
    """Returns the folder of a user's VOC data, and the names of the folders of images and of XML files in it.

    It is `root`, or the only folder below it or below VOCdevkit that has both.
    """
    inside = [*root.glob('*/'), *root.glob('VOCdevkit/*/')]
    for folders in ([root], sorted({path for path in inside if (path / 'Annotations').is_dir()})):
        found = [(folder, *names) for folder in folders for names in FOLDERS
                 if all((folder / name).is_dir() for name in names) and any((folder / names[1]).glob('*.xml'))]
        if len({folder for folder, *_ in found}) > 1:
            raise ValueError(f"{root} has several folders in VOC's form, such as {found[0][0]}; give one of them")
        if found:
            return found[0]
    return None


def open_voc_folder(
    root: Path, images: str, below: str, variant: str, partial: bool,
) -> tuple[Annotated, np.ndarray, np.ndarray | None]:
    """Opens a user's images with XML files in VOC's form; returns all, the rows to train on, and those to test on.

    The lists are in ImageSets/Main, see LISTS. Without any, all images that have an XML file are taken, and the rows to
    test on are None, as they are without a second list.
    """
    listed = {path.stem: path for path in sorted((root / below).glob('*.xml'))}
    file_of = {path.stem: path.name for path in sorted((root / images).iterdir()) if is_image(path.name)}
    main = root / 'ImageSets' / 'Main'
    names = next((pair for pair in LISTS if all((main / f'{n}.txt').is_file() for n in pair if n)), None)
    if names is None and (others := sorted(path.name for path in main.glob('*.txt'))):
        raise ValueError(f'{main} has {name_some(others)}, but neither train.txt nor trainval.txt; add one of them, '
                         'or remove ImageSets/Main to train on all images')
    parts = [_read_ids(main / f'{name}.txt') for name in names if name] if names else [[*listed]]
    if names and (both := {*parts[0]} & {*parts[-1]} if len(parts) > 1 else ()):
        raise ValueError(f'{main}: {names[0]}.txt and {names[1]}.txt have images in common ({len(both):,}), such as '
                         f'{min(both)}; list each image in only one')
    kept, n = [], []
    for i, ids in enumerate(parts):
        whose = f'{names[i]}.txt' if names else below
        there = find_present('folder', root / images, [file_of.get(j, f'{j}.jpg') for j in ids], whose, partial)
        ids = [j for j, found in zip(ids, there, strict=True) if found]
        there = find_present('folder', root / below, [f'{j}.xml' for j in ids], whose, partial, 'annotations')
        kept += [j for j, found in zip(ids, there, strict=True) if found]
        n.append(len(kept))
    files = [(f'{images}/{file_of[i]}', f'{below}/{i}.xml') for i in kept]
    found = parse_voc(root, files, str(root), variant)
    if not names and (unlabelled := sorted({*file_of} - {*listed})):
        found.notes.append(f'images without an XML file, which are left out: {len(unlabelled):,}, the first is '
                           f'{file_of[unlabelled[0]]}')
    rows = np.arange(len(kept))
    return found, rows[:n[0]], rows[n[0]:] if len(n) > 1 else None


def _read_ids(file: Path) -> list[str]:
    """Returns the first word of each line, each once."""
    if not file.is_file():
        raise FileNotFoundError(f'{file}: no such list; it names the images of a part')
    ids = [text.split()[0] for _, text in read_lines(file)]
    if not ids:
        raise ValueError(f'{file} names no image; list one in each line')
    if len({*ids}) < len(ids):
        raise ValueError(f'{file} names {short(find_repeated(ids))} twice; name each image once')
    return ids


def parse_voc(
    root: Path, files: list[tuple[str, str]], name: str, variant: str, classes: list[str] | None = None,
) -> Annotated:
    """Reads the XML files of images, pairs of paths below `root`; without `classes`, they are those found, sorted.

    mmdet truncates corners to whole numbers and counts all four from 0; detectron2 only xmin and ymin, so that boxes
    are a pixel larger. Raises ValueError, which names the file and the object, for what has no meaning.
    """
    sizes, found, counts, unsized = list[tuple[int, int]](), list[VocObject](), list[int](), list[str]()
    for image, below in files:
        size, objects = _read_xml(root / below)
        if size is None:
            unsized.append(below)
            size = _image_size(root / image)
        sizes.append(size)
        found += objects
        counts.append(len(objects))
    notes = [f"XML files without a size, for which the image's is used: {len(unsized):,}, the first is {unsized[0]}"
             ] if unsized else []
    classes = sorted({o.name for o in found}) if classes is None else classes
    number = {name: i for i, name in enumerate(classes)}
    starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)

    def refuse(at: int, why: str) -> ValueError:
        image = int(np.searchsorted(starts, at, 'right')) - 1
        return ValueError(f'{root / files[image][1]}: object {at - starts[image] + 1} ({short(found[at].name)}) {why}')

    labels = np.array([number.get(o.name, -1) for o in found], np.int64)
    if (labels < 0).any():
        raise refuse(int(labels.argmin()), f'is of no class of this data set; its {len(classes)} classes are '
                     f'{", ".join(classes)}')
    corners = np.array([o.corners for o in found], np.float64).reshape(-1, 4)
    corners = np.trunc(corners) - 1 if variant == 'mmdet' else corners - [1, 1, 0, 0]
    extents = np.array(sizes, np.int64).reshape(-1, 2)
    empty = (corners[:, 2:] <= corners[:, :2]).any(1)
    outside = ((corners[:, 2:] <= 0) | (corners[:, :2] >= np.repeat(extents[:, ::-1], counts, 0))).any(1)
    for rows, why in ((empty, 'without area'), (outside, 'outside the image')):
        if rows.any():
            at = int(rows.argmax())
            box = ', '.join(f'{c:g}' for c in found[at].corners)
            raise refuse(at, f'has a box {why}: {box} (xmin, ymin, xmax, ymax); correct or remove it')
    difficult = np.array([o.difficult for o in found], bool)
    rectangles = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)
    annotations = Annotations(starts, rectangles, labels, difficult, crowds=False)
    return Annotated(name, root, [image for image, _ in files], [*range(1, len(files) + 1)], extents, classes,
                     [*range(1, len(classes) + 1)], annotations, notes)


def _image_size(file: Path) -> tuple[int, int]:
    try:
        with Image.open(file) as image:
            return image.height, image.width
    # PIL raises almost anything for a broken file.
    except Exception as e:
        raise ValueError(f'{file}: its XML file states no size, and the image has none ({one_line(e)}); give its XML '
                         'file a size with width and height') from None


def _read_xml(file: Path) -> tuple[tuple[int, int] | None, list[VocObject]]:
    """Returns height and width, None if the file does not state them, and the objects."""
    try:
        root = ElementTree.parse(file).getroot()
    except (ElementTree.ParseError, LookupError, ValueError, OSError) as e:  # LookupError: an unknown encoding
        raise ValueError(f'{file} cannot be read as XML ({one_line(e)}); unpack or write it again') from None
    if root.tag != 'annotation':
        raise ValueError(f"{file} is not in VOC's form: its root is {short(root.tag)}, not annotation; convert it")
    size = [root.findtext(f'size/{key}', '') for key in ('height', 'width')]
    try:
        height, width = (_number(text or '0') for text in size)
        if not (height >= 0 and width >= 0 and height % 1 == width % 1 == 0):
            raise ValueError
    except ValueError:
        raise ValueError(f'{file}: its size is {short(size[1])} x {short(size[0])}, not a number of pixels; correct '
                         'width and height') from None
    objects = []
    for i, node in enumerate(root.findall('object')):
        try:
            objects.append(_parse_object(node))
        except ValueError as e:
            raise ValueError(f'{file}: object {i + 1} {e}; correct or remove it') from None
    return (int(height), int(width)) if height and width else None, objects


def _parse_object(node: ElementTree.Element) -> VocObject:
    name = (node.findtext('name') or '').strip()
    if not name:
        raise ValueError('has no name')
    difficult = (node.findtext('difficult') or '0').strip()
    if difficult not in ('0', '1'):
        raise ValueError(f'({short(name)}): difficult is {short(difficult)}, not 0 or 1')
    texts = {key: node.findtext(f'bndbox/{key}') for key in ('xmin', 'ymin', 'xmax', 'ymax')}
    if missing := [key for key, text in texts.items() if text is None]:
        raise ValueError(f'({short(name)}) has no {missing[0]} in its bndbox')
    corners = []
    for key, text in texts.items():
        try:
            corners.append(_number(text or ''))
        except ValueError:
            raise ValueError(f'({short(name)}): {key} is "{short(text)}", not a number') from None
    return VocObject(name, difficult == '1', tuple(corners))


def _number(text: str) -> float:
    """Parses a finite number."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value
