"""The images that a detector trains on and is measured on: resized, flipped, in batches of one orientation.

Each is a function of (seed, epoch, index), so neither the number of threads or processes nor a restart changes it.
"""
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from ...data import DataError, UnreadableError
from ...data.augment import resize
from ...data.philox import permutation, uniforms
from ...data.readers.images import name_of
from ...data.threads import AHEAD, Job, make_threads, run_in_order
from ...runtime.distributed import World
from .masks import rasterize, resize_mask

MAX_UNREADABLE = 0.1  # share of the images
ITEM_VIEW, BATCH_VIEW = 0, 1  # of the random numbers (see data.philox)
SMALLEST = 1e-5  # pixels; detectron2 drops a resized box that is no wider or no higher

Key = tuple[int, int, int]  # seed, epoch, index


class Target(NamedTuple):
    """The objects of a resized, flipped image."""

    boxes: Tensor  # (n, 4) float32, x1 y1 x2 y2 in its pixels
    labels: Tensor  # (n,) int64
    masks: Tensor | None  # (n, h, w) uint8


class Item(NamedTuple):
    """An image as the model gets it, before normalization and padding."""

    image: Tensor  # (3, h, w) uint8, RGB
    target: Target | None  # None: not for training
    index: int  # of the image in its source
    size: tuple[int, int]  # height and width of the original


@dataclass(frozen=True)
class Preparation:
    """How an image becomes an item."""

    shorts: tuple[int, ...]  # pixels; one of these lengths of the short side is drawn for each image
    long: int  # pixels; the long side gets no longer
    flip: float = 0.0  # probability
    variant: str = 'mmdet'  # or 'detectron2'
    masks: bool = False


def fit_size(height: int, width: int, short: int, long: int) -> tuple[int, int]:
    """Returns height and width whose short side is `short`, or whose long side is `long` if that is smaller.

    >>> fit_size(375, 500, 800, 1333), fit_size(300, 1000, 800, 1333)
    ((800, 1067), (400, 1333))
    """
    scale = min(long / max(height, width), short / min(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def resize_image(image: np.ndarray, height: int, width: int, variant: str) -> Tensor:
    """Returns an image (H, W, 3) uint8 at another size, (3, height, width) uint8.

    Both variants interpolate linearly: 'mmdet' between the nearest pixels, as OpenCV does, but rounded as torch does,
    which makes some pixels differ by one level; 'detectron2' with antialiasing, as PIL does.
    """
    if variant == 'detectron2':
        out = np.empty((height, width, 3), np.uint8)
        resize(image, width, height, 0, 0, out)
        return torch.from_numpy(out).permute(2, 0, 1)
    pixels = np.array(image) if not image.flags.writeable or min(image.strides) < 0 else image  # torch takes no other
    return tv.resize(torch.from_numpy(pixels).permute(2, 0, 1), [height, width], antialias=False)


def resize_boxes(boxes: np.ndarray, size: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
    """Returns boxes (n, 4) of an image of `size` (height, width) in one of size `new`, clipped to it, float32."""
    (h, w), limit = new, np.array([new[1], new[0]] * 2, np.float32)
    scale = np.array([w / size[1], h / size[0]] * 2, np.float32)
    return np.clip(np.asarray(boxes, np.float32) * scale, 0, limit)


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


class _ItemLoader:
    """Reads images in threads. `unreadable` names those that cannot be read, index -> reason."""

    def __init__(self, images: Any, rows: np.ndarray, p: Preparation, world: World, workers: int) -> None:
        self.images, self.rows, self.preparation, self.world = images, np.asarray(rows, np.int64), p, world
        self.unreadable: dict[int, str] = {}
        self._workers, self._threads = workers, make_threads(workers)

    def join(self) -> None:
        """Gathers `unreadable` from all processes; raises DataError if there are too many."""
        for found in self.world.gather(self.unreadable):
            self.unreadable |= found
        self._check_unreadable()

    def _check_unreadable(self) -> None:
        if len(self.unreadable) > MAX_UNREADABLE * len(self.rows):
            raise DataError(
                f'{self.images.name}: {len(self.unreadable)} of {len(self.rows)} images cannot be read, more than '
                f'{MAX_UNREADABLE:.0%}; the first: {self.unreadable[min(self.unreadable)]}')


class TrainLoader(_ItemLoader):
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
        super().__init__(images, rows, p, world, workers)
        if not len(self.rows):
            raise ValueError(f'{images.name}: no image to train on; give images with objects')
        if p.masks and not images.has_masks:
            raise ValueError(f'{images.name}: no masks; give objects with a segmentation, or train a detector of boxes')
        sizes = images.sizes[self.rows]
        self.plan, self.seed = BatchPlan(sizes[:, 1] > sizes[:, 0], batch, seed), seed

    def load(self, step: int) -> Iterator[list[Item]]:
        """Yields this process's items of `step` and of those after it: places rank, rank + world, ... of the batch.

        Raises:
            DataError: more than MAX_UNREADABLE of the images cannot be read, or none; see also `prepare`.
        """
        for items, reasons in run_in_order(self._threads, self._jobs(step)):
            self.unreadable |= reasons
            self._check_unreadable()
            yield items

    def _jobs(self, first: int) -> Iterator[Job]:
        for step in itertools.count(first):
            epoch, batch = self.plan.at(step)
            mine = batch[self.world.rank::self.world.size].tolist()
            items, reasons = [None] * len(mine), {}
            yield (items, reasons), [
                functools.partial(self._fill, items, reasons, k, (epoch, place)) for k, place in enumerate(mine)]

    def _fill(self, items: list, reasons: dict[int, str], k: int, at: tuple[int, int]) -> None:
        epoch, place = at
        key = self.seed, epoch, int(self.rows[place])
        for stand_in in self.plan.stand_ins(place):
            row = int(self.rows[stand_in])
            try:
                items[k] = prepare(self.images, row, key, self.preparation)
                return
            except UnreadableError as e:
                reasons[row] = str(e)
        raise DataError(
            f'{self.images.name}: none of the {len(self.rows)} images can be read; the first: {reasons[min(reasons)]}')


class EvalLoader(_ItemLoader):
    """Yields this process's items, rows rank, rank + world, ..., once, unflipped and without targets.

    `unreadable` names those that it leaves out; they must not count in a metric. Arguments as for TrainLoader; the
    short side has the first length of `p`.
    """

    def __init__(self, images: Any, rows: np.ndarray, p: Preparation, world: World, workers: int) -> None:
        super().__init__(images, rows, replace(p, shorts=p.shorts[:1]), world, workers)

    def __iter__(self) -> Iterator[Item]:
        self.unreadable = {}  # what failed in an earlier pass may be readable now
        for items, reasons in run_in_order(self._threads, self._jobs(), max(AHEAD, 2 * self._workers)):
            self.unreadable |= reasons
            self._check_unreadable()
            yield from items

    def _jobs(self) -> Iterator[Job]:
        for row in self.rows[self.world.rank::self.world.size].tolist():
            items, reasons = [], {}
            yield (items, reasons), [functools.partial(self._fill, items, reasons, row)]

    def _fill(self, items: list, reasons: dict[int, str], row: int) -> None:
        p = self.preparation
        try:
            image = self.images.read(row)
        except UnreadableError as e:
            reasons[row] = str(e)
            return
        size = image.shape[0], image.shape[1]
        items.append(Item(resize_image(image, *fit_size(*size, p.shorts[0], p.long), p.variant), None, row, size))
