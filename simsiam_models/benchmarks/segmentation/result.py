"""Writes what a segmenter predicts: masks and a picture sheet."""
from pathlib import Path

import numpy as np

from ...data.readers.images import name_of
from ..datasets.masks import MaskedImages
from ..panels import MOST
from ..trained import SHEET
from .pictures import MaskRow, write_mask, write_sheet

MASKS = 'masks'


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
