"""Annotated objects of many images in compact arrays, whatever the form of the files they come from."""
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from ...data.readers.index import digest

VARIANTS = ('mmdet', 'detectron2')
MIN_SIDE = 32  # pixels: mmdet trains on no image whose shorter side is less


class Objects(NamedTuple):
    """Objects of one image, in the order of the file."""

    boxes: np.ndarray  # (n, 4) float32: x1, y1, x2, y2 in pixels of the stored image, counted from 0
    labels: np.ndarray  # (n,) int64
    ignored: np.ndarray  # (n,) bool: COCO's crowds, VOC's difficult objects
    # Of each: COCO's polygons, its run-length encoding (a dict), or None; None: no masks.
    segmentations: list[Any] | None


class Segmentations:
    """Outlines of objects: the coordinates of all polygons end to end, and run-length encodings."""

    def __init__(
        self, coordinates: np.ndarray, polygons: np.ndarray, starts: np.ndarray, encodings: dict[int, dict[str, Any]],
    ) -> None:
        self.coordinates, self.polygons = coordinates, polygons  # polygons (P + 1,): where each starts
        self.starts, self.encodings = starts, encodings  # starts (M + 1,): the first polygon of each object
        self.present = np.diff(starts) > 0
        self.present[list(encodings)] = True

    def get(self, row: int) -> list[list[float]] | dict[str, Any] | None:
        """Returns the polygons or the encoding of an object, as in the file; None if it has neither."""
        if not self.present[row]:
            return None
        if row in self.encodings:
            return self.encodings[row]
        ends = self.polygons[self.starts[row]:self.starts[row + 1] + 1]
        return [self.coordinates[a:b].tolist() for a, b in zip(ends[:-1], ends[1:], strict=True)]


@dataclass(eq=False)
class Annotations:
    """The M objects of N images, by image, and within an image in the order of the file."""

    starts: np.ndarray  # (N + 1,) int64: image i has the objects from starts[i] to starts[i + 1]
    rectangles: np.ndarray  # (M, 4) float64: x, y, width, height
    labels: np.ndarray  # (M,) int64
    ignored: np.ndarray  # (M,) bool: crowds or difficult objects
    crowds: bool  # ignored objects are COCO's crowds, not VOC's difficult ones
    # `__post_init__` replaces None by an array.
    areas: np.ndarray = cast(np.ndarray, None)  # (M,) float64: by COCO's files, or of the boxes
    unused: np.ndarray = cast(np.ndarray, None)  # (M,) bool: mmdet's `ignore` in COCO's files
    ids: np.ndarray = cast(np.ndarray, None)  # (M,) int64: in the file
    segmentations: Segmentations | None = None
    order: np.ndarray | None = None  # (M,) int64: the rows of `segmentations`

    def __post_init__(self) -> None:
        n = len(self.labels)
        if self.areas is None:
            self.areas = self.rectangles[:, 2] * self.rectangles[:, 3]
        self.unused = np.zeros(n, bool) if self.unused is None else self.unused
        self.ids = np.arange(1, n + 1) if self.ids is None else self.ids

    @property
    def has_masks(self) -> bool:
        """Returns whether every object has a segmentation."""
        return self.segmentations is not None and bool(len(self.labels)) and bool(self.segmentations.present.all())

    def objects(self, image: int, kept: np.ndarray | None = None) -> Objects:
        """Returns the objects of an image, or those for which `kept` (M,) is true."""
        rows = np.arange(self.starts[image], self.starts[image + 1])
        rows = rows if kept is None else rows[kept[rows]]
        boxes = self.rectangles[rows]
        boxes[:, 2:] += boxes[:, :2]
        outlines = None
        if self.segmentations is not None and self.order is not None and self.has_masks:
            outlines = [self.segmentations.get(i) for i in self.order[rows].tolist()]
        return Objects(boxes.astype(np.float32), self.labels[rows], self.ignored[rows], outlines)

    def reasons(self, sizes: np.ndarray, variant: str) -> dict[str, np.ndarray]:
        """Returns what does not train: text -> (M,) bool. Each object is in one of them; `sizes`: see `Annotated`.

        mmdet: neither crowds nor difficult objects train, and of COCO no box without area, smaller than 1 px or outside
        the image (mmdet v2.25.0, mmdet/datasets/coco.py). detectron2: difficult objects do, and small boxes.
        """
        if variant not in VARIANTS:
            raise ValueError(f'--variant {variant}: must be one of {", ".join(VARIANTS)}')
        if not self.crowds:
            return {'difficult objects': self.ignored} if variant == 'mmdet' else {}
        x, y, width, height = self.rectangles.T
        rows, columns = np.repeat(sizes, np.diff(self.starts), 0).T
        inside_x = np.minimum(x + width, columns) - np.maximum(x, 0)
        inside_y = np.minimum(y + height, rows) - np.maximum(y, 0)
        side, found = np.minimum(width, height), {'crowds': self.ignored, 'objects marked with `ignore`': self.unused}
        if variant == 'mmdet':
            found |= {'boxes with a side below 1 px': side < 1, 'boxes with an area of 0 or less': self.areas <= 0}
        else:
            found['boxes without area'] = side <= 0
        found['boxes outside the image'] = (inside_x <= 0) | (inside_y <= 0)
        seen = np.zeros(len(x), bool)
        for why, rows in found.items():
            found[why] = rows & ~seen
            seen |= rows
        return found

    def digest(self) -> str:
        """Hashes the objects to 16 hexadecimal characters."""
        outlines = self.segmentations
        parts: list[np.ndarray | str] = [] if outlines is None or self.order is None else [
            outlines.coordinates, outlines.polygons, outlines.starts, self.order, repr(outlines.encodings)]
        return digest(self.starts, self.rectangles, self.labels, self.ignored, self.areas, self.unused, *parts)


@dataclass(eq=False)
class Annotated:
    """What one file, or one list of files, says: images by their paths, classes, and objects."""

    name: str
    root: Path  # the paths are relative to it
    paths: list[str]
    image_ids: list[int]
    sizes: np.ndarray  # (N, 2) int64: height and width
    classes: list[str]
    category_ids: list[int]
    objects: Annotations
    notes: list[str] = field(default_factory=list)
