"""Lists of image files: text, `path label` a line, or CSV. Parsed once, and mapped from the cache afterwards.

Paths are relative to the folder of the list, or absolute. Labels are optional, but for all lines or for none.

Text: a line that ends in an image's extension is a path, in which there may be spaces; any other is a path, blanks or a
tab, and the number of its class. Empty lines are passed over.

CSV (or .tsv, with tabs): the first row names the columns, one of PATHS and perhaps one of LABELS, others being passed
over; or it is a row like all others, `path` or `path,label`. The first label tells what they are: numbers of classes,
names of classes, or nothing.
"""
import csv
import os
import re
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .images import EXTENSIONS, FileImages
from .index import Listing, cached, file_stamp

TEXT, CSV = ('.txt', '.lst', '.list'), ('.csv', '.tsv')
PATHS, LABELS = ('path', 'file', 'filename', 'image'), ('label', 'class', 'target')
MOST = 100_000  # classes; a larger number is something else
_NUMBER = re.compile(r'[0-9]+', re.ASCII)


class ListImages(FileImages):
    """Images that a list names.

    Raises:
        FileNotFoundError: no such list, or none of its first images is there.
        ValueError: a line of it, which is named, is not as it should be.
    """

    def __init__(self, file: str | Path) -> None:
        file = Path(file)
        if not file.is_file():
            raise FileNotFoundError(f'{file}: no such list of images')
        root = file.parent
        key = {'root': os.path.realpath(root), 'list': file.name}
        super().__init__(root, cached(key, lambda: _parse(file)), str(file))
        if not len(self):
            raise ValueError(f'{file}: names no image; each line is `path` or `path label`')
        first = range(min(len(self), 100))
        if not any(os.path.exists(self.path(i)) for i in first):  # Path.exists raises at some names
            raise FileNotFoundError(
                f'{file}: its first image {self.path(0)} is not there, nor is any of the first {len(first)}; paths are '
                f'relative to the folder of the list')


def _parse(file: Path) -> Listing:
    listing, names = Listing(), {}
    listing.files[file.name] = stamp = file_stamp(file)
    listing.watch(stamp[1] if stamp else 0)
    labelled = None  # what the first line has: None or '' for no label, else its label
    for n, (line, path, label) in enumerate(_rows(file)):
        if '\0' in path:
            raise ValueError(f'{file}, line {line}: holds a NUL byte; a list is text in UTF-8')
        if not n:
            labelled = label
        if bool(label) != bool(labelled):
            has = 'has no label' if labelled else f'has the label {label!r}'
            raise ValueError(f'{file}, line {line}: {has}, unlike those before it; label all images or none')
        listing.add(path)
        if not label:
            continue
        if not _NUMBER.fullmatch(labelled):
            listing.labels.append(names.setdefault(label, len(names)))
        elif not _NUMBER.fullmatch(label) or int(label) >= MOST:
            raise ValueError(
                f'{file}, line {line}: the label {label!r} is no class number; these are whole numbers from 0 to '
                f'{MOST - 1}')
        else:
            listing.labels.append(int(label))
    if names:  # numbers in the order of the names
        listing.classes = sorted(names)
        number = {name: i for i, name in enumerate(listing.classes)}
        order = np.array([number[name] for name in names], np.int32)
        listing.labels = array('i', order[np.frombuffer(listing.labels, np.int32)].tobytes())
    elif listing.labels:
        listing.classes = [str(i) for i in range(max(listing.labels) + 1)]
    return listing


def _rows(file: Path) -> Iterator[tuple[int, str, str]]:
    """Line number, path, and label or ''."""
    # Bytes that are no UTF-8 stand for themselves, as in names of files.
    with open(file, encoding='utf-8-sig', errors='surrogateescape', newline='' if _is_csv(file) else None) as f:
        if _is_csv(file):
            yield from _csv_rows(file, csv.reader(f, delimiter='\t' if file.suffix.lower() == '.tsv' else ','))
            return
        for line, text in enumerate(f, 1):
            text = text.strip()
            if text.lower().endswith(EXTENSIONS):
                yield line, text, ''
            elif text:
                path, label = text.rsplit(None, 1) if len(text.split(None, 1)) == 2 else (text, '')
                if not path.lower().endswith(EXTENSIONS):
                    raise ValueError(
                        f'{file}, line {line}: {_short(text)!r} is no path of an image, with or without a label after '
                        f'it; looked for {" ".join(EXTENSIONS)} (a CSV may name other files)')
                if not _NUMBER.fullmatch(label):
                    raise ValueError(
                        f'{file}, line {line}: the label {_short(label)!r} is no whole number from 0; names of classes '
                        'need a CSV')
                yield line, path, label


def _csv_rows(file: Path, reader: 'csv.Reader') -> Iterator[tuple[int, str, str]]:
    at: tuple[int, int | None] | None = None  # columns of path and label
    width = 0
    try:
        for row in reader:
            if not any(row):
                continue
            if at is None:
                width, header = len(row), [name.strip().lower() for name in row]
                at = _columns(header)
                if at is not None:
                    continue
                if not row[0].lower().endswith(EXTENSIONS) or width > 2:
                    raise ValueError(
                        f'{file}, line {reader.line_num}: {_short(str(row))} names no column {", ".join(PATHS)}, nor '
                        'is it `path` or `path,label` of an image')
                at = 0, 1 if width == 2 else None
            if len(row) != width:
                raise ValueError(
                    f'{file}, line {reader.line_num}: {len(row)} fields where the first line has {width}; a field with '
                    'a comma in it needs quotes')
            path, label = row[at[0]], '' if at[1] is None else row[at[1]].strip()
            if not path:
                raise ValueError(f'{file}, line {reader.line_num}: no path in it')
            yield reader.line_num, path, label
    except csv.Error as e:
        raise ValueError(f'{file}, line {reader.line_num}: no CSV ({e})') from None


def _columns(header: list[str]) -> tuple[int, int | None] | None:
    paths, labels = ([header.index(name) for name in names if name in header] for names in (PATHS, LABELS))
    return (paths[0], labels[0] if labels else None) if paths else None


def _is_csv(file: Path) -> bool:
    return file.suffix.lower() in CSV


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + '...'
