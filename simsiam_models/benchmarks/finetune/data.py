"""Labelled images for fine-tuning: who trains, who validates, and how an image is transformed, counted, not drawn.

timm's transforms draw from Python's, NumPy's and torch's generators. All three are set from (seed, epoch, index) before
each image, so that neither the number of workers nor a restart changes what an image becomes.
"""
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from ...data import DataError, UnreadableError, open_data
from ...data.philox import permutation, uniforms
from ...data.readers.images import Images
from ...runtime.distributed import World
from ..samples import every_class_trains, split, subset

MAX_UNREADABLE = 0.1  # share of the images


def open_labelled(spec: str, share: float, seed: int) -> tuple[Images, Images, str]:
    """-> training images, validation images, and in words where the latter come from.

    They are those that lie beside the training images, else `share` of each class, by a counted draw.

    Raises:
        ValueError: no labels; one class; a val folder of other classes; a class without training image.
    """
    images, val = open_data(spec)
    if hasattr(images, 'samples') or images.labels is None:
        raise ValueError(f'{spec}: no labels; fine-tuning needs one subfolder per class, or a list with labels')
    for part in ('val', 'valid', 'validation'):
        if val is None and Path(spec, 'train').is_dir() and Path(spec, part).is_dir():
            there = {p.name for p in Path(spec, part).iterdir() if p.is_dir()}
            odd = sorted(there.symmetric_difference(images.classes))
            where = f'{odd[0]!r} is in one of them only' if odd else 'the folder is not called val'
            raise ValueError(
                f'{Path(spec, part)}: not the {len(images.classes)} classes of {Path(spec, "train")}: {where}; give '
                'both the same class folders under train and val')
    if len(np.unique(images.labels)) < 2:
        raise ValueError(f'{spec}: one class only; a classifier needs at least two')
    every_class_trains(images)
    if val is not None:
        return images, val, f'{len(val)} images of {val.name}'
    train, held = split(np.asarray(images.labels), share, seed)
    if not len(held):
        raise ValueError(f'{spec}: no class has two images, so none can be held out; add images, or a val folder')
    text = f'{len(held)} of {len(images)} images, {share:g} of each class, held out by seed {seed}'
    if alone := sum(np.bincount(images.labels) == 1):
        text += f'; {alone} classes have one image and are not validated'
    return subset(images, train), subset(images, held), text


def seed_everything(seed: int, epoch: int, index: int, view: int = 0) -> None:
    """Python's, NumPy's and torch's generators, from a counted number."""
    a, b = (uniforms(seed, epoch, np.array([index]), view, 2)[0] * 2**32).astype(np.uint64).tolist()
    random.seed(a << 32 | b)
    np.random.seed(a)
    torch.manual_seed(a << 31 | b >> 1)


class Samples(Dataset):
    """(epoch, index) -> image (3, S, S), label, and '' or why the image was replaced.

    In training the next readable image stands in for an unreadable one; where it is measured a black one does.
    """

    def __init__(self, images: Images, transform: Callable[[Image.Image], Tensor], seed: int, training: bool) -> None:
        self.images, self.transform, self.seed, self.training = images, transform, seed, training
        self.labels = np.array(images.labels)  # a copy: those of a listing are mapped, and torch warns of that

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, str]:
        epoch, index = key
        image, label, why = self._read(index)
        if self.training:
            seed_everything(self.seed, epoch, index)
        return self.transform(Image.fromarray(image)), label, why

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[tuple[Tensor, int, str]] | DataError:
        """A batch; or why the run ends, which a reading process would raise as a traceback."""
        try:
            return [self[key] for key in keys]
        except DataError as e:
            return e

    def _read(self, index: int) -> tuple[np.ndarray, int, str]:
        why = ''
        for i in range(len(self) if self.training else 1):
            row = (index + i) % len(self)
            try:
                return self.images.read(row), int(self.labels[row]), why
            except UnreadableError as e:
                why = why or str(e)
        if self.training:
            raise DataError(f'{self.images.name}: none of the {len(self)} images can be read; the first: {why}')
        return np.zeros((64, 64, 3), np.uint8), int(self.labels[index]), why


