"""The images and masks that a segmenter trains on and is measured on, prepared as mmsegmentation does, in its order.

Resize by a random ratio, crop, flip, distort the colours; normalise and pad, which `training.make_inputs` does. Each
image is a function of (seed, epoch, index), so neither the number of threads or processes nor a restart changes it.
"""
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...data.philox import permutation, uniforms
from ...runtime.distributed import World
from ..items import EvalItems, Key, TrainItems
from ..pixels import fit_size, resize_image, resize_mask
from .colours import distort, draw_distortion
from .metrics import IGNORED

ITEM_VIEW, DROPOUT_VIEW = 0, 1  # of the random numbers (see data.philox)
COLOURS = 9  # numbers that `draw_distortion` takes


class MaskedItem(NamedTuple):
    """An image and its mask, before normalization and padding."""

    image: Tensor  # (3, h, w) uint8, RGB
    mask: np.ndarray  # uint8 labels; in training (h, w), in tests of the original size
    row: int  # of the image in its source


@dataclass(frozen=True, kw_only=True)
class CropAugmentation:
    """How an image and its mask become an item; the names are those of `protocols.SegmentationProtocol`."""

    box: tuple[int, int]
    ratios: tuple[float, float]
    crop: int
    cat_max_ratio: float
    redraws: int
    flip_p: float
    brightness: float
    contrast: tuple[float, float]
    saturation: tuple[float, float]
    hue: int


def prepare(image: np.ndarray, mask: np.ndarray, index: int, key: Key, a: CropAugmentation) -> MaskedItem:
    """Returns an image (H, W, 3) uint8 and its mask (H, W) uint8 as they train; what is drawn depends on `key` alone.

    The item is smaller than a crop if the resized image is.
    """
    u = uniforms(key[0], key[1], np.array([key[2]]), ITEM_VIEW, 2 + COLOURS + 2 * (a.redraws + 1))[0].tolist()
    resized, mask = resize_pair(image, mask, u[0], a)
    top, left = choose_crop(mask, u[2 + COLOURS:], a)
    bottom, right = top + a.crop, left + a.crop
    mask, pixels = mask[top:bottom, left:right], resized[:, top:bottom, left:right].permute(1, 2, 0).numpy()
    if u[1] < a.flip_p:
        mask, pixels = mask[:, ::-1], pixels[:, ::-1]
    pixels = distort(pixels, draw_distortion(u[2:], a.brightness, a.contrast, a.saturation, a.hue))
    return MaskedItem(torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))), np.ascontiguousarray(mask),
                      index)


def resize_pair(image: np.ndarray, mask: np.ndarray, u: float, a: CropAugmentation) -> tuple[Tensor, np.ndarray]:
    """Resizes an image, (3, h, w), and its mask, (h, w), to fit in the box times a ratio, drawn by `u` in [0, 1).

    The sides of that box are truncated to whole pixels.
    """
    ratio = a.ratios[0] + (a.ratios[1] - a.ratios[0]) * u
    long, short = (max(1, int(side * ratio)) for side in a.box)
    h, w = fit_size(mask.shape[0], mask.shape[1], short, long)
    return resize_image(image, h, w), resize_mask(mask, h, w)


def choose_crop(mask: np.ndarray, u: list[float], a: CropAugmentation) -> tuple[int, int]:
    """Returns the top and the left of a crop, drawn again while one class fills too much of it.

    A crop is accepted if it has several classes (the background is one, ignored pixels are none), and each has less
    than `cat_max_ratio` of its labelled pixels. After so many redraws, the last crop is not checked.

    Args:
        u: two numbers in [0, 1) for each draw.
    """
    tall, wide = (max(side - a.crop, 0) for side in mask.shape)
    places = [(int(y * (tall + 1)), int(x * (wide + 1))) for y, x in zip(u[::2], u[1::2], strict=True)]
    for top, left in places[:-1]:
        counts = np.bincount(mask[top:top + a.crop, left:left + a.crop].ravel(), minlength=IGNORED + 1)[:IGNORED]
        if np.count_nonzero(counts) > 1 and counts.max() / counts.sum() < a.cat_max_ratio:
            return top, left
    return places[-1]


class ShuffledPlan:
    """The order in which images train: in each epoch all of them, in random order, but for an incomplete last batch."""

    def __init__(self, images: int, batch: int, seed: int) -> None:
        self.images, self.batch, self.seed = images, batch, seed
        self.per_epoch = images // batch  # batches
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    def at(self, step: int) -> tuple[int, np.ndarray]:
        """Returns the epoch of a step and the images of its batch, (batch,) int64."""
        epoch, k = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, permutation(self.seed, epoch, self.images)
        return epoch, self._order[k * self.batch:(k + 1) * self.batch]

    def stand_ins(self, place: int) -> Iterator[int]:
        """Yields the images to try for the one at `place`: itself, then the following ones."""
        for i in range(self.images):
            yield (place + i) % self.images


def load_training(
    images: Any, a: CropAugmentation, batch: int, world: World, *, seed: int, workers: int,
) -> TrainItems[ShuffledPlan]:
    """Returns the training batches of `images`, a `datasets.masks.MaskedImages`.

    Raises:
        ValueError: there are fewer images than a batch has.
    """
    if len(images) < batch:
        raise ValueError(
            f'{images.name}: a batch of {batch} is larger than the training set ({len(images)}), and incomplete '
            f'batches are dropped; use a --batch-size of at most {len(images)}')
    def prepare_row(row: int, key: Key) -> MaskedItem:
        image, mask = images.read_pair(row)
        return prepare(image, mask, row, key, a)

    return TrainItems(
        images, np.arange(len(images)), ShuffledPlan(len(images), batch, seed), prepare_row, world, workers)


def load_tests(images: Any, box: tuple[int, int], world: World, workers: int) -> EvalItems:
    """Returns the test images, resized to fit in `box` (long, short), with masks of the original size."""
    def prepare_test(row: int) -> MaskedItem:
        image, mask = images.read_pair(row)
        return MaskedItem(resize_test(image, box), mask, row)

    return EvalItems(images, np.arange(len(images)), prepare_test, world, workers)


def resize_test(image: np.ndarray, box: tuple[int, int]) -> Tensor:
    """Returns an image (H, W, 3) resized to fit in a box (long, short), (3, h, w) uint8."""
    return resize_image(image, *fit_size(image.shape[0], image.shape[1], box[1], box[0]))


def draw_dropout(seed: int, step: int, indices: list[int], channels: int) -> Tensor:
    """Returns numbers in [0, 1) that decide which channels drop out for each image of a step, (B, channels)."""
    return torch.from_numpy(uniforms(seed, step, np.array(indices), DROPOUT_VIEW, channels).astype(np.float32))
