"""CSV, TSV and JSON lines that name images and perhaps their labels; used for lists, and for metadata beside images.

CSV (or .tsv, with tabs): the first row names the columns, unless one of its fields is the path of an image. Then each
row is a path, with or without a label. JSON lines: each line is an object, and the keys of the first SAMPLE lines name
the columns.

The column of the paths is the one that `#image=COLUMN` chooses; or the first of PATH_COLUMNS, in any case; or the only
one with the path of an image in the first row. `labels` says which column has the labels.
"""
import csv
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ...runtime.messages import short
from .labels import PLAIN, SAMPLE, Choice, choose_column, describe_column, is_missing

PATH_COLUMNS = (
    'path', 'file', 'filename', 'image', 'file_name', 'filepath', 'file_path', 'image_path', 'img_path', 'img',
    'image_name', 'image_file', 'image_id')

_Row = tuple[int, list[Any]]  # number of the line, fields


class Sheet(NamedTuple):
    """What a sheet says of each image."""

    column: str | None  # of the labels
    columns: list[str]  # all others but that of the paths; [] without names
    rows: Iterator[tuple[int, str, Any]]  # number of the line, path, and label or None

    def describe(self, classes: int, reason: str = '') -> str:
        return describe_column(self.column, self.columns, classes, reason)


def read_sheet(file: Path, extensions: tuple[str, ...], choice: Choice) -> Sheet:
    """Opens a sheet; raises ValueError if its first lines are not valid. So does iterating over its rows."""
    rows = _read_json(file) if file.suffix.lower() == '.jsonl' else _read_csv(file)
    head = next(rows, None)
    if head is None:
        return Sheet(None, [], iter(()))
    line, header = head
    paths = _find_paths(header, extensions)
    named = not paths or not {str(name).strip().lower() for name in header}.isdisjoint(PATH_COLUMNS)
    if not named and len(header) > 2:
        raise _no_path(file, line, header)
    sample = [] if named else [head]
    sample += itertools.islice(rows, SAMPLE)
    unnamed = ['path', 'label'] if paths == [0] else ['label', 'path']
    names = [str(name).strip() for name in header] if named else unnamed
    path_at = _choose_path(file, line, names, _find_paths(sample[0][1], extensions) if sample else [], choice)
    kinds = {name: PLAIN for at, name in enumerate(names[:len(header)]) if at != path_at}
    column = choose_column(kinds, choice, lambda name: [row[names.index(name)] for _, row in sample])
    label_at = None if column is None else names.index(column)
    if twice := next((name for name in (names[path_at], column) if name is not None and names.count(name) > 1), None):
        raise ValueError(f'{file}, line {line}: several columns are named {short(twice)!r}; rename all but one of them')
    found = ((line, _check_path(file, line, row[path_at]), None if label_at is None else _read_label(row[label_at]))
             for line, row in itertools.chain(sample, rows))
    return Sheet(column, list(kinds), found)


def _find_paths(row: list[Any], extensions: tuple[str, ...]) -> list[int]:
    return [at for at, field in enumerate(row) if isinstance(field, str) and field.lower().endswith(extensions)]


def _choose_path(file: Path, line: int, names: list[str], found: list[int], choice: Choice) -> int:
    """Returns the number of the column of the paths; `found`: those with the path of an image in the first row."""
    lower = [name.lower() for name in names]
    if choice.image is not None:
        if choice.image not in names:
            raise ValueError(f'{file}#image={choice.image}: no such column; there are {", ".join(names)}')
        return names.index(choice.image)
    known = next((lower.index(name) for name in PATH_COLUMNS if name in lower), None)
    if known is None and len(found) > 1:
        raise ValueError(
            f'{file}: the columns {", ".join(names[at] for at in found)} all name images; choose one with '
            f'{file}#image=COLUMN')
    if known is None and not found:
        raise _no_path(file, line, names)
    return found[0] if known is None else known


def _no_path(file: Path, line: int, row: list[Any]) -> ValueError:
    return ValueError(
        f'{file}, line {line}: {short(str(row))} names no column {", ".join(PATH_COLUMNS[:4])}, nor is it `path` or '
        '`path,label` of an image; #image=COLUMN chooses the column of the paths')


def _check_path(file: Path, line: int, path: Any) -> str:
    if not isinstance(path, str) or not path:
        raise ValueError(f'{file}, line {line}: the path is empty')
    if '\0' in path:
        raise ValueError(f'{file}, line {line}: contains a NUL byte; a list must be text in UTF-8')
    return path


def _read_label(label: Any) -> Any:
    label = label.strip() if isinstance(label, str) else label
    if is_missing(label):
        return None
    return label if isinstance(label, (str, int, float)) else (json.dumps(label),)  # breaks the rule


def _read_csv(file: Path) -> Iterator[_Row]:
    # surrogateescape keeps bytes that are not UTF-8, as os.fsdecode does in file names.
    with open(file, encoding='utf-8-sig', errors='surrogateescape', newline='') as f:
        reader, width = csv.reader(f, delimiter='\t' if file.suffix.lower() == '.tsv' else ','), 0
        try:
            for row in filter(any, reader):
                width = width or len(row)
                if len(row) != width:
                    raise ValueError(
                        f'{file}, line {reader.line_num}: {len(row)} fields, but the first line has {width}; put '
                        'fields that contain a comma in quotes')
                yield reader.line_num, row
        except csv.Error as e:
            raise ValueError(f'{file}, line {reader.line_num}: not valid CSV ({e})') from None


def _read_json(file: Path) -> Iterator[_Row]:
    records = _read_objects(file)
    first = list(itertools.islice(records, SAMPLE))
    names = list(dict.fromkeys(name for _, record in first for name in record))
    if first:
        yield first[0][0], names
    for line, record in itertools.chain(first, records):
        yield line, [record.get(name) for name in names]


def _read_objects(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(file, encoding='utf-8-sig', errors='surrogateescape') as f:
        for line, text in enumerate(f, 1):
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except (ValueError, RecursionError):
                record = None
            if not isinstance(record, dict):
                raise ValueError(f'{file}, line {line}: not a JSON object')
            yield line, record
