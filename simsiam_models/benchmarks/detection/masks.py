"""Masks of objects: polygons and run lengths to pixels, training targets of the mask head, and its output in an image.

mmdetection's rules: masks are pixels of the original image, resized by OpenCV's nearest rule; the target is the mean of
the mask in each cell of the box, cut at one half; the output is sampled at the pixels' centres of the original image.
"""
import functools
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from ...runtime.messages import require, short

DIVISOR = 32  # mmdetection pads images and masks to multiples of it
CHUNK = 1 << 26  # pixels of masks that `encode_pasted` holds at a time
MAX_COORDINATE = 1e6  # pycocotools walks along each edge pixel by pixel


@functools.cache
def coco_masks() -> Any:
    """Returns pycocotools.mask; raises RuntimeError if it is not installed."""
    require('a mask', pycocotools='pycocotools')
    from pycocotools import mask
    return mask


def rasterize(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Returns the mask of an object, (height, width) uint8 of 0 and 1.

    Args:
        segmentation: as in a COCO file: a list of polygons [x1, y1, x2, y2, ...], of which the mask is the union, or
            run lengths {'size': [height, width], 'counts': a list or pycocotools' string}. Polygons of fewer than three
            points cover nothing.

    Raises:
        ValueError: it is none of these, or of another size.
    """
    if isinstance(segmentation, dict):
        return _decode_runs(segmentation, height, width)
    polygons = [_check_polygon(p) for p in segmentation] if isinstance(segmentation, list) else []
    polygons = [p for p in polygons if len(p) >= 6]
    if not polygons:
        raise ValueError(
            f'segmentation {short(segmentation)}: must be run lengths, or a list of polygons, at least one with three '
            'points')
    coco = coco_masks()
    mask: np.ndarray = coco.decode(coco.merge(coco.frPyObjects(polygons, height, width)))
    return mask


def _check_polygon(polygon: Any) -> list[float]:
    try:
        points = np.asarray(polygon, np.float64)
    except (TypeError, ValueError):
        points = np.zeros(1)
    if points.ndim != 1 or len(points) % 2 or not (np.abs(points) < MAX_COORDINATE).all():
        raise ValueError(
            f'polygon {short(polygon)}: must be an even number of coordinates x1, y1, x2, y2, ... in pixels')
    coordinates: list[float] = points.tolist()
    return coordinates


def _decode_runs(runs: dict[str, Any], height: int, width: int) -> np.ndarray:
    """Unlike pycocotools, does not leave the rest of the mask to chance where the lengths do not fill it."""
    size, counts = runs.get('size'), runs.get('counts')
    if not isinstance(size, (list, tuple)) or list(size) != [height, width]:
        raise ValueError(f'run lengths of size {short(size)}: the image has height and width {[height, width]}')
    try:
        lengths = np.asarray(_read_counts(counts) if isinstance(counts, (str, bytes)) else counts)
        valid = lengths.ndim == 1 and lengths.dtype.kind in 'iu' and lengths.min() >= 0
    except (TypeError, ValueError, OverflowError):
        valid = False
    if not valid or lengths.sum() != height * width:
        raise ValueError(
            f'run lengths {short(counts.decode("latin-1") if isinstance(counts, bytes) else counts)}: must be integers '
            f'from 0 that add up to {height} x {width} pixels')
    mask: np.ndarray = np.repeat(np.arange(len(lengths), dtype=np.uint8) % 2, lengths).reshape(width, height).T
    return mask


def _read_counts(text: str | bytes) -> list[int]:
    """Reads pycocotools' string: five bits per character, lowest first; from the 4th on, the change of every second."""
    counts, value, bits = list[int](), 0, 0
    for c in text.encode('latin-1') if isinstance(text, str) else text:
        c -= 48
        if not 0 <= c < 64:
            raise ValueError
        value |= (c & 31) << bits
        bits += 5
        if not c & 32:
            value -= (c & 16) << bits - 4  # the sign
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = bits = 0
    if bits:
        raise ValueError
    return counts


def mask_targets(
    masks: Tensor, boxes: Tensor, size: int, matched: Tensor | None = None, divisor: int = DIVISOR,
) -> Tensor:
    """Returns what the mask head shall learn for each box, (n, size, size) float32 of 0 and 1.

    Args:
        masks: (m, h, w) of 0 and 1, of one image.
        boxes: (n, 4) x1 y1 x2 y2 in pixels of the masks.
        matched: (n,) the mask of each box; by default, mask i belongs to box i.
        divisor: beyond an edge where the image is padded to a multiple of it, there is background; elsewhere the pixels
            of the edge repeat.
    """
    m, (h, w) = len(masks), masks.shape[1:]
    if not len(boxes):
        return boxes.new_zeros(0, size, size, dtype=torch.float32)
    padded = masks.new_zeros(m, 1, h + (h % divisor > 0), w + (w % divisor > 0), dtype=torch.float32)
    padded[:, 0, :h, :w] = masks
    rows = torch.arange(m, device=boxes.device) if matched is None else matched
    boxes = boxes.detach().float().clamp(min=0)
    boxes = torch.minimum(boxes, boxes.new_tensor([w, h, w, h]))
    rois = torch.cat([rows[:, None].to(boxes), boxes], 1)
    cells: Tensor = roi_align(padded, rois, size, sampling_ratio=0, aligned=True)[:, 0]
    return (cells >= 0.5).float()


def paste_masks(
    probabilities: Tensor, boxes: Tensor, height: int, width: int, threshold: float = 0.5,
) -> Tensor:
    """Returns the masks of an image, (n, height, width) bool on the CPU.

    Args:
        probabilities: (n, s, s) in [0, 1], each over the area of its box.
        boxes: (n, 4) x1 y1 x2 y2 in pixels of the image; one without area has an empty mask.
        threshold: above 0; a pixel of at least this probability belongs to the object.
    """
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    probabilities, boxes = probabilities.detach().float().cpu(), boxes.detach().float().cpu()
    for mask, p, box in zip(masks, probabilities, boxes, strict=True):
        x1, y1, x2, y2 = box
        if not (box.isfinite().all() and x2 > x1 and y2 > y1):
            continue
        columns, rows = _window(x1, x2, width, p.shape[1]), _window(y1, y2, height, p.shape[0])
        x = (torch.arange(columns.start, columns.stop) + 0.5 - x1) / (x2 - x1) * 2 - 1
        y = (torch.arange(rows.start, rows.stop) + 0.5 - y1) / (y2 - y1) * 2 - 1
        if len(x) and len(y):
            grid = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], 2)
            mask[rows, columns] = F.grid_sample(p[None, None], grid[None], align_corners=False)[0, 0] >= threshold
    return masks


