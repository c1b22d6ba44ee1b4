"""Lists of image files: text with `path label` lines, or CSV. Parsed once, then memory-mapped from the cache.

Paths are relative to the folder of the list, or absolute. Labels are optional, but all lines or none must have one;
`labels` says what they may be.

Text: a line that ends in an image extension is a path, which may contain spaces; any other line is a path, spaces or a
tab, and a label. Empty lines are ignored. CSV: see `sheets`.
"""
import os
import re
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...runtime.messages import short
from .images import FileImages
from .index import Listing, load_or_build
from .labels import Choice, LabelError, Labels
from .names import EXTENSIONS
from .sheets import Sheet, read_sheet

TEXT_SUFFIXES, CSV_SUFFIXES = ('.txt', '.lst', '.list'), ('.csv', '.tsv', '.jsonl')
_LINE = re.compile(rf'(.*(?:{"|".join(map(re.escape, EXTENSIONS))}))(?:\s+(.*))?', re.IGNORECASE)


class ListImages(FileImages):
    """The images that a list names. `choice`: the columns of a CSV.

    Raises FileNotFoundError if the list or all of its first images are missing, ValueError if a line is not valid.
    """

    def __init__(self, file: str | Path, choice: Choice | None = None) -> None:
        file = Path(file)
        if not file.is_file():
            raise FileNotFoundError(f'{file}: no such list of images')
        key: dict[str, Any] = {'root': os.path.realpath(file.parent), 'list': file.name}
        if choice is not None:
            key['choice'] = [choice.image, choice.label]
        index = load_or_build(key, lambda: _parse(file, choice))
        super().__init__(file.parent, index, str(file))
        if not len(self):
            raise ValueError(f'{file} names no image; each line must be `path` or `path label`')
        first = range(min(len(self), 100))
        if not any(os.path.exists(self.path(i)) for i in first):  # Path.exists raises for some names
            raise FileNotFoundError(
                f'{file}: neither its first image {self.path(0)} nor any of the first {len(first)} exists; paths are '
                f'relative to the folder of the list')


def _parse(file: Path, choice: Choice | None = None) -> Listing:
    listing, labels, hashes = Listing(), Labels(), array('q')
    listing.watch_file(file.name, file)
    sheet = _read_text(file, choice) if file.suffix.lower() in TEXT_SUFFIXES else read_sheet(
        file, EXTENSIONS, choice or Choice())
    first_label = None
    for line, path, label in sheet.rows:
        if not len(listing):
            first_label = label
        if (label is None) != (first_label is None):
            has = 'has no label' if label is None else f'has the label {short(label)!r}'
            raise ValueError(f'{file}, line {line}: {has}, unlike the lines before it; label all images or none')
        try:
            listing.add(path)
        except UnicodeEncodeError:  # JSON can name what is no text
            raise ValueError(f'{file}, line {line}: no file can be named {short(ascii(path))}') from None
        hashes.append(hash(os.path.normpath(path) if './' in path or '//' in path else path))
        if label is not None:
            labels.add(label, line)
    try:
        listing.labels, listing.classes = labels.number()
    except LabelError as e:
        raise ValueError(f'{file}, line {e.at}: {e}') from None
    listing.remark_repeated(hashes)
    if note := sheet.describe(len(listing.classes)):
        listing.remarks.append(note)
    return listing


def _read_text(file: Path, choice: Choice | None) -> Sheet:
    if choice is not None:
        raise ValueError(f'{file} has no columns to choose from; only a CSV, a table or a tar has a choice')
    return Sheet(None, [], _read_lines(file))


def _read_lines(file: Path) -> Iterator[tuple[int, str, Any]]:
    # surrogateescape keeps bytes that are not UTF-8, as os.fsdecode does in file names.
    with open(file, encoding='utf-8-sig', errors='surrogateescape') as f:
        for line, text in enumerate(map(str.strip, f), 1):
            if '\0' in text:
                raise ValueError(f'{file}, line {line}: contains a NUL byte; a list must be text in UTF-8')
            if not text:
                continue
            found = _LINE.fullmatch(text)
            if found is None:
                raise ValueError(
                    f'{file}, line {line}: {short(text)!r} is not the path of an image, with or without a label after '
                    f'it; looked for {" ".join(EXTENSIONS)} (a CSV may name other files)')
            yield line, found[1], found[2]
