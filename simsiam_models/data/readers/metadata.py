"""Labels in a metadata.csv or metadata.jsonl beside the images, as Hugging Face's imagefolder has them.

Its paths are relative to its own folder, which is that of the images or the one above. If it has labels for all images,
they are used, unless several subfolders are classes already.
"""
import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime.messages import short
from .index import Index, describe_alike
from .labels import Choice, LabelError, Labels
from .sheets import read_sheet

NAMES = ('metadata.csv', 'metadata.jsonl')


def read_metadata(root: Path, index: Index, extensions: tuple[str, ...], choice: Choice) -> Index:
    """Returns the index with the labels of the metadata, and a note; unchanged if there is none.

    Raises ValueError if a chosen column does not exist.
    """
    if not len(index):
        return index
    folders = (root, ''), (root.parent, f'{root.name}/')
    places = [(folder / name, above) for folder, above in folders for name in NAMES]
    for file, above in places:
        if file.is_file() and (found := _join(file, above, index, extensions, choice)) is not None:
            return found
    if choice != Choice():
        raise ValueError(f'{root} has no {" or ".join(NAMES)} with columns to choose from')
    return index


def _join(file: Path, above: str, index: Index, extensions: tuple[str, ...], choice: Choice) -> Index | None:
    """Returns None if the file names none of the images, as that of another folder."""
    row = {os.fsdecode(index.path(i)): i for i in range(len(index))}
    given: dict[int, tuple[Any, int]] = {}
    elsewhere, clash = 0, None
    try:
        sheet = read_sheet(file, extensions, choice)
        for line, path, label in sheet.rows:
            path = os.path.normpath(path)
            at = row.get(path.removeprefix(above)) if path.startswith(above) else None
            if at is None:
                elsewhere += 1
            elif given.setdefault(at, (label, line))[0] != label and clash is None:
                clash = LabelError(f'{short(path)} has another label there than in line {given[at][1]}', line)
    except ValueError as e:  # the file may serve another purpose
        if choice != Choice():
            raise
        return None if above else _add_note(index, f'{file.name} is not used: {e}')
    if not given:
        return None
    if sheet.column is not None and len(index.classes) > 1 and choice.label is None:
        return _add_note(
            index, f'the subfolders are the classes; #label={sheet.column} chooses that column of {file.name}')
    labels, reason = Labels(), ''
    for i in range(len(index)):
        labels.add(*given.get(i, (None, 0)))
    try:
        if clash is not None:
            raise clash
        if sheet.column is not None and (missing := labels.codes.count(-1)):
            name = os.fsdecode(index.path(labels.codes.index(-1)))
            raise LabelError(f'{missing} of {len(index)} images have no label, the first is {name}', None)
        numbers, classes = labels.number() if sheet.column is not None else ([], [])
    except LabelError as e:
        reason, numbers, classes = str(e) if e.at is None else f'line {e.at}: {e}', [], []
        if choice.label is not None and index.classes:  # those of the folders are not what was chosen
            raise ValueError(f'{file}#label={choice.label}: {reason}') from None
    note = sheet.describe(len(classes), reason)
    if note:
        note = f'{file.name}: {note}' + f'; {elsewhere} of its lines name no image here' * bool(elsewhere)
    index = _add_note(index.relabel(np.array(numbers, np.int32), classes) if classes else index, note)
    return _add_note(index, describe_alike(classes))


def _add_note(index: Index, note: str) -> Index:
    return dataclasses.replace(index, notes=[*index.notes, note]) if note else index