def _window(low: Tensor, high: Tensor, size: int, cells: int) -> slice:
    """The pixels that a mask of `cells` from low to high reaches: it fades out over half a cell beyond the box."""
    reach = (high - low) / (2 * cells) + 1
    start, stop = ((low - reach).clamp(0, size), (high + reach).clamp(0, size))
    return slice(math.floor(start), max(math.floor(start), math.ceil(stop)))


def encode_masks(masks: Tensor | np.ndarray) -> list[dict[str, Any]]:
    """Returns (n, H, W) masks of 0 and 1 as pycocotools' run lengths, whose counts are text, as JSON needs it."""
    pixels = masks.cpu().numpy() if isinstance(masks, Tensor) else masks
    if not len(pixels):
        return []
    runs = coco_masks().encode(np.asfortranarray(pixels.astype(np.uint8).transpose(1, 2, 0)))
    return [{'size': [int(x) for x in r['size']], 'counts': r['counts'].decode('ascii')} for r in runs]


def encode_pasted(
    probabilities: Tensor, boxes: Tensor, height: int, width: int, threshold: float = 0.5,
) -> list[dict[str, Any]]:
    """Returns `encode_masks` of `paste_masks`, but holds only a part of the masks of a large image at a time."""
    step = max(1, CHUNK // max(1, height * width))
    parts = zip(probabilities.split(step), boxes.split(step), strict=True)
    return [runs for p, b in parts for runs in encode_masks(paste_masks(p, b, height, width, threshold))]
