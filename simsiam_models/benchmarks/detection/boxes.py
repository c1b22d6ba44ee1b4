"""Boxes: anchors, overlap, matching, sampling, and the coding of regression targets.

Boxes are (n, 4) float tensors of x1, y1, x2, y2 in pixels. Sources: mmdet 2.25 (`core/anchor`, `core/bbox`) and
detectron2 (`modeling/{anchor_generator,matcher,sampling,box_regression}.py`), which `protocols.VARIANTS` tells apart.
"""
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou

SCALE_CLAMP = math.log(1000 / 16)  # of the logarithm of a size's ratio
NEGATIVE, IGNORED = -1, -2  # in place of the number of an object


def make_base_anchors(stride: int, scales: Sequence[float], ratios: Sequence[float], size_major: bool) -> Tensor:
    """Returns the anchors of the cell at the origin, (A, 4), centred on its corner and not rounded.

    An anchor of ratio r (height / width) and scale s has the area (s * stride) squared. The order is ratio-major, as in
    mmdet, or size-major, as in detectron2.
    """
    pairs = [(r, s) for s in scales for r in ratios] if size_major else [(r, s) for r in ratios for s in scales]
    ratio, scale = torch.tensor(pairs, dtype=torch.float32).unbind(1)
    heights = stride * ratio.sqrt() * scale
    widths = stride * (1 / ratio.sqrt()) * scale
    return torch.stack([-widths, -heights, widths, heights], 1) / 2


def make_anchors(base: Tensor, stride: int, height: int, width: int) -> Tensor:
    """Returns the anchors of a map of height x width cells, (height * width * A, 4), row by row."""
    x = torch.arange(width, dtype=base.dtype, device=base.device) * stride
    y = torch.arange(height, dtype=base.dtype, device=base.device) * stride
    yy, xx = torch.meshgrid(y, x, indexing='ij')
    return (torch.stack([xx, yy, xx, yy], -1).view(-1, 1, 4) + base).view(-1, 4)


def find_valid_cells(size: tuple[int, int], divisor: int, stride: int, height: int, width: int) -> Tensor:
    """Returns which cells of a map, (height, width), belong to an image of `size` that is padded by itself.

    Cells beyond that belong to the batch's padding, and are never trained.
    """
    rows, columns = (-(-(-(-n // divisor) * divisor) // stride) for n in size)
    valid = torch.zeros(height, width, dtype=torch.bool)
    valid[:rows, :columns] = True
    return valid


def lie_inside(anchors: Tensor, size: tuple[int, int]) -> Tensor:
    """Returns which anchors do not leave an image of `size` (height, width), without its padding."""
    height, width = size
    x1, y1, x2, y2 = anchors.unbind(1)
    return (x1 >= 0) & (y1 >= 0) & (x2 < width) & (y2 < height)


def match(boxes: Tensor, objects: Tensor, low: float, high: float, best: str = 'none') -> Tensor:
    """Matches boxes (n, 4) with objects (m, 4); returns (n,): the object's number, NEGATIVE or IGNORED.

    A box is of the object that it overlaps most, if that IoU reaches `high`; it is negative if the IoU is below `low`.

    Args:
        best: what becomes of the boxes that overlap an object more than all other boxes do. 'none': nothing;
            'floor': from an IoU of `low` on they are that object's (mmdet's match_low_quality); 'always': they are
            positive for the object that they themselves overlap most, however little (detectron2).
    """
    if not len(objects) or not len(boxes):
        return torch.full((len(boxes),), NEGATIVE, dtype=torch.long, device=boxes.device)
    iou = box_iou(objects, boxes)  # (m, n)
    most, number = iou.max(0)
    matched = torch.where(most >= high, number, torch.where(most < low, NEGATIVE, IGNORED))
    if best == 'none':
        return matched
    highest = iou.max(1).values  # by object
    is_best = iou == highest[:, None]
    if best == 'always':
        return torch.where(is_best.any(0), number, matched)
    is_best &= (highest >= low)[:, None]
    # Of several objects, the last one gets the box.
    last = len(objects) - 1 - is_best.flip(0).to(torch.uint8).argmax(0)
    return torch.where(is_best.any(0), last, matched)


def sample(matched: Tensor, number: int, share: float, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws at most number * share positives, and negatives up to `number` in all; returns the positions of both.

    `matched` is from `match`. The positions are in ascending order.
    """
    positive = (matched >= 0).nonzero().squeeze(1)
    negative = (matched == NEGATIVE).nonzero().squeeze(1)
    positive = _draw(positive, int(number * share), rng)
    return positive, _draw(negative, number - len(positive), rng)


def _draw(positions: Tensor, most: int, rng: torch.Generator) -> Tensor:
    if len(positions) <= most:
        return positions
    chosen = torch.randperm(len(positions), generator=rng)[:most].sort().values
    return positions[chosen.to(positions.device)]


def encode(boxes: Tensor, objects: Tensor, stds: Sequence[float]) -> Tensor:
    """Returns the regression targets (n, 4) that take boxes to objects: dx, dy, dw, dh, divided by `stds`."""
    centre, size = _split(boxes)
    to_centre, to_size = _split(objects)
    deltas = torch.cat([(to_centre - centre) / size, (to_size / size).log()], 1)
    return deltas / deltas.new_tensor(stds)


def decode(
    boxes: Tensor, deltas: Tensor, stds: Sequence[float], size: tuple[int, int], clamp_below: bool,
) -> Tensor:
    """Returns the boxes (n, k, 4) that deltas (n, k, 4) make of `boxes` (n, 4), cut at the image of `size`.

    dw and dh are at most SCALE_CLAMP; with `clamp_below` (mmdet), at least -SCALE_CLAMP too.
    """
    centre, extent = (x.unsqueeze(1) for x in _split(boxes))
    deltas = deltas * deltas.new_tensor(stds)
    shift, growth = deltas.split(2, -1)
    growth = growth.clamp(-SCALE_CLAMP if clamp_below else None, SCALE_CLAMP)
    centre = centre + shift * extent
    half = extent * growth.exp() / 2
    return clip(torch.cat([centre - half, centre + half], -1), size)


def clip(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Cuts boxes (..., 4) at the borders of an image of `size` (height, width)."""
    height, width = size
    return boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))


def _split(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the centres and sizes of boxes (n, 4), (n, 2) each."""
    low, high = boxes.split(2, 1)
    return (low + high) / 2, high - low
