"""The training and validation images of a fine-tuning run; each is a function of (seed, epoch, index).

timm's transforms draw from the generators of Python, NumPy and torch. All three are seeded with (seed, epoch, index)
before each image, so neither the number of workers nor a restart changes the result for an image.
"""
import argparse
import dataclasses
import logging
import math
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from ...data import DataError, UnreadableError
from ...data.philox import permutation, uniforms
from ...data.readers.images import Images
from ...runtime import signals
from ...runtime.distributed import World
from ...runtime.messages import one_line
from ..datasets.classification import open_pair
from ..datasets.lists import labelled_subset
from ..samples import Pair, check_every_class_trains
from .settings import Settings

MAX_UNREADABLE = 0.1  # share of the images

ImageTransform = Callable[[Image.Image], Tensor]
Key = tuple[int, int]  # epoch, index

_logger = logging.getLogger('simsiam_models')


def open_source(args: argparse.Namespace) -> Pair:
    """Opens the user's images, or those of --protocol, of which --list names the training images."""
    kind = 'folder' if args.protocol == 'plain' else args.dataset
    pair = open_pair(kind, args.data, args.allow_partial, args.val_share, args.seed)
    if args.list is None:
        return pair
    train = labelled_subset(pair.train, args.protocol.removeprefix('semi_'), args.list, args.allow_partial)
    if not args.allow_partial:
        check_every_class_trains(train)
    return dataclasses.replace(pair, train=train, counts={**pair.counts, 'train': len(train)})


def seed_generators(seed: int, epoch: int, index: int, view: int = 0) -> None:
    """Seeds the generators of Python, NumPy and torch with counter-based random numbers."""
    a, b = (uniforms(seed, epoch, np.array([index]), view, 2)[0] * 2**32).astype(np.uint64).tolist()
    random.seed(a << 32 | b)
    np.random.seed(a)
    torch.manual_seed(a << 31 | b >> 1)


class Samples(Dataset[Any]):
    """Maps batches of keys (epoch, index) to images (B, 3, S, S), labels (B,), and reasons (B,).

    A reason says why an image cannot be read; it is '' for readable images.

    In training, the next readable image replaces an unreadable one, with its own label. In validation, a black image
    fills the row of an unreadable one, and `training.predict` leaves the row out of every number.
    """

    def __init__(self, images: Images, transform: ImageTransform, seed: int, training: bool) -> None:
        self.images, self.transform, self.seed, self.training = images, transform, seed, training
        self.labels = np.array(images.labels)  # a copy: torch warns of labels that are mapped from a file, read-only

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, keys: list[Key]) -> list[Any] | DataError:
        """Returns a batch, or a DataError: a worker process would raise it as a traceback.

        A worker process hands tensors over in shared memory; arrays, for which the pipe will do, where that is short.
        """
        items = []
        try:
            for epoch, index in keys:
                image, label, reason = self._read(index)
                if self.training:
                    seed_generators(self.seed, epoch, index)
                items.append((self.transform(Image.fromarray(image)), label, reason))
        except DataError as e:
            return e
        worker = get_worker_info()
        # All workers may be about to write a batch; one that found no room would end, or wait forever.
        if worker is None or free_shared_memory() > 2 * worker.num_workers * len(items) * items[0][0].nbytes:
            batch: list[Any] = default_collate(items)
            return batch
        images, labels, reasons = zip(*items, strict=True)
        return [np.stack(images), np.array(labels), reasons]

    def _read(self, index: int) -> tuple[np.ndarray, int, str]:
        reason = ''
        for i in range(len(self) if self.training else 1):
            row = (index + i) % len(self)
            try:
                return self.images.read(row), int(self.labels[row]), reason
            except UnreadableError as e:
                reason = reason or str(e)
        if self.training:
            raise DataError(f'{self.images.name}: none of the {len(self)} images can be read; the first: {reason}')
        return np.zeros((64, 64, 3), np.uint8), int(self.labels[index]), reason


def make_train_transform(s: Settings, mean: tuple[float, ...], std: tuple[float, ...]) -> ImageTransform:
    """Returns crop, flip, RandAugment, normalization and erasing as a transform; ValueError for a wrong RandAugment."""
    make: Callable[..., ImageTransform] = create_transform
    try:
        return make(
            s.image_size, is_training=True, scale=s.crop_scale, hflip=s.flip, color_jitter=None,
            auto_augment=s.randaugment, interpolation='bilinear', mean=mean, std=std, re_prob=s.erase, re_mode='pixel')
    except (AssertionError, ValueError, KeyError, IndexError, AttributeError):
        raise ValueError(
            f'--randaugment {s.randaugment}: not as timm writes it; use for example rand-m7-mstd0.5-inc1, or '
            'none') from None


