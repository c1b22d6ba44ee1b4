"""Where a fine-tuned classifier is wrong: its confusion matrix and its worst mistakes."""
import csv
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from PIL import Image

from ..data.readers.images import Images, load_picture, name_of, open_files
from ..pages.document import escape
from ..pages.gallery import Cell, draw_row
from ..pages.tables import draw_table, wrap_wide
from ..runtime.messages import counted, is_count, restore_cell, short
from .data import open_recorded
from .run import RunFolder

PREDICTIONS = 'predictions.csv'
MATRIX, PAIRS, MISTAKES = 20, 30, 24  # classes of a matrix; of more, pairs in a table; mistakes that are shown
STYLE = '''
.matrix table { margin: 0 .5rem .5rem 0 } .matrix td:first-child { min-width: 0 }
.matrix td, .matrix th { border: 0; padding: .3rem .55rem; text-align: right }
.matrix tbody th { text-align: right } .matrix td { font-variant-numeric: tabular-nums; border-radius: 3px }
.matrix td.zero { color: var(--soft) }
'''

Loader = Callable[[], Image.Image | None]


class Mistake(NamedTuple):
    """A wrong prediction."""

    path: str
    label: str
    predicted: str
    score: float  # of the predicted class


def read_confusion(record: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Returns label -> predicted class -> images; raises ValueError if damaged."""
    confusion: dict[str, dict[str, int]] = record['extra']['confusion']
    given = confusion.values() if isinstance(confusion, dict) else [None]
    if not all(isinstance(row, dict) and row.keys() <= confusion.keys() and all(map(is_count, row.values()))
               for row in given):
        raise ValueError('the confusion matrix in record.json is damaged; fine-tune again, or remove the file')
    return confusion


def draw_confusion(record: dict[str, Any]) -> str:
    """Returns the confusion matrix, or for many classes the pairs that are confused most."""
    confusion = read_confusion(record)
    classes = list(confusion)
    if len(classes) > MATRIX:
        pairs = sorted(((n, a, b) for a, row in confusion.items() for b, n in row.items() if a != b), reverse=True)
        rows = [['Label', 'Predicted', 'Images'], *([a, b, f'{n:,}'] for n, a, b in pairs[:PAIRS])]
        more = [f'{len(pairs) - PAIRS:,} more pairs are in confusion.csv.'] if len(pairs) > PAIRS else []
        return draw_table(rows, f'Pairs confused most often, of {len(classes):,} classes', more)
    head = ''.join(f'<th scope="col">{escape(short(c, 16))}</th>' for c in classes)
    body = ''.join(
        f'<tr><th scope="row">{escape(short(label, 30))}</th>'
        + ''.join(_draw_cell(row.get(c, 0), sum(row.values()), c == label) for c in classes) + '</tr>\n'
        for label, row in confusion.items())
    return '<div class="matrix">' + wrap_wide(
        f'<table><caption>Images by label (rows) and predicted class (columns)</caption><thead><tr><td></td>{head}</tr>'
        f'</thead>\n<tbody>{body}</tbody></table>', 'Confusion matrix') + '</div>\n'


def _draw_cell(n: int, total: int, right: bool) -> str:
    if not n:
        return '<td class="zero">0</td>'
    share = round(8 + 30 * n / total)  # percent of colour: the text keeps its contrast
    return f'<td style="background: color-mix(in srgb, var(--s{1 if right else 2}) {share}%, transparent)">{n:,}</td>'


def read_mistakes(folder: Path, tested: int | None = None) -> list[Mistake] | None:
    """Returns the wrong ones of the predictions of `tested` images, the surest first; None if the run kept none.

    Raises ValueError if the file is damaged.
    """
    file, found, n = folder / PREDICTIONS, list[Mistake](), 0
    if not file.is_file():
        return None
    try:
        with open(file, newline='', encoding='utf-8-sig', errors='surrogateescape') as f:
            table = csv.DictReader(f)
            if table.fieldnames is None:
                raise ValueError
            for row in table:
                n += 1
                path, label, predicted = (restore_cell(row[k]) for k in ('path', 'label', 'predicted'))
                score = float(row['score'])
                if not 0 <= score <= 1:
                    raise ValueError
                if label != predicted:
                    found.append(Mistake(path, label, predicted, score))
        if tested not in (None, n):
            raise ValueError
    except (KeyError, ValueError, TypeError, AttributeError, csv.Error):
        raise ValueError(f'{file} is damaged; remove it, or fine-tune again') from None
    return sorted(found, key=lambda m: -m.score)


def draw_mistakes(run: RunFolder, given: str | None) -> Iterator[str]:
    """Yields pictures of the mistakes with the highest scores; `given` names the images if they have moved."""
    confusion = read_confusion(run.record) if run.record and 'confusion' in run.record.get('extra', {}) else None
    tested = None if confusion is None else sum(sum(row.values()) for row in confusion.values())
    mistakes = read_mistakes(run.folder, tested)
    if mistakes is None:
        yield (f'<p>{PREDICTIONS} is missing, so mistakes cannot be shown: this run is from an earlier version. '
               'Fine-tune again into a new folder.</p>\n')
        return
    shown = mistakes[:MISTAKES]
    pictures, problem = find_pictures(run, shown, given)
    text = (f'Misclassified: {counted(len(mistakes), "validation image")}. Shown: {len(shown)}, highest scores first. '
            + problem)
    yield f'<p class="soft">{escape(text)}</p>\n'
    if shown:
        yield draw_row('Predicted class (score), and the label', [
            Cell(pictures.get(m.path, lambda: None), f'{short(m.predicted, 40)} ({m.score:.2f}), label '
                 f'{short(m.label, 40)}', Path(m.path).name) for m in shown])


def find_pictures(
    run: RunFolder, mistakes: list[Mistake], given: str | None,
) -> tuple[dict[str, Loader], str]:
    """Returns what loads the image of each path that is found, and a sentence on the others.

    An image is the file at the path that PREDICTIONS holds, or part of the data that the record names or that are
    `given`: the one with the same label whose name has the longest end in common with the path, if there is only one.
    """
    found: dict[str, Loader] = {
        m.path: partial(load_picture, open_files([m.path], m.path), 0) for m in mistakes
        if given is None and os.path.isfile(m.path)}  # Path.is_file raises for some names
    data = (run.record or {}).get('data', {}).get('path')
    if len(found) == len({m.path for m in mistakes}):
        return found, ''
    if given is None and not isinstance(data, str):
        return found, 'The record does not name the data; pass them with --data.'
    parts, problem = open_recorded(data, given)
    for images in reversed(parts):  # the validation part, if there is one
        found |= _match([m for m in mistakes if m.path not in found], images)
    missing = len({m.path for m in mistakes} - {*found})
    if missing and not problem:
        problem = f'{missing} of these images {"is" if missing == 1 else "are"} not in {given or data}.'
    return found, problem


def _match(mistakes: list[Mistake], images: Images) -> dict[str, Loader]:
    """Returns what loads the image of each path that one of the images matches."""
    ends: dict[str, list[tuple[list[str], int]]] = {_split(m.path)[-1]: [] for m in mistakes}
    for row in range(len(images) if mistakes and images.labels is not None else 0):
        parts = _split(name_of(images, row))
        if parts[-1] in ends:
            ends[parts[-1]].append((parts, row))
    found: dict[str, Loader] = {}
    for m in mistakes:
        own = _split(m.path)
        shared = [(len(os.path.commonprefix([own[::-1], parts[::-1]])), row) for parts, row in ends[own[-1]]
                  if str(images.classes[cast(np.ndarray, images.labels)[row]]) == m.label]
        longest = max(shared, default=(0, 0))[0]
        best = [row for length, row in shared if length == longest]
        if len(best) == 1:
            found[m.path] = partial(load_picture, images, best[0])
    return found


def _split(name: str) -> list[str]:
    """Returns the folders, the archive and the file in the name of an image."""
    return re.split('/|: ', name)
