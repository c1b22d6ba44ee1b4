"""The images that a detector trains on and is measured on: resized, flipped, in batches of one orientation.

Each is a function of (seed, epoch, index), so neither the number of threads or processes nor a restart changes it.
"""
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...data import DataError
from ...data.philox import permutation, uniforms
from ...data.readers.images import name_of
from ...runtime.distributed import World
from ..items import EvalItems, Key, TrainItems
from ..pixels import fit_size, resize_image, resize_mask
from .masks import rasterize

ITEM_VIEW, BATCH_VIEW = 0, 1  # of the random numbers (see data.philox)
SMALLEST = 1e-5  # pixels; detectron2 drops a resized box that is no wider or no higher


class Target(NamedTuple):
    """The objects of a resized, flipped image."""

    boxes: Tensor  # (n, 4) float32, x1 y1 x2 y2 in its pixels
    labels: Tensor  # (n,) int64
    masks: Tensor | None  # (n, h, w) uint8


class Item(NamedTuple):
    """An image as the model gets it, before normalization and padding."""

    image: Tensor  # (3, h, w) uint8, RGB
    target: Target | None  # None: not for training
    row: int  # of the image in its source
    size: tuple[int, int]  # height and width of the original


@dataclass(frozen=True)
class Preparation:
    """How an image becomes an item."""

    shorts: tuple[int, ...]  # pixels; one of these lengths of the short side is drawn for each image
    long: int  # pixels; the long side gets no longer
    flip: float = 0.0  # probability
    variant: str = 'mmdet'  # or 'detectron2'
    masks: bool = False


def resize_boxes(boxes: np.ndarray, size: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
    """Returns boxes (n, 4) of an image of `size` (height, width) in one of size `new`, clipped to it, float32."""
    (h, w), limit = new, np.array([new[1], new[0]] * 2, np.float32)
    scale = np.array([w / size[1], h / size[0]] * 2, np.float32)
    clipped: np.ndarray = np.clip(np.asarray(boxes, np.float32) * scale, 0, limit)
    return clipped


def prepare(images: Any, i: int, key: Key, p: Preparation) -> Item:
    """Returns image i of `images`, an ObjectImages, as it trains.

    The length of the short side and the flip depend on `key` alone.

    Raises:
        UnreadableError: the image cannot be read.
        DataError: it has another size than its annotation, or a segmentation that is not valid.
    """
    u = uniforms(key[0], key[1], np.array([key[2]]), ITEM_VIEW, 2)[0]
    short, flip = p.shorts[int(u[0] * len(p.shorts))], u[1] < p.flip
    image, objects = images.read(i), images.training_objects(i, p.variant)
    size = image.shape[0], image.shape[1]
    h, w = fit_size(*size, short, p.long)
    pixels, boxes = resize_image(image, h, w, p.variant).numpy(), resize_boxes(objects.boxes, size, (h, w))
    keep = np.arange(len(boxes))
    if p.variant == 'detectron2':
        keep = np.flatnonzero((boxes[:, 2:] - boxes[:, :2] > SMALLEST).all(1))
    boxes, masks = boxes[keep], None
    if p.masks:
        masks = np.zeros((len(keep), h, w), np.uint8)
        for mask, k in zip(masks, keep, strict=True):
            try:
                mask[:] = resize_mask(rasterize(objects.segmentations[k], *size), h, w)
            except ValueError as e:
                raise DataError(f'{name_of(images, i)}: object {k + 1} of those that train: {e}') from None
    if flip:
        pixels, boxes = pixels[:, :, ::-1], np.stack([w - boxes[:, 2], boxes[:, 1], w - boxes[:, 0], boxes[:, 3]], 1)
        masks = None if masks is None else masks[:, :, ::-1]
    target = Target(_tensor(boxes), _tensor(objects.labels[keep]), None if masks is None else _tensor(masks))
    return Item(_tensor(pixels), target, i, size)


def _tensor(array: np.ndarray) -> Tensor:
    # numpy copies in the thread that asks, while torch starts threads for it.
    return torch.from_numpy(np.ascontiguousarray(array))


class BatchPlan:
    """The order in which images train: batches of one orientation, as mmdetection groups them.

    In each epoch, the landscape images and the others, both in random order, are cut into batches; images from the
    start of the same order fill the last one. All batches then follow one another in random order. It is a function of
    (seed, epoch), and every process has the same.

    Args:
        landscape: (N,) bool: the image is wider than high.
    """

    def __init__(self, landscape: np.ndarray, batch: int, seed: int) -> None:
        self.landscape, self.batch, self.seed = landscape, batch, seed
        wide = int(landscape.sum())
        self.per_epoch = -(-wide // batch) + -(-(len(landscape) - wide) // batch)  # batches
        self._epoch, self._batches = -1, np.zeros((0, batch), np.int64)

    def at(self, step: int) -> tuple[int, np.ndarray]:
        """Returns the epoch of a step and the images of its batch, (batch,) int64 from 0 to N - 1."""
        epoch, k = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._plan(epoch)
        return epoch, self._batches[k]

    def _plan(self, epoch: int) -> np.ndarray:
        order = permutation(self.seed, epoch, len(self.landscape))
        wide = self.landscape[order]
        groups = [group for group in (order[wide], order[~wide]) if len(group)]
        batches = np.concatenate([np.resize(group, (-(-len(group) // self.batch), self.batch)) for group in groups])
        u = uniforms(self.seed, epoch, np.arange(len(batches)), BATCH_VIEW, 1)[:, 0]
        return batches[np.argsort(u, kind='stable')]

    def stand_ins(self, place: int) -> Iterator[int]:
        """Yields the images to try for the one at `place`: itself, the next of its orientation, then the others."""
        same = self.landscape == self.landscape[place]
        yield from np.roll(np.flatnonzero(same), -int(same[:place].sum())).tolist()
        yield from np.flatnonzero(~same).tolist()


class TrainLoader(TrainItems[BatchPlan]):
    """Yields the items of each step, without end.

    Another image of the same orientation replaces an unreadable one, with its own objects.

    Args:
        images: an ObjectImages.
        rows: the images that train.
        batch: images of a step, over all processes.
        workers: threads; with 0, the caller's own thread reads.

    Raises:
        ValueError: no image trains, or masks are wanted and there are none.
    """

    def __init__(
        self, images: Any, rows: np.ndarray, p: Preparation, batch: int, world: World, *, seed: int, workers: int,
    ) -> None:
        if not len(rows):
            raise ValueError(f'{images.name}: no image to train on; give images with objects')
        if p.masks and not images.has_masks:
            raise ValueError(f'{images.name}: no masks; give objects with a segmentation, or train a detector of boxes')
        sizes = images.sizes[rows]
        plan = BatchPlan(sizes[:, 1] > sizes[:, 0], batch, seed)
        super().__init__(images, rows, plan, lambda row, key: prepare(images, row, key, p), world, workers)


class EvalLoader(EvalItems):
    """Yields the items of this process, unflipped and without targets.

    The short side has the first length of `p`. Arguments as for TrainLoader.
    """

    def __init__(self, images: Any, rows: np.ndarray, p: Preparation, world: World, workers: int) -> None:
        def prepare_test(row: int) -> Item:
            image = images.read(row)
            size = image.shape[0], image.shape[1]
            h, w = fit_size(*size, p.shorts[0], p.long)
            return Item(resize_image(image, h, w, p.variant), None, row, size)

        super().__init__(images, rows, prepare_test, world, workers)
