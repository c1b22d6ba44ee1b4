"""Predicts the classes of pixels: of a whole image, or of windows whose logits are averaged where they overlap."""
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .model import Segmenter


@dataclass(frozen=True, kw_only=True)
class Inference:
    """How an image is measured: resized to fit in `box` (long, short), then whole, or in windows."""

    box: tuple[int, int]  # pixels
    test: str  # 'whole', 'slide'
    crop: int  # side of a window
    stride: int  # between windows


def list_windows(height: int, width: int, crop: int, stride: int) -> Iterator[tuple[slice, slice]]:
    """Yields the windows of an image. The last ones of a row and of a column are moved inside it.

    >>> [(y.start, x.start) for y, x in list_windows(1025, 2049, 769, 513)]
    [(0, 0), (0, 513), (0, 1026), (0, 1280), (256, 0), (256, 513), (256, 1026), (256, 1280)]
    """
    tops, lefts = (
        [max(0, min(i * stride, side - crop)) for i in range(max(side - crop + stride - 1, 0) // stride + 1)]
        for side in (height, width))
    for top in tops:
        for left in lefts:
            yield slice(top, min(top + crop, height)), slice(left, min(left + crop, width))


@torch.no_grad()
def compute_logits(segmenter: Segmenter, image: Tensor, t: Inference) -> Tensor:
    """Returns logits (classes, H, W) of a normalised image (3, H, W)."""
    if t.test == 'whole':
        return segmenter.compute_logits(image[None])[0]
    height, width = image.shape[1:]
    total = image.new_zeros(len(segmenter.names), height, width)
    windows = image.new_zeros(height, width)
    for y, x in list_windows(height, width, t.crop, t.stride):
        total[:, y, x] += segmenter.compute_logits(image[None, :, y, x])[0]
        windows[y, x] += 1
    return total / windows


def segment(segmenter: Segmenter, image: Tensor, size: Sequence[int], t: Inference) -> np.ndarray:
    """Returns the label of each pixel, (H, W) uint8, of a normalised image (3, h, w) whose original size is (H, W)."""
    logits = segmenter.resize(compute_logits(segmenter, image, t)[None], size)[0]
    return logits.argmax(0).to(torch.uint8).cpu().numpy()
