"""Writes what a segmenter predicts and how good that is: masks, a picture sheet, a table of classes, a record."""
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ...data.readers.images import name_of
from ...runtime.files import write_csv
from ...runtime.messages import short
from ..backbone import Backbone
from ..datasets.masks import MaskedImages, MaskPair
from ..panels import MOST
from ..results.record import format_record, write_record
from .pictures import MaskRow, write_mask, write_sheet

RECORD, PER_CLASS, MASKS, SHEET = 'record.json', 'per_class.csv', 'masks', 'sheet.jpg'
SHOWN = 5  # classes


def choose_shown(images: MaskedImages) -> frozenset[int]:
    """Returns the rows of the images for the sheet, evenly spaced."""
    n = len(images)
    return frozenset((n - 1) * i // max(1, min(n, MOST) - 1) for i in range(min(n, MOST)))


def write_pictures(folder: Path, images: MaskedImages, found: dict[int, np.ndarray]) -> None:
    """Writes a sheet of images with their true and predicted labels, by row."""
    rows = [MaskRow(name_of(images, row), *images.read_pair(row), labels) for row, labels in sorted(found.items())]
    if rows:
        write_sheet(folder / SHEET, rows, images.classes)


def write_prediction(folder: Path, images: MaskedImages, row: int, labels: np.ndarray) -> None:
    """Writes the predicted labels of an image as a mask of ids, under the name of the true mask."""
    ids = np.array(images.kinds.ids, np.uint8)[labels]
    write_mask(folder / MASKS / images.mask_path(row), ids)


def write_result(
    folder: Path, benchmark: str, protocol: dict[str, Any], source: Backbone, data: MaskPair, entry: dict[str, Any],
    *, seconds: float, extra: dict[str, Any], say: Callable[[str], Any],
) -> dict[str, Any]:
    """Writes the table of classes and the record of an evaluation, prints it, and returns it.

    `entry` is from `training.SegmentationEvaluation.measure`.
    """
    rows = entry['per_class']
    write_csv(folder / PER_CLASS, [list(rows[0]), *(list(row.values()) for row in rows)])
    unreadable = [*extra.pop('unreadable', {}).values(), *entry['unreadable'].values()]
    record = write_record(
        folder / RECORD, benchmark, protocol, source, data.data(), entry['metrics'], seconds=seconds,
        extra={'per_class': rows, 'unreadable': sorted(set(unreadable)), **extra})
    if bad := list(entry['unreadable'].values()):
        say(f'{len(bad)} test images could not be read and are left out of all numbers; the first: {bad[0]}')
    ranked = sorted((r for r in rows if r['IoU'] is not None), key=lambda r: r['IoU'])
    listed = ranked if len(ranked) <= 2 * SHOWN else [*ranked[:SHOWN], *ranked[-SHOWN:]]
    say(f'IoU of {"the" if listed is ranked else "the worst and the best"} classes: ' + ', '.join(
        f'{short(r["class"], 30)} {r["IoU"]:.1f}' for r in listed))
    say(format_record(record))
    return record