def make_eval_transform(size: int, resize: int, mean: tuple[float, ...], std: tuple[float, ...]) -> ImageTransform:
    """Returns the transform that resizes the short side to `resize`, bilinear, and crops the centre to `size`."""
    # As timm builds it from the exported config.json, so that the top-1 equals the exported classifier's exactly.
    make: Callable[..., ImageTransform] = create_transform
    return make(size, interpolation='bilinear', crop_pct=find_crop_pct(size, resize), mean=mean, std=std)


def find_crop_pct(size: int, resize: int) -> float:
    """Returns the number for which floor(size / crop_pct), timm's short side, is `resize`."""
    pct = size / resize
    while math.floor(size / pct) < resize:
        pct = math.nextafter(pct, 0)
    return pct


def plan_train_batches(n: int, batch: int, epoch: int, seed: int, world: World, keep_last: bool) -> list[list[Key]]:
    """Returns this process's part of each global batch, in the epoch's random order.

    A last, smaller batch is dropped. With `keep_last` it is filled from the start of the order instead, to a multiple
    of the processes and at least two samples each.
    """
    order = permutation(seed, epoch, n)
    whole, rest = divmod(n, batch)
    if rest and keep_last:
        least = max(2 * world.size, -(-rest // world.size) * world.size)
        order = np.concatenate([order, np.resize(order, least - rest)])
        whole += 1
    parts = (order[k * batch:(k + 1) * batch][world.rank::world.size] for k in range(whole))
    return [[(epoch, int(i)) for i in part] for part in parts]


def plan_eval_batches(n: int, batch: int, world: World) -> list[list[Key]]:
    """Returns the batches of the rows rank, rank + world, ..., as `distributed.gather_rows` takes them."""
    mine = range(world.rank, n, world.size)
    return [[(0, i) for i in mine[k:k + batch]] for k in range(0, len(mine), batch)]


def free_shared_memory() -> float:
    """Returns the free bytes where worker processes leave tensors: 64 MB in a container by default."""
    try:
        return shutil.disk_usage('/dev/shm').free
    except OSError:  # a system that has it elsewhere
        return math.inf


def _unchanged(batch: Any) -> Any:
    return batch


def _ignore_signals(worker: int) -> None:
    """Lets the main process alone decide when a run stops: signals often go to all processes of a group."""
    for name in signals.NAMES:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


class Loader:
    """Yields batches on the device. `unreadable` names the images that cannot be read, index -> reason."""

    def __init__(self, samples: Samples, workers: int, device: torch.device) -> None:
        self.samples, self.workers, self.device = samples, workers, device
        self.unreadable: dict[int, str] = {}

    def load(self, keys: list[list[Key]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (B, 3, S, S) and (B,); raises DataError if more than MAX_UNREADABLE of the images cannot be read."""
        for batch, items in zip(keys, self._read(keys), strict=True):
            if isinstance(items, DataError):
                raise items
            x, y, reasons = torch.as_tensor(items[0]), torch.as_tensor(items[1]), items[2]
            self.unreadable |= {index: why for (_, index), why in zip(batch, reasons, strict=True) if why}
            self._check_unreadable()
            yield x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)

    def _read(self, keys: list[list[Key]]) -> Iterator[Any]:
        """Yields what `samples` returns for the keys; raises RuntimeError if a worker process ends."""
        fork = self.workers and 'fork' in torch.multiprocessing.get_all_start_methods()
        loader = DataLoader(
            self.samples, batch_size=None, sampler=keys, num_workers=self.workers, collate_fn=_unchanged,
            pin_memory=self.device.type == 'cuda', generator=torch.Generator(), worker_init_fn=_ignore_signals,
            multiprocessing_context='fork' if fork else None)  # fork: no process needs a copy of the images
        try:
            batches = iter(loader)
        except OSError as e:  # no semaphore, for which /dev/shm is needed too, or no process
            if not self.workers:
                raise
            _logger.warning(
                f'no worker process can be started ({e.strerror or e}; does /dev/shm exist, with free space?), so the '
                'main process reads the images, which is slower')
            self.workers = 0
            yield from self._read(keys)
            return
        try:
            yield from batches
        except RuntimeError as e:
            if isinstance(e, DataError) or not any(x in str(e) for x in ('DataLoader worker (pid', 'shared memory')):
                raise
            raise RuntimeError(
                f'a process that reads images ended ({one_line(e, 150)}): make room in memory and /dev/shm (in Docker '
                '--shm-size), or use --workers 0') from None

    def join(self, world: World) -> None:
        """Gathers `unreadable` from all processes; raises DataError like `load`."""
        for found in world.gather(self.unreadable):
            self.unreadable |= found
        self._check_unreadable()

    def _check_unreadable(self) -> None:
        if len(self.unreadable) > MAX_UNREADABLE * len(self.samples):
            raise DataError(
                f'{self.samples.images.name}: {len(self.unreadable)} of {len(self.samples)} images cannot be read, '
                f'more than {MAX_UNREADABLE:.0%}; the first: {self.unreadable[min(self.unreadable)]}')
