"""Writes what a detector found and how good that is: predictions, a picture sheet, a table of classes, a record."""
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ...data.readers.images import name_of
from ...runtime.files import write_csv, write_json
from ...runtime.messages import short
from ..backbone import Backbone
from ..datasets.objects import ObjectImages, ObjectPair
from ..panels import MOST
from ..results.record import format_record, write_record
from .masks import rasterize
from .metrics import Detections, to_coco_results
from .pictures import Drawn, SheetRow, write_sheet

RECORD, PER_CLASS, PREDICTIONS, SHEET = 'record.json', 'per_class.csv', 'predictions.json', 'sheet.jpg'
SHOWN = 5  # classes
SURE = 0.3  # detections with a lower score are not drawn


def write_predictions(folder: Path, images: ObjectImages, rows: list[int], found: list[Detections]) -> None:
    """Writes the detections as COCO's results, and a sheet of pictures with what is there and what was found."""
    write_json(folder / PREDICTIONS, to_coco_results(images, rows, found))
    shown = [make_row(images, *pair) for pair in zip(rows[:MOST], found[:MOST], strict=True)]
    if shown:
        write_sheet(folder / SHEET, shown, images.classes)


def make_row(images: ObjectImages, row: int, found: Detections) -> SheetRow:
    """Returns an image with its objects and its best detections for the sheet."""
    image, objects = images.read(row), images.objects(row)
    size, best, truth, masks = image.shape[:2], found.scores >= SURE, None, None
    if found.masks is not None:
        truth = np.array([rasterize(s, *size) for s in objects.segmentations]).reshape(-1, *size)
        masks = [rasterize(m, *size) for m, kept in zip(found.masks, best, strict=True) if kept]
        masks = np.array(masks).reshape(-1, *size)
    return SheetRow(
        Path(name_of(images, row)).name, image, Drawn(objects.boxes, objects.labels, None, truth),
        Drawn(found.boxes[best], found.labels[best], found.scores[best], masks))


def write_result(
    folder: Path, benchmark: str, protocol: dict[str, Any], source: Backbone, data: ObjectPair, entry: dict[str, Any],
    *, seconds: float, extra: dict[str, Any], say: Callable[[str], Any],
) -> dict[str, Any]:
    """Writes the table of classes and the record of an evaluation, prints it, and returns it.

    `entry` is from `training.Evaluation.measure`.
    """
    rows = entry['per_class']
    write_csv(folder / PER_CLASS, [list(rows[0]), *(list(row.values()) for row in rows)])
    unreadable = [*extra.pop('unreadable', {}).values(), *entry['unreadable'].values()]
    record = write_record(
        folder / RECORD, benchmark, protocol, source, data.data(), entry['metrics'], seconds=seconds,
        extra={
            'per_class': rows, 'unreadable': sorted(set(unreadable)), 'shared_images': data.shared, **extra})
    if bad := list(entry['unreadable'].values()):
        say(f'{len(bad)} test images could not be read and are left out of all numbers; the first: {bad[0]}')
    key = next(name for name in rows[0] if name not in ('class', 'images', 'objects'))
    ranked = sorted((r for r in rows if r.get(key) is not None), key=lambda r: r[key])
    listed = ranked if len(ranked) <= 2 * SHOWN else [*ranked[:SHOWN], *ranked[-SHOWN:]]
    say(f'{key} of {"the" if listed is ranked else "the worst and the best"} classes: ' + ', '.join(
        f'{short(r["class"], 30)} {r[key]:.1f}' for r in listed))
    say(format_record(record))
    return record
