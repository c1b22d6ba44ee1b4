"""Writes what a detector found: predictions and a picture sheet."""
from pathlib import Path

import numpy as np

from ...data.readers.images import name_of
from ...runtime.files import write_json
from ..datasets.objects import ObjectImages
from ..panels import MOST
from ..trained import SHEET
from .masks import rasterize
from .metrics import Detections, to_coco_results
from .pictures import Drawn, SheetRow, write_sheet

PREDICTIONS = 'predictions.json'
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
    size, best, truth, masks = (image.shape[0], image.shape[1]), found.scores >= SURE, None, None
    if objects.segmentations is not None and found.masks is not None:
        truth = np.array([rasterize(s, *size) for s in objects.segmentations]).reshape(-1, *size)
    if found.masks is not None:
        drawn = [rasterize(m, *size) for m, kept in zip(found.masks, best, strict=True) if kept]
        masks = np.array(drawn).reshape(-1, *size)
    return SheetRow(
        Path(name_of(images, row)).name, image, Drawn(objects.boxes, objects.labels, None, truth),
        Drawn(found.boxes[best], found.labels[best], found.scores[best], masks))
