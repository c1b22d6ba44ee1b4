"""Lists of image files: text with `path label` lines, or CSV. Parsed once, then memory-mapped from the cache.

Paths are relative to the folder of the list, or absolute. Labels are optional, but all lines or none must have one.

Text: a line that ends in an image extension is a path, which may contain spaces; any other line is a path, spaces or a
tab, and a class number. Empty lines are ignored.

CSV (or .tsv, with tabs): the first row names the columns, one of PATH_COLUMNS and perhaps one of LABEL_COLUMNS; other
columns are ignored. Or there is no such row, and each row is `path` or `path,label`. The first label decides whether
labels are class numbers, class names, or missing.
"""
import csv
import os
import re
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...runtime.messages import short
from .images import EXTENSIONS, FileImages
from .index import Listing, load_or_build

TEXT_SUFFIXES, CSV_SUFFIXES = ('.txt', '.lst', '.list'), ('.csv', '.tsv')
PATH_COLUMNS, LABEL_COLUMNS = ('path', 'file', 'filename', 'image'), ('label', 'class', 'target')
MAX_CLASSES = 100_000  # a larger number is not a class
_NUMBER = re.compile(r'[0-9]+', re.ASCII)


class ListImages(FileImages):
    """The images that a list names.

    Raises FileNotFoundError if the list or all of its first images are missing, ValueError if a line is not valid.
    """

    def __init__(self, file: str | Path) -> None:
        file = Path(file)
        if not file.is_file():
            raise FileNotFoundError(f'{file}: no such list of images')
        key = {'root': os.path.realpath(file.parent), 'list': file.name}
        super().__init__(file.parent, load_or_build(key, lambda: _parse(file)), str(file))
        if not len(self):
            raise ValueError(f'{file} names no image; each line must be `path` or `path label`')
        first = range(min(len(self), 100))
        if not any(os.path.exists(self.path(i)) for i in first):  # Path.exists raises for some names
            raise FileNotFoundError(
                f'{file}: its first image {self.path(0)} is not there, nor is any of the first {len(first)}; paths are '
                f'relative to the folder of the list')


def _parse(file: Path) -> Listing:
    listing, names, hashes = Listing(), {}, array('q')
    listing.watch_file(file.name, file)
    for line, path, label in _read_rows(file):
        if '\0' in path:
            raise ValueError(f'{file}, line {line}: contains a NUL byte; a list must be text in UTF-8')
        if not len(listing):
            first_label = label
        if bool(label) != bool(first_label):
            has = 'has no label' if first_label else f'has the label {short(label)!r}'
            raise ValueError(f'{file}, line {line}: {has}, unlike the lines before it; label all images or none')
        listing.add(path)
        hashes.append(hash(os.path.normpath(path) if './' in path or '//' in path else path))
        if label and _NUMBER.fullmatch(first_label):
            if not _NUMBER.fullmatch(label) or int(label) >= MAX_CLASSES:
                raise ValueError(
                    f'{file}, line {line}: the label {short(label)!r} is not a class number; use integers from 0 to '
                    f'{MAX_CLASSES - 1}')
            listing.labels.append(int(label))
        elif label:
            listing.labels.append(names.setdefault(label, len(names)))
    listing.remark_repeated(hashes)
    if names:  # renumber the classes in the order of their names
        listing.classes = sorted(names)
        number = {names[name]: i for i, name in enumerate(listing.classes)}
        listing.labels = array('i', map(number.get, listing.labels))
    elif listing.labels:
        listing.classes = [str(i) for i in range(max(listing.labels) + 1)]
    return listing


def _read_rows(file: Path) -> Iterator[tuple[int, str, str]]:
    """Yields line number, path, and label or ''."""
    is_csv = file.suffix.lower() in CSV_SUFFIXES
    # surrogateescape keeps bytes that are not UTF-8, as os.fsdecode does in file names.
    with open(file, encoding='utf-8-sig', errors='surrogateescape', newline='' if is_csv else None) as f:
        if is_csv:
            yield from _read_csv(file, csv.reader(f, delimiter='\t' if file.suffix.lower() == '.tsv' else ','))
            return
        for line, text in enumerate(map(str.strip, f), 1):
            if text.lower().endswith(EXTENSIONS):
                yield line, text, ''
            elif text:
                path, label = text.rsplit(None, 1) if len(text.split(None, 1)) == 2 else (text, '')
                if not path.lower().endswith(EXTENSIONS):
                    raise ValueError(
                        f'{file}, line {line}: {short(text)!r} is not the path of an image, with or without a label '
                        f'after it; looked for {" ".join(EXTENSIONS)} (a CSV may name other files)')
                if not _NUMBER.fullmatch(label):
                    raise ValueError(
                        f'{file}, line {line}: the label {short(label)!r} is not an integer from 0; class names need a '
                        'CSV')
                yield line, path, label


def _read_csv(file: Path, reader: Any) -> Iterator[tuple[int, str, str]]:
    width = 0
    try:
        for row in filter(any, reader):
            if not width:
                width, header = len(row), [name.strip().lower() for name in row]
                path_at, label_at = (next((header.index(name) for name in names if name in header), None)
                                     for names in (PATH_COLUMNS, LABEL_COLUMNS))
                if path_at is not None:
                    continue
                if not row[0].lower().endswith(EXTENSIONS) or width > 2:
                    raise ValueError(
                        f'{file}, line {reader.line_num}: {short(str(row))} names no column {", ".join(PATH_COLUMNS)}, '
                        'nor is it `path` or `path,label` of an image')
                path_at, label_at = 0, 1 if width == 2 else None
            if len(row) != width:
                raise ValueError(
                    f'{file}, line {reader.line_num}: {len(row)} fields, but the first line has {width}; put fields '
                    'that contain a comma in quotes')
            if not row[path_at]:
                raise ValueError(f'{file}, line {reader.line_num}: the path is empty')
            yield reader.line_num, row[path_at], '' if label_at is None else row[label_at].strip()
    except csv.Error as e:
        raise ValueError(f'{file}, line {reader.line_num}: not valid CSV ({e})') from None