def train_transform(
    size: int, mean: tuple, std: tuple, scale: tuple[float, float], flip: float, randaugment: str | None, erase: float,
) -> Callable[[Image.Image], Tensor]:
    """Random resized crop, flip, RandAugment, normalise, random erasing.

    Raises:
        ValueError: timm does not know such a RandAugment.
    """
    try:
        return create_transform(
            size, is_training=True, scale=scale, hflip=flip, color_jitter=None, auto_augment=randaugment,
            interpolation='bilinear', mean=mean, std=std, re_prob=erase, re_mode='pixel')
    except (AssertionError, ValueError, KeyError, IndexError, AttributeError):
        raise ValueError(
            f'--randaugment {randaugment}: not as timm writes it; e.g. rand-m7-mstd0.5-inc1, or none') from None


def eval_transform(size: int, resize: int, mean: tuple, std: tuple) -> Callable[[Image.Image], Tensor]:
    """Short side to `resize`, bilinear, centre crop `size`; what timm makes of the exported config.json."""
    return create_transform(
        size, interpolation='bilinear', crop_pct=crop_pct(size, resize), mean=mean, std=std)


def crop_pct(size: int, resize: int) -> float:
    """timm resizes to floor(size / crop_pct): the number of which that is `resize`."""
    pct = size / resize
    while math.floor(size / pct) < resize:
        pct = math.nextafter(pct, 0)
    return pct


def train_batches(
    n: int, batch: int, epoch: int, seed: int, world: World, keep_last: bool,
) -> list[list[tuple[int, int]]]:
    """This process's part of each global batch: (epoch, index) in the counted order of the epoch.

    Without `keep_last` a last, smaller batch is dropped; with it, it is filled up from the start of the order to a
    multiple of the processes, two samples each at least.
    """
    order = permutation(seed, epoch, n)
    whole, rest = divmod(n, batch)
    if rest and keep_last:
        least = max(2 * world.size, -(-rest // world.size) * world.size)
        order = np.concatenate([order, np.resize(order, least - rest)])
        whole += 1
    parts = [order[i * batch:(i + 1) * batch][world.rank::world.size] for i in range(whole)]
    return [[(epoch, int(i)) for i in part] for part in parts]


def eval_batches(n: int, batch: int, world: World) -> list[list[tuple[int, int]]]:
    mine = range(world.rank, n, world.size)
    return [[(0, i) for i in mine[k:k + batch]] for k in range(0, len(mine), batch)]


def _stack(items: list[tuple[Tensor, int, str]] | DataError) -> list | DataError:
    return items if isinstance(items, DataError) else default_collate(items)


class Loader:
    """Batches of a list of keys on the device; `unreadable` is why images were replaced, by their index."""

    def __init__(self, samples: Samples, workers: int, device: torch.device) -> None:
        self.samples, self.workers, self.device = samples, workers, device
        self.unreadable: dict[int, str] = {}

    def batches(self, keys: list[list[tuple[int, int]]]) -> Iterator[tuple[Tensor, Tensor]]:
        """(B, 3, S, S) and (B,).

        Raises:
            DataError: more than a tenth of the images cannot be read.
        """
        options: dict[str, Any] = {}
        if self.workers:  # fork: the images need not be copied into each process
            options['multiprocessing_context'] = 'fork' if 'fork' in torch.multiprocessing.get_all_start_methods() \
                else None
        loader = DataLoader(
            self.samples, batch_sampler=keys, num_workers=self.workers, pin_memory=self.device.type == 'cuda',
            collate_fn=_stack, generator=torch.Generator(), **options)
        for batch, items in zip(keys, loader, strict=True):
            if isinstance(items, DataError):
                raise items
            x, y, whys = items
            self.unreadable |= {index: why for (_, index), why in zip(batch, whys, strict=True) if why}
            self._check()
            yield x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)

    def join(self, world: World) -> None:
        """What any process could not read, all know.

        Raises:
            DataError: it is more than a tenth of the images.
        """
        for found in world.gather(self.unreadable):
            self.unreadable |= found
        self._check()

    def _check(self) -> None:
        if len(self.unreadable) > MAX_UNREADABLE * len(self.samples):
            raise DataError(
                f'{self.samples.images.name}: {len(self.unreadable)} of {len(self.samples)} images cannot be read, '
                f'more than {MAX_UNREADABLE:.0%}; the first: {self.unreadable[min(self.unreadable)]}')
